"""bitsandbytes' packed weights without the Python that each operator on them runs through.

`Params4bit` has a `__torch_function__` of its own, for `torch.chunk` and `torch.split` (FSDP's way of sharding). So
every operator that compiled code gives such a weight goes through Python twice more: with 14 de-quantisations a layer
and step a fifth of the host's time in the forward (16.6 ms for 8 layers, 13.5 without, on a CPU).
"""

from collections.abc import Callable

import torch
from bitsandbytes.nn import Params4bit

from unsloth_puzzles.exchange import exchange_classes


class PlainParams4bit(Params4bit):
    """A `Params4bit` that operators take for the tensor it is."""

    __torch_function__ = torch._C._disabled_torch_function_impl


PlainParams4bit.__name__ = Params4bit.__name__  # by which PEFT knows packed weights (DoRA, merging, counting)


def plain_params4bit(model: torch.nn.Module) -> Callable[[], None]:
    """Let operators on the NF4 weights of `model` go straight to PyTorch.

    Args:
        model: holds `Params4bit`, changed in place.

    Returns:
        A function that undoes it.
    """
    weights = [parameter for parameter in model.parameters() if type(parameter) is Params4bit]
    return exchange_classes((weight, PlainParams4bit) for weight in weights)

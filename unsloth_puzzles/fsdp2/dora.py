"""DoRA over packed layers: PEFT's layer, given the de-quantised weight while FSDP2 has gathered the stream.

    y = (m / |W + s B A|) (W x + s B A x)        the norm by row, a constant in the backward

PEFT's DoRA layer reads W from the module that it adapts. A packed module has only bytes to read, so the DoRA layer gets
a stand-in with W as its weight. PEFT's own code does the rest.

A mixed-precision policy rounds m to 16 bits for the computation, as it does A and B; the sharded m stays float32. In
bfloat16 that is a relative error of up to 2^-9 in m, which PEFT's layer under autocast has in the norm alone.
"""

from types import SimpleNamespace

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn

from unsloth_puzzles.fsdp2.linear import StreamLinear4bit


class StreamDoraLayer(DoraLinearLayer):
    """PEFT's DoRA layer over a `StreamLinear4bit`. Its `weight` is the magnitude m, [out_features]."""

    def forward(self, x, *, base_layer: StreamLinear4bit, base_result: torch.Tensor | None = None, **adapter: object):
        """Return the part that DoRA adds to the packed layer's output.

        Args:
            x: [..., in_features], after dropout if there is any.
            base_layer: The packed layer, gathered.
            base_result: [..., out_features], its output for x; None with dropout. It is then computed by the packed
                layer, which keeps no W for the backward.
            **adapter: What PEFT gives for one adapter: A, B, their scale, the adapter's name.

        Returns:
            [..., out_features].
        """
        bias = base_layer.bias
        if base_result is None:
            base_result, bias = base_layer.multiply(x), None
        # In the dtype that bitsandbytes de-quantises to, from which PEFT has made the first magnitudes.
        weight = nn.Parameter(base_layer.dequantize(base_layer.original["dtype"]), requires_grad=False)
        return super().forward(
            x, base_layer=SimpleNamespace(weight=weight, bias=bias), base_result=base_result, **adapter
        )


def dora_layers(model: nn.Module, packed: set[nn.Module]) -> list[DoraLinearLayer]:
    """PEFT's DoRA layers that adapt one of the modules in `packed`.

    Args:
        model: A model with or without adapters of PEFT.
        packed: Modules that `pack_nf4` packs.

    Raises:
        ValueError: One of them is not PEFT's own.
    """
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or module.get_base_layer() not in packed:
            continue
        for adapter, layer in module.lora_magnitude_vector.items():
            if type(layer) is not DoraLinearLayer:
                raise ValueError(
                    "model must have PEFT's own DoRA layers, "
                    f"got {type(layer).__name__} in {name}.lora_magnitude_vector.{adapter}"
                )
            found.append(layer)
    return found

"""The dtype of what a checkpoint of bitsandbytes stores beside its 4-bit weights: embeddings, norms, the head.

`from_pretrained(dtype=...)` of transformers 5.17 casts them to the dtype that it is given; that of 5.24 leaves them as
they are stored.
"""

import copy
import re

import torch
from bitsandbytes.nn import Params4bit
from transformers import PreTrainedModel


def cast_unquantised(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give what a pre-quantised checkpoint stores unquantised the dtype that a 16-bit checkpoint would get.

    Most tensors get `dtype`. Those which the architecture makes in another dtype, or keeps in float32, get that.

    Args:
        model: As `from_pretrained(dtype=dtype)` gave it, changed in place.
        dtype: Floating.
    """
    found = {name: one for name, one in [*model.named_parameters(), *model.named_buffers()] if _is_float(one)}
    if all(one.dtype == dtype for one in found.values()):
        return
    with torch.device("meta"):
        made = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype).state_dict()
    kept = {name.replace("*", ".*"): kind for name, kind in model._get_dtype_plan(dtype).items()}
    for name, tensor in found.items():
        if name not in made:  # no checkpoint holds it
            continue
        kind = next((kind for pattern, kind in kept.items() if re.search(pattern, name)), made[name].dtype)
        tensor.data = tensor.data.to(kind)


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not isinstance(tensor, Params4bit)

"""What the op is held against: cross entropy through the output projection as people compute it today, and the floor.

Every baseline is a function `loss(hidden_states, weight, labels)`: hidden_states (rows, hidden) and weight
(vocabulary, hidden) of one dtype, labels (rows,) int64 with -100 where ignored; it returns the mean over the other
rows, 0-dim. None of them is ours. Liger and Apple's kernels are imported when asked for.
"""

import importlib
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F

from benchmarks.backprop.workload import Loss
from unsloth_puzzles.device import capability

EAGER = "eager"
COMPILED = "torch.compile"
LIGER = "Liger FLCE"
LIGER_FLOAT32 = "Liger FLCE, float32 dW"
CCE = "Apple CCE"
FLOOR = "bare matrix products"
FLOOR_FLOAT32 = "bare matrix products, float32 dW"


def baselines(device: str | torch.device, dtype: torch.dtype) -> tuple[dict[str, Loss], dict[str, str]]:
    """The baselines that run on tensors of `dtype` on `device`, by name, and the others with the reason why not.

    Liger FLCE (Hsu et al., arXiv 2410.10989) makes the gradients in the forward, chunk by chunk, in kernels written for
    cross entropy. Apple's CCE (Wijmans et al., arXiv 2411.09009) never writes a logit and, by default, skips the blocks
    of the gradient that would vanish in bfloat16, so its time and its error depend on what has been learnt.
    """
    found: dict[str, Loss] = {EAGER: eager, COMPILED: compiled}
    left_out: dict[str, str] = {}
    for name, needs, load in (
        (LIGER, _liger_needs, _liger),
        (LIGER_FLOAT32, _liger_needs, partial(_liger, accum_dtype=torch.float32)),
        (CCE, _cce_needs, _cce),
    ):
        reason = needs(torch.device(device), dtype)
        if reason is None:
            try:
                found[name] = load()
                continue
            except ModuleNotFoundError as error:
                reason = f"{error.name} is not installed here"
            except (ImportError, AttributeError) as error:  # it does not fit the torch or triton that is here
                reason = f"it cannot be imported: {error}"
        left_out[name] = reason
    return found, left_out


def eager(hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """All logits, all of them again in float32: what models do without help."""
    return F.cross_entropy((hidden_states @ weight.t()).float(), labels)


def compiled(hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`eager` under `torch.compile`, once per shape. Dynamo's recompile limit raises: it is never eager unseen."""
    return _compiled_eager()(hidden_states, weight, labels)


def gemm_floor(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    rows: int,
    *,
    train_head: bool = True,
    accumulate_dtype: torch.dtype | None = None,
) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
    """A call that does the matrix products of forward and backward in chunks of `rows`, and nothing else.

    Per chunk: the logits into one buffer, then that buffer, as though it held their gradient, times W into dX, and, if
    the head is trained, its transpose times X added to dW in `accumulate_dtype` (default: the weight's). Nothing that
    recomputes no logits does fewer FLOPs: 6 (frozen 4) x rows x hidden x vocabulary. The call returns (dX, dW or None),
    which mean nothing, so that its peak memory is a floor too: one chunk of logits and the gradients.

    Raises ValueError for fewer than one row, and where no product of 16-bit matrices can be added to a float32 one (the
    CPU, GPUs before sm_80).
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    x, w = hidden_states.detach(), weight.detach()
    total = accumulate_dtype or w.dtype
    if train_head and total != w.dtype and not _adds_to_float32(w, total):
        raise ValueError(
            f"accumulate_dtype must be {w.dtype} on {w.device.type}, or float32 for 16 bits on a GPU from sm_80 on, "
            f"got {total}"
        )
    options = {} if total == w.dtype else {"out_dtype": total}

    def products() -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = torch.empty(min(rows, len(x)), len(w), dtype=x.dtype, device=x.device)
        dx = torch.empty_like(x)
        dw = torch.empty(w.shape, dtype=total, device=w.device) if train_head else None
        for start in range(0, len(x), rows):
            piece = x[start : start + rows]
            chunk = logits[: len(piece)]
            torch.mm(piece, w.t(), out=chunk)
            torch.mm(chunk, w, out=dx[start : start + rows])
            if dw is not None and start == 0:
                torch.mm(chunk.t(), piece, out=dw, **options)
            elif dw is not None:
                torch.addmm(dw, chunk.t(), piece, out=dw, **options)
        return dx, dw

    return products


@cache
def _compiled_eager() -> Loss:
    return torch.compile(eager, fullgraph=True, dynamic=False)


def _liger(**options: object) -> Loss:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda hidden_states, weight, labels: function(hidden_states, weight, labels, **options)


def _liger_needs(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else "its Triton kernels need a CUDA GPU"


def _cce() -> Loss:
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy


def _cce_needs(device: torch.device, dtype: torch.dtype) -> str | None:
    if capability(device) < 80:
        return "its Triton kernels need a CUDA GPU from sm_80 on"
    return None if dtype.itemsize == 2 else f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"


def _adds_to_float32(weight: torch.Tensor, total: torch.dtype) -> bool:
    sixteen_bit = weight.dtype.itemsize == 2 and total == torch.float32
    return sixteen_bit and capability(weight.device) >= 80

"""The MLP's activation with its adapters against the plain formula, both compared with float64."""

from collections.abc import Callable, Iterable

import torch
from torch.nn.functional import silu

from benchmarks.models import SEED
from benchmarks.norms import relative_norm
from unsloth_puzzles.compiled.swiglu import LoraSwiGLU

MARGIN = 1.05  # of the formula's error
ROWS, COLUMNS, RANK = (2, 96), 160, 8
GPU_ROWS, GPU_COLUMNS, GPU_RANK = (2, 512), 8192, 16  # the columns of Llama 3.2 1B
OUTPUTS = 2  # the activation, and its low-rank product


def check_activation(device: str, dtypes: Iterable[torch.dtype]) -> dict[str, bool]:
    """Whether outputs and gradients of `LoraSwiGLU` are as near to float64's as the formula's in the same dtype.

    The error of each of the two outputs and seven gradients may be at most `MARGIN` times the formula's.

    Args:
        device: "cpu" or "cuda".
        dtypes: 16-bit ones.

    Returns:
        Whether all outputs, and all gradients, hold, by dtype and by whether the kernel rounds where eager mode does.
    """
    checks = {}
    for dtype in dtypes:
        data = _draw(device, dtype)
        exact = _results(formula, [tensor.detach().double().requires_grad_() for tensor in data])
        plain = _errors(_results(formula, data), exact)
        for eager_rounding in (True, False):
            found = _errors(_results(lambda *given: LoraSwiGLU.apply(*given, eager_rounding), data), exact)  # noqa: B023
            good = [mine <= MARGIN * theirs for mine, theirs in zip(found, plain, strict=True)]
            name = f"{str(dtype).removeprefix('torch.')}, {'eager rounding' if eager_rounding else 'rounding once'}"
            checks[f"outputs, {name}"] = all(good[:OUTPUTS])
            checks[f"gradients, {name}"] = all(good[OUTPUTS:])
    return checks


def formula(g, u, ig, iu, bg, bu, a) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what `LoraSwiGLU` does, in PyTorch's operators."""
    act = silu(g + ig @ bg.t()) * (u + iu @ bu.t())  # [..., columns]
    return act, act @ a.t()


def _draw(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    rows, columns, rank = (ROWS, COLUMNS, RANK) if device == "cpu" else (GPU_ROWS, GPU_COLUMNS, GPU_RANK)
    generator = torch.Generator().manual_seed(SEED)
    shapes = [(*rows, columns)] * 2 + [(*rows, rank)] * 2 + [(columns, rank)] * 2 + [(rank, columns)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def _results(function: Callable, data: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs and gradients. The upstream gradients hold values of every 16-bit dtype."""
    outputs, generator = function(*data), torch.Generator().manual_seed(SEED + 1)
    slopes = [torch.randint(-8, 9, out.shape, generator=generator).to(out) / 4 for out in outputs]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, data, slopes)]


def _errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [relative_norm(one, true) for one, true in zip(found, exact, strict=True)]

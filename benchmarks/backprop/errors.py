"""How far a loss and its gradients are from the truth, as relative norms.

errors = gradient_errors(case, losses(case)[0])  # {"ours": {"loss": ..., "hidden_states": ..., "weight": ...}, ...}
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.backprop.workload import Case, Loss, many_shapes, release
from benchmarks.norms import relative_norm
from unsloth_puzzles.device import capability


@dataclass(frozen=True)
class Truth:
    """Loss and gradients of a case in a wider dtype, from the case's own rounded inputs; `weight` None if frozen."""

    loss: torch.Tensor
    hidden_states: torch.Tensor
    weight: torch.Tensor | None


@torch.no_grad()
def truth(case: Case, dtype: torch.dtype | None = None, rows: int = 1024) -> Truth:
    """Cross entropy and its gradients by their formulas, (softmax - one hot) / labels that count, in chunks of `rows`.

    `dtype`: float64, or float32 without TF32; None is float64 on the CPU and where a GPU has tensor cores for it (A100,
    H100, H200), else float32. At the reference shape that is 52 TFLOP and, in float64, about 12 GiB.
    """
    device = case.hidden_states.device
    if dtype is None:
        fast = device.type == "cpu" or capability(device) in (80, 90)
        dtype = torch.float64 if fast else torch.float32
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        x, weight, labels = case.hidden_states.detach(), case.weight.detach().to(dtype), case.labels
        count = (labels != -100).sum()
        loss = torch.zeros((), dtype=dtype, device=device)
        dx = torch.empty(x.shape, dtype=dtype, device=device)
        dw = torch.zeros(weight.shape, dtype=dtype, device=device) if case.train_head else None
        for start in range(0, len(x), rows):
            piece, wanted = x[start : start + rows].to(dtype), labels[start : start + rows]
            valid = (wanted != -100)[:, None]
            index = wanted.clamp(min=0)[:, None]
            log_p = torch.log_softmax(piece @ weight.t(), -1)
            loss -= (log_p.gather(1, index) * valid).sum() / count
            gradient = log_p.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=dtype))
            gradient.mul_(valid.to(dtype) / count)
            torch.mm(gradient, weight, out=dx[start : start + rows])
            if dw is not None:
                dw.addmm_(gradient.t(), piece)
            del log_p, gradient
    finally:
        torch.set_float32_matmul_precision(precision)
    return Truth(loss, dx, dw)


def gradient_errors(case: Case, named: Mapping[str, Loss], true: Truth | None = None) -> dict[str, dict[str, float]]:
    """|found - true| / |true|, Euclidean norms over the whole tensor, per loss: "loss", "hidden_states", "weight".

    "weight" is missing where the head is frozen, and a loss that runs out of memory is missing altogether.
    """
    true = true or truth(case)
    keys = ("loss", "hidden_states", "weight")
    errors = {}
    with many_shapes():
        for name, loss in named.items():
            try:
                found = case.forward_backward(loss)
                errors[name] = {key: _error(value, getattr(true, key)) for key, value in zip(keys, found, strict=False)}
            except torch.OutOfMemoryError:
                pass
            found = None
            release()
    return errors


def relative_difference(found, exact) -> float:
    """The largest relative difference (Euclidean norm) between two lists of tensors; NaN if one is NaN."""
    apart = [relative_norm(a, b) for a, b in zip(found, exact, strict=True)]
    return torch.tensor(apart, dtype=torch.float64).max().item()  # Python's max may leave NaN out


def _error(found: torch.Tensor, true: torch.Tensor, rows: int = 4096) -> float:
    """Relative error, in pieces: the difference of two weight gradients would be as large as the truth."""
    off = size = 0.0
    pieces = (torch.atleast_1d(tensor.detach()).split(rows) for tensor in (found, true))
    for a, b in zip(*pieces, strict=True):
        off = off + (a.to(b.dtype) - b).double().square().sum()
        size = size + b.double().square().sum()
    return float((off / size).sqrt())

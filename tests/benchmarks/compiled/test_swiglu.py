"""The check of the MLP's activation: it passes, and a wrong output or gradient does not."""

import pytest
import torch

from benchmarks.compiled import swiglu
from benchmarks.compiled.swiglu import check_activation

DTYPES = (torch.float16, torch.bfloat16)


def test_activation_is_as_near_to_float64_as_the_formula():
    checks = check_activation("cpu", DTYPES)
    assert len(checks) == 8 and all(checks.values()), checks


class _Wrong(torch.autograd.Function):
    """The formula with one gradient or the output a hundredth off."""

    part = "outputs"

    @staticmethod
    def forward(ctx, *data):
        ctx.save_for_backward(*data[:-1])
        act, low_rank = swiglu.formula(*data[:-1])
        return (act * 1.01 if _Wrong.part == "outputs" else act), low_rank

    @staticmethod
    def backward(ctx, *slopes):
        data = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            found = list(torch.autograd.grad(swiglu.formula(*data), data, slopes))
        if _Wrong.part == "gradients":
            found[5] = found[5] * 1.01
        return *found, None


@pytest.mark.parametrize("part", ["outputs", "gradients"])
def test_wrong_values_do_not_pass(part, monkeypatch):
    monkeypatch.setattr(_Wrong, "part", part)
    monkeypatch.setattr(swiglu, "LoraSwiGLU", _Wrong)
    checks = check_activation("cpu", DTYPES)
    assert {name for name, good in checks.items() if not good} == {name for name in checks if name.startswith(part)}

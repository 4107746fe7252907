"""The puzzle's shape, and data for it: hidden states, a head and labels as a trained model would see them."""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (hidden_states, weight, labels) -> 0-dim

_LOGIT_STD = 1.28  # of a freshly initialised Llama: weights 0.02, 4096 hidden states of unit size


@dataclass(frozen=True)
class Shape:
    """Rows (batch x length), hidden size, vocabulary size, and the dtype of hidden states and weight."""

    rows: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype

    def flops(self, train_head: bool = True) -> float:
        """Of the matrix products that cannot be avoided: logits, dX and, if the head is trained, dW."""
        return (6.0 if train_head else 4.0) * self.rows * self.hidden * self.vocabulary

    def least_gib(self, chunk: int, train_head: bool = True, accumulate_dtype: torch.dtype | None = None) -> float:
        """Of the gradients and one chunk of logits: what nobody who keeps a chunk can go below."""
        small = self.rows * self.hidden + min(chunk, self.rows) * self.vocabulary
        weight = self.hidden * self.vocabulary * (accumulate_dtype or self.dtype).itemsize if train_head else 0
        return (small * self.dtype.itemsize + weight) / 2**30


REFERENCE = Shape(4 * 4096, 4096, 128256, torch.bfloat16)
TINY = Shape(1000, 64, 2048, torch.float32)  # seconds on a CPU, and 1000 rows leave a ragged last chunk


@dataclass(frozen=True)
class Case:
    """Data of one shape. hidden_states: (rows, hidden), a leaf that wants its gradient; weight: (vocabulary, hidden),
    trained or not; labels: (rows,) int64, -100 where ignored."""

    shape: Shape
    hidden_states: torch.Tensor
    weight: nn.Parameter
    labels: torch.Tensor

    @property
    def train_head(self) -> bool:
        return self.weight.requires_grad

    def forward_backward(self, loss: Loss) -> tuple[torch.Tensor, ...]:
        """(loss, dX) or, with a trained head, (loss, dX, dW)."""
        value = loss(self.hidden_states, self.weight, self.labels)
        inputs = (self.hidden_states, self.weight) if self.train_head else (self.hidden_states,)
        return value.detach(), *torch.autograd.grad(value, inputs)


def make_case(
    shape: Shape,
    device: str,
    *,
    train_head: bool = True,
    learnt: bool = True,
    ignored: float = 0.0,
    any_gradient_dtype: bool = False,
    seed: int = 3407,
) -> Case:
    """Random data, reproducible on one kind of device. `ignored`: the share of labels that is -100, drawn row by row.

    `learnt`: labels follow Zipf's law, as words do, and each hidden state leans towards its label's row of the weight,
    so that its loss is near 0 for some and 6 for others, about 2 in the mean: a trained model's logits, whose gradients
    are mostly small. Otherwise labels and hidden states have nothing to do with each other: a model's first step.

    `any_gradient_dtype` sets `weight.grad_dtype` to None: a dW that was summed in float32 is then returned in float32.
    Otherwise autograd wants the weight's dtype, and rounding to it hides most of what float32 gained.
    """
    generator = torch.Generator(device).manual_seed(seed)
    options = {"device": device, "generator": generator}
    rows, hidden, vocabulary = shape.rows, shape.hidden, shape.vocabulary
    weight = torch.randn(vocabulary, hidden, dtype=shape.dtype, **options).mul_(_LOGIT_STD / hidden**0.5)
    states = torch.randn(rows, hidden, **options)
    share = torch.rand(rows, dtype=torch.float64, **options)
    labels = (((vocabulary + 1) ** share - 1) if learnt else vocabulary * share).long().clamp_(0, vocabulary - 1)
    if learnt:
        towards = weight[labels].float()
        log_of_others = math.log(vocabulary) + _LOGIT_STD**2 / 2  # their expected log-sum-exp
        margin = log_of_others - 6 + 10 * torch.rand(rows, 1, **options)
        states += margin * towards / towards.square().sum(-1, keepdim=True)
    labels[torch.rand(rows, **options) < ignored] = -100
    parameter = nn.Parameter(weight, requires_grad=train_head)
    if any_gradient_dtype:
        parameter.grad_dtype = None
    return Case(shape, states.to(shape.dtype).requires_grad_(), parameter, labels)


def many_shapes():
    """A context in which a function may be compiled for 64 shapes: Dynamo's own limit of 8 would end a sweep."""
    return torch._dynamo.config.patch(recompile_limit=64)


def release() -> None:
    """Give unused memory back to the device, so that one candidate's cached blocks are not another's shortage."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

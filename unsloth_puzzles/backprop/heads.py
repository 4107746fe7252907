"""The output projection, chunk by chunk: any module, its weight gradients accumulated in one buffer each."""

import threading
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode

from unsloth_puzzles.backprop.results import check_buffers, check_head
from unsloth_puzzles.backprop.sums import Sum

# What made the logits must not need them again: only then may their gradient overwrite them.
_FORGETS_ITS_OUTPUT = ("_LinearBackward", "AddmmBackward0", "MmBackward0", "AddBackward0", "MatMul4BitBackward")
_locks: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()


def lock_of(linear: nn.Module) -> threading.RLock:
    """The lock of a head, to be held by whoever calls the head or reads its parameters.

    `functional_call` exchanges the parameters of the module itself. A second thread would take the leaves of the first
    for them, and leave these behind as the module's parameters.
    """
    return _locks.setdefault(linear, threading.RLock())


class Head:
    """`linear` with its trainable parameters replaced by leaves whose gradients are summed over the chunks.

    The leaves share the parameters' memory, so nothing is ever written to a parameter's `.grad`. Frozen parameters get
    no gradient and no buffer.

    Args:
        linear: The projection, [rows, hidden] -> [rows, vocab].
        parameters: Those of `linear` that are trained, by name.
        accumulate_dtype: Of the sums; None is each parameter's own.
    """

    def __init__(self, linear: nn.Module, parameters: dict[str, torch.Tensor], accumulate_dtype: torch.dtype | None):
        self.linear = linear
        self.leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        self.sums = [
            Sum(leaf, torch.promote_types(leaf.dtype, accumulate_dtype or leaf.dtype)) for leaf in self.leaves.values()
        ]
        self._mode = _LeanLinear({id(leaf): total for leaf, total in zip(self.leaves.values(), self.sums, strict=True)})
        self._module = _Call(linear)
        self._lock = lock_of(linear)
        self._checked = False
        self._buffers = [(buffer, buffer._version) for buffer in linear.buffers() if not buffer.is_inference()]
        self._replaced = {f"linear.{name}": leaf for name, leaf in self.leaves.items()}

    def call(self, function: Callable | None, x: torch.Tensor, *arguments: object, record: bool = False) -> object:
        """Call the head, or a function with it.

        Args:
            function: Called as `function(x, linear, *arguments)`; None for `linear(x)`.
            x: [rows, hidden].
            arguments: Of the function.
            record: Whether autograd records the call.

        Returns:
            What `linear` or the function returns.
        """
        with self._lock, torch.set_grad_enabled(record), self._mode:
            return torch.func.functional_call(self._module, self._replaced, (function, x, *arguments))

    def project(self, x: torch.Tensor, vocab_size: int, record: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of a chunk, with `record` with their graph, and their memory, which the gradient may overwrite.

        Args:
            x: [rows, hidden].
            vocab_size: Columns that the logits must have.
            record: Whether autograd records the projection.

        Returns:
            Logits [rows, vocab_size], and a detached tensor of that shape: the same memory, unless the projection's
            derivative needs it.
        """
        logits = self.call(None, x, record=record)
        if logits.shape != (len(x), vocab_size):
            need = (len(x), vocab_size)
            raise ValueError(f"linear must map {tuple(x.shape)} to {need}, got {tuple(logits.shape)}")
        return logits, logits.detach() if _forgets(logits) else logits.detach().clone()

    def backward(self, outputs, gradients, x, others, into=None, live=None) -> list[torch.Tensor | None]:
        """Differentiate what a call returned; gradients of the parameters are added to their sums.

        Args:
            outputs: Tensors with a graph that `call` or `project` made.
            gradients: The upstream gradient of each; None for 1.
            x: [rows, hidden], what the head was called with.
            others: Further leaves.
            into: [rows, hidden], which may be overwritten: the first product that gives a gradient of that shape goes
                there, so that the gradient of x need not be copied to where it belongs.
            live: [] bool; where it is False the outputs do not count and all gradients are zero, even if NaN.

        Returns:
            The gradients of x (None if it requires none) and of `others`.
        """
        inputs = [x] * x.requires_grad + [*others, *self.leaves.values()]
        if not self._checked:
            check_head(outputs, inputs)
            check_buffers(self.linear, self._buffers)
            self._checked = True
        self._mode.live, self._mode.into = live, into
        try:
            found = list(torch.autograd.grad(outputs, inputs, gradients, allow_unused=True))
        finally:
            self._mode.live = self._mode.into = None
        if live is not None:
            found = [g if g is None else torch.where(live, g, 0) for g in found]
        if not x.requires_grad:
            found.insert(0, None)
        for total, gradient in zip(self.sums, found[1 + len(others) :], strict=True):
            if gradient is not None:  # used by something else than `F.linear`, which adds to the sum itself
                total.add(gradient)
        return found[: 1 + len(others)]

    def results(self, parameters: list[torch.Tensor], scaled: bool) -> list[tuple]:
        """The summed gradients of `parameters` with their scales, None where one was never used: see `Sum.result`."""
        return [total.result(parameter, scaled) for total, parameter in zip(self.sums, parameters, strict=True)]


def _forgets(logits: torch.Tensor) -> bool:
    """Whether the operation that made `logits` can be differentiated without them."""
    if logits.grad_fn is None:
        return not logits.requires_grad  # a head that returns its input: the memory is the caller's
    return logits.grad_fn.name() in _FORGETS_ITS_OUTPUT


class _Call(nn.Module):
    """Gives `functional_call`, which replaces the parameters, a module whose call is what we want to run."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear
        # FSDP2's hooks belong around a whole forward: chunk by chunk they would end in a crash of the backward.
        self._without_hooks = isinstance(linear, FSDPModule)

    def forward(self, function: Callable | None, x: torch.Tensor, *arguments: object) -> object:
        if function is not None:
            return function(x, self.linear, *arguments)
        return self.linear.forward(x) if self._without_hooks else self.linear(x)


class _LeanLinear(TorchFunctionMode):
    """While active, `F.linear` with a trainable weight adds dW to its sum instead of making a dW per chunk.

    Whoever calls it: `nn.Linear`, a LoRA layer, or the user's function with `linear.weight`. Under autocast the weight
    is cast once, not once a chunk.
    """

    def __init__(self, sums: dict[int, Sum]):
        super().__init__()
        self._sums = sums
        self._cast: dict[int, torch.Tensor] = {}
        self.live: torch.Tensor | None = None  # see Head.backward
        self.into: torch.Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.linear or kwargs or not _dense(args[1]):
            return func(*args, **(kwargs or {}))
        x, weight, bias = (*args, None)[:3]  # [..., in], [out, in], [out] or None
        weight_sum, bias_sum = self._sums.get(id(weight)), None if bias is None else self._sums.get(id(bias))
        made = (weight_sum is None and weight.requires_grad) or (
            bias is not None and bias_sum is None and bias.requires_grad
        )
        if made:  # a weight computed from something else, or another argument: autograd's business
            return func(*args)
        if torch.is_autocast_enabled(x.device.type) and weight.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x, bias_cast = x.to(dtype), None if bias is None else bias.detach().to(dtype)
            weight_cast = self._cast.get(id(weight))
            if weight_cast is None:
                weight_cast = weight.detach().to(dtype)
                if weight_sum is not None or isinstance(weight, nn.Parameter):  # it lives as long as its id is used
                    self._cast[id(weight)] = weight_cast
        else:
            weight_cast, bias_cast = weight.detach(), None if bias is None else bias.detach()
        # The last arguments make the result require grad where x does not but they do.
        return _Linear.apply(x, weight_cast, bias_cast, weight_sum, bias_sum, self, weight, bias)

    def product(self, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[..., out] @ [out, in] -> [..., in]."""
        into, self.into = self.into, None  # once: a second product would overwrite the first
        if into is None or into.dtype != gradient.dtype or into.shape != (*gradient.shape[:-1], weight.shape[1]):
            return gradient @ weight
        return torch.mm(gradient, weight, out=into)


class _Linear(torch.autograd.Function):
    """x W^T + b whose backward returns dx and adds dW and db to their sums."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_sum, bias_sum, mode, *trained):
        ctx.save_for_backward(x, weight)
        ctx.sums, ctx.mode = (weight_sum, bias_sum), mode
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors  # [..., in], [out, in]
        weight_sum, bias_sum = ctx.sums
        with torch.autocast(x.device.type, enabled=False):
            if ctx.mode.live is not None:
                gradient = torch.where(ctx.mode.live, gradient, 0)
            flat = gradient.reshape(-1, gradient.shape[-1])  # [rows, out]
            if weight_sum is not None:
                weight_sum.add_product(flat, x.reshape(-1, x.shape[-1]))  # [out, in]
            if bias_sum is not None:
                bias_sum.add(flat.sum(0, dtype=bias_sum.dtype))  # [out]
            return (ctx.mode.product(gradient, weight) if ctx.needs_input_grad[0] else None), *(None,) * 7


def _dense(weight: object) -> bool:
    return isinstance(weight, torch.Tensor) and type(weight) in (torch.Tensor, nn.Parameter) and weight.dim() == 2

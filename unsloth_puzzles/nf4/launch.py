"""Launch the compiled kernel by its handle.

`kernel[grid](...)` inspects every argument at every call, which can take the host longer than a small matrix takes the
GPU. Here `prepare` looks the compiled kernel up by what it depends on, and `Launch.run` gives plain addresses to its
launcher. `cache` recalls the launch of a weight that was seen before. A launcher that takes other arguments than those
of Triton 3.6 to 3.9 is left alone: there the kernel is launched as Triton does it.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from unsloth_puzzles.nf4.build import DEFAULT, INTERPRETED, POINTERS, Config, compile_kernel, constexprs
from unsloth_puzzles.nf4.kernel import dequantize_nf4_kernel
from unsloth_puzzles.nf4.ordinary_launch import OrdinaryLaunch
from unsloth_puzzles.nf4.state import NF4Weight

MAX_NUMEL = 2**34  # the kernel counts 32-bit words of 8 weights in 32 bits
_current_device = getattr(torch._C, "_cuda_getDevice", None)  # None in builds of PyTorch without CUDA
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _empty_strided(size: tuple, strides: tuple, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, strides, dtype=dtype, device="cuda")


# What torch.compile's own code allocates with: 1.1 us, where torch.empty_strided takes 2.0 and torch.empty 3.3.
_empty_strided_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _empty_strided)


@dataclass(slots=True)
class Launch:
    """A compiled kernel bound to one weight, whose tensors it does not keep alive."""

    enqueue: Callable  # enqueue(programs, 1, 1, stream, *before, *addresses, address of out, numel, *after)
    programs: int
    before: tuple
    after: tuple
    addresses: tuple[int, ...]  # of packed, absmax, code, code2, absmax2, offset
    numel: int
    size: tuple[int, ...]
    strides: tuple[int, ...]  # of a contiguous tensor of this size
    dtype: torch.dtype
    device: int  # index of the CUDA device

    def run(self, out: torch.Tensor | None = None, addresses: tuple[int, ...] | None = None) -> torch.Tensor:
        """Enqueue ONE kernel on the current stream of the weight's device.

        Args:
            out: where to write, the tensor that `prepare` was given; None for a new one.
            addresses: of another weight of the same shape, blocks and alignment; None for those of `prepare`.

        Returns:
            The de-quantised weight.
        """
        device = self.device
        if _current_device() != device:
            with torch.cuda.device(device):
                return self.run(out, addresses)
        if out is None:
            out = _empty_strided_cuda(self.size, self.strides, self.dtype)
        self.enqueue(
            self.programs,
            1,
            1,
            _current_stream(device),
            *self.before,
            *(addresses or self.addresses),
            out.data_ptr(),
            self.numel,
            *self.after,
        )
        return out


def prepare(
    weight: NF4Weight, out: torch.Tensor | None = None, config: Config = DEFAULT
) -> "Launch | InterpretedLaunch":
    """Bind the kernel to a weight; it is compiled at the first call that needs it.

    Args:
        weight: packed tensor and state, consistent with each other (`state.check`).
        out: the contiguous tensor to be written; None for a new one.
        config: how the kernel is built.

    Raises:
        TypeError, ValueError: the kernel cannot read this weight, naming the argument.
    """
    packed, absmax, code, code2, absmax2, offset, blocksize, blocksize2, shape, dtype = weight
    if is_traceable_wrapper_subclass(packed):
        raise TypeError(f"weight must be a plain packed tensor, got {type(packed).__name__}; pass its local tensor")
    if not packed.is_cuda and not INTERPRETED:
        raise ValueError(
            f"weight must be a CUDA tensor, got {packed.device}; "
            "on a CPU set TRITON_INTERPRET=1 before importing triton"
        )
    numel = math.prod(shape)
    if numel >= MAX_NUMEL:
        raise ValueError(f"quant_state.shape must hold fewer than 2^34 weights, got {numel}")
    nested = offset is not None
    if not nested:
        code2 = absmax2 = offset = code  # in their place, never read
    addresses = (
        packed.data_ptr(), absmax.data_ptr(), code.data_ptr(), code2.data_ptr(), absmax2.data_ptr(), offset.data_ptr(),
    )  # fmt: skip
    if numel and not all(addresses):
        raise ValueError("weight must have allocated memory, with each tensor of its quant_state, got none")
    address = 0 if out is None else out.data_ptr()  # new memory is aligned
    aligned = not (addresses[0] | address) & 15  # what is read or written 16 bytes at a time
    per_program = 8 * config.words * config.unroll
    full = aligned and not numel % per_program
    programs = -(-numel // per_program)
    kind = (config, dtype, blocksize, blocksize2, nested, full, aligned)
    if INTERPRETED:
        tensors = (packed.view(torch.uint8), absmax, code, code2, absmax2, offset)
        return InterpretedLaunch(programs, tensors, kind, tuple(shape))
    device = packed.get_device()
    handle = _handle(*kind, device) if numel else _NOTHING
    strides = _contiguous_strides(shape)
    return Launch(
        handle.enqueue, programs, handle.before, handle.after, addresses, numel, tuple(shape), strides, dtype, device
    )


class _Handle(NamedTuple):
    """The C launcher of a compiled kernel: the call in `Launch.enqueue`."""

    enqueue: Callable
    before: tuple
    after: tuple
    compiled: object  # kept: newer releases of Triton unload the module when it goes


# Parameters of the launchers of Triton 3.7 to 3.9.
_LAUNCH = ["gridX", "gridY", "gridZ", "stream", "function"]
_LAUNCH += ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook", "args"]
_NOTHING = _Handle(lambda *arguments: None, (), (), None)  # for a weight without elements
_handles: dict[tuple, _Handle] = {}


def _handle(*kind) -> _Handle:
    if kind not in _handles:
        _handles[kind] = _bind(*kind)
    return _handles[kind]


def _bind(config, dtype, blocksize, blocksize2, nested: bool, full: bool, aligned: bool, device: int) -> _Handle:
    where = {"NESTED": nested, "FULL": full, "ALIGNED": aligned}
    compiled = compile_kernel(config, dtype, blocksize, blocksize2, device, **where)
    with torch.cuda.device(device):  # loads the module there
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    constants = (None,) * (len(dequantize_nf4_kernel.arg_names) - len(POINTERS) - 1)  # the launcher ignores them
    if (direct := direct_launch(run, function, metadata)) is None:
        return _Handle(OrdinaryLaunch(config, dtype, blocksize, blocksize2, device, where), (), (), compiled)
    enqueue, before = direct
    return _Handle(enqueue, before, constants, compiled)


def direct_launch(run: Callable, function: object, metadata: object) -> tuple[Callable, tuple] | None:
    """Return the call that enqueues a kernel unchecked by Triton, and what it takes between stream and arguments.

    Launch hooks are not called.

    Args:
        run: The launcher of a compiled kernel.
        function, metadata: The kernel's.

    Returns:
        None for a launcher whose parameters are not known.
    """
    given = list(inspect.signature(type(run).__call__).parameters)[1:]
    of_3_6 = given == [*_LAUNCH[:5], _LAUNCH[-1]]  # what comes between is among args
    if not of_3_6 and given != _LAUNCH:
        return None
    if of_3_6 and triton.__version__.startswith("3.6.") and run.global_scratch_size == run.profile_scratch_size == 0:
        # Past a Python wrapper that allocates scratch memory.
        return run.launch, (function, False, False, None, None, metadata, None, None, None)
    return run, (function, metadata, None, None, None)


def _contiguous_strides(shape) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class InterpretedLaunch(NamedTuple):
    """The kernel in Triton's interpreter bound to one weight on the CPU."""

    programs: int
    tensors: tuple[torch.Tensor, ...]
    kind: tuple
    size: tuple[int, ...]

    def run(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """As `Launch.run`."""
        config, dtype, blocksize, blocksize2, nested, full, aligned = self.kind
        if out is None:
            out = torch.empty(self.size, dtype=dtype)
        if self.programs:
            where = {"NESTED": nested, "FULL": full, "ALIGNED": aligned}
            constants = constexprs(config, dtype, blocksize, blocksize2, 0, **where)
            dequantize_nf4_kernel[(self.programs,)](*self.tensors, out, out.numel(), **constants)
        return out

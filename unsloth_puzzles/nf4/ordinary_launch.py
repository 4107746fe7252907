"""A launch of the kernel as Triton does it: where its C launcher takes other arguments than those that are known."""

from typing import NamedTuple

import torch

from unsloth_puzzles.device import capability
from unsloth_puzzles.nf4.build import Config, chosen_kernel, constexprs, options, pointer_types


class OrdinaryLaunch:
    """A launch by Triton itself, from the arguments of `Launch.enqueue`."""

    def __init__(self, config: Config, dtype, blocksize: int, blocksize2: int, device: int, where: dict[str, bool]):
        self._kernel, self._types = chosen_kernel(where["ALIGNED"]), pointer_types(dtype, where["NESTED"])
        self._options = constexprs(config, dtype, blocksize, blocksize2, capability(device), **where) | options(config)

    def __call__(self, programs: int, _y: int, _z: int, _stream: int, *arguments: int) -> None:
        *addresses, numel = arguments  # Triton takes the current stream, which the caller's is
        pointers = map(_Pointer, addresses, self._types)
        self._kernel[(programs,)](*pointers, numel, **self._options)


class _Pointer(NamedTuple):
    """The part of a tensor that Triton asks for."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address

"""One NF4 weight as one stream of bytes, and a tensor type on which only byte-moving operators exist.

    packed indices | absmax | absmax2        each part aligned to 16 bytes, the end padded to 16 x world size

FSDP2 splits a parameter along its first dimension. A stream of 16 x world size bytes splits into equal shares of whole
16-byte words, whatever the block size: blocks need not align with ranks, the scales are sharded with the indices,
and nothing is padded by FSDP2 itself.

FSDP2 of PyTorch 2.11 and earlier creates each sharded parameter with `requires_grad=True` first, so the parameter must
have a floating dtype. A plain float16 tensor would be copied by `torch._foreach_copy_`, which converts 16-bit floats to
float32 and back on CUDA and so changes NaN patterns. `ByteStream` says float16 and holds int16; FSDP2's own hooks hand
uint8 to the collective.
"""

import math
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves, tree_map

DTYPE = torch.float16  # the reported dtype
_INSIDE = torch.int16  # the stored dtype, of the same size
_ALIGNMENT = 16  # bytes: the kernel's widest load
_ADAPTED_LATE = "model must not be packed to get adapters; call get_peft_model, and add_adapter, before pack_nf4"

aten = torch.ops.aten
_MOVES = frozenset(
    {
        aten._pin_memory.default,
        aten._to_copy.default,
        aten._unsafe_view.default,
        aten.alias.default,
        aten.as_strided.default,
        aten.cat.default,
        aten.chunk.default,
        aten.clone.default,
        aten.copy_.default,
        aten.detach.default,
        aten.empty_like.default,
        aten.equal.default,
        aten.is_pinned.default,
        aten.new_empty.default,
        aten.new_zeros.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.view.default,
    }
)


@dataclass(frozen=True)
class Layout:
    """Where the parts of one weight lie in its stream.

    Attributes:
        shape: (out_features, in_features) of the weight.
        blocksize: Weights that share one absmax.
        blocksize2: First-level absmax that share one second-level absmax; None without double quantisation, where the
            absmax are float32.
        world_size: Ranks that the stream is split over.
    """

    shape: tuple[int, ...]
    blocksize: int
    blocksize2: int | None
    world_size: int

    @property
    def packed_bytes(self) -> int:
        return -(-math.prod(self.shape) // 2)

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.shape) // self.blocksize)

    @property
    def blocks2(self) -> int:
        return -(-self.blocks // self.blocksize2) if self.blocksize2 else 0

    @property
    def absmax_start(self) -> int:
        return _aligned(self.packed_bytes, _ALIGNMENT)

    @property
    def absmax2_start(self) -> int:
        return _aligned(self.absmax_start + self.blocks * (1 if self.blocksize2 else 4), _ALIGNMENT)

    @property
    def size(self) -> int:
        """Bytes of the whole stream."""
        return _aligned(self.absmax2_start + 4 * self.blocks2, _ALIGNMENT * self.world_size)

    def split(self, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Views of the parts.

        Args:
            stream: [size] uint8.

        Returns:
            The packed 4-bit indices [n, 1] uint8, the absmax [blocks] (uint8, or float32 without double quantisation),
            and the absmax2 [blocks2] float32 or None.
        """
        packed = stream[: self.packed_bytes].view(-1, 1)
        if self.blocksize2 is None:
            end = self.absmax_start + 4 * self.blocks
            return packed, stream[self.absmax_start : end].view(torch.float32), None
        absmax = stream[self.absmax_start : self.absmax_start + self.blocks]
        end = self.absmax2_start + 4 * self.blocks2
        return packed, absmax, stream[self.absmax2_start : end].view(torch.float32)


class ByteStream(torch.Tensor):
    """Bytes that FSDP2 shards as a float16 parameter.

    Inside is an int16 tensor of the same shape, so no operator can take a byte pattern for a number. Operators that
    move bytes exist; arithmetic and casts raise TypeError.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    packed_by = "pack_nf4"  # for the error of `dequantize_nf4`

    @staticmethod
    def __new__(cls, words: torch.Tensor) -> "ByteStream":
        return torch.Tensor._make_wrapper_subclass(
            cls, words.shape, strides=words.stride(), storage_offset=words.storage_offset(), dtype=DTYPE,
            device=words.device, requires_grad=False,
        )  # fmt: skip

    def __init__(self, words: torch.Tensor):
        if words.dtype != _INSIDE:
            raise TypeError(f"words must be {_INSIDE}, got {words.dtype}")
        self._words = words  # [size / 2], or a share of it

    def __repr__(self) -> str:
        return f"ByteStream({2 * self.numel()} bytes, {self.device})"

    @property
    def quant_state(self) -> None:
        """PEFT reads it to merge adapters and to add DoRA."""
        raise AttributeError("model must not be packed to merge or add adapters like this; undo pack_nf4 first")

    @property
    def compress_statistics(self) -> None:
        """PEFT reads it to adapt a layer."""
        raise AttributeError(_ADAPTED_LATE)

    def __add__(self, other: object) -> None:
        """PEFT adds A and B to it for the magnitudes of DoRA."""
        raise TypeError(_ADAPTED_LATE)

    def __tensor_flatten__(self):
        return ["_words"], None

    @staticmethod
    def __tensor_unflatten__(inner, metadata, outer_size, outer_stride):
        return ByteStream(inner["_words"])

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """Return a rank's contribution: its share as uint8, in one piece.

        A mixed-precision policy does not apply to the stream.
        """
        return (self._words.view(torch.uint8),), None  # [size / world size]

    def fsdp_post_all_gather(self, all_gather_outputs, metadata, param_dtype, *, out=None):
        """The gathered bytes as a plain float16 tensor over the same storage, which FSDP2 frees and fills again."""
        (stream,) = all_gather_outputs  # [size] uint8
        return None if out is not None else (stream.view(DTYPE), (stream,))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops._c10d_functional.all_gather_into_tensor.default:  # of DTensor.full_tensor()
            share = args[0]._words.reshape(-1).view(torch.uint8)  # NCCL has no int16
            whole = torch.ops._c10d_functional.wait_tensor(func(share, *args[1:]))
            return ByteStream(whole.view(_INSIDE))
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        if func not in _MOVES:
            raise TypeError(f"func must move bytes of the packed weight, got {func}")
        if (cast := kwargs.pop("dtype", None)) not in (None, DTYPE):
            raise TypeError(
                f"dtype must be that of the packed weight, got {cast} for {func}; "
                "cast the model, or call prepare_model_for_kbit_training, before pack_nf4"
            )
        for one in tree_leaves((args, kwargs)):  # a copy would convert the other tensor's numbers
            if isinstance(one, torch.Tensor) and one.dtype != DTYPE:
                raise TypeError(f"dtype must be that of the packed weight, got {one.dtype} beside it for {func}")
        found = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        if func is aten.copy_.default:
            return args[0]
        return tree_map(lambda one: ByteStream(one) if _is_words(one) else one, found)


def stream_of(weight: torch.Tensor) -> torch.Tensor:
    """The bytes of a packed parameter, [size] uint8.

    Args:
        weight: A `ByteStream`, or the plain float16 tensor that `fsdp_post_all_gather` has put in its place.
    """
    return (weight._words if isinstance(weight, ByteStream) else weight).view(torch.uint8)


def _inside(value: object) -> object:
    if isinstance(value, ByteStream):
        return value._words
    is_costume = isinstance(value, torch.Tensor) and value.dtype == DTYPE
    return value.view(_INSIDE) if is_costume else value


def _is_words(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == _INSIDE


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment

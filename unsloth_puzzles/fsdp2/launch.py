"""De-quantise a byte stream by its address, outside of traced code.

FSDP2 gathers a stream into other memory each time. Its parts lie at fixed distances from its start, so one prepared
launch serves every stream of a layout, and no view of a part is made.
"""

import torch

from unsloth_puzzles.fsdp2.stream import ByteStream, Layout
from unsloth_puzzles.nf4.launch import Launch, prepare
from unsloth_puzzles.nf4.state import NF4Weight

_prepared: dict[tuple, tuple[Launch, int, int]] = {}  # the launch, and where absmax and absmax2 start


def dequantize_stream(
    weight: torch.Tensor,
    code: torch.Tensor,
    code2: torch.Tensor | None,
    offset: torch.Tensor | None,
    layout: Layout,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight of a stream on a GPU, by one launch of challenge A's kernel.

    Args:
        weight: A `ByteStream`, or the plain float16 tensor that FSDP2 has gathered; 2 bytes an element.
        code, code2, offset: Of the layer, see `StreamLinear4bit`.
        layout: Of the stream.
        dtype: Of the result.

    Returns:
        [out_features, in_features] in `dtype`.

    Raises:
        ValueError: The stream is not gathered, or is a share of it.
    """
    words = weight._words if isinstance(weight, ByteStream) else weight
    start = words.data_ptr()
    if not start or 2 * words.numel() != layout.size:
        found = f"{2 * words.numel()} bytes" if start else "freed memory"
        raise ValueError(f"weight must be a whole stream of {layout.size} bytes, got {found}; gather it first")
    key = layout, dtype, words.get_device(), start & 15  # the kernel reads 16 bytes at once if it may
    if key not in _prepared:
        packed, absmax, absmax2 = layout.split(words.view(torch.uint8))
        sizes = layout.blocksize, layout.blocksize2 or 1, torch.Size(layout.shape), dtype
        launch = prepare(NF4Weight(packed, absmax, code, code2, absmax2, offset, *sizes))
        _prepared[key] = launch, layout.absmax_start, layout.absmax2_start
    launch, absmax, absmax2 = _prepared[key]
    table = code.data_ptr()
    if layout.blocksize2 is None:
        return launch.run(addresses=(start, start + absmax, table, table, table, table))
    return launch.run(addresses=(start, start + absmax, table, code2.data_ptr(), start + absmax2, offset.data_ptr()))

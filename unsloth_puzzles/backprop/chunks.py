"""How many rows of hidden states are turned into logits at a time."""

import math
import re
from functools import cache

import torch

# Dense 16-bit tensor-core FLOPs per clock and multiprocessor, by compute capability (NVIDIA's architecture whitepapers)
_FLOPS_PER_CLOCK = {70: 1024, 75: 1024, 80: 2048, 86: 1024, 87: 2048, 89: 1024, 90: 4096, 100: 8192, 103: 8192}
_USUAL_BALANCE = 200  # FLOPs a byte: T4 203, A100 200, H200 218
_LEAST, _MOST = 256, 4096  # fewer rows leave most of a GEMM's tiles empty; more gain nothing (H200: 1 % from 2048 on)
_LEAST_LOGITS = 2**25  # with fewer, a chunk's products are done before the host's 0.8 ms are (8192 classes, H200)
_SHARE = 4  # a chunk may take a quarter of the free memory
_STRETCH = 1.05  # "auto" chunks may be this much larger, if that saves one
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def chunk_spans(
    chunk_size: int | str, x: torch.Tensor, vocab_size: int, dtype: torch.dtype, bytes_per_logit: float, divisor: int
) -> list[tuple[int, int]]:
    """(start, stop) of each chunk of the rows of x.

    Args:
        chunk_size: See `chunk_rows`.
        x: [rows, hidden].
        vocab_size: Columns of the logits.
        dtype: Of the logits.
        bytes_per_logit: Of a chunk's logits and temporaries.
        divisor: By which "auto" is divided, where a function needs more room.
    """
    rows = chunk_rows(chunk_size, vocab_size, dtype, x.device, bytes_per_logit, x.shape[-1])
    if chunk_size == "auto":
        rows = even_rows(max(1, rows // divisor), len(x))
    return [(start, min(start + rows, len(x))) for start in range(0, len(x), rows)]


def chunk_rows(
    chunk_size: int | str,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    bytes_per_logit: float | None = None,
    hidden_size: int = 4096,
) -> int:
    """Rows of a chunk.

    "auto" is four times the machine's balance (FLOPs it does while it moves a byte). A chunk of R rows does 6 R FLOPs
    per weight and moves 8 bytes per weight that a bigger chunk would not have moved again: W is read for the logits and
    for dX, dW is read and written. At four times the balance the moving alone would take a third of the time; most of
    it hides behind the arithmetic, and the matrix products reach 94 to 96 % of their full rate (904 rows, H200). With
    hidden states narrower than 4096 there are more rows in proportion, since dX (rows x hidden) has to be large enough
    to occupy all multiprocessors (2048: 88 % of the full rate at 904 rows, 95 % at 1800), and with a vocabulary so
    small that the host could not keep up. Never more than a quarter of the free memory. The same answer for the same
    arguments, so a run's memory does not depend on its history, and nothing waits for the device. The op then makes the
    chunks of a call even (`even_rows`).

    Args:
        chunk_size: Rows, bytes of logits such as "256MiB", or "auto".
        vocab_size: Columns of the logits.
        dtype: Of the logits.
        device: Where they are made.
        bytes_per_logit: Of a chunk's logits and temporaries, for "auto"; None counts the logits alone.
        hidden_size: Columns of the hidden states, for "auto".

    Raises:
        ValueError, TypeError: `chunk_size` is something else, or less than one row.
    """
    itemsize = torch.empty((), dtype=dtype).element_size()
    if chunk_size == "auto":
        return _auto_rows(vocab_size, hidden_size, dtype, torch.device(device), bytes_per_logit or itemsize)
    if isinstance(chunk_size, str):
        size = _bytes(chunk_size)
        if size is None:
            raise ValueError(f"chunk_size must be 'auto', rows (an int) or bytes such as '256MiB', got {chunk_size!r}")
        rows = size // (vocab_size * itemsize)
        if rows < 1:
            need = f"at least {vocab_size * itemsize} bytes, one row of {vocab_size} logits"
            raise ValueError(f"chunk_size must be {need}, got {chunk_size!r}")
        return rows
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
        raise TypeError(f"chunk_size must be 'auto', rows (an int) or bytes such as '256MiB', got {chunk_size!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 row, got {chunk_size}")
    return chunk_size


def even_rows(rows: int, of: int) -> int:
    """`rows` of a chunk, changed a little so that `of` rows make chunks of about one size.

    16384 rows in chunks of 904 would leave a nineteenth of 112, which costs three or four products and does the work of
    an eighth of one; 18 chunks of 920 do not. Fewer rows than 256, which is what little memory leaves, stay as they
    are.

    Args:
        rows: Of a chunk.
        of: All rows.

    Returns:
        At most 5 % and 15 rows more than `rows`.
    """
    if of == 0 or rows < _LEAST:
        return rows
    return min(of, _odd_eights(of / math.ceil(of / (_STRETCH * rows))))


def kept_bytes(keep_logits: int | str) -> int:
    """The bytes that `keep_logits` says.

    Args:
        keep_logits: Bytes, an int or a text such as "1GiB".

    Raises:
        ValueError, TypeError: It is something else, or negative.
    """
    size = _bytes(keep_logits) if isinstance(keep_logits, str) else keep_logits
    if not isinstance(size, int | None) or isinstance(size, bool):
        raise TypeError(f"keep_logits must be bytes, an int or a text such as '1GiB', got {keep_logits!r}")
    if size is None or size < 0:
        raise ValueError(f"keep_logits must be bytes, 0 or more, such as '1GiB', got {keep_logits!r}")
    return size


def _bytes(text: str) -> int | None:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMG]I?)?B)\s*", text.upper())
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


@cache
def _auto_rows(
    vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device, bytes_per_logit: float
) -> int:
    if device.type != "cuda":
        return _LEAST
    wanted = 4 * _balance(dtype, device) * max(1, 4096 / hidden_size)
    wanted = max(wanted, _LEAST_LOGITS / vocab_size)
    rows = min(_MOST, max(_LEAST, _odd_eights(wanted)))
    return max(1, min(rows, int(_free_bytes(device) / _SHARE / (vocab_size * bytes_per_logit))))


def _odd_eights(rows: float) -> int:
    """The next odd multiple of eight.

    Tensor cores take rows by eights; an odd number of them, since cuBLAS splits some multiples of 128 badly: 896 rows
    take 56.2 ms where 904 take 50.3 (bfloat16, 4096 x 128256, H200).
    """
    return 16 * math.ceil((rows - 8) / 16) + 8


def _balance(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per byte at the clocks and the bus width that the driver names."""
    properties = torch.cuda.get_device_properties(device)
    bandwidth = 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8
    if not bandwidth or not properties.clock_rate:
        return _USUAL_BALANCE
    sm = 10 * properties.major + properties.minor
    per_clock = _FLOPS_PER_CLOCK.get(sm, 1024) if dtype.itemsize == 2 else 256  # 128 multiply-adds in float32
    return per_clock * properties.multi_processor_count * properties.clock_rate * 1e3 / bandwidth


def _free_bytes(device: torch.device) -> int:
    """Return the memory that the driver has free or PyTorch's allocator holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    limit = torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.get_device_properties(device).total_memory
    free = min(free, int(limit) - torch.cuda.memory_reserved(device))
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

"""Writes a GGUF file tensor by tensor: sizes are known before the data, so nothing waits in memory."""

import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch

from unsloth_puzzles.gguf.quantization import Type, encode, row_bytes
from unsloth_puzzles.gguf.weights import Weight


@dataclass
class Tensor:
    """A tensor of the file.

    Attributes:
        name: as the engine knows it.
        source: its values; the shape is that of the file.
        type: how they are stored.
        change: applied to each chunk of rows, or None.
        multiple: what `change` needs the number of rows to be a multiple of.
    """

    name: str
    source: Weight
    type: Type
    change: Callable[[torch.Tensor], torch.Tensor] | None = None
    multiple: int = 1

    @property
    def bytes(self) -> int:
        rows, columns = math.prod(self.source.shape[:-1]), self.source.shape[-1]
        return rows * row_bytes(self.type, columns)


@contextmanager
def named_at_the_end(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Give files their names one right after the other when all of them are whole, so that they belong together.

    Args:
        paths: the files. Those that are there are replaced at the end.

    Yields:
        Temporary paths in the same folders, to be written. They are removed if anything is raised. Those of a process
        that was killed are removed by the next export into the folder.
    """
    for folder in {path.parent for path in paths}:
        _remove_abandoned(folder)
    unfinished = [path.with_name(f"{path.name}.{_host()}.{os.getpid()}.unfinished") for path in paths]
    try:
        yield unfinished
        for temporary, path in zip(unfinished, paths, strict=True):
            os.replace(temporary, path)
    finally:
        for temporary in unfinished:
            temporary.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of processes of this host that no longer run."""
    named = re.compile(rf"(?:.+\.gguf|Modelfile)\.{re.escape(_host())}\.(\d+)\.unfinished")
    for path in folder.glob("*.unfinished"):
        if (found := named.fullmatch(path.name)) and not _runs(int(found[1])):
            path.unlink(missing_ok=True)


def _host() -> str:
    """The name of this machine or container. Others may share the folder, and their processes have the same numbers."""
    return re.sub(r"\W", "-", platform.node())


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def write(path: Path, header: gguf.GGUFWriter, tensors: Sequence[Tensor], advance: Callable[[int], None]) -> None:
    """Write a file. What was written stays if anything is raised: see `named_at_the_end`.

    Args:
        path: the file.
        header: holds the metadata; opened for no file yet.
        tensors: in the order of the file.
        advance: is told the number of bytes after each chunk.

    Raises:
        ValueError: values that are not finite, or not in the type's range.
        OSError: the file cannot be written, as on a full disk.
        RuntimeError: `gguf` has laid out the file otherwise than assumed.
    """
    if sys.byteorder != "little":
        raise RuntimeError(f"sys.byteorder must be 'little', since GGUF's is, got {sys.byteorder!r}")
    for tensor in tensors:
        shape, any_float = tensor.source.shape, np.dtype(np.float32)  # the type decides; of uint8 it would be in bytes
        header.add_tensor_info(tensor.name, shape, any_float, tensor.bytes, raw_dtype=tensor.type)
    with closing(header):
        header.write_header_to_file(path)
        header.write_kv_data_to_file()
        header.write_ti_data_to_file()
        (file,) = header.fout
        expected = _pad(file, header.data_alignment)
        for tensor in tensors:
            for chunk in tensor.source.chunks(tensor.multiple):
                _check_finite(chunk, tensor.name)
                data = encode(chunk if tensor.change is None else tensor.change(chunk), tensor.type, tensor.name)
                file.write(np.ascontiguousarray(data))  # `tofile` is silent if its last bytes do not fit on the disk
                advance(data.nbytes)
            expected += tensor.bytes
            if file.tell() != expected:
                raise RuntimeError(f"{tensor.name} must take {tensor.bytes} bytes, got a file of {file.tell()}")
            expected = _pad(file, header.data_alignment)


def _pad(file, alignment: int) -> int:
    file.write(bytes(-file.tell() % alignment))
    return file.tell()


def _check_finite(values: torch.Tensor, name: str) -> None:
    if not values.isfinite().all():
        raise ValueError(f"model must have finite weights, got NaN or infinity in {name}")

"""Decode images in the forms that `datasets` and transformers use."""

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch


def decode(image: object, where: str, *, rescales: bool = True) -> object:
    """Decode an image for a processor of transformers, and name the row if that fails.

    Args:
        image: A Pillow image; a NumPy array, a PyTorch tensor or nested lists, see `picture_of_array`; a path, a URL or
            base64 text; a file's bytes; or {"bytes": ..., "path": ...}, as `datasets` returns with decode=False.
        where: Name of the row in error messages.
        rescales: Whether the processor divides values by 255. If not, arrays and tensors are returned unchanged.

    Returns:
        A Pillow image, for bytes and files with its EXIF orientation applied, as in `datasets`.

    Raises:
        ValueError: The image cannot be decoded, has another type, or has values outside of 0 to 255.
    """
    from PIL import Image, ImageOps
    from transformers.image_utils import is_valid_image

    given = image
    if isinstance(image, Mapping) and {"bytes", "path"} & {*image}:
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    try:
        if isinstance(image, str):
            image = _read(image)
        if isinstance(image, (bytes, bytearray, memoryview)):
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))  # also decodes it
        elif isinstance(image, Image.Image):
            image.load()  # Pillow reads a file as late as here
    except Exception as error:  # Pillow raises many, by format, and the network its own
        raise ValueError(
            f"images of {where} must be images that Pillow can decode, got {_described(given)}; check the file, or "
            "leave the row out"
        ) from error
    if isinstance(image, Image.Image):
        _check_bits(image, where)
        return image
    if isinstance(image, (list, tuple)) or is_valid_image(image):
        return picture_of_array(image, where) if rescales else image
    raise ValueError(
        f"images of {where} must be images, paths or files' bytes, got {_described(given)}; load them by PIL.Image.open"
    )


def _read(text: str) -> object:
    """The bytes of a path or of base64 text; of a URL a Pillow image."""
    if text.startswith(("http://", "https://")):
        from transformers.image_utils import load_image

        return load_image(text)
    if os.path.isfile(text):
        return Path(text).read_bytes()
    return base64.decodebytes((text.split(",")[-1] if text.startswith("data:image/") else text).encode())


def picture_of_array(array: object, where: str) -> object:
    """The Pillow image of an array, a tensor or nested lists.

    Processors resize other dtypes than uint8 by other rules, and divide by 255 whatever the values are.

    Args:
        array: [height, width], [height, width, channels] or [channels, height, width] of whole numbers from 0 to 255,
            in any dtype. 1 to 4 channels are grey, grey with alpha, RGB, and RGB with alpha.
        where: Name of the row in error messages.

    Raises:
        ValueError: The array has another shape or other values.
    """
    from PIL import Image

    try:
        array = np.asarray(array.detach().cpu() if isinstance(array, torch.Tensor) else array)
        kind = array.dtype.kind
    except (TypeError, ValueError, RuntimeError):  # lists of different lengths; bfloat16, which NumPy lacks
        kind = getattr(array, "dtype", type(array).__name__)
    if kind not in ("u", "i", "f"):
        got = getattr(array, "dtype", kind)
        raise ValueError(f"images of {where} must have whole numbers from 0 to 255, got {got}; convert them to uint8")
    if array.ndim == 3 and (array.shape[0] in (1, 3) or (array.shape[-1] not in (1, 3) and array.shape[0] in (2, 4))):
        array = array.transpose(1, 2, 0)  # as transformers guesses it
    if array.ndim not in (2, 3) or not array.size or array.shape[2:] not in ((), (1,), (2,), (3,), (4,)):
        raise ValueError(
            f"images of {where} must have a shape of [height, width], [height, width, channels] or "
            f"[channels, height, width] with 1 to 4 channels, got {list(array.shape)}"
        )
    low, high = array.min(), array.max()
    whole = low >= 0 and high <= 255 and (array == array.astype(np.uint8)).all()
    if not whole or (kind == "f" and 0 < high <= 1):  # an image of floats up to 1, all black and white
        raise ValueError(
            f"images of {where} must have whole numbers from 0 to 255, got {array.dtype} from {low:g} to {high:g}; "
            "scale them to 255 and convert them to uint8"
        )
    array = array.astype(np.uint8)
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _check_bits(image, where: str) -> None:
    """Refuse what Pillow would make white by its conversion to RGB."""
    if image.mode.startswith(("I", "F")):
        low, high = image.getextrema()
        if not 0 <= low <= high <= 255:
            raise ValueError(
                f"images of {where} must have values from 0 to 255, got mode {image.mode!r} from {low:g} to {high:g}; "
                "scale them to 255 and convert them to mode 'L'"
            )


def _described(given: object) -> str:
    if isinstance(given, (bytes, bytearray, memoryview)):
        return f"{len(given)} bytes"
    if isinstance(given, Mapping):
        return "{" + ", ".join(f"{key!r}: {_described(value)}" for key, value in given.items()) + "}"
    return repr(given[:60]) if isinstance(given, str) else "None" if given is None else type(given).__name__

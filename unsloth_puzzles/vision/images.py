"""Decode images in the forms that `datasets` and transformers use."""

import io
import os
from collections.abc import Mapping

_URLS = ("http://", "https://", "data:image/")


def decode(image: object, where: str) -> object:
    """Decode an image for a processor of transformers, and name the row if that fails.

    Args:
        image: A Pillow image, a NumPy array or a PyTorch tensor; a path, a URL or base64 text; a file's bytes; or
            {"bytes": ..., "path": ...}, as `datasets` returns with decode=False.
        where: Name of the row in error messages.

    Returns:
        A Pillow image for bytes and files, with its EXIF orientation applied, as in `datasets`. A URL, which processors
        load, and any other image are returned unchanged.

    Raises:
        ValueError: The image cannot be decoded or has another type.
    """
    from PIL import Image, ImageOps
    from transformers.image_utils import is_valid_image, load_image

    given = image
    if isinstance(image, Mapping) and {"bytes", "path"} & {*image}:
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    try:
        if isinstance(image, (bytes, bytearray, memoryview)):
            return ImageOps.exif_transpose(Image.open(io.BytesIO(image)))  # also decodes it
        if isinstance(image, str) and not image.startswith(_URLS):
            if isinstance(given, Mapping) and os.path.isfile(image):
                return ImageOps.exif_transpose(Image.open(image))
            return load_image(image)  # a path, or base64 text
        if isinstance(image, Image.Image):
            image.load()  # Pillow reads a file as late as here
    except Exception as error:  # Pillow raises many, by format
        raise ValueError(
            f"images of {where} must be images that Pillow can decode, got {_described(given)}; check the file, or "
            "leave the row out"
        ) from error
    if isinstance(image, (str, list, tuple)) or is_valid_image(image):
        return image
    raise ValueError(
        f"images of {where} must be images, paths or files' bytes, got {_described(given)}; load them by PIL.Image.open"
    )


def _described(given: object) -> str:
    if isinstance(given, (bytes, bytearray, memoryview)):
        return f"{len(given)} bytes"
    if isinstance(given, Mapping):
        return "{" + ", ".join(f"{key!r}: {_described(value)}" for key, value in given.items()) + "}"
    return repr(given[:60]) if isinstance(given, str) else "None" if given is None else type(given).__name__

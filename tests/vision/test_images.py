"""Images in the forms of data sets give what the decoded image gives, and those that cannot be decoded are named."""

import base64
import io
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, List
from PIL import ImageOps
from PIL.Image import open as open_image

from benchmarks.vision.chat import picture
from benchmarks.vision.checks import ONE, TEXT
from tests.vision.models import EVERY, family
from unsloth_puzzles.vision.collator import VisionCollator
from unsloth_puzzles.vision.images import decode
from unsloth_puzzles.vision.sampler import has_images

PICTURE = picture(84, 56, seed=7)


def _file(image=PICTURE, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


FILE = _file()


def _same(one: dict, other: dict) -> bool:
    return {*one} == {*other} and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", EVERY)
def test_files_give_what_the_image_gives(name, tmp_path):
    collate = VisionCollator(family(name)[0])
    expected = collate([{**ONE, "images": [PICTURE]}, TEXT])
    path = Path(tmp_path, "picture.png")
    path.write_bytes(FILE)
    for given in (
        {"bytes": FILE, "path": None},
        {"bytes": FILE, "path": "nowhere.png"},  # as in a data set from another machine
        {"bytes": None, "path": str(path)},
        FILE,
        bytearray(FILE),
        path,
        str(path),
        base64.b64encode(FILE).decode(),
    ):
        assert _same(collate([{**ONE, "images": [given]}, TEXT]), expected), given
        inline = [{"type": "image", "image": given}, *ONE["messages"][0]["content"][1:]]
        messages = [{"role": "user", "content": inline}, *ONE["messages"][1:]]
        assert _same(collate([{"messages": messages}, TEXT]), expected), given


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_files_of_a_data_set_are_decoded_as_the_data_set_does(mode):
    exif = PICTURE.getexif()
    exif[0x0112] = 6  # the orientation: turned by 90 degrees
    files = [{"bytes": _file(PICTURE.convert(mode), exif=exif), "path": None}]
    features = Features({"images": List(Image(decode=False))})
    column = Dataset.from_dict({"images": [files]}, features=features)
    undecoded = column[0]["images"][0]
    decoded = column.cast_column("images", List(Image()))[0]["images"][0]
    assert isinstance(undecoded["bytes"], bytes) and decoded.size == (56, 84)
    found = decode(undecoded, "row 0")
    assert found.mode == decoded.mode and found.tobytes() == decoded.tobytes()
    assert decode(decoded, "row 0") is decoded
    assert found.tobytes() == ImageOps.exif_transpose(open_image(io.BytesIO(files[0]["bytes"]))).tobytes()


@pytest.mark.parametrize(
    "given, got",
    [
        (b"no image", "that Pillow can decode, got 8 bytes; check the file, or leave the row out"),
        (FILE[:3000], "that Pillow can decode, got 3000 bytes; check the file"),
        (
            {"bytes": b"", "path": None},
            r"that Pillow can decode, got \{'bytes': 0 bytes, 'path': None\}; check the file",
        ),
        ({"bytes": None, "path": "no.png"}, r"that Pillow can decode, got \{'bytes': None, 'path': 'no.png'\}; check"),
        ("no.png", r"that Pillow can decode, got 'no\.png'; check the file"),
        (Path("no.png"), "that Pillow can decode, got PosixPath; check the file"),
        (open_image(io.BytesIO(FILE[:3000])), "that Pillow can decode, got PngImageFile; check the file"),
        (
            {"bytes": None, "path": None},
            r"paths or files' bytes, got \{'bytes': None, 'path': None\}; load them by PIL",
        ),
        ({"file": "a.png"}, r"paths or files' bytes, got \{'file': 'a.png'\}; load them by PIL"),
        (3, r"paths or files' bytes, got int; load them by PIL\.Image\.open"),
    ],
)
def test_images_that_cannot_be_decoded_are_named(given, got):
    with pytest.raises(ValueError, match=f"images of row 1 must be images,? {got}"):
        VisionCollator(family("qwen2_vl")[0])([TEXT, {**ONE, "images": [given]}])


@pytest.mark.parametrize("form", [str, Path, lambda path: {"bytes": None, "path": str(path)}])
def test_a_broken_file_is_named_by_its_row(form, tmp_path):
    path = Path(tmp_path, "broken.png")
    path.write_bytes(FILE[:3000])
    with pytest.raises(ValueError, match=r"images of row 1 must be images that Pillow can decode, got .*; check"):
        VisionCollator(family("qwen2_vl")[0])([TEXT, {**ONE, "images": [form(path)]}])


def test_rows_are_not_decoded_to_know_whether_they_have_images():
    assert has_images({**ONE, "images": [{"bytes": b"no image", "path": None}]})

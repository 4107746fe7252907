"""Images in the forms of data sets give what the decoded image gives, and those that cannot be decoded are named."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List
from PIL import ImageOps
from PIL.Image import fromarray as from_array
from PIL.Image import open as open_image

from benchmarks.vision.chat import picture
from benchmarks.vision.checks import ONE, TEXT
from tests.vision.models import EVERY, family, fresh
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
        f"data:image/png;base64,{base64.b64encode(FILE).decode()}",
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
        ("http://127.0.0.1:1/a.png", r"that Pillow can decode, got 'http://127\.0\.0\.1:1/a\.png'; check the file"),
        ("data:image/png;base64,AAAA", "that Pillow can decode, got 'data:image/png;base64,AAAA'; check the file"),
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


ARRAY = np.asarray(PICTURE)  # [56, 84, 3] uint8
GREY = PICTURE.convert("L")


@pytest.mark.parametrize(
    "given, picture",
    [
        (ARRAY, PICTURE),
        (ARRAY.transpose(2, 0, 1), PICTURE),
        (torch.tensor(ARRAY).permute(2, 0, 1), PICTURE),
        (ARRAY.tolist(), PICTURE),
        (ARRAY.astype(np.uint16), PICTURE),
        (ARRAY.astype(np.int64), PICTURE),
        (ARRAY.astype(np.float32), PICTURE),
        (torch.tensor(ARRAY).half(), PICTURE),
        (np.asarray(GREY), GREY),
        (np.asarray(GREY)[None], GREY),
        (torch.tensor(np.asarray(GREY))[..., None], GREY),
        (np.asarray(PICTURE.convert("LA")), GREY),
        (np.asarray(PICTURE.convert("RGBA")), PICTURE),
        (torch.tensor(np.asarray(PICTURE.convert("RGBA"))).permute(2, 0, 1), PICTURE),
    ],
)
def test_arrays_give_what_the_picture_gives(given, picture):
    collate = VisionCollator(family("qwen2_vl")[0])
    assert _same(collate([{**ONE, "images": [given]}]), collate([{**ONE, "images": [picture.convert("RGB")]}]))


@pytest.mark.parametrize(
    "given, got",
    [
        (ARRAY / np.float32(255), r"whole numbers from 0 to 255, got float32 from 0 to 0\.996078; scale them"),
        (torch.tensor(ARRAY) / 255, r"whole numbers from 0 to 255, got float32 from 0 to 0\.996078; scale them"),
        (ARRAY > 128, r"whole numbers from 0 to 255, got bool; convert them to uint8"),
        (ARRAY.astype(np.uint16) * 256, r"whole numbers from 0 to 255, got uint16 from 0 to 65024; scale them"),
        (ARRAY.astype(np.int16) - 9, r"whole numbers from 0 to 255, got int16 from -9 to 245; scale them"),
        (np.full((4, 4, 3), np.nan), r"whole numbers from 0 to 255, got float64 from nan to nan; scale them"),
        (torch.tensor(ARRAY).bfloat16(), r"whole numbers from 0 to 255, got torch\.bfloat16; convert them to uint8"),
        ([[1, 2], [3]], r"whole numbers from 0 to 255, got list; convert them to uint8"),
        (ARRAY[None], r"a shape of .* with 1 to 4 channels, got \[1, 56, 84, 3\]"),
        (ARRAY[:0], r"a shape of .* with 1 to 4 channels, got \[0, 84, 3\]"),
        (np.zeros((8, 8, 5), np.uint8), r"a shape of .* with 1 to 4 channels, got \[8, 8, 5\]"),
        (from_array(np.asarray(GREY).astype(np.uint16) * 256), r"values from 0 to 255, got mode 'I;16' from .*; scale"),
        (from_array(np.asarray(GREY).astype(np.float32) * 2), r"values from 0 to 255, got mode 'F' from .*; scale"),
    ],
)
def test_images_whose_values_would_be_lost_are_refused(given, got):
    with pytest.raises(ValueError, match=rf"^images of row 1 must have {got}"):
        VisionCollator(family("qwen2_vl")[0])([TEXT, {**ONE, "images": [given]}])


def test_arrays_of_a_processor_that_does_not_rescale_are_left_as_they_are():
    processor, _ = fresh("qwen2_vl")
    collate = VisionCollator(processor)
    expected = collate([{**ONE, "images": [ARRAY]}])["pixel_values"]
    processor.image_processor.do_rescale = False
    found = collate([{**ONE, "images": [torch.tensor(ARRAY).permute(2, 0, 1) / 255]}])["pixel_values"]
    assert found.shape == expected.shape and (found - expected).abs().max() < 0.1  # resized in other dtypes


def test_files_of_16_bits_are_refused_in_every_form(tmp_path):
    """Pillow's conversion to RGB makes them white."""
    file = _file(from_array(np.asarray(GREY).astype(np.uint16) * 256))
    path = Path(tmp_path, "deep.png")
    path.write_bytes(file)
    for given in (file, path, str(path), {"bytes": None, "path": str(path)}, base64.b64encode(file).decode()):
        with pytest.raises(ValueError, match=r"^images of row 0 must have values from 0 to 255, got mode 'I;16'"):
            decode(given, "row 0")

"""A file beside the merge: no difference, and any change of a weight is found."""

import gguf
import numpy as np
import pytest

from benchmarks.gguf.file_weights import largest_difference
from tests.gguf.models import lora
from unsloth_puzzles.gguf.export import export_gguf


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, tokenizer = lora(text={"attention_bias": True})
    return export_gguf(model, tokenizer, tmp_path_factory.mktemp("file"), "f32", progress=False)[0], model


def test_a_float32_file_holds_the_merge(exported):
    assert largest_difference(*exported) == 0


@pytest.mark.parametrize(
    "name", ["blk.1.attn_k.weight", "blk.0.attn_q.bias", "token_embd.weight", "output_norm.weight"]
)
@pytest.mark.parametrize("value", [3.0, float("nan")])
def test_a_changed_weight_is_found(exported, tmp_path, name, value):
    path, model = exported
    changed = tmp_path / path.name
    changed.write_bytes(path.read_bytes())
    (tensor,) = (one for one in gguf.GGUFReader(changed, "r+").tensors if one.name == name)
    before = tensor.data.flat[5].item()
    tensor.data.flat[5] = value
    found = largest_difference(changed, model)
    assert np.isnan(found) if np.isnan(value) else found == pytest.approx(abs(3 - before), rel=1e-6)


def test_other_files_are_refused(exported, tmp_path):
    path, model = exported
    half, _ = export_gguf(model, lora()[1], tmp_path, "f16", progress=False)
    with pytest.raises(ValueError, match="path must be a file of float32 weights, got F16"):
        largest_difference(half, model)
    with pytest.raises(ValueError, match=r"got a difference in blk\.0\.attn_k\.bias, "):
        largest_difference(path, lora()[0])

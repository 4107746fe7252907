"""The patch of Mllama: what it changes, that it changes nothing else, and that it can be taken away."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.mllama import modeling_mllama as mllama

from benchmarks.vision.checks import (
    AFTER,
    ONE,
    SHORT,
    TEXT,
    TURNS,
    TWO,
    gradients,
    largest_difference,
    relative_difference,
    token_losses,
)
from benchmarks.vision.stock import with_blank_images
from tests.vision.models import family, fresh
from unsloth_puzzles.vision.collator import VisionCollator
from unsloth_puzzles.vision.mllama import patch_mllama

ROWS = [ONE, TEXT, TWO, AFTER]


def _layer_inputs(model, batch):
    """What the first cross-attention layer is given in a forward pass."""
    layer = next(one for one in model.modules() if isinstance(one, mllama.MllamaCrossAttentionDecoderLayer))
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**batch, use_cache=False)
    hook.remove()
    return layer, seen[0]


def test_without_the_patch_losses_depend_on_the_neighbours():
    processor, model = fresh("mllama")
    collate = VisionCollator(processor)
    assert max(largest_difference(model, collate, [TWO, AFTER, TURNS])) > 1e-2
    with patch_mllama(model):
        assert max(largest_difference(model, collate, [TWO, AFTER, TURNS])) <= 1e-5


def test_without_the_patch_a_blank_image_changes_the_losses_of_a_text():
    processor, model = fresh("mllama")
    collate = VisionCollator(processor)
    alone = token_losses(model, collate([TEXT]))[0]
    assert (token_losses(model, with_blank_images(collate(ROWS)))[1] - alone).abs().max() > 1e-2


def test_layer_differs_from_transformers_in_tokens_that_see_no_image_only():
    processor, model = fresh("mllama")
    layer, (args, kwargs) = _layer_inputs(model, VisionCollator(processor)([TWO, AFTER]))
    seen = kwargs["full_text_row_masked_out_mask"][:, 0, :, 0].bool()  # [rows, length]
    assert seen.any(1).all() and not seen.all(1).any()
    with torch.no_grad():
        theirs = layer(*args, **kwargs)
        with patch_mllama(model):
            ours = layer(*args, **kwargs)
    hidden_states = args[0]
    assert torch.equal(ours[seen], theirs[seen])
    assert torch.equal(ours[~seen], hidden_states[~seen]) and not torch.equal(theirs[~seen], hidden_states[~seen])


def test_rows_without_an_image_stay_out_of_the_cross_attention():
    processor, model = family("mllama")
    _, (args, kwargs) = _layer_inputs(model, VisionCollator(processor)(ROWS))
    index = kwargs["full_text_row_masked_out_mask"].index
    assert index is not None and index.tolist() == [0, 2, 3]
    assert len(kwargs["cross_attention_states"]) == len(kwargs["cross_attention_mask"]) == 3 and len(args[0]) == 4


def test_images_of_all_rows_as_transformers_gives_them():
    """What others do: a blank image, which no token sees, for a row of text."""
    processor, model = family("mllama")
    batch = VisionCollator(processor)(ROWS)
    for ours, theirs in zip(token_losses(model, batch), token_losses(model, with_blank_images(batch)), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5


def test_images_that_are_not_those_of_the_rows_are_refused():
    processor, model = family("mllama")
    batch = VisionCollator(processor)(ROWS)
    for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        batch[key] = batch[key][:2]
    with pytest.raises(
        ValueError, match=r"pixel_values must be those of the 3 rows .* of all 4, got those of 2; use Vis"
    ):
        model(**batch)


def test_undo_gives_transformers_back():
    processor, model = fresh("mllama")
    batch = VisionCollator(processor)([TWO, AFTER])
    before, keys = token_losses(model, batch), [*model.state_dict()]
    patch = patch_mllama(model)
    assert [*model.state_dict()] == keys and len(patch.names) == 4  # tower, text model, two layers
    assert not torch.equal(token_losses(model, batch)[1], before[1])
    patch.undo()
    patch.undo()
    assert all(torch.equal(a, b) for a, b in zip(token_losses(model, batch), before, strict=True))
    assert {type(part) for part in model.modules()} == {type(part) for part in fresh("mllama")[1].modules()}


def test_undo_under_what_another_library_exchanged_is_refused():
    _, model = fresh("mllama")
    patch = patch_mllama(model)
    text = model.model.language_model
    ours = type(text)
    text.__class__ = type("Sharded", (ours,), {})
    with pytest.raises(RuntimeError, match=r"model\.language_model must still be of the class .*, got a Sharded; undo"):
        patch.undo()
    text.__class__ = ours
    patch.undo()
    assert type(text) is mllama.MllamaTextModel


def test_copies_are_patched_and_files_are_not():
    processor, model = family("mllama")
    batch = VisionCollator(processor)(ROWS)
    expected = token_losses(model, batch)
    twin = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(token_losses(twin, batch), expected, strict=True))
    stored = pickle.loads(pickle.dumps(model.model.language_model))
    assert type(stored) is mllama.MllamaTextModel


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}])
def test_generation_of_a_mixed_batch(options):
    processor, model = family("mllama")
    collate = VisionCollator(processor, assistant_only=False, padding_side="left")

    def generate(rows):
        batch = collate([{**one, "messages": one["messages"][:1]} for one in rows])
        length = batch.pop("labels").shape[1]
        return model.generate(**batch, max_new_tokens=6, do_sample=False, **options)[:, length:]

    together = generate(ROWS)
    for found, one in zip(together, ROWS, strict=True):
        alone = generate([one])[0]
        assert torch.equal(found[: len(alone)], alone)


def test_checkpointing_keeps_the_rows():
    processor, model = fresh("mllama")
    patch_mllama(model)
    model.train()
    batch = VisionCollator(processor)(ROWS)
    expected = gradients(model, [batch])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert relative_difference(gradients(model, [batch]), expected) <= 1e-6


def test_training_makes_no_cache_and_hidden_states_are_recorded():
    processor, model = fresh("mllama")
    patch_mllama(model)
    batch = VisionCollator(processor)(ROWS)
    assert model(**batch).past_key_values is not None
    found = model.train()(**batch, output_hidden_states=True)
    assert found.past_key_values is None and len(found.hidden_states) == 5


@pytest.mark.parametrize("first", ["patch", "adapters"])
def test_adapters_before_or_after(first):
    processor, model = fresh("mllama")
    config = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    if first == "patch":
        patch_mllama(model)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    if first == "adapters":
        patch_mllama(adapted)
    collate = VisionCollator(processor)
    assert max(largest_difference(adapted, collate, ROWS)) <= 1e-5
    found = gradients(adapted, [collate(ROWS)])
    assert relative_difference(found, gradients(adapted, [collate([one]) for one in ROWS])) <= 2e-6
    assert any("vision_model" in name for name in found)


def test_a_batch_of_text_skips_the_layers():
    processor, model = family("mllama")
    _, plain = fresh("mllama")
    batch = VisionCollator(processor)([TEXT, SHORT])
    assert torch.equal(model(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (list, TypeError, r"model must be a torch\.nn\.Module, got list"),
        (lambda: nn.Linear(2, 2), ValueError, "model must have a MllamaTextModel, got a Linear without one"),
        (lambda: family("llava")[1], ValueError, "model must have a MllamaTextModel, got a LlavaForConditional"),
        (lambda: family("mllama")[1], ValueError, r"model must not be patched yet, got model\.vision_model, which is"),
    ],
)
def test_models_that_cannot_be_patched_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        patch_mllama(make())


def test_another_transformers_is_refused(monkeypatch):
    _, model = fresh("mllama")
    monkeypatch.setattr(mllama.MllamaTextModel, "forward", lambda self, input_ids=None, cross_attention_mask=None: None)
    monkeypatch.setattr("unsloth_puzzles.vision.mllama.transformers.__version__", "5.25.0")
    with pytest.raises(
        ValueError,
        match=r"^transformers must have a MllamaTextModel that takes cross_attention_states, .*, got one without; "
        r"the patch was written for transformers 5\.15 to 5\.24, this is 5\.25\.0$",
    ):
        patch_mllama(model)

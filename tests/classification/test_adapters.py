"""The head is trained with the adapters, saved with them, and comes back with the same logits."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer

from tests.classification.models import (
    LABELS,
    batch,
    byte_tokenizer,
    classifier,
    losses_of_steps,
    save_checkpoint,
    with_adapters,
)
from unsloth_puzzles.classification.adapters import add_adapters, load_trained, save_classifier
from unsloth_puzzles.classification.losses import MULTI, weigh_classes


def _trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_and_adapters_alone_are_trained_in_float32(checkpoint, dtype):
    model, _ = classifier(checkpoint, dtype=dtype)
    trained = _trained(model)
    heads = [name for name in trained if "lora" not in name]
    assert heads == ["base_model.model.score.modules_to_save.default.weight"]
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert len(adapted) == 14 and not any("score" in name for name in adapted)


def test_every_trained_parameter_moves(checkpoint):
    model, tokenizer = classifier(checkpoint)
    before = {name: parameter.detach().clone() for name, parameter in _trained(model).items()}
    losses = losses_of_steps(model, [{**batch(tokenizer), "labels": torch.tensor([0, 1, 2])}] * 6)
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in _trained(model).items())


@pytest.mark.parametrize(
    "source, special", [("checkpoint", None), ("quantised_checkpoint", None), ("resized", ("<s>", "</s>"))]
)
def test_saved_and_loaded_logits_are_identical(source, special, request, tmp_path):
    name = save_checkpoint(tmp_path / "base", byte_tokenizer(special)) if special else request.getfixturevalue(source)
    model, tokenizer = classifier(name)
    losses_of_steps(model, [{**batch(tokenizer), "labels": torch.tensor([0, 1, 2])}] * 2)
    model.eval()
    save_classifier(model, tokenizer, tmp_path / "trained")
    torch.manual_seed(99)  # a head that is drawn anew is another one
    again, its_tokenizer = load_trained(tmp_path / "trained", device="cpu")
    with torch.no_grad():
        assert torch.equal(again(**batch(its_tokenizer)).logits, model(**batch(tokenizer)).logits)
    assert again.get_base_model().config.id2label == dict(enumerate(LABELS)) and not again.training
    assert its_tokenizer.pad_token_id == tokenizer.pad_token_id == again.get_base_model().config.pad_token_id
    assert not _trained(again)
    kept = Path(tmp_path, "trained/adapter_model.safetensors").stat().st_size
    assert kept < 2 * sum(parameter.nbytes for parameter in _trained(model).values())  # no embeddings


def test_a_model_that_is_not_quantised_comes_back_so(checkpoint, tmp_path):
    model, tokenizer = classifier(checkpoint, four_bit=False)
    save_classifier(model.eval(), tokenizer, tmp_path)
    again, _ = load_trained(tmp_path, device="cpu")
    with torch.no_grad():
        assert torch.equal(again(**batch(tokenizer)).logits, model(**batch(tokenizer)).logits)


def _cast_all(model):
    """Adapters and the tables of rotary embeddings, too."""
    return torch.nn.Module.bfloat16(model)


@pytest.mark.parametrize(
    "source, four_bit", [("checkpoint", True), ("checkpoint", False), ("quantised_checkpoint", True)]
)
@pytest.mark.parametrize("before, after", [(prepare_model_for_kbit_training, None), (None, _cast_all)])
def test_weights_that_were_cast_come_back_cast(source, four_bit, before, after, request, tmp_path):
    """`prepare_model_for_kbit_training` makes the first parameter float32, but layers compute in bfloat16 as before."""
    dtype = torch.float32 if after else torch.bfloat16
    model, tokenizer = classifier(request.getfixturevalue(source), adapters=False, dtype=dtype, four_bit=four_bit)
    model = with_adapters(before(model) if before else model)
    model = (after(model) if after else model).eval()
    save_classifier(model, tokenizer, tmp_path)
    again, _ = load_trained(tmp_path, device="cpu")
    found = {name: one.dtype for name, one in again.named_parameters()}
    assert found == {name: one.dtype for name, one in model.named_parameters()}
    with torch.no_grad():
        assert torch.equal(again(**batch(tokenizer)).logits, model(**batch(tokenizer)).logits)
    again, _ = load_trained(tmp_path, dtype=torch.float16, device="cpu")
    assert again.get_base_model().dtype == torch.float16


def test_layers_that_compute_in_another_dtype_are_not_saved(checkpoint, tmp_path):
    model, tokenizer = classifier(checkpoint, dtype=torch.bfloat16)
    model.get_base_model().model.layers[1].mlp.up_proj.base_layer.compute_dtype = torch.float32
    with pytest.raises(
        ValueError,
        match=r"^model must compute in bfloat16, .* got float32 in model\.layers\.1\.mlp\.up_proj\.base_layer; ",
    ):
        save_classifier(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_loaded_to_go_on_training(checkpoint, tmp_path):
    model, tokenizer = classifier(checkpoint, ["a", "b"], MULTI, dtype=torch.bfloat16)
    weigh_classes(model, torch.tensor([0.3, 2.0]))
    save_classifier(model, tokenizer, tmp_path)
    again, _ = load_trained(tmp_path, trainable=True, device="cpu")
    assert again.training and list(_trained(again)) == list(_trained(model))
    config = again.get_base_model().config
    assert config.problem_type == MULTI and again.get_base_model().dtype == torch.bfloat16
    given = {**batch(tokenizer), "labels": torch.ones(3, 2)}
    assert torch.equal(again(**given).loss, model(**given).loss)
    assert {parameter.dtype for parameter in _trained(again).values()} == {torch.float32}


def test_another_dtype_and_another_base_can_be_asked_for(checkpoint, tmp_path):
    model, tokenizer = classifier(checkpoint)
    save_classifier(model, tokenizer, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "/nowhere"}))
    again, _ = load_trained(tmp_path, name=checkpoint, dtype=torch.float16, device="cpu")
    assert again.get_base_model().dtype == torch.float16


def test_checkpointing_changes_no_gradient(checkpoint):
    models = [classifier(checkpoint, adapters=False)[0] for _ in range(2)]
    tokenizer = byte_tokenizer()
    gradients = []
    for model, checkpointing in zip(models, (False, True), strict=True):
        torch.manual_seed(1)
        adapted = with_adapters(model, gradient_checkpointing=checkpointing)
        adapted(**batch(tokenizer), labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append([parameter.grad for parameter in _trained(adapted).values()])
    assert models[1].is_gradient_checkpointing
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task_type": "CAUSAL_LM"}, "task_type must be 'SEQ_CLS' or left out"),
        ({"task_type": None}, "task_type must be 'SEQ_CLS' or left out"),
        ({"target_modules": ["q_proj", "score"]}, "target_modules must be without 'score'"),
        ({"inference_mode": True}, r"model\.score must be trained, got requires_grad"),
    ],
)
def test_options_that_leave_the_head_untrained_are_refused(checkpoint, options, message):
    model, _ = classifier(checkpoint, adapters=False)
    with pytest.raises(ValueError, match=f"^{message}"):
        add_adapters(model, **options)


@pytest.mark.parametrize("initial", ["pissa_niter_4", "corda", "lora_ga"])
def test_initialisations_that_loading_cannot_repeat_are_refused(checkpoint, initial):
    model, _ = classifier(checkpoint, adapters=False, four_bit=False)
    with pytest.raises(ValueError, match=f"^init_lora_weights must leave the base model .*, got '{initial}'"):
        add_adapters(model, init_lora_weights=initial)


def test_other_models_are_refused(checkpoint, tmp_path):
    model, tokenizer = classifier(checkpoint, adapters=False)
    with pytest.raises(TypeError, match=r"^model must be what add_adapters returns, got a LlamaForSequence"):
        save_classifier(model, tokenizer, tmp_path)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"^model must be what load_classifier returns, got a PeftModel"):
        add_adapters(adapted)
    adapted.add_adapter("other", LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    adapted.set_adapter("other")
    with pytest.raises(ValueError, match=r"^model must have the adapter 'default' active, .*, got other"):
        save_classifier(adapted, tokenizer, tmp_path)
    adapted.set_adapter("default")
    tokenizer.pad_token = "</s>"
    with pytest.raises(ValueError, match=r"^tokenizer must pad with token 2, the model's, got 1"):
        save_classifier(adapted, tokenizer, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^folder must be one that save_classifier wrote"):
        load_trained(tmp_path)


def test_modules_that_peft_chooses_are_adapted_beside_the_head(checkpoint):
    model, _ = classifier(checkpoint, adapters=False)
    adapted = add_adapters(model, target_modules=None)
    kinds = {name.split(".")[-1] for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    assert kinds == {"q_proj", "v_proj"}

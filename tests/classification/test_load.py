"""A classifier has the checkpoint's weights under a head in float32, whatever the checkpoint says, or is refused."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.classification.models import LABELS, TEXTS, batch, byte_tokenizer, classifier, config, save_quantised
from unsloth_puzzles.classification.load import _quantization, load_classifier
from unsloth_puzzles.classification.losses import MULTI, REGRESSION


def _quantised_layers(model):
    return {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.parametrize("source", ["checkpoint", "quantised_checkpoint"])
def test_all_linear_layers_but_the_head_are_quantised(source, request):
    model, _ = classifier(request.getfixturevalue(source), adapters=False)
    assert _quantised_layers(model) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert type(model.score) is torch.nn.Linear and model.score.weight.dtype == torch.float32
    assert 0.1 < model.score.weight.std() < 0.3  # drawn: initializer_range is 0.2
    assert model.training


def test_the_head_joins_the_skipped_modules_of_a_checkpoint(quantised_checkpoint):
    config = AutoConfig.from_pretrained(quantised_checkpoint)
    assert _quantization(config, True, torch.float16) is None
    assert config.quantization_config["llm_int8_skip_modules"] == ["lm_head", "multi_modal_projector", "score"]


def test_transformers_alone_quantises_the_head_of_such_a_checkpoint(quantised_checkpoint):
    """If this fails, transformers has mended it, and the mended list of skipped modules is not needed any more."""
    with pytest.raises(NotImplementedError, match="'Byte'"):
        AutoModelForSequenceClassification.from_pretrained(quantised_checkpoint, num_labels=3)


def test_both_sources_give_the_same_weights(checkpoint, quantised_checkpoint):
    models = [classifier(source, adapters=False)[0] for source in (checkpoint, quantised_checkpoint)]
    first, second = (dict(model.named_parameters()) for model in models)
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    _, tokenizer = classifier(checkpoint, adapters=False)
    logits = [model.eval()(**batch(tokenizer)).logits for model in models]
    assert torch.equal(*logits)  # and so is the dtype that they compute in, though one says bfloat16


def test_compute_dtype_is_the_one_asked_for(quantised_checkpoint):
    model, _ = classifier(quantised_checkpoint, adapters=False, dtype=torch.float16)
    assert {module.compute_dtype for module in model.modules() if isinstance(module, Linear4bit)} == {torch.float16}
    assert model.score.weight.dtype == torch.float32 and model.model.norm.weight.dtype == torch.float16


def test_labels_and_problem_are_in_the_config(checkpoint):
    model, _ = classifier(checkpoint, ["b", "a"], MULTI, adapters=False)
    assert model.config.id2label == {0: "b", 1: "a"} and model.config.label2id == {"b": 0, "a": 1}
    assert model.config.num_labels == 2 == model.num_labels == model.score.out_features
    assert model.config.problem_type == MULTI
    assert classifier(checkpoint, ["age"], REGRESSION, adapters=False)[0].score.out_features == 1


def test_without_quantisation_results_are_those_of_transformers(checkpoint):
    model, tokenizer = classifier(checkpoint, adapters=False, four_bit=False)
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3, dtype=torch.float32)
    plain.config.pad_token_id = tokenizer.pad_token_id
    assert _quantised_layers(model) == set()
    assert torch.equal(plain.score.weight, model.score.weight)
    logits = [one.eval()(**batch(tokenizer)).logits for one in (model, plain)]
    assert (logits[0] - logits[1]).norm() <= 1e-6 * logits[1].norm()


def test_a_trained_classifier_keeps_its_head_and_its_labels(checkpoint, tmp_path):
    model, tokenizer = classifier(checkpoint, adapters=False, four_bit=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = classifier(str(tmp_path), adapters=False, four_bit=False)
    assert torch.equal(again.score.weight, model.score.weight)
    with pytest.raises(ValueError, match=r"^labels must be those of the checkpoint, a LlamaForSequenceCl.*; for other"):
        load_classifier(str(tmp_path), ["red", "blue", "green"])
    with pytest.raises(ValueError, match=r"^problem_type must be the checkpoint's, single_label_classification, got"):
        load_classifier(str(tmp_path), LABELS, problem_type=MULTI)


@pytest.mark.parametrize(
    "labels, problem_type, error, message",
    [
        ("red", None, TypeError, "labels must be a list of names, one for each class, got 'red'$"),
        ([0, 1], None, TypeError, r"labels must be a list of names, one for each class, got \[0, 1\]$"),
        (2, None, TypeError, r"labels must be a list of names, one for each class, got 2$"),
        ({"red"}, None, TypeError, r"labels must be a list of names, one for each class, got \{'red'\}$"),
        ({"red": 0}, None, TypeError, r"labels must be a list of names, one for each class, got \{'red': 0\}$"),
        (["a"], None, ValueError, "labels must be at least 2 different names for single_label"),
        (["a", "a"], MULTI, ValueError, "labels must be at least 1 different names for multi_label"),
        ([], REGRESSION, ValueError, "labels must be at least 1"),
        (LABELS, "ranking", ValueError, "problem_type must be one of single_label_classification, .*, got 'ranking'"),
    ],
)
def test_bad_labels_are_refused(checkpoint, labels, problem_type, error, message):
    with pytest.raises(error, match=f"^{message}"):
        load_classifier(checkpoint, labels, **({"problem_type": problem_type} if problem_type else {}))


def test_other_quantisations_are_refused(checkpoint, quantised_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"^four_bit must be True for a checkpoint that is quantised"):
        load_classifier(quantised_checkpoint, LABELS, four_bit=False)
    file = Path(checkpoint, "config.json")
    given = {**json.loads(file.read_text()), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(
        ValueError, match=r"^name must be a checkpoint in 16 bits or in bitsandbytes' 4 bits, got .*gptq"
    ):
        load_classifier(str(tmp_path), LABELS)
    with pytest.raises(ValueError, match=r"^options must be others, got num_labels, which load_classifier sets itself"):
        load_classifier(checkpoint, LABELS, num_labels=3)


def test_an_architecture_with_another_head_is_refused(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=259, num_labels=2, **small)).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"^model must be a decoder for sequence .*, got BertForSequenceCl"):
        load_classifier(str(tmp_path), ["LABEL_0", "LABEL_1"], four_bit=False, tokenizer=byte_tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3"])
def test_families(family, tmp_path):
    import transformers

    tokenizer = byte_tokenizer()
    given = {**config(tokenizer).to_dict(), "head_dim": 16, "pad_token_id": 2}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "head_dim", "pad_token_id")  # fmt: skip
    small = getattr(transformers, f"{family}Config")(**{name: given[name] for name in names})
    getattr(transformers, f"{family}ForCausalLM")(small).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = classifier(str(tmp_path))
    loss = model(**batch(tokenizer), labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert loss.isfinite() and model.base_model.model.score.weight.grad.norm() > 0
    left = byte_tokenizer(padding_side="left")
    model.eval()
    with torch.no_grad():
        right, left = (model(**batch(one, TEXTS)).logits for one in (tokenizer, left))
    assert (right - left).norm() <= 1e-5 * right.norm()


def test_quantised_otherwise_in_four_bits_is_loaded_as_it_is(checkpoint, tmp_path):
    model, _ = classifier(save_quantised(checkpoint, tmp_path, bnb_4bit_quant_type="fp4"), adapters=False)
    kinds = {module.weight.quant_state.quant_type for module in model.modules() if isinstance(module, Linear4bit)}
    assert kinds == {"fp4"}

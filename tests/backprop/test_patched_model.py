"""use_memory_efficient_loss on a model: its own loss and gradients without logits, and all else its own."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from tests.backprop.patched import SMALL, assert_close, batch, gradients, llama, reference
from unsloth_puzzles.backprop import patched_loss as hook
from unsloth_puzzles.backprop.linear import memory_efficient_linear
from unsloth_puzzles.backprop.losses import cross_entropy, z_loss
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss


@pytest.mark.parametrize("num_items_in_batch", [None, 23, torch.tensor(23)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("skip_ignored", [False, True], ids=["all rows", "labelled rows"])
def test_loss_and_gradients_are_the_models_own(num_items_in_batch, tied, skip_ignored):
    model = llama(tie_word_embeddings=tied).train()
    inputs = {**batch(), "num_items_in_batch": num_items_in_batch}
    own, truth = gradients(model, **inputs), reference(model, **inputs)
    with use_memory_efficient_loss(model, chunk_size=5, skip_ignored=skip_ignored) as patch:
        ours = gradients(model, **inputs)
        assert model(**inputs).logits is None and patch.calls == 2
    assert_close(ours, truth)
    assert_close(ours, own, 1e-6)
    assert_close(gradients(model, **inputs), own, 0)
    assert patch.calls == 2


@pytest.mark.parametrize(
    "kind, config",
    [
        (Gemma2ForCausalLM, Gemma2Config(**SMALL, final_logit_softcapping=2.0)),
        (GraniteForCausalLM, GraniteConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logits_scaling=3.0)),
        (CohereForCausalLM, CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logit_scale=0.3)),
    ],
    ids=["soft cap", "divided", "multiplied"],
)
def test_soft_cap_and_scale_of_the_config_are_honoured(kind, config):
    torch.manual_seed(0)
    model = kind(config).double().train()
    theirs = reference(model, **batch())
    with use_memory_efficient_loss(model, chunk_size=7):
        assert_close(gradients(model, **batch()), theirs)
    changed = copy.deepcopy(model)
    for name in ("final_logit_softcapping", "logits_scaling"):
        if getattr(config, name, None):
            setattr(changed.config, name, 2 * getattr(config, name))
    if hasattr(changed, "logit_scale"):
        changed.logit_scale = 0.6
    assert (changed(**batch()).loss - theirs[0]).abs() > 1e-3 * theirs[0]  # so the test can tell


def test_a_config_that_names_a_scale_the_model_does_not_apply_is_seen_through():
    model = llama(logit_scale=0.5)
    theirs = reference(model, **batch())
    with use_memory_efficient_loss(model):
        assert_close(gradients(model, **batch()), theirs)


@pytest.mark.parametrize("adapter", ["lora", "lora on the head", "head saved", "prompt"])
def test_peft(adapter):
    lora = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    configs = {
        "lora": LoraConfig(target_modules=["q_proj", "down_proj"], **lora),
        "lora on the head": LoraConfig(target_modules=["q_proj", "lm_head"], **lora),
        "head saved": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **lora),
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    model = get_peft_model(llama(tie_word_embeddings=False), configs[adapter]).double().train()
    theirs = reference(model, **batch())
    with use_memory_efficient_loss(model, chunk_size=6) as patch:
        assert_close(gradients(model, **batch()), theirs)
        assert patch.calls == 1


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_a_tied_head_that_peft_saves(saved):
    """With `ensure_weight_tying` its copy of the head has in_features and out_features swapped."""
    lora = LoraConfig(
        target_modules=["q_proj"], modules_to_save=[saved], ensure_weight_tying=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(llama(tie_word_embeddings=True), lora).double().train()
    head = model.get_base_model().get_output_embeddings()
    assert head.weight.shape == (head.in_features, head.out_features)  # so the test can tell
    theirs = reference(model, **batch())
    with use_memory_efficient_loss(model, chunk_size=6):
        assert_close(gradients(model, **batch()), theirs)


@pytest.mark.parametrize("offloaded", ["model.embed_tokens", "model.layers.0", "lm_head", ""])
def test_offloaded_output_embeddings_are_refused(offloaded):
    from accelerate.hooks import attach_align_device_hook

    model = llama(tie_word_embeddings=False).train()
    theirs = reference(model, **batch())[0]
    part = model.get_submodule(offloaded)
    weights = {name: value.clone() for name, value in part.state_dict().items()}
    attach_align_device_hook(part, execution_device=torch.device("cpu"), offload=True, weights_map=weights)
    assert any(parameter.is_meta for parameter in part.parameters())
    if offloaded in ("lm_head", ""):
        with pytest.raises(
            ValueError, match="must keep its output embeddings on a device, got LlamaForCausalLM with offloaded"
        ):
            use_memory_efficient_loss(model)
    else:
        with use_memory_efficient_loss(model):
            assert (model(**batch()).loss - theirs).abs() <= 1e-12 * theirs


def test_accelerates_hooks_stay_around_our_forward():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, seen = llama().train(), []

    class Hook(ModelHook):
        def post_forward(self, module, output):
            seen.append(output.logits)
            return output

    theirs = reference(model, **batch())
    add_hook_to_module(model, Hook())
    with use_memory_efficient_loss(model):
        seen.clear()
        assert_close(gradients(model, **batch()), theirs)
        assert seen == [None]
    model(**batch())
    assert seen[-1] is not None


def test_generation_inference_and_signature_are_the_models_own():
    model = llama().eval()
    ids = batch()["input_ids"]
    logits, generated = model(ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)
    state = torch.get_rng_state()
    with use_memory_efficient_loss(model) as patch:
        assert torch.equal(torch.get_rng_state(), state) and not any(m.training for m in model.modules())
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)
        assert patch.calls == 0
    assert "forward" not in vars(model)
    assert type(pickle.loads(pickle.dumps(model))) is LlamaForCausalLM


def test_patch_leaves_random_states_of_all_devices(monkeypatch):
    """With dropout in the model, which the probe runs in train mode."""
    model = llama(attention_dropout=0.5)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: 1 / 0)
    state = torch.get_rng_state()
    with use_memory_efficient_loss(model):
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
def test_patch_leaves_random_states_of_gpus_it_is_not_on():
    """Each GPU's next numbers are those without a patch, the model's GPU and the others alike."""
    gpus = range(torch.cuda.device_count())
    model = llama(attention_dropout=0.5).cuda()
    torch.cuda.manual_seed_all(3)
    states = [torch.cuda.get_rng_state(gpu) for gpu in gpus]
    for device in ("cuda", "cpu"):
        with use_memory_efficient_loss(model.to(device)):
            assert all(torch.equal(torch.cuda.get_rng_state(gpu), states[gpu]) for gpu in gpus)


def test_positional_arguments_tuples_and_shifted_labels():
    model, inputs = llama().train(), batch()
    expected = reference(model, **inputs)[0]
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    with use_memory_efficient_loss(model):
        by_position = model(inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"])
        assert torch.allclose(by_position.loss, expected, rtol=1e-12)
        assert torch.allclose(model(**inputs, return_dict=False)[0], expected, rtol=1e-12)
        taken = model(inputs["input_ids"], inputs["attention_mask"], shift_labels=shifted).loss
        assert torch.allclose(taken, expected, rtol=1e-12)


@pytest.mark.parametrize("ignore_index", [0, -1, 255])
@pytest.mark.parametrize("num_items_in_batch", [None, torch.tensor(5)], ids=["mean", "tensor"])
def test_ignore_index_of_the_call(ignore_index, num_items_in_batch):
    model, inputs = llama(torch.float32).train(), batch()
    usual = gradients(model, **inputs, num_items_in_batch=num_items_in_batch)
    inputs["labels"][inputs["labels"] == -100] = ignore_index
    options = {"ignore_index": ignore_index, "num_items_in_batch": num_items_in_batch}
    own = gradients(model, **inputs, **options)
    with use_memory_efficient_loss(model, chunk_size=7, skip_ignored=ignore_index == 0):
        assert_close(gradients(model, **inputs, **options), own, 1e-6)
        shifted = F.pad(inputs["labels"], (0, 1), value=ignore_index)[:, 1:]
        assert_close(gradients(model, **{**inputs, "labels": None}, shift_labels=shifted, **options), own, 1e-6)
        with pytest.raises(ValueError, match=r"labels must be .*, got -10"):
            model(**batch(), ignore_index=ignore_index)  # -100 counts then, and is no class
        with pytest.raises(TypeError, match="ignore_index must be an int, got None"):
            model(**batch(), ignore_index=None)
    assert_close(own, usual, 1e-6)


def test_skipped_rows_are_not_projected_nor_looked_at(monkeypatch):
    """Hidden states that no label belongs to may be NaN; predictions are those of all rows."""
    model, inputs = llama().train(), batch()
    truth, projected = reference(model, **inputs), []
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]

    def counted(hidden_states, *arguments, **options):
        projected.append(hidden_states.shape[:-1].numel())
        return memory_efficient_linear(hidden_states, *arguments, **options)

    monkeypatch.setattr(hook, "memory_efficient_linear", counted)
    with use_memory_efficient_loss(model, predictions=True, skip_ignored=True):
        assert_close(gradients(model, **inputs), truth)
        assert projected == [(shifted != -100).sum()] and projected[0] < 0.3 * shifted.numel()
        expected = model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.argmax(
            -1
        )
        ours = model(**inputs)
        assert torch.equal(ours.predicted_ids, expected)
        poison = torch.where(shifted == -100, torch.nan, 0.0)[..., None]
        model.model.norm.register_forward_hook(lambda module, given, output: output + poison)
        assert torch.equal(model.train()(**inputs).loss, ours.loss)
    assert projected[1:3] == [projected[0], shifted.numel()]


@pytest.mark.parametrize("normalizer", [None, torch.tensor(7)], ids=["mean", "tensor"])
def test_a_batch_without_labels_trains_nothing(normalizer):
    model, inputs = llama().train(), batch()
    inputs["labels"][:] = -100
    found = []
    for skip_ignored in (False, True):
        with use_memory_efficient_loss(model, skip_ignored=skip_ignored):
            found.append(gradients(model, **inputs, num_items_in_batch=normalizer))
    (loss, slopes), (other, others) = found
    assert torch.equal(loss, other) or (loss.isnan() and other.isnan())
    assert slopes.keys() == others.keys() and len(slopes) == len(list(model.parameters()))
    assert all(torch.equal(one, others[name]) and not one.any() for name, one in slopes.items())


def test_a_loss_that_counts_rows_without_a_label_is_not_skipped():
    def entropy_too(logits, labels):
        return cross_entropy(logits, labels) + 0.1 * logits.square().sum()

    with pytest.raises(ValueError, match=r"skip_ignored must be False with this loss, which .* changes by \d"):
        use_memory_efficient_loss(llama(), entropy_too, skip_ignored=True)
    with pytest.raises(TypeError, match="skip_ignored must be True or False, got 'auto'"):
        use_memory_efficient_loss(llama(), skip_ignored="auto")


def test_another_loss_and_a_compiled_one():
    model, inputs = llama(torch.float32).train(), batch()
    logits, labels = model(**inputs).logits[:, :-1], inputs["labels"][:, 1:]
    smoothed = F.cross_entropy(logits.transpose(1, 2), labels, label_smoothing=0.1)
    with use_memory_efficient_loss(model, partial(cross_entropy, label_smoothing=0.1), compile=True, chunk_size=8):
        assert (model(**inputs).loss - smoothed).abs() <= 1e-6 * smoothed
    with use_memory_efficient_loss(model, partial(z_loss, coefficient=0.5)):
        assert model(**inputs).loss > 1.5 * F.cross_entropy(logits.transpose(1, 2), labels)


def test_other_outputs_are_the_models_own():
    model, inputs = llama().train(), batch()
    options = {"output_hidden_states": True, "use_cache": True}
    own = model(**inputs, **options)
    with use_memory_efficient_loss(model):
        ours = model(**inputs, **options)
    for mine, theirs in zip(ours.hidden_states, own.hidden_states, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(ours.past_key_values.layers[0].keys, own.past_key_values.layers[0].keys)


@pytest.mark.parametrize("mutation", ["not shifted", "normaliser ignored", "cap forgotten"])
def test_these_tests_can_tell(mutation, monkeypatch):
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0)).double().train()
    theirs = reference(model, **batch(), num_items_in_batch=31)

    def mutant(hidden_states, linear, labels, function, *, normalizer, **options):
        if mutation == "not shifted":
            labels = labels.roll(1, -1)
        elif mutation == "normaliser ignored":
            normalizer = "labels"
        else:
            function = cross_entropy
        return memory_efficient_linear(hidden_states, linear, labels, function, normalizer=normalizer, **options)

    monkeypatch.setattr(hook, "memory_efficient_linear", mutant)
    with use_memory_efficient_loss(model):
        ours = gradients(model, **batch(), num_items_in_batch=31)
    with pytest.raises(AssertionError):
        assert_close(ours, theirs)

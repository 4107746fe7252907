"""The hook: the model's own loss and gradients without logits, under every trainer; and what it refuses, by name."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import CPTConfig, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from benchmarks.models import tiny_llama_config
from unsloth_puzzles.backprop import trainer as hook
from unsloth_puzzles.backprop.linear import memory_efficient_linear
from unsloth_puzzles.backprop.losses import cross_entropy, z_loss
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss

VOCABULARY = 256
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "initializer_range": 0.5,  # logits large enough that a forgotten cap or scale shows
}


def llama(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = tiny_llama_config(VOCABULARY)
    for name, value in changes.items():
        setattr(config, name, value)
    return LlamaForCausalLM(config).to(dtype)


def batch(rows=3, length=17, seed=1):
    """Right-padded sequences of several lengths, their prompts masked: 3, 5, 7, ... labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=generator)
    labels, attention_mask = torch.full_like(ids, -100), torch.ones_like(ids)
    for row in range(rows):
        end = length - 2 * row
        attention_mask[row, end:] = 0
        labels[row, end - 4 - row : end] = ids[row, end - 4 - row : end]
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(model, labels, num_items_in_batch=None, **inputs):
    """Loss and gradients of full logits in the model's dtype; transformers would round float64 logits to float32."""
    model.zero_grad()
    logits = model(**inputs).logits[:, -labels.shape[1] :]  # without the virtual tokens of prompt tuning
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
    loss = loss / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, theirs, tolerance=1e-12):
    assert (ours[0] - theirs[0]).abs() <= tolerance * theirs[0].abs()
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    largest = max(gradient.norm() for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():  # some, such as those of key biases, are zero but for rounding
        assert (ours[1][name] - gradient).norm() <= tolerance * (gradient.norm() + 1e-3 * largest), name


@pytest.mark.parametrize("num_items_in_batch", [None, 23, torch.tensor(23)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_the_models_own(num_items_in_batch, tied):
    model = llama(tie_word_embeddings=tied).train()
    inputs = {**batch(), "num_items_in_batch": num_items_in_batch}
    own, truth = gradients(model, **inputs), reference(model, **inputs)
    with use_memory_efficient_loss(model, chunk_size=5) as patch:
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


def test_a_model_that_accelerate_has_put_under_autocast_stays_there(tmp_path):
    """accelerate wraps the forward once, at the first training or evaluation; the patch comes after it."""
    model, dtypes = llama(torch.float32), []
    trainer = Trainer(model, arguments(tmp_path, bf16=True), train_dataset=Data(12), eval_dataset=Data(5))
    trainer.train()
    own = trainer.evaluate()["eval_loss"]
    model.lm_head.register_forward_hook(lambda head, inputs, logits: dtypes.append(logits.dtype))
    with use_memory_efficient_loss(trainer) as patch:
        dtypes.clear()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(own, rel=1e-6)
        trainer.train()
    assert patch.calls == 7 and set(dtypes) == {torch.bfloat16}
    dtypes.clear()
    assert trainer.evaluate()["eval_loss"] != own and set(dtypes) == {torch.bfloat16}


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
    with use_memory_efficient_loss(model, chunk_size=7):
        assert_close(gradients(model, **inputs, **options), own, 1e-6)
        shifted = F.pad(inputs["labels"], (0, 1), value=ignore_index)[:, 1:]
        assert_close(gradients(model, **{**inputs, "labels": None}, shift_labels=shifted, **options), own, 1e-6)
        with pytest.raises(ValueError, match=r"labels must be .*, got -10"):
            model(**batch(), ignore_index=ignore_index)  # -100 counts then, and is no class
        with pytest.raises(TypeError, match="ignore_index must be an int, got None"):
            model(**batch(), ignore_index=None)
    assert_close(own, usual, 1e-6)


def test_another_loss_and_a_compiled_one():
    model, inputs = llama(torch.float32).train(), batch()
    logits, labels = model(**inputs).logits[:, :-1], inputs["labels"][:, 1:]
    smoothed = F.cross_entropy(logits.transpose(1, 2), labels, label_smoothing=0.1)
    with use_memory_efficient_loss(model, partial(cross_entropy, label_smoothing=0.1), compile=True, chunk_size=8):
        assert (model(**inputs).loss - smoothed).abs() <= 1e-6 * smoothed
    with use_memory_efficient_loss(model, partial(z_loss, coefficient=0.5)):
        assert model(**inputs).loss > 1.5 * F.cross_entropy(logits.transpose(1, 2), labels)


class Data(torch.utils.data.Dataset):
    """Sequences with 1 to 15 labels each."""

    def __init__(self, size, length=16):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(2, VOCABULARY, (size, length), generator=generator)
        self.prompts = torch.randint(1, length - 1, (size,), generator=generator).tolist()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        labels = self.ids[index].clone()
        labels[: self.prompts[index]] = -100
        return {"input_ids": self.ids[index], "attention_mask": torch.ones_like(labels), "labels": labels}


def arguments(folder, kind=TrainingArguments, **options):
    return kind(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], save_strategy="no", seed=0, use_cpu=True, disable_tqdm=True,
        **options,
    )  # fmt: skip


def logged(trainer, *names):
    return [[entry[name] for name in names] for entry in trainer.state.log_history if names[0] in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_with_gradient_accumulation_trains_as_with_logits(tmp_path, checkpointing):
    curves, weights = [], []
    for patched in (False, True):
        model = llama(torch.float64)
        trainer = Trainer(model, arguments(tmp_path, gradient_checkpointing=checkpointing), train_dataset=Data(12))
        assert trainer.model_accepts_loss_kwargs
        if patched:
            with use_memory_efficient_loss(trainer, chunk_size=6) as patch:
                trainer.train()
            assert patch.calls == 6 and not patch.active
        else:
            trainer.train()
        curves.append(logged(trainer, "loss", "grad_norm"))
        weights.append(model.model.layers[0].mlp.up_proj.weight.detach())
    assert len(curves[0]) == 3
    assert torch.allclose(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-6, atol=0)
    assert (weights[1] - weights[0]).norm() <= 1e-5 * weights[0].norm()


def test_the_patch_may_come_before_the_trainer_and_ends_under_mixed_precision(tmp_path):
    model = llama(torch.float32)
    with use_memory_efficient_loss(model) as patch:
        trainer = Trainer(model, arguments(tmp_path, bf16=True), train_dataset=Data(12))
        assert trainer.model_accepts_loss_kwargs
        trainer.train()  # accelerate has wrapped our forward by now
    assert patch.calls == 6 and model(**batch()).logits is not None
    assert patch.calls == 6


def test_evaluation_with_metrics_that_need_no_logits(tmp_path):
    model, data, seen = llama(torch.float32), Data(5), []

    def metrics(evaluated):
        ids, log_probs = evaluated.predictions
        labels = evaluated.label_ids[:, 1:]
        valid = labels != -100
        seen.append(-log_probs[:, :-1][valid].mean())
        return {"accuracy": (ids[:, :-1] == labels)[valid].mean()}

    logits = model(**torch.utils.data.default_collate(list(data))).logits[:, :-1]
    labels = torch.stack([entry["labels"] for entry in data])[:, 1:]
    mean = F.cross_entropy(logits.transpose(1, 2), labels).item()
    right = (logits.argmax(-1) == labels)[labels != -100].float().mean().item()
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=data, compute_metrics=metrics)
    with use_memory_efficient_loss(trainer, predictions=True):
        found = trainer.evaluate()
    assert seen[0] == pytest.approx(mean, rel=1e-5) and found["eval_accuracy"] == pytest.approx(right)
    plain = Trainer(model, arguments(tmp_path, per_device_eval_batch_size=5), eval_dataset=data)
    with use_memory_efficient_loss(plain):
        assert plain.evaluate()["eval_loss"] == pytest.approx(mean, rel=1e-5)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft_trainer_loses_nothing(tmp_path, tokenizer, loss_type):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = [{"input_ids": entry["input_ids"].tolist(), "labels": entry["labels"].tolist()} for entry in Data(12)]
    histories = []
    for patched in (False, True):
        config = arguments(tmp_path, SFTConfig, loss_type=loss_type, bf16=False, gradient_checkpointing=False)
        trainer = SFTTrainer(
            llama(torch.float32), config, train_dataset=Dataset.from_list(data), processing_class=tokenizer
        )
        theirs = vars(trainer.model)["forward"]
        if patched:
            with use_memory_efficient_loss(trainer, chunk_size=5) as patch:
                trainer.train()
            assert patch.calls == 6 and vars(trainer.model)["forward"] is theirs
        else:
            trainer.train()
        histories.append(logged(trainer, "loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"))
    assert len(histories[0]) == 3
    assert torch.allclose(torch.tensor(histories[1]), torch.tensor(histories[0]), rtol=2e-5, atol=0)


def test_sft_trainer_needs_the_trainer_itself(tmp_path, tokenizer):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": [5, 6, 7]}])
    config = arguments(tmp_path, SFTConfig, bf16=False)
    trainer = SFTTrainer(llama(torch.float32), config, train_dataset=data, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"fused head of a TRL trainer, got .*; pass that trainer"):
        use_memory_efficient_loss(trainer.model)
    with pytest.raises(ValueError, match="loss must be cross_entropy with SFTTrainer"):
        use_memory_efficient_loss(trainer, z_loss)
    with pytest.raises(ValueError, match="predictions must be False with SFTTrainer"):
        use_memory_efficient_loss(trainer, predictions=True)


def test_settings_of_the_loss_that_change_after_the_patch_are_refused():
    model, given = llama(), {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4).long()}
    with use_memory_efficient_loss(model):
        before = model(**given).loss
        model.config.final_logit_softcapping = 2.0
        with pytest.raises(ValueError, match=r"^final_logit_softcapping must be as when the model was patched"):
            model(**given)
        model.config.final_logit_softcapping = None
        own, model.loss_function = model.loss_function, partial(F.cross_entropy, reduction="sum")
        with pytest.raises(ValueError, match=r"^loss_function must be as when the model was patched"):
            model(**given)
        model.loss_function = own
        assert torch.equal(model(**given).loss, before)


def test_models_and_trainers_with_another_loss_are_refused(tmp_path):
    small = {k: v for k, v in SMALL.items() if k != "head_dim"}
    with pytest.raises(TypeError, match="must be a PreTrainedModel, a PEFT model or a Trainer, got Linear"):
        use_memory_efficient_loss(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="a head on its backbone, got LlamaModel"):
        use_memory_efficient_loss(LlamaModel(tiny_llama_config()))
    with pytest.raises(TypeError, match="a head on its backbone, got LlamaForSequenceClassification"):
        use_memory_efficient_loss(LlamaForSequenceClassification(tiny_llama_config()))
    t5 = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(ValueError, match="got an encoder-decoder, T5ForConditionalGeneration"):
        use_memory_efficient_loss(T5ForConditionalGeneration(t5))
    other = llama()
    other.loss_function = partial(F.cross_entropy, reduction="sum")
    with pytest.raises(ValueError, match=r"loss_function must be ForCausalLMLoss, got .*cross_entropy.* of Llama"):
        use_memory_efficient_loss(other)
    minicpm = MiniCPM3Config(
        **{**small, "num_key_value_heads": 2},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        dim_model_base=8,
    )
    with pytest.raises(ValueError, match=r"must do no more .* \(logits_scaling, final_logit_soft"):
        use_memory_efficient_loss(MiniCPM3ForCausalLM(minicpm))
    cpt = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1])
    with pytest.raises(ValueError, match=r"got PEFT's CPT \('default'\), which needs logits"):
        use_memory_efficient_loss(get_peft_model(llama(), cpt))
    mixtral = MixtralForCausalLM(MixtralConfig(**small, num_local_experts=2, output_router_logits=False))
    with use_memory_efficient_loss(mixtral), pytest.raises(ValueError, match="output_router_logits must be False"):
        mixtral(**batch(), output_router_logits=True)
    with use_memory_efficient_loss(mixtral):
        mixtral.config.output_router_logits = True
        with pytest.raises(ValueError, match="output_router_logits must be False"):
            mixtral(**batch())
        assert mixtral(**batch(), output_router_logits=False).loss > 0
    with pytest.raises(ValueError, match="output_router_logits must be False"):
        use_memory_efficient_loss(mixtral)
    with use_memory_efficient_loss(other := llama()) as patch:
        with pytest.raises(ValueError, match="must not be patched, got a LlamaForCausalLM"):
            use_memory_efficient_loss(other)
        with pytest.raises(ValueError, match="fused_lm_head must be None"):
            other(**batch(), fused_lm_head=True)
        for kept in (1, torch.tensor([0, 1])):
            with pytest.raises(ValueError, match="logits_to_keep must be 0 with labels"):
                other(**batch(), logits_to_keep=kept)
        patch.undo()
    smoothing = Trainer(llama(), arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match=r"label_smoothing_factor must not be set, got .* needs the logits"):
        use_memory_efficient_loss(smoothing)
    custom = Trainer(llama(), arguments(tmp_path), compute_loss_func=lambda *_: 0)
    with pytest.raises(ValueError, match=r"compute_loss_func must not be set, got .* needs the logits"):
        use_memory_efficient_loss(custom)
    metrics = Trainer(llama(), arguments(tmp_path), compute_metrics=lambda evaluated: {})
    with pytest.raises(
        ValueError,
        match=r"compute_metrics must not be set, got .*needs the logits.* pass predictions=True, and compute_metr",
    ):
        use_memory_efficient_loss(metrics)
    metrics = Trainer(llama(), arguments(tmp_path), preprocess_logits_for_metrics=lambda logits, labels: logits)
    with pytest.raises(
        ValueError,
        match=r"preprocess_logits_for_metrics must not be set, got .*needs the logits.* take it away and pass pred",
    ):
        use_memory_efficient_loss(metrics, predictions=True)
    with pytest.raises(ValueError, match=r"^model_init must be None.*make the Trainer with model=model_init\(\)"):
        use_memory_efficient_loss(Trainer(args=arguments(tmp_path), model_init=lambda: llama()))


def test_a_patch_that_computed_nothing_says_so(tmp_path):
    """A Trainer with `model_init` trains another model than the one that it had."""
    trainer = Trainer(args=arguments(tmp_path), model_init=lambda: llama(torch.float32), train_dataset=Data(12))
    text = "no loss was computed by it: LlamaForCausalLM was not called with labels"
    with pytest.warns(UserWarning, match=text), use_memory_efficient_loss(trainer.model):
        trainer.train()


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


def test_data_parallel_is_refused_by_name():
    model = llama()
    with pytest.raises(TypeError, match=r"^model must be one model on one GPU, got an nn\.DataParallel"):
        use_memory_efficient_loss(torch.nn.DataParallel(model))
    trainer = Trainer(model, TrainingArguments("unused", report_to=[], use_cpu=True))
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"^args\.n_gpu must be 1, got 2.*CUDA_VISIBLE_DEVICES"):
        use_memory_efficient_loss(trainer)
    trainer.args._n_gpu = 1
    with use_memory_efficient_loss(trainer) as patch:
        assert patch.active

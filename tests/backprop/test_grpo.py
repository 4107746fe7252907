"""The GRPO trainer: as full logits in float64, as TRL's own head in float32; what it refuses; the script."""

import copy
from functools import cache, partial

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaForCausalLM, Qwen3MoeConfig
from trl import GRPOTrainer

from benchmarks.backprop.grpo import (
    FullLogitsGRPOTrainer,
    make_trainer,
    tiny_tokenizer,
    train,
    vowel_share,
    whole_step,
)
from benchmarks.backprop.grpo_grid import step
from benchmarks.backprop.grpo_head import head_only
from benchmarks.models import tiny_llama_config
from unsloth_puzzles.attention.models import register
from unsloth_puzzles.backprop import grpo
from unsloth_puzzles.backprop.grpo import MemoryEfficientGRPOTrainer, default_keep_logits

VOCAB, PROMPT, COMPLETION, SEQUENCES = 131, 5, 7, 8
CHUNK = 6  # rows: many chunks, the last one ragged
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
TIGHT = {torch.float32: 1e-5, torch.float64: 1e-10}
Ours = partial(MemoryEfficientGRPOTrainer, chunk_size=CHUNK, compile=False)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "pad_token_id": 2,
}
tokenizer = cache(tiny_tokenizer)


def llama(dtype=torch.float32, vocab=VOCAB):
    torch.manual_seed(0)
    return spread(LlamaForCausalLM(tiny_llama_config(vocab)).to(dtype))


def spread(model):
    """Weights larger than a fresh model's: logits that differ, so that temperature, caps and scales matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def trainer_of(make, model, folder, **settings):
    settings = {"per_device_train_batch_size": SEQUENCES, "temperature": 0.7, "use_cpu": True, **settings}
    trainer = make_trainer(make, model, tokenizer(), vowel_share, folder, max_completion_length=COMPLETION, **settings)
    trainer.model.train()
    return trainer


def batch(dtype=torch.float32):
    """What the trainer prepares: prompts padded on the left, completions on the right, ratios far enough to clip."""
    generator = torch.Generator().manual_seed(1)
    ids = partial(torch.randint, 3, VOCAB, generator=generator)
    noise = lambda: 0.5 * torch.randn(SEQUENCES, COMPLETION, generator=generator, dtype=torch.float64)  # noqa: E731
    lengths = torch.tensor([7, 1, 5, 7, 2, 3, 6, 4])
    inputs = {
        "prompt_ids": ids((SEQUENCES, PROMPT)),
        "prompt_mask": (torch.arange(PROMPT) >= torch.tensor([0, 1, 2, 3, 0, 4, 0, 2])[:, None]).long(),
        "completion_ids": ids((SEQUENCES, COMPLETION)),
        "completion_mask": (torch.arange(COMPLETION) < lengths[:, None]).long(),
        # Of both signs, but not around 0: a loss that is nearly 0 because its terms cancel has no digits to compare.
        "advantages": (torch.randn(SEQUENCES, generator=generator, dtype=torch.float64) + 1).to(dtype),
        "num_items_in_batch": lengths.sum(),
    }
    now = scores(llama(torch.float64), inputs)
    return {
        **inputs,
        "old_per_token_logps": (now + noise()).to(dtype),
        "ref_per_token_logps": (now + noise()).to(dtype),
    }


@torch.no_grad()
def scores(model, inputs):
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(tokens, attention_mask=mask).logits[:, PROMPT - 1 : -1] / 0.7
    return logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)


def assert_same(ours, theirs, tight):
    for mine, right in zip(ours[0], theirs[0], strict=True):
        assert (mine - right).abs() <= tight * right.abs()
    assert set(ours[1]) == set(theirs[1])
    for name, right in theirs[1].items():
        assert right.norm() > 0 and (ours[1][name] - right).norm() <= tight * right.norm(), name
    assert set(ours[2]) == set(theirs[2])
    for name, right in theirs[2].items():
        assert ours[2][name] == pytest.approx(right, rel=tight, abs=0), name


# ---------------------------------------------------------------------------------------------------- parity


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(ours, theirs) by dtype, on equal models of their own: full logits in float64, TRL's fused head in float32."""
    folder = str(tmp_path_factory.mktemp("trainer"))
    reference = {torch.float64: FullLogitsGRPOTrainer, torch.float32: GRPOTrainer}
    return {
        dtype: [trainer_of(make, llama(dtype), folder) for make in (Ours, theirs)]
        for dtype, theirs in reference.items()
    }


@pytest.mark.parametrize(
    ("level", "dtype"),
    [
        pytest.param("token", torch.float64, id="token-full-logits-float64"),
        pytest.param("sequence", torch.float32, id="sequence-trl-float32"),
        pytest.param("token", torch.float32, id="token-trl-float32", marks=pytest.mark.slow),
        pytest.param("sequence", torch.float64, id="sequence-full-logits-float64", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_gradients_and_metrics(pairs, loss_type, level, dtype):
    inputs = batch(dtype)
    for delta in (None, 1.4):
        for beta in (0.0, 0.04):
            for accumulation in (1, 2):
                found = []
                for trainer in pairs[dtype]:
                    trainer.loss_type, trainer.importance_sampling_level = loss_type, level
                    trainer.args.delta, trainer.beta = delta, beta
                    found.append(step(trainer, inputs, accumulation))
                assert_same(*found, TIGHT[dtype])


@pytest.mark.parametrize(
    "config",
    [
        tiny_llama_config(VOCAB),
        Gemma2Config(**SMALL, final_logit_softcapping=2.0, attn_logit_softcapping=None),
        CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logit_scale=0.25),
        GraniteConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logits_scaling=4.0),
    ],
    ids=lambda config: config.model_type,
)
def test_caps_and_scales_of_architectures(config, tmp_path):
    """Log-probabilities and entropies, and their gradients with the entropy bonus, as the model's own logits give."""
    torch.manual_seed(0)
    # Newer releases of transformers have no SDPA for Gemma 2; eager attention of padding is NaN in float64.
    cls = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    attention = "sdpa" if cls._supports_sdpa else register()[0]
    model = spread(transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).double())
    found = []
    for make in (Ours, FullLogitsGRPOTrainer):
        trainer = trainer_of(make, copy.deepcopy(model), str(tmp_path), entropy_coef=0.5)
        inputs = batch(torch.float64)
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        rows = trainer._get_per_token_logps_and_entropies(trainer.model, tokens, mask, COMPLETION, compute_entropy=True)
        found.append((rows[:2], step(trainer, inputs)))
    for mine, right in zip(found[0][0], found[1][0], strict=True):
        assert mine.shape == (SEQUENCES, COMPLETION) and (mine - right).norm() <= 1e-12 * right.norm()
        assert mine[inputs["completion_mask"] == 0].count_nonzero() == 0
    assert_same(found[0][1], found[1][1], TIGHT[torch.float64])


@pytest.mark.parametrize("of_model", [False, True], ids=["of the config", "of the model"])
def test_a_scale_that_changes_after_construction_is_refused(of_model, tmp_path):
    small = {k: v for k, v in SMALL.items() if k != "head_dim"}
    config = CohereConfig(**small, logit_scale=0.25) if of_model else Gemma2Config(**SMALL, final_logit_softcapping=2.0)
    trainer = trainer_of(Ours, transformers.AutoModelForCausalLM.from_config(config).double(), str(tmp_path))
    holder, name = (trainer.model, "logit_scale") if of_model else (trainer.model.config, "final_logit_softcapping")
    setattr(holder, name, 3.0)
    with pytest.raises(ValueError, match=rf"^{name} must be as when the model was patched, got another"):
        step(trainer, batch(torch.float64))


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_a_tied_head_that_peft_saves(tmp_path, saved):
    """With `ensure_weight_tying` its copy of the head has in_features and out_features swapped."""

    found = []
    for make in (Ours, FullLogitsGRPOTrainer):
        adapter = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[saved], ensure_weight_tying=True)
        torch.manual_seed(0)
        config = tiny_llama_config(VOCAB)
        config.tie_word_embeddings = True
        model = get_peft_model(spread(LlamaForCausalLM(config).double()), adapter).double()
        trained = dict(step(trainer_of(make, model, str(tmp_path)), batch(torch.float64))[1])
        found.append({name: gradient for name, gradient in trained.items() if gradient.norm() > 0})
    assert any("modules_to_save" in name for name in found[0]) and found[0].keys() == found[1].keys()
    for name, right in found[1].items():
        assert (found[0][name] - right).norm() <= TIGHT[torch.float64] * right.norm(), name


def test_auxiliary_loss_of_a_mixture_of_experts(tmp_path):
    config = Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.1
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    trainers = [trainer_of(make, copy.deepcopy(model), str(tmp_path)) for make in (Ours, GRPOTrainer)]
    found = [step(trainer, batch()) for trainer in trainers]
    assert found[0][2]["aux_loss"][0] > 0
    for _, gradients, _ in found:
        for name in [name for name in gradients if not gradients[name].norm() > 0]:
            del gradients[name]  # an expert that no token chose
    assert_same(*found, TIGHT[torch.float32])


@pytest.mark.parametrize("name", ["Phimoe", "Mixtral"])
def test_auxiliary_loss_is_that_of_the_model(name):
    """The config of Phi names its number of experts otherwise than Qwen's."""
    config = getattr(transformers, f"{name}Config")(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    inputs = {"input_ids": torch.randint(1, VOCAB, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    inputs["attention_mask"][0, :3] = 0
    outputs = model(**inputs, output_router_logits=True)
    assert outputs.aux_loss > 0 and torch.equal(grpo._aux_loss(model, outputs, inputs), outputs.aux_loss)
    outputs.router_logits = None  # as transformers 5.17 has it for GraniteMoe, whose auxiliary loss is 0 then
    with pytest.raises(ValueError, match=rf"^model must return router logits .*, got none from {name}ForCausalLM; set"):
        grpo._aux_loss(model, outputs, inputs)


def test_lora_trains_as_with_full_logits(tmp_path):
    """Adapters in the backbone, and the reference that TRL keeps as a second adapter of the same model."""

    found = []
    for make in (Ours, FullLogitsGRPOTrainer):
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(llama(vocab=512), adapter)
        trainer = trainer_of(make, model, str(tmp_path), beta=0.1, max_steps=3, learning_rate=1e-3)
        trainer.train()
        found.append([(e["loss"], e["kl"], e["entropy"], e["grad_norm"]) for e in trainer.state.log_history[:-1]])
    assert found[0][-1][1] > 1e-5
    for mine, right in zip(*found, strict=True):
        assert mine == pytest.approx(right, rel=1e-3, abs=1e-6)


def test_training_with_a_reference_model_logs_what_trl_logs(tmp_path):
    """Generation, old log-probabilities, a reference model from disk, accumulation, checkpointing: the whole loop."""
    llama(vocab=512).save_pretrained(tmp_path / "model")
    found = []
    for make in (Ours, GRPOTrainer):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
        settings = {"gradient_accumulation_steps": 2, "num_iterations": 2, "gradient_checkpointing": True}
        trainer = trainer_of(make, model, str(tmp_path), beta=0.1, max_steps=4, learning_rate=1e-4, **settings)
        trainer.train()
        found.append([entry for entry in trainer.state.log_history if "loss" in entry])
    timed = {"step_time", "train_runtime"}
    for mine, right in zip(*found, strict=True):
        assert set(mine) == set(right)
        for name in set(right) - timed:
            assert mine[name] == pytest.approx(right[name], rel=1e-3, abs=1e-6), name
    assert found[0][-1]["kl"] > 0


def test_micro_batch_without_a_token_contributes_zero(pairs):
    inputs = batch()
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    trainer = pairs[torch.float32][0]
    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = "dapo", "token", 0.0
    losses, gradients, _ = step(trainer, inputs)
    assert losses.item() == 0 and all(g.count_nonzero() == 0 for g in gradients.values())


def test_compiled_function(tmp_path, pairs):
    inputs = batch()
    compiled = trainer_of(partial(MemoryEfficientGRPOTrainer, chunk_size=CHUNK, compile=True), llama(), str(tmp_path))
    theirs = trainer_of(GRPOTrainer, llama(), str(tmp_path))
    assert_same(step(compiled, inputs), step(theirs, inputs), TIGHT[torch.float32])


@pytest.mark.parametrize("wrapped", [False, True])
def test_undo_gives_trls_head_back(tmp_path, monkeypatch, wrapped):
    llama().save_pretrained(tmp_path / "model")  # from where TRL takes the reference model
    ours, theirs = (
        trainer_of(make, LlamaForCausalLM.from_pretrained(tmp_path / "model"), str(tmp_path), beta=0.1)
        for make in (Ours, GRPOTrainer)
    )
    models = ours.model, ours.ref_model
    of_ours = [model.forward for model in models]
    if wrapped:
        for model, forward in zip(models, of_ours, strict=True):
            model.forward = lambda *args, forward=forward, **kwargs: forward(*args, **kwargs)
    ours.undo()
    ours.undo()
    assert wrapped or not any(model.forward is forward for model, forward in zip(models, of_ours, strict=True))
    monkeypatch.delattr(grpo, "memory_efficient_linear")  # nobody may call it now
    inputs = batch()
    assert_same(step(ours, inputs), step(theirs, inputs), TIGHT[torch.float32])
    ids = inputs["prompt_ids"]
    mine, right = (each.ref_model(ids, labels=ids, fused_lm_head=True).log_probs for each in (ours, theirs))
    assert (mine - right).norm() <= TIGHT[torch.float32] * right.norm()
    assert ours.model(ids).logits.shape == (SEQUENCES, PROMPT, VOCAB)


# ---------------------------------------------------------------------------------------------------- limits


def test_no_more_logits_than_a_chunk_and_none_of_the_prompt(tmp_path):
    trainer, inputs, rows = trainer_of(partial(Ours, keep_logits=0), llama(), str(tmp_path)), batch(), []
    step(trainer, inputs)  # on its first call the op tries the function on a few rows
    trainer.model.lm_head.register_forward_hook(lambda module, given, logits: rows.append(logits.shape[:-1].numel()))
    step(trainer, inputs)
    tokens = int(inputs["completion_mask"].sum())
    assert max(rows) == CHUNK
    passes = sum(n for n in rows if n > 1)  # the op asks with one row how large the vocabulary is
    assert passes <= 2 * tokens  # forward and backward
    assert passes > 2 * (tokens - CHUNK)


def test_kept_logits_are_not_computed_again(tmp_path):
    trainer, inputs, rows = trainer_of(Ours, llama(), str(tmp_path)), batch(), []
    step(trainer, inputs)
    trainer.model.lm_head.register_forward_hook(lambda module, given, logits: rows.append(logits.shape[:-1].numel()))
    step(trainer, inputs)
    assert default_keep_logits(trainer.model.lm_head) >= 4 * VOCAB * int(inputs["completion_mask"].sum())  # all of them
    assert sum(n for n in rows if n > 1) <= int(inputs["completion_mask"].sum())


def test_mixed_adapters_are_refused(tmp_path):
    """`PeftMixedModel` has no `get_base_model`."""
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
    with pytest.raises(TypeError, match=r"^model must be a PreTrainedModel or a PeftModel of one, got PeftMixedModel"):
        trainer_of(Ours, model, tmp_path)


def test_refuses_what_it_would_get_wrong(tmp_path, monkeypatch):
    folder = str(tmp_path)
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32"):
        trainer_of(Ours, llama(), folder, cast_lm_head_to_fp32=True)

    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 1.1 * output.logits
            return output

    with pytest.raises(ValueError, match="must do no more between backbone, head and loss than"):
        trainer_of(Ours, Scaled(tiny_llama_config(VOCAB)), folder)
    with monkeypatch.context() as patched:
        patched.setattr(transformers.TrainingArguments, "n_gpu", 2)
        with pytest.raises(ValueError, match=r"does not support `nn\.DataParallel`"):
            trainer_of(Ours, llama(), folder)
    monkeypatch.setattr(grpo.trl, "__version__", "1.17.0")
    with pytest.raises(RuntimeError, match=r"trl must be 1\.16, got 1\.17\.0"):
        trainer_of(Ours, llama(), folder)


# ---------------------------------------------------------------------------------------------------- the script


def test_head_and_step_are_measured():
    sizes = {"sequences": 4, "length": 16, "hidden": 32, "vocab": 700}
    head = head_only(device="cpu", dtype=torch.float32, **sizes, chunk_size=16, rounds=1)
    for name, found in head.items():
        assert found["peak_gib"] > 0 and found["time"].median > 0
        assert max(found[error] for error in ("loss_error", "hidden_error", "weight_error")) < 1e-5, name
    assert head["ours"]["peak_gib"] < 0.5 * head["full logits"]["peak_gib"]
    sizes = {"sequences": 8, "prompt": 4, "completion": 8, "rounds": 1}
    steps = whole_step(device="cpu", dtype=torch.float32, config=tiny_llama_config(300), **sizes)
    assert len({round(found["loss"], 5) for found in steps.values()}) == 1


def test_reward_rises_and_the_curves_agree():
    settings = {"steps": 14, "sequences": 32, "completion": 12, "learning_rate": 1e-2, "use_cpu": True}
    mine, theirs = (train(make, **settings) for make in (MemoryEfficientGRPOTrainer, GRPOTrainer))
    assert len(mine["reward"]) == 14
    assert sum(mine["reward"][-3:]) > sum(mine["reward"][:3]) + 0.15
    assert mine["reward"][:5] == pytest.approx(theirs["reward"][:5], abs=0.02)
    assert mine["loss"][:5] == pytest.approx(theirs["loss"][:5], abs=1e-3)

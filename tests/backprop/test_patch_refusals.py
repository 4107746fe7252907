"""use_memory_efficient_loss: what it refuses, by name."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import CPTConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from benchmarks.models import tiny_llama_config
from tests.backprop.patched import SMALL, arguments, batch, llama, reference
from unsloth_puzzles.backprop.losses import cross_entropy
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss


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


def _scaled_in_place(logits, labels):
    return cross_entropy(logits.mul_(2), labels)


def _closes_over_a_parameter():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    return lambda logits, labels: cross_entropy(logits * scale, labels)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "loss, error, message",
    [
        (
            F.cross_entropy,
            ValueError,
            r"^loss must be a sum over rows, got a result of 23 rows .* away from its halves' sum, of size [\d.]+; "
            r"for the sum of a loss of PyTorch pass functools\.partial\(F\.cross_entropy, reduction='sum'\)$",
        ),
        (
            partial(F.cross_entropy, reduction="none"),
            ValueError,
            r"^loss must be a sum over rows, got a result of shape \(23,\), torch\.float64; for the sum of a loss",
        ),
        (lambda *_: 0.0, TypeError, r"^loss must return a tensor, got float$"),
        ("mean", TypeError, r"^loss must be a function, got str$"),
        (_scaled_in_place, ValueError, r"^loss must not change the logits in place, got one that does"),
    ],
)
def test_losses_that_are_no_sum_are_refused_by_their_name(loss, error, message, compile):
    model, given = llama(), batch()
    with use_memory_efficient_loss(model, loss, compile=compile), pytest.raises(error, match=message):
        model(**given)


def test_loss_that_closes_over_a_parameter_is_refused_by_its_name():
    model = llama()
    message = r"^loss must get what it differentiates as arguments, got a tensor \(\) that requires .*; detach it, or"
    with use_memory_efficient_loss(model, _closes_over_a_parameter()), pytest.raises(ValueError, match=message):
        model(**batch())


def test_sum_that_the_refusal_advises_is_the_mean_of_the_labels():
    model, given = llama(), batch()
    with use_memory_efficient_loss(model, partial(F.cross_entropy, reduction="sum")):
        loss = model(**given).loss
    assert (loss - reference(model, **given)[0]).abs() <= 1e-12 * loss


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
        with pytest.raises(ValueError, match=r"^fused_lm_head must be None, .*; undo it, and pass that trainer if"):
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


def test_data_parallel_is_refused_by_name(tmp_path):
    model = llama()
    with pytest.raises(TypeError, match=r"^model must be one model on one GPU, got an nn\.DataParallel"):
        use_memory_efficient_loss(torch.nn.DataParallel(model))
    trainer = Trainer(model, arguments(tmp_path))
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"^args\.n_gpu must be 1, got 2.*CUDA_VISIBLE_DEVICES"):
        use_memory_efficient_loss(trainer)
    trainer.args._n_gpu = 1
    with use_memory_efficient_loss(trainer) as patch:
        assert patch.active


def test_a_scale_that_the_model_has_copied_is_refused_after_the_patch_and_taken_before():
    """Cohere's forward reads its own attribute and not the config's."""
    small = {name: value for name, value in SMALL.items() if name != "head_dim"}
    torch.manual_seed(0)
    model = CohereForCausalLM(CohereConfig(**small, logit_scale=0.25)).train()
    given = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    with use_memory_efficient_loss(model):
        model.logit_scale = 3.0
        with pytest.raises(ValueError, match=r"^logit_scale must be as when the model was patched"):
            model(**given)
    expected = model(**given).loss
    with use_memory_efficient_loss(model):
        torch.testing.assert_close(model(**given).loss, expected)


def test_models_that_return_tuples_are_refused():
    model, given = llama(), {"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 4).long()}
    with use_memory_efficient_loss(model):
        loss, *_ = model(**given, return_dict=False)
        assert torch.equal(loss, model(**given).loss)
        model.config.return_dict = False
        with pytest.raises(ValueError, match=r"^return_dict must be as when the model was patched"):
            model(**given)
    with pytest.raises(ValueError, match=r"^model.config.return_dict must be True, got False of LlamaForCausalLM"):
        use_memory_efficient_loss(model)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_labels_that_cannot_hold_the_ignored_index_are_refused(dtype):
    model = llama()
    with use_memory_efficient_loss(model):
        with pytest.raises(TypeError, match=rf"^labels must be signed integers, which can hold -100, got {dtype}"):
            model(input_ids=torch.ones(1, 4).long(), labels=torch.ones(1, 4, dtype=dtype))
        model(input_ids=torch.ones(1, 4).long(), labels=torch.ones(1, 4, dtype=torch.int32))


def test_a_copy_of_a_patched_model_with_hooks_computes_with_its_own_weights():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, given = llama(), {"input_ids": torch.arange(4)[None]}
    add_hook_to_module(model, ModelHook())
    patch = use_memory_efficient_loss(model)
    copied = copy.deepcopy(model)
    copied.lm_head.weight.data.zero_()
    assert not copied(**given).logits.any() and model(**given).logits.any()
    patch.undo()


def test_a_copy_of_a_patched_model_can_be_patched_after_undo():
    model, given = llama(), {"input_ids": torch.arange(4)[None], "labels": torch.arange(4)[None]}
    expected = model(**given).loss
    patch = use_memory_efficient_loss(model)
    copied = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"^model must not be patched, got a LlamaForCausalLM that is"):
        use_memory_efficient_loss(copied)
    patch.undo()
    with use_memory_efficient_loss(copied) as again:
        torch.testing.assert_close(copied(**given).loss.float(), expected)
    assert again.calls == 1 and torch.equal(copied(**given).loss, expected)


def test_predict_of_a_trainer_is_refused_without_predictions(tmp_path):
    rows = [{name: tensor[0] for name, tensor in batch().items()} for _ in range(2)]
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=rows)
    logits = trainer.predict(rows).predictions
    with use_memory_efficient_loss(trainer) as patch:
        with pytest.raises(ValueError, match=r"^predictions must be True for trainer.predict, got False"):
            trainer.predict(rows)
        assert trainer.evaluate(rows)["eval_loss"] > 0 and patch.calls
    assert "predict" not in vars(trainer) and (trainer.predict(rows).predictions == logits).all()
    with use_memory_efficient_loss(trainer, predictions=True):
        ids, log_probs = trainer.predict(rows).predictions
    assert ids.shape == log_probs.shape == logits.shape[:2]


def test_a_model_from_a_file_is_not_patched(tmp_path):
    model = llama()
    with use_memory_efficient_loss(model):
        torch.save(model, tmp_path / "model.pt")
        model(**batch())
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert loaded(**batch()).logits is not None
    with use_memory_efficient_loss(loaded) as patch:
        assert loaded(**batch()).loss.item() == pytest.approx(model(**batch()).loss.item(), rel=1e-6)
        assert patch.calls == 1

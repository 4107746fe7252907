"""use_memory_efficient_loss under every trainer: the same curves, metrics and evaluations without logits."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Trainer,
)

from tests.backprop.patched import Data, arguments, batch, llama
from unsloth_puzzles.backprop.losses import z_loss
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss


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


FUSED_HEAD = (
    r"^model must be without the fused head of a TRL trainer, got LlamaForCausalLM with it; pass that trainer if it is "
    r"an SFTTrainer; others are not supported$"
)


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


@pytest.mark.parametrize(("loss_type", "skip_ignored"), [("nll", False), ("nll", True), ("dft", True)])
def test_sft_trainer_loses_nothing(tmp_path, tokenizer, loss_type, skip_ignored):
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
            with use_memory_efficient_loss(trainer, chunk_size=5, skip_ignored=skip_ignored) as patch:
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
    with pytest.raises(ValueError, match=FUSED_HEAD):
        use_memory_efficient_loss(trainer.model)
    with pytest.raises(ValueError, match="loss must be cross_entropy with SFTTrainer"):
        use_memory_efficient_loss(trainer, z_loss)
    with pytest.raises(ValueError, match="predictions must be False with SFTTrainer"):
        use_memory_efficient_loss(trainer, predictions=True)
    logits = trainer.predict(data).predictions
    with use_memory_efficient_loss(trainer):
        assert trainer.predict(data).predictions == pytest.approx(logits, rel=1e-6)
    trainer.label_smoother = object()
    with pytest.raises(ValueError, match="switch it off: there is no smoothing with SFTTrainer"):
        use_memory_efficient_loss(trainer)


def test_other_trainers_of_trl_and_their_models_are_refused(tmp_path, tokenizer):
    """The advice leads to no second refusal: MemoryEfficientGRPOTrainer needs no patch."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, GRPOConfig

    from unsloth_puzzles.backprop.grpo import MemoryEfficientGRPOTrainer

    texts = {"prompt": ["a"] * 4, "chosen": ["b"] * 4, "rejected": ["c"] * 4}
    options = {"args": arguments(tmp_path, DPOConfig, bf16=False), "train_dataset": Dataset.from_dict(texts)}
    dpo = DPOTrainer(llama(torch.float32), llama(torch.float32), processing_class=tokenizer, **options)
    options = {
        "args": arguments(tmp_path, GRPOConfig, bf16=False, num_generations=2),
        "train_dataset": Dataset.from_dict({"prompt": texts["prompt"]}),
    }
    grpo = MemoryEfficientGRPOTrainer(llama(torch.float32), lambda **_: [0.0], processing_class=tokenizer, **options)
    for trainer in (dpo, grpo):
        name = type(trainer).__name__
        with pytest.raises(ValueError) as refusal:
            use_memory_efficient_loss(trainer)
        assert str(refusal.value) == (
            f"model must be an SFTTrainer or a trainer that is not TRL's, got a {name}; for GRPO use "
            "MemoryEfficientGRPOTrainer alone, without use_memory_efficient_loss and without compile_qlora"
        )
        with pytest.raises(ValueError, match=FUSED_HEAD):
            use_memory_efficient_loss(trainer.model)


NO_LOSS = (
    r"no loss was computed by it: LlamaForCausalLM was not called with labels; is it the model that was trained\? "
    r"A TRL SFTTrainer must be given itself, after it is made$"
)


def test_a_patch_that_computed_nothing_says_so(tmp_path):
    """A Trainer with `model_init` trains another model than the one that it had."""
    trainer = Trainer(args=arguments(tmp_path), model_init=lambda: llama(torch.float32), train_dataset=Data(12))
    with pytest.warns(UserWarning, match=NO_LOSS), use_memory_efficient_loss(trainer.model):
        trainer.train()


def test_a_patch_of_the_model_before_its_sft_trainer_says_so(tmp_path, tokenizer):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": entry["input_ids"].tolist()} for entry in Data(12)])
    config, model = arguments(tmp_path, SFTConfig, bf16=False), llama(torch.float32)
    with pytest.warns(UserWarning, match=NO_LOSS), use_memory_efficient_loss(model) as patch:
        SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer).train()
    assert patch.calls == 0

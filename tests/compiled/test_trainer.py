"""transformers' Trainer over a compiled 4-bit model: accumulated gradients, packed batches, evaluation, saved adapters,
mixed precision."""

from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import Trainer, TrainingArguments

from tests.compiled.models import BACKENDS, compiled_by, nf4_llama, with_adapters
from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.compiled.qlora import compile_qlora

LENGTHS = (40, 24, 17, 31, 9, 26)  # two batches a step, the second of them packed
SHORT = (12, 8, 15)  # of the evaluation


def make_base():
    """One layer: each kind of batch is compiled for once then, not twice."""
    return nf4_llama(layers=1)


def make_model():
    return with_adapters(make_base())


def batch(length, packed=False):
    ids = torch.randint(64, (2, length), generator=torch.Generator().manual_seed(length))
    found = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < length // 4, -100)}
    if packed:  # two documents a row
        first = length // 3
        found["position_ids"] = torch.cat([torch.arange(first), torch.arange(length - first)]).expand(2, -1)
    return found


class Batches(torch.utils.data.IterableDataset):
    """Whole batches as rows of a data set, since each has its own length."""

    def __init__(self, lengths, packed):
        self.lengths, self.packed = lengths, packed

    def __iter__(self):
        return (batch(length, self.packed and number % 2 == 1) for number, length in enumerate(self.lengths))


def make_trainer(model, folder):
    settings = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=1, per_device_eval_batch_size=1, report_to=[],
        gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, save_strategy="no", seed=0, use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, prediction_loss_only=True,
    )  # fmt: skip
    data = {"train_dataset": Batches(LENGTHS, packed=True), "eval_dataset": Batches(SHORT, packed=False)}
    return Trainer(model, settings, data_collator=lambda rows: rows[0], **data)


def train(trainer, steps):
    """[[loss, norm of the gradients], ...]"""
    trainer.args.max_steps = steps
    trainer.train()
    return [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "grad_norm" in entry]


def gradients(model, autocast=True):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(**batch(21)).loss
    loss.backward()
    return loss.detach().float(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@torch.no_grad()
def evaluate(model):
    return model.eval()(**batch(13)).loss


@pytest.fixture(scope="module", params=BACKENDS)
def run(request, tmp_path_factory):
    """The same training, evaluation and training on by a model that is not compiled, and by one that was at first."""
    folder, found = tmp_path_factory.mktemp("trainer"), {"backend": request.param}
    trainer = make_trainer(make_model(), folder)
    found["plain"] = train(trainer, 3), trainer.evaluate()["eval_loss"], train(trainer, 1)

    model = make_model()
    trainer = make_trainer(model, folder)
    with (
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
        compiled_by(request.param) as options,
        compile_qlora(trainer, **options),
    ):
        with count_compilations() as found["training"]:
            losses = train(trainer, 3)
        with count_compilations() as found["evaluation"]:
            evaluated = trainer.evaluate()["eval_loss"]
        model.save_pretrained(folder / "adapters")
        found["saved"] = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
        found["loss"] = evaluate(model)
        with count_compilations() as found["mixed precision"]:
            found["compiled gradients"] = gradients(model.train())
    found["plain gradients"], found["float32 gradients"] = gradients(model), gradients(model, autocast=False)
    model.zero_grad()
    with count_compilations() as found["afterwards"]:
        found["compiled"] = losses, evaluated, train(trainer, 1)
    return folder, found


def test_losses_match_uncompiled_model(run):
    """In float32 sums in another order change a loss by a few 1e-7 of it; Adam divides gradients by their own size and
    so hands a small one's rounding on to the next step, a few 1e-6 of the gradients' norm."""
    (steps, evaluated, on), (plain, plain_evaluated, plain_on) = run[1]["compiled"], run[1]["plain"]
    assert len(steps) == len(plain) == 3 and len(on) == len(plain_on) == 1
    for (loss, norm), (expected, expected_norm) in zip([*steps, *on], [*plain, *plain_on], strict=True):
        assert loss == pytest.approx(expected, rel=1e-6, abs=0)
        assert norm == pytest.approx(expected_norm, rel=2e-5, abs=0)
    assert evaluated == pytest.approx(plain_evaluated, rel=1e-6, abs=0)


def test_each_kind_of_batch_compiles_once(run):
    """Six lengths, three of them packed: the layer is compiled for one document and for several; without gradients,
    layer, norm and loss once more, for three lengths; afterwards nothing."""
    found = run[1]
    layer = "LlamaDecoderLayer_first"  # its input wants no gradient
    expected = {
        "training": [(layer, 1, 1), ("norm", 1, 1), ("run", 1, 0), (layer, 1, 1)],
        "evaluation": [("LlamaDecoderLayer_no_grad", 1, 0), ("norm_no_grad", 1, 0), ("run", 1, 0)],
        "mixed precision": [(layer, 1, 1), ("norm", 1, 1), ("run", 1, 0)],
        "afterwards": [],
    }
    inductor = found["backend"] == "inductor"
    for name, captures in expected.items():
        counts = found[name]
        if not inductor:  # which alone counts what it compiles; the loss is left to it
            captures = [(of, 0, 0) for of, *_ in captures if of != "run"]
        assert counts.graph_breaks == {}, name
        assert [one.reason for one in counts.captures] == [None] * len(captures), counts.table()
        names = [one.name.rstrip("_0123456789") for one in counts.captures]  # the losses' are numbered
        triples = [(one, each.forward, each.backward) for one, each in zip(names, counts.captures, strict=True)]
        assert triples == captures, counts.table()
    if inductor:
        compilations = {name: found[name].compilations for name in expected}
        assert compilations == {"training": 7, "evaluation": 3, "mixed precision": 5, "afterwards": 0}


def test_adapters_saved_while_compiled_can_be_loaded(run):
    folder, found = run
    stored = load_peft_weights(str(folder / "adapters"), device="cpu")
    assert stored.keys() == found["saved"].keys() and len(stored) == 14
    assert all(torch.equal(tensor, found["saved"][name]) for name, tensor in stored.items())
    loaded = PeftModel.from_pretrained(make_base(), folder / "adapters", is_trainable=True)
    with compiled_by(found["backend"]) as options, compile_qlora(loaded, **options):
        loss = evaluate(loaded)
    assert (loss - found["loss"]).abs() <= 1e-6 * found["loss"]
    untrained = evaluate(make_model())
    assert (untrained - found["loss"]).abs() > 1e-4 * found["loss"]  # so it is the training that has been loaded


def test_mixed_precision_error_is_no_larger_than_uncompiled(run):
    """At most 1.3 times as far: fused operations round to bfloat16 less often, other sums come out in another order."""
    (loss, gradient), (plain_loss, plain_gradient), (exact_loss, exact) = (
        run[1][name] for name in ("compiled gradients", "plain gradients", "float32 gradients")
    )
    far, plain_far = (gradient - exact).norm() / exact.norm(), (plain_gradient - exact).norm() / exact.norm()
    assert 1e-4 < far <= 1.3 * plain_far, (far, plain_far)  # and bfloat16 it was
    # One number may come out right by accident: half a unit of bfloat16's last place, 2^-9, is no error of anybody.
    allowed = max(1.3 * (plain_loss - exact_loss).abs(), 2**-9 * exact_loss)
    assert (loss - exact_loss).abs() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
def test_sft_trainer_losses_and_metrics_match_uncompiled(tmp_path, backend):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    rows = [{"input_ids": batch(length)["input_ids"][0].tolist()} for length in (23, 11, 17, 30)]
    histories = []
    for compiled in (False, True):
        settings = SFTConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], learning_rate=1e-2, use_cpu=True,
            logging_steps=1, save_strategy="no", seed=0, disable_tqdm=True, bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = SFTTrainer(make_model(), settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        with (
            compiled_by(backend) as options,
            compile_qlora(trainer, **options) if compiled else nullcontext(),
            count_compilations() as counts,
        ):
            trainer.train()
        names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
        histories.append([[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry])
    assert counts.graph_breaks == {} and not any(one.reason for one in counts.captures), counts.table()
    assert len(histories[0]) == 2
    assert torch.allclose(torch.tensor(histories[1]), torch.tensor(histories[0]), rtol=2e-5, atol=0)

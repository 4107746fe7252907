"""The two trainings differ in their loss alone; what is compared, said and refused. The 1B figures need a GPU."""

import json

import pytest
import torch

from unsloth_puzzles.bench.models import random_llama, tiny_llama_config
from unsloth_puzzles.comparisons import curve_training, llama_curve
from unsloth_puzzles.comparisons.curve_data import make_batches
from unsloth_puzzles.comparisons.curve_training import Settings, train
from unsloth_puzzles.comparisons.llama_curve import differences, fall, run, title

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"batch": 2, "length": 48, "chunk_size": 20, "tiny": True, "device": DEVICE}


@pytest.fixture(autouse=True)
def torch_as_it_was():
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with torch.random.fork_rng():
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
    torch.utils.deterministic.fill_uninitialized_memory = fill


def test_full_fine_tuning_with_our_loss_is_the_same_training():
    standard, ours = (train(Settings(mode="full", loss=loss, steps=60, **SMALL)) for loss in ("standard", "ours"))
    assert (standard["loss_calls"], ours["loss_calls"]) == (0, 2 * 60)
    assert max(differences(standard, ours)) <= 1e-4 and fall(ours) > 0.5
    again = train(Settings(mode="full", loss="standard", steps=5, **SMALL))
    assert again["losses"] == standard["losses"][:5]  # so whatever differs is the loss


def test_qlora_with_our_loss_is_the_same_training(monkeypatch):
    def one_batch(settings, path, vocab_size):  # again and again, so that little learning shows
        batches, text = make_batches(settings, path, vocab_size)
        return batches[:1] * settings.steps, text

    monkeypatch.setattr(curve_training, "make_batches", one_batch)
    settings = {**SMALL, "batch": 1, "length": 16, "chunk_size": 5, "accumulation": 1, "learning_rate": 3e-2}
    standard, ours = (
        train(Settings(mode="qlora", loss=loss, steps=4, warmup=1, **settings)) for loss in ("standard", "ours")
    )
    assert max(differences(standard, ours)) <= 1e-3 and ours["loss_calls"] == 4
    assert ours["dtype"] == ("float32" if DEVICE == "cpu" else standard["dtype"])
    assert ours["losses"][-1] < ours["losses"][0] - 0.1


@pytest.mark.parametrize("mutation", ["per micro-batch mean", "labels not shifted"])
def test_the_comparison_can_tell(mutation, monkeypatch):
    from unsloth_puzzles.backprop import trainer as hook

    ours = hook.memory_efficient_linear

    def mutant(hidden_states, linear, labels, function, *, normalizer, **options):
        if mutation == "per micro-batch mean":
            normalizer = 2 * (labels != -100).sum()
        else:
            labels = labels.roll(1, -1)
        return ours(hidden_states, linear, labels, function, normalizer=normalizer, **options)

    standard = train(Settings(loss="standard", steps=4, **SMALL))
    monkeypatch.setattr(hook, "memory_efficient_linear", mutant)
    assert max(differences(standard, train(Settings(loss="ours", steps=4, **SMALL)))) > 1e-3


def test_batches_are_uneven_repeatable_and_of_the_text():
    settings = Settings(steps=5, batch=3, length=64)
    batches, text = make_batches(settings, None, 512)
    assert text == "Python's language reference, a BPE of 512 tokens trained on it"
    flat = [micro for step in batches for micro in step]
    counts = [int((micro["labels"][:, 1:] != -100).sum()) for micro in flat]
    assert len(flat) == 10 and len(set(counts)) > 5 and min(counts) > 0
    for micro in flat:
        kept = micro["labels"] != -100
        assert torch.equal(micro["labels"][kept], micro["input_ids"][kept]) and not kept[:, 0].any()
        assert not kept[micro["attention_mask"] == 0].any() and micro["input_ids"].max() < 512
    same = make_batches(settings, None, 512)[0]
    again = [micro for step in same for micro in step]
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(flat, again, strict=True))
    other = make_batches(Settings(steps=5, batch=3, length=64, seed=1), None, 512)[0]
    assert not torch.equal(other[0][0]["input_ids"], batches[0][0]["input_ids"])


def test_a_process_of_its_own_with_real_weights_from_a_directory(tmp_path):
    random_llama(tiny_llama_config(vocab_size=512), "cpu", seed=9).save_pretrained(tmp_path)
    found = run("full", "ours", steps=2, weights=str(tmp_path), **SMALL)
    assert found["weights"] == f"real weights, {tmp_path}" and len(found["losses"]) == 2
    here = train(Settings(loss="standard", steps=2, weights=str(tmp_path), **SMALL))
    assert max(differences(here, found)) <= 1e-5
    assert (found["peak_gib"] is None) == (DEVICE == "cpu") and found["seconds"] > 0
    assert len(found["labels"]) == 2 and len(found["labels"][0]) == 2
    for said in (
        "tiny Llama, real weights",
        "full fine-tuning",
        "float32",
        "AdamW",
        "learning rate 0.001",
        "2 x 2 sequences of up to 48 tokens",
    ):
        assert said in title(found)
    failed = run("full", "ours", steps=1, dtype="float99", **SMALL)
    assert isinstance(failed, str) and "float99" in failed  # a reason, not an exception


def test_what_cannot_be_compared_or_set_is_refused():
    curve = {"losses": [3.0, 2.0], "loss": "ours", "learning_rate": 1e-3}
    assert differences(curve, {**curve, "losses": [3.5, 2.0]}) == [0.5, 0.0] and fall(curve, 1) == 1
    with pytest.raises(ValueError, match=r"learning_rate: got 0.001 and 0.002, need the same training"):
        differences(curve, {**curve, "learning_rate": 2e-3})
    for name, value in (("mode", "half"), ("loss", "theirs"), ("optimizer", "sgd")):
        with pytest.raises(ValueError, match=f"{name}: needs one of"):
            Settings(**{name: value}).decided()
    with pytest.raises(ValueError, match="steps: needs 1 or more, got 0"):
        run("full", "ours", steps=0)


def test_the_command_line_takes_every_setting(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(llama_curve, "train", lambda settings: seen.append(settings) or {"losses": []})
    out = tmp_path / "out.json"
    llama_curve.main(
        ["--mode=qlora", "--loss=ours", "--steps=7", "--learning-rate=0.5", "--tiny=True", "--optimizer=adamw8bit",
         "--chunk-size=9", f"--out={out}"]
    )  # fmt: skip
    expected = Settings(
        mode="qlora", loss="ours", steps=7, learning_rate=0.5, tiny=True, optimizer="adamw8bit", chunk_size=9
    )
    assert seen == [expected] and json.loads(out.read_text()) == {"losses": []}
    assert curve_training.Settings().steps >= 100

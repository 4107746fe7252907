"""The runs differ in their loss alone, planted faults are seen, and what fails keeps the rest. 1B needs a GPU."""

import json
import math
import threading

import pytest
import torch
import torch.nn.functional as F

from benchmarks.backprop import curve_training, llama_curve
from benchmarks.backprop.curve_data import (
    FAULTS,
    OURS,
    PER_CHUNK,
    RUNS,
    SCALED,
    STANDARD,
    Settings,
    make_batches,
)
from benchmarks.backprop.curve_training import train
from benchmarks.backprop.figures import CURVE_LIMITS, NORM_LIMITS
from benchmarks.backprop.llama_curve import differences, norm_differences, pass_means, run, title
from benchmarks.models import random_llama, tiny_llama_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"batch": 2, "length": 48, "chunk_size": 20, "tiny": True, "device": DEVICE}
SHORT = {"steps": 24, "fault_steps": 12, **SMALL}


def quiet(line):
    pass


@pytest.fixture(autouse=True)
def torch_as_it_was():
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with torch.random.fork_rng():
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tiny model's products are too short for several, which would wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def full(one_thread):
    with torch.random.fork_rng():
        return {name: train(Settings(**SHORT), name, quiet) for name in RUNS["full"]}


def test_full_fine_tuning_with_our_loss_is_the_same_training(full):
    standard, ours = full[STANDARD], full[OURS]
    assert (standard["loss_calls"], ours["loss_calls"]) == (0, 2 * 24)
    assert max(differences(standard, ours)) <= 1e-5
    assert max(norm_differences(standard, ours)) <= 1e-5
    means = pass_means(ours)
    assert len(means) == 4 and means[0] - means[-1] > 0.1
    again = train(Settings(**SHORT), STANDARD, quiet)
    assert again["losses"] == standard["losses"]  # so whatever differs is the loss


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen_in_losses_and_gradient_norms(fault, full):
    gaps = differences(full[STANDARD], full[fault])
    assert len(gaps) == 12
    assert max(gaps) > 1e-3
    assert max(norm_differences(full[STANDARD], full[fault])) > 5e-3


def test_scaled_gradients_leave_the_first_loss_and_scale_the_first_norm(full):
    assert differences(full[STANDARD], full[SCALED])[0] <= 1e-5
    assert full[SCALED]["gradient_norms"][0] == pytest.approx(1.01 * full[STANDARD]["gradient_norms"][0], rel=1e-5)


def test_mean_per_chunk_is_the_mean_of_the_chunks_means():
    settings = Settings(**{**SMALL, "device": "cpu", "accumulation": 1}).decided()
    batches, _ = make_batches(settings, None, 512)
    (inputs,) = batches[0]
    model = random_llama(tiny_llama_config(vocab_size=512), "cpu")
    with torch.no_grad():
        found = curve_training._loss_per_chunk(model, dict(inputs), settings)
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.flatten(0, 1)
    labels = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].flatten()
    means = [
        F.cross_entropy(z, y) for z, y in zip(logits.split(20), labels.split(20), strict=True) if (y != -100).any()
    ]
    assert len(means) > 1 and found.item() == pytest.approx(torch.stack(means).mean().item(), rel=1e-5)
    assert abs(found.item() - F.cross_entropy(logits, labels).item()) > 1e-3


def test_gradient_norm_is_that_of_all_gradients_together():
    settings = Settings(steps=1, **SMALL).decided()
    curve = train(settings, STANDARD, quiet)
    model = random_llama(tiny_llama_config(vocab_size=512), DEVICE)
    model.set_attn_implementation("eager")
    batches, _ = make_batches(settings, None, 512)
    labels = sum(curve["labels"][0])
    for batch in batches[0]:
        inputs = {name: value.to(DEVICE) for name, value in batch.items()}
        model(**inputs, num_items_in_batch=labels).loss.backward()
    exact = torch.cat([p.grad.flatten().double() for p in model.parameters()]).norm().item()
    assert curve["gradient_norms"] == [pytest.approx(exact, rel=1e-5)]


@pytest.mark.slow
def test_qlora_with_our_loss_is_the_same_training_and_its_norms_show_a_wrong_scale(monkeypatch):
    settings = {**SMALL, "batch": 1, "length": 16, "chunk_size": 5, "accumulation": 1, "steps": 3, "passes": 3}
    settings |= {"mode": "qlora", "learning_rate": 0.2}  # the first three steps take a tenth to three of it
    standard, ours = (train(Settings(**settings), name, quiet) for name in RUNS["qlora"])
    assert max(differences(standard, ours)) <= 1e-3 and ours["loss_calls"] == 3
    assert max(norm_differences(standard, ours)) <= 1e-3
    assert ours["dtype"] == ("float32" if DEVICE == "cpu" else "float16")
    assert "NF4 by patch_linear4bit" in title(ours) and "AdamW" in title(ours)
    assert ours["losses"][-1] < ours["losses"][0] - 0.1

    from unsloth_puzzles.backprop import patched_loss as hook

    right = hook.memory_efficient_linear

    def scaled(*given, **options):
        loss = right(*given, **options)
        return loss.detach() + 1.01 * (loss - loss.detach())

    monkeypatch.setattr(hook, "memory_efficient_linear", scaled)
    wrong = train(Settings(**settings), OURS, quiet)
    assert max(differences(standard, wrong)) <= CURVE_LIMITS["qlora"]  # AdamW hides it
    assert min(norm_differences(standard, wrong)) > NORM_LIMITS["qlora"]


@pytest.mark.parametrize("mutation", ["per micro-batch mean", "labels not shifted"])
def test_comparison_sees_faults_of_the_hook(mutation, monkeypatch, full):
    from unsloth_puzzles.backprop import patched_loss as hook

    ours = hook.memory_efficient_linear

    def mutant(hidden_states, linear, labels, function, *, normalizer, **options):
        if mutation == "per micro-batch mean":
            normalizer = 2 * (labels != -100).sum()
        else:
            labels = labels.roll(1, -1)
        return ours(hidden_states, linear, labels, function, normalizer=normalizer, **options)

    monkeypatch.setattr(hook, "memory_efficient_linear", mutant)
    found = train(Settings(steps=4, passes=1, **SMALL), OURS, quiet)["losses"]
    assert max(abs(a - b) for a, b in zip(full[STANDARD]["losses"], found, strict=False)) > 1e-3


def test_batches_are_uneven_repeatable_and_of_the_text():
    settings = Settings(steps=18, passes=4, batch=3, length=64)
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
    other = make_batches(Settings(steps=18, passes=4, batch=3, length=64, seed=1), None, 512)[0]
    assert not torch.equal(other[0][0]["input_ids"], batches[0][0]["input_ids"])


def test_passes_go_over_the_same_batches(full):
    labels = full[OURS]["labels"]
    assert labels[:6] == labels[6:12] == labels[18:] and labels[0] != labels[1]
    curve = {"steps": 5, "passes": 2, "losses": [3.0, 4.0, 5.0, 1.0, 2.0]}
    assert pass_means(curve) == [4.0, 1.5]


@pytest.mark.slow
def test_process_with_a_local_checkpoint(tmp_path):
    random_llama(tiny_llama_config(vocab_size=512), "cpu", seed=9).save_pretrained(tmp_path)
    lines = []
    found = run("full", steps=2, fault_steps=1, weights=str(tmp_path), show=lines.append, **SMALL)
    assert all(isinstance(found[name], dict) for name in RUNS["full"])
    assert found[OURS]["weights"] == f"real weights, {tmp_path}" and len(found[OURS]["losses"]) == 2
    assert any("full, ours: step 2 of 2, loss" in line for line in lines)
    here = train(Settings(steps=2, fault_steps=1, weights=str(tmp_path), **SMALL), STANDARD, quiet)
    assert max(differences(here, found[OURS])) <= 1e-5
    assert (found[OURS]["peak_gib"] is None) == (DEVICE == "cpu") and found[OURS]["seconds"] > 0
    for said in (
        "tiny Llama, real weights",
        "full fine-tuning",
        "float32",
        "SGD without momentum",
        "learning rate",
        "2 x 2 sequences of up to 48 tokens",
    ):
        assert said in title(found[OURS])


def test_failed_run_is_kept_as_its_reason_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    out, before = tmp_path / "out.json", []

    def one(settings, name):
        before.append(list(json.loads(out.read_text())["full"]) if out.exists() else [])
        if name == OURS:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return {"run": name}

    monkeypatch.setattr(llama_curve, "train", one)
    llama_curve.main([f"--out={out}", '{"mode": "full"}'])
    found = json.loads(out.read_text())["full"]
    assert before == [list(RUNS["full"])[:count] for count in range(4)]  # written after every run
    assert found[OURS] == "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert [found[name]["run"] for name in (STANDARD, *FAULTS)] == [STANDARD, *FAULTS]
    assert "FAILED: full, ours: OutOfMemoryError" in capsys.readouterr().out


def test_timeout_keeps_the_runs_that_are_finished(monkeypatch):
    def killed(module, *arguments, timeout, env, show):
        out = next(each for each in arguments if each.startswith("--out=")).removeprefix("--out=")
        llama_curve.write_json(llama_curve.Path(out), {"full": {STANDARD: {"losses": [1.0]}}})
        raise llama_curve.child.ChildError(f"{module} took longer than {timeout:.0f} s", "")

    monkeypatch.setattr(llama_curve.child, "run", killed)
    found = run("full", timeout=7)
    assert found[STANDARD] == {"losses": [1.0]} and list(found) == list(RUNS["full"])
    assert all("took longer than 7 s" in found[name] for name in (OURS, *FAULTS))


def test_process_that_takes_too_long_is_ended():
    found = run("full", timeout=0.5, show=None, **SMALL)
    assert all("took longer than" in reason for reason in found.values())


def test_unequal_runs_and_unknown_settings_are_refused():
    curve = {"losses": [3.0, 2.0], "gradient_norms": [4.0, 2.0], "run": OURS, "learning_rate": 1e-3}
    assert differences(curve, {**curve, "losses": [3.5, 2.0]}) == [0.5, 0.0]
    assert norm_differences(curve, {**curve, "gradient_norms": [5.0, 2.0]}) == [0.25, 0.0]
    assert differences(curve, {**curve, "losses": [3.5], "run": PER_CHUNK}) == [0.5]
    with pytest.raises(ValueError, match="shorter"):
        differences(curve, {**curve, "losses": [3.5]})
    with pytest.raises(ValueError, match=r"learning_rate must be the same in both runs, got 0.001 and 0.002"):
        differences(curve, {**curve, "learning_rate": 2e-3})
    with pytest.raises(ValueError, match="mode must be one of"):
        Settings(mode="half").decided()
    with pytest.raises(ValueError, match="dtype must be 'float32' for full fine-tuning, got 'float16'"):
        Settings(dtype="float16").decided()
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        run("full", steps=0)
    with pytest.raises(ValueError, match="run must be one of"):
        train(Settings(mode="qlora", **SMALL), SCALED)


def test_steps_without_a_finite_norm_reach_the_comparison(tmp_path, monkeypatch):
    """A step that both runs skip does not count. A step that one run skips differs."""
    settings = Settings(steps=2, passes=1, **SMALL)
    norms = iter([torch.tensor(float("inf")), torch.tensor(2.0)])
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: next(norms))
    curve = train(settings, STANDARD, quiet)
    assert curve["gradient_norms"] == [None, 2.0]
    llama_curve.write_json(tmp_path / "out.json", curve)  # refuses NaN and infinity
    both, one = norm_differences(curve, curve), norm_differences(curve, {**curve, "gradient_norms": [1.0, None]})
    assert math.isnan(both[0]) and both[1] == 0 and one == [math.inf, math.inf]


def test_command_line_takes_every_setting(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(llama_curve, "train", lambda settings, name: seen.append((settings, name)) or {"losses": []})
    out = tmp_path / "out.json"
    settings = {"mode": "qlora", "steps": 7, "learning_rate": 0.5, "tiny": True, "chunk_size": 9}
    llama_curve.main([f"--out={out}", json.dumps(settings), '{"mode": "full"}'])
    one, other = Settings(**settings), Settings()
    assert seen == [(one, STANDARD), (one, OURS), *((other, name) for name in RUNS["full"])]
    empty = {"losses": []}
    assert json.loads(out.read_text()) == {mode: dict.fromkeys(RUNS[mode], empty) for mode in ("qlora", "full")}
    assert Settings().steps == 60


def test_modes_side_by_side_have_a_process_each(monkeypatch):
    meet = threading.Barrier(2, timeout=10)

    def fake(mode, *, timeout, show, **settings):
        meet.wait()
        return {"settings": settings}

    monkeypatch.setattr(llama_curve, "run", fake)
    found = dict(llama_curve.run_modes({"full": {}, "qlora": {"steps": 3}}, together=True, timeout=1))
    assert found == {"full": {"settings": {}}, "qlora": {"settings": {"steps": 3}}}


def test_modes_one_after_the_other_share_a_process(monkeypatch):
    def started(module, out, *settings, timeout, env, show):
        asked.append((settings, timeout))
        llama_curve.write_json(llama_curve.Path(out.removeprefix("--out=")), {"qlora": {OURS: {"losses": [1.0]}}})

    asked = []
    monkeypatch.setattr(llama_curve.child, "run", started)
    found = dict(llama_curve.run_modes({"full": {}, "qlora": {"steps": 3}}, timeout=10))
    assert asked == [(('{"mode": "full"}', '{"mode": "qlora", "steps": 3}'), 20)]
    reason = "the process ended before this run"
    assert found["full"] == dict.fromkeys(RUNS["full"], reason)
    assert found["qlora"] == {STANDARD: reason, OURS: {"losses": [1.0]}}


def test_an_error_of_one_mode_ends_the_processes_of_the_others(monkeypatch):
    ended = []

    def fake(mode, **given):
        raise KeyboardInterrupt

    monkeypatch.setattr(llama_curve, "run", fake)
    monkeypatch.setattr(llama_curve.child, "end_all", lambda: ended.append(True))
    with pytest.raises(KeyboardInterrupt):
        list(llama_curve.run_modes({"full": {}, "qlora": {}}, together=True))
    assert ended == [True]

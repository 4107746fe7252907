"""SmolLM2 on docstrings over three seeds: NF4 and not quantised, beside majority, naive Bayes and TF-IDF.

python -m benchmarks.classification.sweeps resources/measurements/d_classification_sweeps.json
"""

import os
import statistics
import time
from collections.abc import Mapping, Sequence

from benchmarks.classification.baselines import Score, baselines
from benchmarks.classification.docstrings import Docstrings, docstrings
from benchmarks.classification.losses import losses_of
from benchmarks.classification.training import WAYS, train
from benchmarks.command import run_sweep
from benchmarks.smollm2 import checkpoint
from unsloth_puzzles.bench.hardware import Hardware
from unsloth_puzzles.bench.record import Measurements

FOLDER = "build/model"  # holds SmolLM2's file, or gets it
SEEDS = (0, 1, 2)
PARITY_STEPS = 30  # in float32, where ways differ by their rounding alone
EPOCHS = 3
OURS = "LoRA, NF4"


def measure(
    path: str | os.PathLike,
    hardware: Hardware,
    *,
    model: str | None = None,
    data: Mapping[int, Docstrings] | None = None,
    epochs: float = EPOCHS,
    parity_steps: int = PARITY_STEPS,
) -> Measurements:
    """Compare the ways of training, then train for each seed. The file is saved after each way and each seed.

    Args:
        path: The JSON file to write.
        hardware: What `probe()` returned.
        model: A folder or a name of a causal LM; None: SmolLM2, of the hub or of the file in `FOLDER`.
        data: Texts by seed; None: the standard library's docstrings, split anew by each of `SEEDS`.
        epochs: Passes over the training texts.
        parity_steps: Steps of the comparison of losses.

    Returns:
        "loss_difference" in nats, float32: the largest difference of a step's loss from transformers' layers, by way.
        "macro_f1" and "accuracy" of NF4, with the other classifiers as baselines: of each seed, and of all seeds their
        medians, with our lowest and highest.

    Raises:
        OSError: `model` is None, and neither the hub nor the package index has SmolLM2.
        RuntimeError: Logits differ after saving and loading.
    """
    found = Measurements(path, hardware)
    if model is None:
        model, source = checkpoint(FOLDER)
        print(source, flush=True)
    data = data or {seed: docstrings(seed=seed) for seed in SEEDS}
    _add_parity(found, model, next(iter(data.values())), parity_steps)
    of_seeds = []
    for seed, one in data.items():
        of_seeds.append(_scores(model, one, seed, epochs, hardware.device))
        _add_scores(found, f"docstrings, seed {seed}", of_seeds[-1:])
        found.save()
    _add_scores(found, f"docstrings, {len(data)} seeds", of_seeds)
    found.save()
    return found


def _add_parity(found: Measurements, model: str, data: Docstrings, steps: int) -> None:
    exact = None
    for way in WAYS:  # that of transformers comes first
        started = time.perf_counter()
        losses = losses_of(model, data, way, steps=steps, device=found.hardware["device"])
        seconds = f"{time.perf_counter() - started:.0f} s"
        if exact is None:
            exact = losses
            print(f"{way}, {steps} steps, float32: {seconds}", flush=True)
            continue
        off = (losses - exact).abs().max().item()
        found.add("loss_difference", f"{way}, {steps} steps, float32", off, "nats")
        found.save()
        print(f"{way}, {steps} steps, float32: losses differ by {off:.1e} nats; {seconds}", flush=True)


def _scores(model: str, data: Docstrings, seed: int, epochs: float, device: str) -> dict[str, Score]:
    """Of each classifier, by name."""
    started = time.perf_counter()
    scores = baselines(data)
    print(f"seed {seed}, baselines: {time.perf_counter() - started:.0f} s", flush=True)
    for name, four_bit in ((OURS, True), ("LoRA, not quantised", False)):
        run = train(model, data, way="patched" if four_bit else "transformers", four_bit=four_bit, epochs=epochs,
                    seed=seed, weighted=True, device=device)  # fmt: skip
        print(f"seed {seed}, {name}: {run.score}, {run.seconds:.0f} s of training", flush=True)
        if not run.reloaded_equal:
            raise RuntimeError(f"logits must be equal after saving and loading, got others: {name}, seed {seed}")
        scores[name] = run.score
    return scores


def _add_scores(found: Measurements, case: str, of_seeds: Sequence[Mapping[str, Score]]) -> None:
    for metric in ("macro_f1", "accuracy"):
        values = {name: [getattr(scores[name], metric) for scores in of_seeds] for name in of_seeds[0]}
        ours = values.pop(OURS)
        spread = (min(ours), max(ours)) if len(ours) > 1 else (None, None)
        others = {name: statistics.median(of) for name, of in values.items()}
        found.add(metric, case, statistics.median(ours), "fraction", *spread, others)


if __name__ == "__main__":
    run_sweep(measure, "SmolLM2 on docstrings over three seeds, and the losses of each way of training.")

"""SmolLM2 on docstrings over three seeds: NF4 and not quantised, beside majority, naive Bayes and TF-IDF.

    python -m benchmarks.classification.sweeps resources/measurements/d_classification_sweeps.json [--folder model]

It needs a GPU.
"""

import argparse
import statistics
from pathlib import Path

import torch

from benchmarks.classification.baselines import baselines
from benchmarks.classification.docstrings import Docstrings, docstrings
from benchmarks.classification.training import WAYS, train
from benchmarks.smollm2 import checkpoint
from unsloth_puzzles.bench.record import Measurements

SEEDS = (0, 1, 2)
PARITY_STEPS = 30  # in float32, where ways differ by their rounding alone
EPOCHS = 3


def measure(
    path: str | Path,
    model: str,
    *,
    data: dict[int, Docstrings] | None = None,
    device: str | None = None,
    epochs: float = EPOCHS,
    parity_steps: int = PARITY_STEPS,
) -> Measurements:
    """Train all and save what comes of it after each seed.

    Args:
        path: The JSON file.
        model: A folder or a name of a causal LM.
        data: Texts by seed; None: the standard library's docstrings, split anew by each of `SEEDS`.
        device: None is the GPU, or the CPU.
        epochs: Of each training.
        parity_steps: Of the comparison of losses.

    Returns:
        Metrics "loss_difference" (largest of any step against transformers' layers, float32), "macro_f1" and "accuracy"
        (median, lowest and highest over the seeds; the baselines' medians beside them).

    Raises:
        RuntimeError: Logits differ after saving and loading.
    """
    found = Measurements(path)
    data = data or {seed: docstrings(seed=seed) for seed in SEEDS}
    _parity(found, model, next(iter(data.values())), parity_steps, device)
    found.save()
    scores: dict[str, list] = {}
    for seed, one in data.items():
        for name, score in baselines(one).items():
            scores.setdefault(name, []).append(score)
        for name, four_bit in (("LoRA, NF4", True), ("LoRA, not quantised", False)):
            run = train(model, one, way="patched" if four_bit else "transformers", four_bit=four_bit, epochs=epochs,
                        seed=seed, weighted=True, device=device)  # fmt: skip
            print(f"seed {seed}, {name}: {run.score}, {run.seconds:.0f} s", flush=True)
            scores.setdefault(name, []).append(run.score)
            if not run.reloaded_equal:
                raise RuntimeError(f"{name}, seed {seed}: logits differ after saving and loading")
    for metric in ("macro_f1", "accuracy"):
        values = {name: [getattr(score, metric) for score in of] for name, of in scores.items()}
        ours = values.pop("LoRA, NF4")
        others = {name: statistics.median(of) for name, of in values.items()}
        case = f"docstrings, {len(data)} seeds"
        found.add(metric, case, statistics.median(ours), "fraction", min(ours), max(ours), baselines=others)
    found.save()
    return found


def _parity(found: Measurements, model: str, data: Docstrings, steps: int, device: str | None) -> None:
    """Losses of each way of training in float32, with the same seed."""
    options = {"steps": steps, "dtype": torch.float32, "device": device}
    losses = {way: torch.tensor(train(model, data, way=way, **options).losses) for way in WAYS}
    for way in WAYS[1:]:
        off = (losses[way] - losses["transformers"]).abs().max().item()
        found.add("loss_difference", f"{way}, {steps} steps, float32", off, "nats")


def main() -> None:
    parser = argparse.ArgumentParser(description="Classification over seeds.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--model", help="a folder or a name; default: SmolLM2 of the hub, or of the file in --folder")
    parser.add_argument("--folder", default="model", help="holds SmolLM2's GGUF file, or gets it")
    given = parser.parse_args()
    measure(given.path, given.model or checkpoint(given.folder)[0])


if __name__ == "__main__":
    main()

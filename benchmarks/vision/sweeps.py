"""Time of a training step over the share of text rows, and what grouping rows by kind saves: on a GPU.

python -m benchmarks.vision.sweeps resources/measurements/d_vision_sweeps.json
"""

import os
import time
from collections.abc import Callable

import torch
import transformers
from peft import LoraConfig, get_peft_model

from benchmarks.command import run_sweep
from benchmarks.vision.checks import assistant, row, user
from benchmarks.vision.families import FAMILIES
from benchmarks.vision.work import padding
from unsloth_puzzles.bench.hardware import Hardware
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.bench.timing import wall_time
from unsloth_puzzles.vision.collator import VisionCollator
from unsloth_puzzles.vision.sampler import KindSampler

ANSWER = "A class is a template for objects, which has attributes and methods. " * 8
ROWS = 8
SIZE = (448, 448)  # 256 tokens
# The shapes of Qwen2-VL 2B, whose text model has 28 layers; the vocabulary is the tiny tokenizer's.
TEXT = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "max_position_embeddings": 32768,
}  # fmt: skip
TOWER = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}


def qwen2_vl_2b(device: str | torch.device, dtype: torch.dtype, quick: bool = False):
    """Processor and a model of Qwen2-VL 2B's shapes (of two layers if `quick`), random weights, LoRA on all linears."""
    processor, tiny = FAMILIES["qwen2_vl"]()
    processor.image_processor.size = {"shortest_edge": 56**2, "longest_edge": SIZE[0] * SIZE[1]}
    config = tiny.config
    if not quick:
        for name, value in TEXT.items():
            setattr(config.text_config, name, value)
        config.text_config.head_dim = 128
        config.text_config.layer_types = ["full_attention"] * TEXT["num_hidden_layers"]
        config.text_config.rope_parameters["mrope_section"] = [16, 24, 24]
        for name, value in TOWER.items():
            setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen2VLForConditionalGeneration(config).to(dtype)
    return processor, get_peft_model(model, LoraConfig(target_modules="all-linear", r=16)).train()


def mixture(texts: int, blank: bool = False) -> list[dict]:
    """`ROWS` rows, of which `texts` have no image, or a blank one."""
    with_image = row(user(None, "What is this?"), assistant(ANSWER), images=[SIZE])
    without = with_image if blank else row(user("What is this?"), assistant(ANSWER))
    return [with_image] * (ROWS - texts) + [without] * texts


def measure(path: str | os.PathLike, hardware: Hardware, *, quick: bool = False) -> Measurements:
    """Time forward and backward of one batch, ours and with blank images, and count padding in both orders.

    The file is saved after each case.

    Args:
        path: The JSON file to write.
        hardware: What `probe()` returned.
        quick: Take a model of two layers and few rounds.

    Returns:
        "vision_step_ms" by the share of text rows, with blank images as a baseline, and "vision_padding", the share of
        padding among the tokens when rows are grouped by kind, with random order as a baseline.
    """
    found = Measurements(path, hardware)
    dtype = torch.bfloat16 if hardware.bf16 else torch.float16
    processor, model = qwen2_vl_2b(hardware.device, dtype, quick)
    collate = VisionCollator(processor)
    name = "tiny Qwen2-VL" if quick else "layers of Qwen2-VL 2B"
    for texts in (0, ROWS // 4, ROWS // 2, 3 * ROWS // 4, ROWS):
        started = time.perf_counter()
        kinds = {"ours": False, "blank images": True}
        steps = {name: _step(model, collate(mixture(texts, blank))) for name, blank in kinds.items()}
        times = wall_time(steps, rounds=3 if quick else 20)
        ours, theirs = times["ours"], times["blank images"].median / 1e3
        case = f"{name}, random weights, LoRA, {ROWS} rows, {texts} of them text"
        milliseconds = [value / 1e3 for value in (ours.median, ours.low, ours.high)]
        found.add("vision_step_ms", case, milliseconds[0], "ms", *milliseconds[1:], {"blank images": theirs})
        found.save()
        said = f"{milliseconds[0]:.1f} ms, with blank images {theirs:.1f} ms"
        print(f"{case}: {said}; {time.perf_counter() - started:.0f} s", flush=True)
    started = time.perf_counter()
    add_padding(found, processor)
    found.save()
    print(f"padding: {time.perf_counter() - started:.0f} s", flush=True)
    return found


def add_padding(found: Measurements, processor, count: int = 256) -> None:
    """Add the share of padding for `count` rows, half of them text, of answers of many lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, len(ANSWER), (count,), generator=generator).tolist()
    rows = []
    for place, length in enumerate(lengths):
        asked = user(None, "What is this?") if place % 2 else user("What is this?")
        rows.append(row(asked, assistant(ANSWER[:length].strip()), images=[SIZE] * (place % 2)))
    order = torch.randperm(count, generator=generator).tolist()
    grouped = list(KindSampler([bool(one["images"]) for one in rows], ROWS))
    mixed, by_kind = (padding(processor, rows, one, ROWS) for one in (order, grouped))
    case = f"half of {count} rows text, batches of {ROWS}"
    found.add("vision_padding", case, by_kind, "fraction", baselines={"random order": mixed})


def _step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    batch = {name: value.to(model.device) for name, value in batch.items()}

    def run() -> None:
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()

    return run


if __name__ == "__main__":
    run_sweep(measure, "Training steps of mixed batches, ours and with blank images.")

"""Measure the 4-bit linear layer: where it overtakes bitsandbytes' fused GEMM, and what a patched model gains.

    records = measure(probe(), quick=True)  # {"metric", "case", "value", "unit", "low", "high", "baselines"} each

Every `value` is ours; "bitsandbytes" among the baselines is its own forward in the same run.
"""

import copy
from collections.abc import Callable, Iterator

import torch

from unsloth_puzzles.bench.hardware import Hardware
from unsloth_puzzles.bench.memory import peak_memory
from unsloth_puzzles.bench.timing import Timing, device_time, enqueue_time, event_time, rotations, wall_time
from unsloth_puzzles.device import capability
from unsloth_puzzles.nf4.linear import nf4_linear
from unsloth_puzzles.nf4.patch import MIN_ROWS_ELSEWHERE, patch_linear4bit

OURS, THEIRS = "ours", "bitsandbytes"

# (out_features, in_features) -> how many a block of Llama 3.2 1B has: q and o, k and v, gate and up, down.
SHAPES = {(2048, 2048): 2, (512, 2048): 2, (8192, 2048): 2, (2048, 8192): 1}
TINY_SHAPES = {(64, 64): 2, (32, 64): 2, (128, 64): 2, (64, 128): 1}
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
QUICK_ROWS = (1, 2, 3, 4, 8, 64, 512, 4096)
FEW_ROWS = (1, 8, 64, 512)  # on a T4
BLOCK = "one block of Llama 3.2 1B"


def measure(hardware: Hardware, quick: bool) -> list[dict]:
    """All measurements of this file. `quick` takes fewer row counts and samples; without a GPU everything is tiny.

    Metrics, by case:
        linear_us                      a shape or a whole block, and rows: no gradients, device time
        linear_crossover_rows          a shape or a whole block: from these rows on ours is never slower (if any are)
        linear_enqueue_us              one row: host cost of a call
        linear_forward_backward_us     with the gradient of x
        linear_forward_backward_mib    peak above the state before
        prefill_tokens_per_s           random weights; one forward, logits of the last token only
        generation_tokens_per_s        random weights; new tokens over all the time, a prompt of 128 tokens included
    """
    return [
        *_without_gradients(hardware, quick),
        *_with_gradients(hardware, quick),
        *_models(hardware, quick),
    ]


def crossover(ours: dict[int, float], theirs: dict[int, float]) -> int | None:
    """The fewest rows from which on ours is never slower; None if it is slower at the most rows measured."""
    found = None
    for rows in sorted(ours, reverse=True):
        if ours[rows] > theirs[rows]:
            break
        found = rows
    return found


def _without_gradients(hardware: Hardware, quick: bool) -> Iterator[dict]:
    shapes, all_rows = (SHAPES, QUICK_ROWS if quick else ROWS) if hardware.device == "cuda" else (TINY_SHAPES, (1, 4))
    all_rows = FEW_ROWS if _is_old() else all_rows
    rounds = (7 if quick else 20) if hardware.device == "cuda" else 1
    name = _dtype_name(hardware)
    blocks = {OURS: dict.fromkeys(all_rows, 0.0), THEIRS: dict.fromkeys(all_rows, 0.0)}
    for shape, count in shapes.items():
        times = {OURS: {}, THEIRS: {}}
        for rows in all_rows:
            timings = device_time(_candidates(shape, rows, hardware), rounds=rounds)
            for who, timing in timings.items():
                times[who][rows] = timing.median
                blocks[who][rows] += count * timing.median
            yield _record("linear_us", f"{_text(shape)} {name}, {_rows(rows)}", timings, "us")
        found = crossover(times[OURS], times[THEIRS])
        if found is not None:
            yield _plain("linear_crossover_rows", f"{_text(shape)} {name}", found, "rows")
    block = BLOCK if shapes is SHAPES else "one block of a tiny Llama"
    for rows in all_rows:
        theirs = {THEIRS: blocks[THEIRS][rows]}
        yield _plain("linear_us", f"{block} {name}, {_rows(rows)}", blocks[OURS][rows], "us", theirs)
    found = crossover(blocks[OURS], blocks[THEIRS])
    if found is not None:
        yield _plain("linear_crossover_rows", f"{block} {name}", found, "rows")
    shape = max(shapes)
    calls = {who: closures[0] for who, closures in _candidates(shape, 1, hardware).items()}
    timings = enqueue_time(calls, rounds=3 * rounds, calls=100 if hardware.device == "cuda" else 1)
    yield _record("linear_enqueue_us", f"{_text(shape)} {name}, 1 row", timings, "us")


def _candidates(shape: tuple[int, int], rows: int, hardware: Hardware) -> dict[str, list[Callable[[], object]]]:
    """Closures over so many sets of buffers that no call finds its weight or its x in the L2 cache."""
    from bitsandbytes import matmul_4bit

    dtype, device = _dtype(hardware), hardware.device
    out_features, in_features = shape
    packed, state = _quantised(shape, hardware)
    bytes_per_set = packed.numel() + rows * (in_features + out_features) * dtype.itemsize
    ours, theirs = [], []
    for _ in range(rotations(bytes_per_set, hardware.l2_bytes)):
        x = torch.randn(rows, in_features, device=device, dtype=dtype)
        weight = (packed.clone(), copy.deepcopy(state))
        ours.append(_closed(nf4_linear, x, *weight))
        theirs.append(_closed(matmul_4bit, x, *weight))
    return {OURS: [_no_grad(call) for call in ours], THEIRS: [_no_grad(call) for call in theirs]}


def _with_gradients(hardware: Hardware, quick: bool) -> Iterator[dict]:
    from bitsandbytes import matmul_4bit

    on_gpu = hardware.device == "cuda"
    shapes, rows = (SHAPES, 2048 if _is_old() else 8192) if on_gpu else (TINY_SHAPES, 8)
    dtype, name = _dtype(hardware), _dtype_name(hardware)
    for shape in shapes:
        weight = _quantised(shape, hardware)
        x = torch.randn(rows, shape[1], device=hardware.device, dtype=dtype, requires_grad=True)
        upstream = torch.randn(rows, shape[0], device=hardware.device, dtype=dtype)
        calls = {
            OURS: _closed(_forward_backward, nf4_linear, x, weight, upstream),
            THEIRS: _closed(_forward_backward, matmul_4bit, x, weight, upstream),
        }
        case = f"{_text(shape)} {name}, {_rows(rows)}"
        rounds = 10 if quick else 30
        timings = event_time(calls, rounds=rounds, calls=5) if on_gpu else wall_time(calls, rounds=1)
        yield _record("linear_forward_backward_us", case, timings, "us")
        peaks = {who: peak_memory(call)[1] / 2**20 for who, call in calls.items()}
        yield _plain("linear_forward_backward_mib", case, peaks[OURS], "MiB", {THEIRS: peaks[THEIRS]})


def _forward_backward(function, x, weight, upstream):
    return torch.autograd.grad(function(x, *weight), x, upstream)


def _models(hardware: Hardware, quick: bool) -> Iterator[dict]:
    from benchmarks.models import SEED, llama_1b_config, random_nf4_llama, tiny_llama_config

    on_gpu = hardware.device == "cuda"
    config = llama_1b_config() if on_gpu else tiny_llama_config()
    new = 24 if _is_old() else 64  # the host decides, and a T4's is a slow one
    prompt, new, prefill = (128, new, 2048) if on_gpu else (MIN_ROWS_ELSEWHERE, 2, MIN_ROWS_ELSEWHERE)
    models = {who: random_nf4_llama(config, hardware.device, _dtype(hardware)).eval() for who in (OURS, THEIRS)}
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(config.vocab_size, (1, max(prompt, prefill)), generator=generator).to(hardware.device)
    rounds = (3 if quick else 10) if on_gpu and not _is_old() else 1
    case = f"{'Llama 3.2 1B' if on_gpu else 'tiny Llama'}, random weights, {_dtype_name(hardware)}, batch 1"

    def run_prefill(model):
        return model(ids[:, :prefill], use_cache=False, logits_to_keep=1).logits

    def generate(model):
        given = ids[:, :prompt]
        return model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=new, min_new_tokens=new
        )

    with patch_linear4bit(models[OURS]):
        calls = {who: _no_grad(_closed(run_prefill, model)) for who, model in models.items()}
        yield _rate("prefill_tokens_per_s", f"{case}, {prefill} tokens", wall_time(calls, rounds=3 * rounds), prefill)
        calls = {who: _no_grad(_closed(generate, model)) for who, model in models.items()}
        yield _rate("generation_tokens_per_s", f"{case}, {new} new tokens", wall_time(calls, rounds=rounds), new)


def _is_old() -> bool:
    """Whether this is a T4, or as old: then less is measured."""
    return 0 < capability() < 80


def _quantised(shape: tuple[int, int], hardware: Hardware):
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(shape, device=hardware.device, dtype=_dtype(hardware)) * 0.02
    return quantize_4bit(weight, compress_statistics=True, quant_type="nf4")


def _closed(function: Callable, *arguments) -> Callable[[], object]:
    return lambda: function(*arguments)


def _no_grad(call: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(call)


def _dtype(hardware: Hardware) -> torch.dtype:
    if hardware.device == "cpu":
        return torch.float32
    return torch.bfloat16 if hardware.bf16 else torch.float16


def _dtype_name(hardware: Hardware) -> str:
    return str(_dtype(hardware)).removeprefix("torch.")


def _rows(rows: int) -> str:
    return f"{rows} row" + "s" * (rows != 1)


def _text(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _record(metric: str, case: str, timings: dict[str, Timing], unit: str) -> dict:
    ours = timings[OURS]
    baselines = {THEIRS: timings[THEIRS].median}
    return _plain(metric, case, ours.median, unit, baselines, ours.low, ours.high)


def _rate(metric: str, case: str, timings: dict[str, Timing], tokens: int) -> dict:
    ours, theirs = (1e6 * tokens / timings[who].median for who in (OURS, THEIRS))
    low, high = (1e6 * tokens / bound for bound in (timings[OURS].high, timings[OURS].low))
    return _plain(metric, case, ours, "tokens/s", {THEIRS: theirs}, low, high)


def _plain(metric, case, value, unit, baselines=None, low=None, high=None) -> dict:
    names = ("metric", "case", "value", "unit", "low", "high", "baselines")
    return dict(zip(names, (metric, case, value, unit, low, high, baselines or {}), strict=True))

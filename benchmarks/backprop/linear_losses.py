"""What is measured on the puzzle's shape: peak memory and time, ours beside every baseline and beside the floor.

    case = make_case(REFERENCE, "cuda")
    calls, left_out = candidates(case)
    results = measure(calls)

A candidate's call is a forward and a backward from the hidden states on, and returns the loss and the gradients.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.backprop.baselines import FLOOR, FLOOR_FLOAT32, LIGER_FLOAT32, baselines, gemm_floor
from benchmarks.backprop.workload import Case, Loss, Shape, make_case, many_shapes, release
from unsloth_puzzles.backprop.chunks import chunk_rows, even_rows
from unsloth_puzzles.backprop.labelled_rows import LabelledRows
from unsloth_puzzles.backprop.linear import memory_efficient_linear
from unsloth_puzzles.backprop.losses import cross_entropy
from unsloth_puzzles.bench.memory import peak_memory
from unsloth_puzzles.bench.timing import Timing, event_time, wall_time

OURS = "ours"
OURS_FLOAT32 = "ours, float32 dW"
OURS_AS_LIGER = "ours, Liger's chunk size"
OURS_ALL_ROWS = "ours, all rows"
CHUNK_SIZES = (256, 512, 920, 2048, 4096)
VOCABULARIES = (8192, 32768, 262144)  # each is compiled anew, which takes longer than measuring it


def ours(chunk_size: int | str = "auto", *, accumulate_dtype: torch.dtype | None = None, compile: bool = True) -> Loss:
    """`memory_efficient_linear` with the plain `cross_entropy`, as a loss of (hidden_states, weight, labels)."""

    def loss(hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        head = nn.Linear(1, 1, bias=False, device="meta")
        head.weight, head.in_features, head.out_features = weight, *reversed(weight.shape)
        return memory_efficient_linear(
            hidden_states,
            head,
            labels,
            cross_entropy,
            reduction="sum",
            normalizer="labels",
            chunk_size=chunk_size,
            accumulate_dtype=accumulate_dtype,
            compile=compile,
        )

    return loss


def of_labelled_rows(loss: Loss) -> Loss:
    """`loss` of the rows that have a label, as `use_memory_efficient_loss(skip_ignored=True)` calls it."""

    def of_rows(hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = LabelledRows.of(labels)
        return loss(rows.choose(hidden_states), weight, rows.choose(labels))

    return of_rows


def losses(case: Case, *, compile: bool = True, without: Iterable[str] = ()) -> tuple[dict[str, Loss], dict[str, str]]:
    """Every loss that runs on the case, ours ("auto" chunks) and the baselines, and the others with the reason why not.

    Those that differ only in how dW is summed are left away where the head is frozen. `compile` is for ours.
    """
    found, left_out = baselines(case.hidden_states.device, case.shape.dtype)
    float32 = torch.float32
    mine = {OURS: ours(compile=compile), OURS_FLOAT32: ours(accumulate_dtype=float32, compile=compile)}
    unwanted = {*without} if case.train_head else {*without, OURS_FLOAT32, LIGER_FLOAT32}
    found = {name: loss for name, loss in {**mine, **found}.items() if name not in unwanted}
    return found, {name: reason for name, reason in left_out.items() if name not in unwanted}


def candidates(
    case: Case, *, compile: bool = True, without: Iterable[str] = ()
) -> tuple[dict[str, Callable], dict[str, str]]:
    """Calls for `measure`: forward and backward of all `losses`, and the bare matrix products in the chunks of ours."""
    found, left_out = losses(case, compile=compile, without=without)
    calls = {name: _forward_backward(case, loss) for name, loss in found.items()}
    for name, dtype in {FLOOR: None, FLOOR_FLOAT32: torch.float32}.items():
        if name in without or (name == FLOOR_FLOAT32 and not case.train_head):
            continue
        try:
            calls[name] = _floor(case, auto_rows(case), dtype)
        except ValueError as error:
            left_out[name] = str(error)
    return calls, left_out


def auto_rows(case: Case) -> int:
    """The rows that "auto" stands for, with the compiled loss."""
    shape = case.shape
    device = case.hidden_states.device
    return even_rows(chunk_rows("auto", shape.vocabulary, shape.dtype, device, hidden_size=shape.hidden), shape.rows)


def liger_rows(shape: Shape) -> int:
    """The rows of Liger's chunks (liger-kernel 0.8): with as many, ours needs the same memory."""
    chunks = -(-shape.vocabulary // shape.hidden)
    rows = -(-shape.rows // chunks)
    return min(shape.rows, 1 << (rows - 1).bit_length())


def at_liger_memory(case: Case, *, compile: bool = True) -> Callable[[], object]:
    """A call for `measure`: forward and backward of ours in chunks of `liger_rows`."""
    return _forward_backward(case, ours(liger_rows(case.shape), compile=compile))


@dataclass(frozen=True)
class Measured:
    """`extra_peak_gib`: by how much memory in use rose above the state before, gradients included. `time`: in us."""

    extra_peak_gib: float
    time: Timing


@dataclass(frozen=True)
class Results:
    """The measurements of one run, by candidate, and the candidates that failed, with the reason."""

    measured: dict[Hashable, Measured] = field(default_factory=dict)
    failed: dict[Hashable, str] = field(default_factory=dict)

    def time_over(self, one: Hashable, other: Hashable) -> float:
        """Median time of `one` over that of `other`."""
        return self.measured[one].time.median / self.measured[other].time.median


def measure(
    calls: Mapping[Hashable, Callable[[], object]], *, rounds: int = 7, may_fail: Iterable[Hashable] = ()
) -> Results:
    """Peak memory of each call, after one that compiles and warms the caches, then the times of all, interleaved.

    A call that runs out of memory is reported as failed, with the reason, and not timed; so is one of `may_fail` that
    raises any other error, since another library's kernel may not build for this GPU.
    """
    peaks, failed, may_fail = {}, {}, {*may_fail}
    with many_shapes():
        for name, call in calls.items():
            try:
                call()
                peaks[name] = peak_memory(call)[1] / 2**30
            except torch.OutOfMemoryError as error:
                failed[name] = f"out of memory: {str(error).partition('.')[0]}"
            except Exception as error:
                if name not in may_fail:
                    raise
                failed[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            release()
        fit = {name: calls[name] for name in peaks}
        timer = event_time if torch.cuda.is_available() else wall_time
        times = timer(fit, rounds=rounds) if fit else {}
    release()
    return Results({name: Measured(peaks[name], times[name]) for name in fit}, failed)


def frontier(
    case: Case,
    sizes: Iterable[int] = CHUNK_SIZES,
    *,
    beside: Mapping[str, Loss] | None = None,
    compile: bool = True,
    rounds: int = 5,
) -> dict[int, Results]:
    """Ours and the bare matrix products at each chunk size up to the case's rows, all interleaved in one run.

    `beside` has no chunk size of ours: each is measured once, in that run, and stands in the results of every size.
    """
    sizes = [size for size in sizes if size <= case.shape.rows]
    calls = {}
    for size in sizes:
        calls[OURS, size] = _forward_backward(case, ours(size, compile=compile))
        calls[FLOOR, size] = _floor(case, size, None)
    calls |= {(name, None): _forward_backward(case, loss) for name, loss in (beside or {}).items()}
    together = measure(calls, rounds=rounds)

    def at(size: int, found: dict) -> dict:
        return {name: value for (name, of), value in found.items() if of in (size, None)}

    return {size: Results(at(size, together.measured), at(size, together.failed)) for size in sizes}


def vocabulary_sweep(
    shape: Shape,
    device: str,
    vocabularies: Iterable[int] = VOCABULARIES,
    *,
    train_head: bool = True,
    compile: bool = True,
    without: Iterable[str] = (OURS_FLOAT32, LIGER_FLOAT32, FLOOR_FLOAT32),
    rounds: int = 3,
) -> dict[int, Results]:
    """All `candidates` at each vocabulary size, the rest of `shape` unchanged; one vocabulary after the other."""
    found = {}
    for size in vocabularies:
        case = make_case(Shape(shape.rows, shape.hidden, size, shape.dtype), device, train_head=train_head)
        calls, _ = candidates(case, compile=compile, without=without)
        found[size] = measure(calls, rounds=rounds)
        del case, calls
        release()
    return found


def _forward_backward(case: Case, loss: Loss) -> Callable[[], object]:
    return lambda: case.forward_backward(loss)


def _floor(case: Case, rows: int, accumulate_dtype: torch.dtype | None) -> Callable[[], object]:
    return gemm_floor(
        case.hidden_states, case.weight, rows, train_head=case.train_head, accumulate_dtype=accumulate_dtype
    )

"""What Inductor is told about rows of logits: where, for which kernels, and that all kinds of functions compile."""

import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import sympy
import torch
from torch._inductor.choices import InductorChoices
from torch._inductor.virtualized import V

from unsloth_puzzles.backprop import tiles
from unsloth_puzzles.backprop.arguments import Arguments, Reduction
from unsloth_puzzles.backprop.compiled import CompiledFunction
from unsloth_puzzles.backprop.eager import EagerFunction
from unsloth_puzzles.backprop.losses import cross_entropy
from unsloth_puzzles.bench import child

H200, RTX3090, T4 = (9, 132, 60, 2048), (8, 82, 6, 1536), (7, 40, 4, 1024)  # sm, their number, MiB of L2, threads
FIXED = {"XBLOCK": 1, "R0_BLOCK": 16384, "num_warps": 32, "num_stages": 1}


@pytest.mark.parametrize(
    ("gpu", "vocabulary", "itemsize", "expected"),
    [
        (H200, 128256, 2, True),
        (H200, 151936, 2, True),
        (H200, 128256, 4, False),  # one row on each multiprocessor is more than the cache
        (H200, 262144, 2, False),
        (H200, 32000, 2, False),  # four rows on each are not
        (RTX3090, 128256, 2, False),
        (RTX3090, 32000, 2, True),
        (T4, 32000, 2, False),
    ],
)
def test_blocks_are_set_where_one_row_at_a_time_fits_the_cache(monkeypatch, gpu, vocabulary, itemsize, expected):
    as_gpu(monkeypatch, gpu)
    for timed, wanted in ((torch.__version__, expected), ("1.0.", False)):
        monkeypatch.setattr(tiles, "_TIMED", timed)
        kwargs = compiled_with(monkeypatch, vocabulary, itemsize)[1].triton_kernel_kwargs(None, *kernel(vocabulary))
        assert ("fixed_config" in kwargs) == wanted


def test_rehearsal_of_a_t4_has_no_blocks_on_a_larger_gpu(monkeypatch):
    as_gpu(monkeypatch, H200)
    monkeypatch.setenv("UNSLOTH_PUZZLES_REHEARSAL", "T4")
    _, choices = compiled_with(monkeypatch, 128256, 2)
    assert "fixed_config" not in choices.triton_kernel_kwargs(None, *kernel())


@pytest.mark.parametrize("gpu", [H200, RTX3090, T4])
@pytest.mark.parametrize("version", [torch.__version__, "1.0."])
def test_choices_are_made_on_every_gpu_with_a_torch_that_takes_them(monkeypatch, gpu, version):
    as_gpu(monkeypatch, gpu)
    monkeypatch.setattr(tiles, "_VERSIONS", (version,))
    options, choices = compiled_with(monkeypatch, 128256, 2)
    told = version != "1.0."
    assert type(choices).__name__ == ("RowChoices" if told else "InductorChoices")
    assert type(V.choices) is InductorChoices  # afterwards
    assert options.pop("use_fast_math") and bool(options) == told  # another key in the cache of compiled code
    assert all(hasattr(torch._inductor.config, name) for name in options)


def as_gpu(monkeypatch, gpu):
    major, number, mebibytes, threads = gpu
    properties = SimpleNamespace(
        multi_processor_count=number,
        L2_cache_size=mebibytes * 2**20,
        max_threads_per_multi_processor=threads,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(torch.version, "hip", None)


def compiled_with(monkeypatch, vocabulary, itemsize):
    """The options and the choices with which a program is compiled for such logits."""
    asked = []

    def compile(program, *, fullgraph, options):
        return lambda *given: (asked.extend([options, V.choices]), program(*given))[1]

    monkeypatch.setattr(torch, "compile", compile)
    logits = SimpleNamespace(is_cuda=True, device="cuda", shape=(512, vocabulary), element_size=lambda: itemsize)
    assert tiles.compile_for_rows(max, {"use_fast_math": True}, logits)(1, 2) == 2
    return asked


def test_cpu_keeps_inductors_choice(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda program, *, fullgraph, options: options)
    assert tiles.compile_for_rows(print, {}, torch.zeros(2, 128256, dtype=torch.bfloat16)) == {}


def test_other_choices_of_the_users_are_kept():
    class Users(InductorChoices):
        def triton_kernel_kwargs(self, kernel_cls, features, groups, kernel_kwargs):
            return {**kernel_kwargs, "of the user": True}

        def reduction_split_factor(self, device, reduction_numel_hint, numel_hint, inner_reduction):
            return 7

    with V.set_choices_handler(Users()):
        choices = tiles._row_choices(128256, True)
    assert choices.triton_kernel_kwargs(None, *kernel())["of the user"]
    assert choices.reduction_split_factor(None, 128257, 40, True) == 7


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((128256, 40, True), 1),
        ((128256, 2, True), 1),
        ((128256, 1, True), 7),  # a sum of everything, or a single row
        ((128255, 40, True), 1),  # a part of a row
        ((128257, 40, True), 7),  # something else than the logits
        ((128256, 40, False), 7),  # over rows
    ],
)
@pytest.mark.parametrize("blocks", [False, True])
def test_no_row_is_split_over_blocks(monkeypatch, asked, expected, blocks):
    monkeypatch.setattr(InductorChoices, "reduction_split_factor", staticmethod(lambda *given: 7))
    numel, outputs, inner = asked
    choices = tiles._row_choices(128256, blocks)
    assert choices.reduction_split_factor(None, numel, outputs, inner_reduction=inner) == expected


def kernel(length=128256, tiles=("x", "r0_"), operations=(), **given):
    """What Inductor asks its choices about: a kernel's features, its tiling and what it is given already."""
    counts = Counter(operations)
    features = SimpleNamespace(
        reduction_numel=sympy.sympify(length), op_counts=lambda: counts, contains_op=lambda name: bool(counts[name])
    )
    return features, [dict.fromkeys(tiles)], given


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (kernel(), True),
        (kernel(128255), False),  # something else than the logits
        (kernel(1), False),  # no reduction
        (kernel(sympy.Symbol("s0")), False),
        (kernel(tiles=("y", "x", "r0_")), False),
        (kernel(tiles=("x", "r0_", "r1_")), False),
        (kernel(operations=["scan"]), False),
        (kernel(operations=["sort"]), False),
        (kernel(operations=["exp2"] * 120), True),
        (kernel(operations=["exp2"] * 121), False),
        (kernel(mix_order_reduction=True), False),
    ],
)
def test_only_plain_reductions_of_long_rows_get_the_blocks(asked, expected):
    given = tiles._row_choices(128256, True).triton_kernel_kwargs(None, *asked)
    if expected:
        assert given["fixed_config"].config == FIXED and given["override_cooperative_reduction"] is False
    else:
        assert given == asked[2]


def test_rows_no_longer_than_a_block_keep_inductors_choice():
    assert tiles._row_choices(16384, True).triton_kernel_kwargs(None, *kernel(16384)) == {}
    assert tiles._row_choices(16385, True).triton_kernel_kwargs(None, *kernel(16385)) != {}


def test_first_call_of_few_rows_writes_the_kernels_of_many():
    script = Path(__file__).with_name("h200_kernels.py")
    environment = child.environment(TORCHINDUCTOR_COMPILE_THREADS="1")  # or it starts a pool of compilers
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert kernels["cross_entropy, 40 rows"] == kernels["cross_entropy, 512 rows"]
    assert len(kernels["cross_entropy, 512 rows"]) == 2 < len(kernels["Inductor's, 40 rows"])
    # A scan that Inductor splits does not compile in torch 2.11.
    assert kernels["running_sums, 40 rows"] == kernels["running_sums, 512 rows"] != []


def sorted_and_summed_up(logits, labels):
    z = logits.float()
    different = z[:, :512] + torch.arange(512, device=z.device) / 2**20  # equal ones may be sorted in any order
    return (torch.logsumexp(z, -1) + different.sort(-1).values[:, -3] + z.softmax(-1).cumsum(-1)[:, 7000]).sum()


def weighted(logits, labels, weight):
    """A gradient of `weight` is a sum over the rows, beside sums over the vocabulary."""
    return (torch.logsumexp(logits.float(), -1) - (logits.float() * weight).sum(-1)).sum()


@pytest.mark.gpu
@pytest.mark.parametrize("function", [cross_entropy, sorted_and_summed_up, weighted])
@pytest.mark.parametrize("first", [40, 512])  # rows of the call that compiles: fewer than two a multiprocessor, or more
def test_compiled_values_and_gradients_match_eager_mode(function, first):
    eager, compiled = (kind(partial(function), Reduction(False, -100)) for kind in (EagerFunction, CompiledFunction))
    for rows in (first, 512):
        for one, other in zip(gradients(eager, rows), gradients(compiled, rows), strict=True):
            few_flips = 1e-3 if one.dtype == torch.bfloat16 else 1e-5  # a value may be rounded to its other neighbour
            assert (one.double() - other.double()).norm() <= few_flips * one.double().norm()


@pytest.mark.gpu
def test_first_call_of_few_rows_makes_as_many_kernels_as_one_of_many():
    by_few, by_many = (CompiledFunction(partial(cross_entropy), Reduction(False, -100)) for _ in range(2))
    gradients(by_few, 40), gradients(by_many, 512)
    counts = []
    for function in (by_few, by_many):
        gradients(function, 512)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            gradients(function, 512)
            torch.cuda.synchronize()
        counts.append(sum(event.name.startswith("triton_") for event in seen.events()))
    assert counts[0] == counts[1] > 0


def gradients(function, rows, vocabulary=128256):
    """The value, and the gradients of the logits and of the arguments, for random logits."""
    generator = torch.Generator("cuda").manual_seed(rows)
    logits = (3 * torch.randn(rows, vocabulary, device="cuda", generator=generator)).bfloat16()
    labels = torch.randint(vocabulary, (rows,), device="cuda", generator=generator)
    takes_weight = function.function.func is weighted
    shared = (torch.randn(vocabulary, device="cuda", generator=generator),) if takes_weight else ()
    arguments, others = Arguments(labels, (), shared, (True,) * len(shared)), []
    value = function.value_and_gradient(
        logits, arguments, torch.ones((), device="cuda"), lambda start, found: others.append(list(found))
    )
    return [value, logits, *(sum(parts) for parts in zip(*others, strict=True))]

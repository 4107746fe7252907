# %% [markdown]
# ## A. NF4 to Triton
#
# **Task.** Turn a double-quantised bitsandbytes NF4 weight into fp16 or bf16 in ONE Triton kernel that also
# de-quantises the absmax, runs on a Tesla T4, uses no large intermediate buffer, and beats Unsloth's `fast_dequantize`
# by 1.15x or more.
#
# **Criteria** (14 points): a single kernel (3), speed-up of 1.05, 1.10 and 1.15 (1 + 2 + 2), works in `torch.compile`
# (1), custom inline asm works (3), cache eviction (1), tested in fp16 and bf16 (1).

# %% [markdown]
# ### The idea
#
# bitsandbytes stores two weights a byte and one 8-bit scale per 64 weights; the scales have scales of their own:
#
# ```
#  packed byte   h l           two weights: the high nibble first
#                | |
#                v v
#  code[16]      fp32, fp32    the NF4 table
#                  x           one multiply, one rounding to fp16 or bf16
#  absmax        code2[q] * absmax2 + offset          one per 64 weights, from its 8-bit q
#                            one per 64 * 256 weights
# ```
#
# $$w_i = \mathrm{round}\Big(\mathrm{code}[n_i]\cdot\big(\mathrm{code}_2[q_{\lfloor i/64\rfloor}]\cdot
# \mathrm{absmax}_2[\lfloor i/16384\rfloor] + \mathrm{offset}\big)\Big)$$
#
# When the puzzle was set, Unsloth used three launches: de-quantise the absmax into a float32 buffer, add the offset to
# the buffer, de-quantise the weights. The arithmetic is a few instructions a weight. The cost is in moving bytes and in
# launching kernels.
#
# ### The bound, before anything is measured
#
# | bytes a weight | read | write |
# |---|---|---|
# | packed code | 1/2 | |
# | 8-bit absmax | 1/64 | |
# | second absmax | 4/16384 | |
# | 16-bit weight | | 2 |
# | **one kernel** | | **2.516** |
# | float32 absmax buffer of the three launches | 2 x 4/64 | 2 x 4/64 |
# | **three launches** | | **2.766** |
#
# Three launches move only 10 % more bytes: on bytes alone one kernel could win no more than 1.10x. The rest must come
# from using the memory better (16-byte stores, all loads in flight before the first store), and from enqueuing once
# instead of three times. The practical ceiling to compare with is 2.516 bytes a weight at the machine's copy bandwidth:

# %%
from unsloth_puzzles.bench import section, t4

section.start("A. NF4 to Triton")
GPU = hardware.device == "cuda"
SHAPES = [(1024, 4096, "float16"), (2048, 8192, "float16"), (4096, 14336, "float16"), (4096, 14336, "bfloat16")]
SHAPES += [(8192, 28672, "bfloat16")]
BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256) + 2
for rows, columns, dtype in SHAPES:
    moved = rows * columns * BYTES
    here = (
        f"{moved / hardware.copy_bandwidth * 1e6:7.1f} us here" if hardware.copy_bandwidth else "unknown here (no GPU)"
    )
    on_t4 = f"{moved / t4.BANDWIDTH * 1e6:6.1f} us on a T4"
    print(f"{rows:5} x {columns:5} {dtype:8}: {moved / 1e6:6.1f} MB, at least {here}, {on_t4}")

# %% [markdown]
# ### The code
#
# The inline assembly first. The 16 table values lie across the lanes of a half warp, one in each, and a shuffle looks a
# code up. All its instructions exist on sm_75. Below sm_80 no instruction rounds to bfloat16, so integer arithmetic
# does it.

# %%
# show: unsloth_puzzles/nf4/asm.py

# %% [markdown]
# The kernel. The same source without assembly is the plain-Triton path (it also runs in the interpreter). The checks
# below require the same bits from both.

# %%
# show: unsloth_puzzles/nf4/kernel.py

# %% [markdown]
# For a small matrix the host takes longer than the kernel, so the launch is optimised as well.

# %%
# show: unsloth_puzzles/nf4/build.py

# %%
# show: unsloth_puzzles/nf4/state.py

# %%
# show: unsloth_puzzles/nf4/launch.py

# %%
# show: unsloth_puzzles/nf4/cache.py

# %%
# show: unsloth_puzzles/nf4/dequantize.py

# %% [markdown]
# The linear layer of challenges B and C is built on it: $y = xW^\top + b$, whose backward de-quantises $W$ again
# instead of keeping it.

# %%
# show: unsloth_puzzles/nf4/linear.py

# %% [markdown]
# The baselines and the puzzle's own harness are in `benchmarks/nf4/`.

# %%
import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import bitsandbytes as bnb
import matplotlib.pyplot as plt
from IPython.display import Markdown, display

from benchmarks.nf4 import harness
from benchmarks.nf4.baselines import THREE_LAUNCHES, baselines, bitsandbytes_dequantize, three_launches
from benchmarks.nf4.launches import count_launches
from benchmarks.nf4.workload import bytes_per_weight, calls, make_layer
from unsloth_puzzles.bench import timing
from unsloth_puzzles.bench.cross_compile import cross_compile_in_subprocess
from unsloth_puzzles.bench.experiments import free_memory, judge
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.device import capability
from unsloth_puzzles.nf4 import dequantize_nf4
from unsloth_puzzles.nf4.build import DEFAULT, PLAIN, Config
from unsloth_puzzles.nf4.launch import prepare
from unsloth_puzzles.nf4.state import nf4_weight

HARDWARE = hardware.name + (" held to a T4's limits" if hardware.rehearsal else "")
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
PATHS = {"asm": Config(), "plain": PLAIN} if GPU else {"plain": PLAIN}
OLD = 0 < capability() < 80  # a T4, often with two slow cores beside it
results = Measurements("resources/measurements/a_nf4.json", hardware)

contracted_figure = None  # of experiments that may fail
t4_reports, CANDIDATES = [], {"ours": dequantize_nf4, **baselines("cuda")} if GPU else {}

# Separate processes that run beside check 1: compilers, and a count of launches.
background = ThreadPoolExecutor(3)  # one each: an interrupt leaves none that has not begun
compiling = {
    name: background.submit(cross_compile_in_subprocess, f"benchmarks.nf4.variants:{name}")
    for name in ("contraction_jobs", "t4_jobs")
}
counting = background.submit(count_launches) if GPU else None

# %% [markdown]
# ### Check 1: the same bits as bitsandbytes
#
# Bits are compared, not values within a tolerance: fresh random weights in every dtype, both paths and the public
# function, blocks of 32 to 4096 weights, one and two levels of absmax, odd tails, scales so small that products round
# to zero. The output is filled with NaN before each call of a path. Two references: the formula above in plain PyTorch,
# and on a GPU bitsandbytes' own CUDA kernels (on a CPU bitsandbytes rounds bf16 differently, so there the formula
# alone decides).


# %%
def formula(packed, state):
    """The de-quantised weight, one float32 operation after another; products below 2^-126 flush to zero."""

    def multiply(a, b):
        tiny = (a * 2.0**24 * b).abs() < 2.0**-102  # below 2^-126 when rounded to 24 bits
        return torch.where(tiny, a * b * 0.0, a * b)

    numel, blocks = state.shape.numel(), state.absmax.numel()
    data = packed.view(torch.uint8).flatten().int()
    codes = state.code[torch.stack([data >> 4, data & 15], 1).flatten()[:numel]]
    absmax = state.absmax
    if state.nested:
        second = state.state2.absmax.repeat_interleave(state.state2.blocksize)[:blocks]
        absmax = multiply(state.state2.code[absmax.int()], second) + state.offset
    return multiply(codes, absmax.repeat_interleave(state.blocksize)[:numel]).to(state.dtype).view(state.shape)


def run(packed, state, config):
    """One path of the kernel, over an output full of NaN."""
    out = torch.full(state.shape, float("nan"), dtype=state.dtype, device=packed.device)
    return prepare(nf4_weight(packed, state), out, config).run(out)


def differing(ours, reference):
    """How many weights differ in any bit (so +0 is not -0)."""
    bits = torch.int32 if ours.dtype == torch.float32 else torch.int16
    return (ours.contiguous().view(bits) != reference.contiguous().view(bits)).sum().item()


bits = {}
LARGE = (2048, 8192) if OLD else (4096, 14336)  # the formula makes many passes over it
SIZES = [(1, 1), (1, 7), (33, 77), (64, 256)] + ([(129, 1023), (1001, 4099), LARGE] if GPU else [])
for path, config in PATHS.items():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weights = mismatched = cases = flushed = 0
        for shape in SIZES:
            for blocksize, nested in ((64, True), (64, False), (32, True), (4096, True)):
                weight = torch.randn(shape, device=hardware.device).to(dtype)
                packed, state = bnb.functional.quantize_4bit(
                    weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4"
                )
                scaled = [state.state2.absmax, state.offset] if nested else [state.absmax]
                originals = [tensor.clone() for tensor in scaled]
                for scale in (1.0, 1e-38, 3e-39):  # of the absmax: two that make products below 2^-126
                    for tensor, original in zip(scaled, originals, strict=True):
                        tensor.copy_(original * scale)
                    references = [formula(packed, state)]
                    if GPU:
                        theirs = bnb.functional.dequantize_4bit(packed, state)
                        references.append(theirs.t() if packed.shape[0] == 1 else theirs)
                    results_here = [run(packed, state, config)]
                    if config == DEFAULT:  # the public function, and again, when its launch is remembered
                        public = [dequantize_nf4(packed, state) for _ in range(2)]
                        results_here += [found.t() if packed.shape[0] == 1 else found for found in public]
                    mismatched += sum(differing(mine, exact) for mine in results_here for exact in references)
                    if scale == 1:
                        usual = results_here[0]
                    flushed += ((results_here[0] == 0) & (usual != 0)).sum().item()
                    weights, cases = weights + weight.numel(), cases + 1
        short = SHORT[str(dtype).removeprefix("torch.")]
        results.add("mismatched_weights", f"{path} {short}", mismatched, "weights")
        print(f"{path:5} {short}: {cases} cases, {weights:,} weights, {flushed:,} of them tiny, {mismatched} differ")
        bits[f"{path} {short}"] = mismatched == 0 < flushed
judge(results, "the same bits as bitsandbytes", bits)

# %% [markdown]
# ### Check 2: other implementations differ by contraction, not by a bug in Triton
#
# By default Triton lets the compiler contract `code2 * absmax2 + offset` into one fused multiply-add, which rounds once
# where bitsandbytes (a multiply in one kernel, an addition in the next) rounds twice. Compilers for GPUs may do so; it
# is not an error. The assembly says `mul.rn` and `add.rn`, which are never contracted. The plain path is compiled with
# `enable_fp_fusion=False`. The compiled code shows it:

# %%
for report in compiling["contraction_jobs"].result():
    print(f"plain path, {report.name:8}: {report.contracted} fma.rn.f32 in the PTX")

# %% [markdown]
# The effect on the result, with the same kernel compiled both ways. (A CPU does not contract, so there the fused result
# is computed in float64.) In float32 a few per cent of all weights change by one or two ulp. Rounding to fp16 hides
# nearly all of these changes, and rounding to bf16, which is coarser, hides more:

# %%
exactly = {}
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    short = SHORT[str(dtype).removeprefix("torch.")]
    layer = make_layer(*(LARGE if GPU else (128, 512)), dtype, hardware.device)
    packed, state = layer.weight.data, layer.weight.quant_state
    exact = dequantize_nf4(layer)
    if GPU:
        contracted = run(packed, state, PLAIN._replace(fp_fusion=True))
    else:
        second = state.state2.absmax.repeat_interleave(256)[: state.absmax.numel()].double()
        absmax = (state.state2.code.double()[state.absmax.int()] * second + state.offset.double()).float()
        once = bnb.functional.QuantState(absmax, state.shape, state.code, state.blocksize, "nf4", dtype)
        contracted = formula(packed, once)
    differ = contracted != exact
    exactly[short] = torch.equal(exact, formula(packed, state))
    count, case = differ.sum().item(), f"{exact.shape[0]}x{exact.shape[1]} {short}"
    results.add("contracted_mismatched_weights", case, count, "weights")
    print(f"{short}: {count:,} of {differ.numel():,} weights differ with contraction, 0 without")
    if dtype == torch.float32:
        contracted_figure = (exact, contracted)
judge(results, "the formula, without contraction", exactly)

# %%
if contracted_figure:
    exact, contracted = contracted_figure
    ulp = (contracted.view(torch.int32) - exact.view(torch.int32)).flatten().cpu()
    share = (ulp.view(-1, 64) != 0).any(1).float()  # per quantisation block
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    values, counts = ulp[ulp != 0].unique(return_counts=True)
    left.bar(values.numpy(), counts.numpy(), color="tab:red")
    left.set(xlabel="difference of a weight in float32 ulps", ylabel="weights", title="By how much they differ")
    pieces = share[: share.numel() // 64 * 64].view(64, -1).mean(1)
    right.plot(100 * pieces.numpy(), ".-", color="tab:red")
    right.set(xlabel="position in the matrix (64 slices of its blocks)", ylabel="blocks that differ, %", ylim=(0, None))
    right.set_title("Where: everywhere, as rounding would")
    figure.suptitle(f"float32 weights with the multiply-add contracted, random weights, {HARDWARE}")
    figure.savefig("resources/a_nf4_contraction.png", dpi=110)
    plt.show()

# %% [markdown]
# ### Check 3: one launch, one allocation
#
# The profiler counts kernels, and the allocator's statistics count requests for memory. Both run in a separate process,
# because launches stay slow in a process that has been profiled, and they are timed below.

# %%
if GPU:
    counted = counting.result()
    for name, found in counted.items():
        names = [kernel.split("<")[0].removeprefix("void ") for kernel in found["kernels"]]
        print(f"{name}: kernels {names}, {found['allocations']} allocations")
    ours, theirs = (len(found["kernels"]) for found in counted.values())
    results.add("kernel_launches", "one call", ours, "kernels", baselines={THREE_LAUNCHES: theirs})
    requests, requests_theirs = (found["allocations"] for found in counted.values())
    results.add("allocations", "one call", requests, "allocations", baselines={THREE_LAUNCHES: requests_theirs})
    judge(results, "one call", {"one kernel": ours == 1, "one allocation, the output's": requests == 1})
else:
    print("SKIPPED: launches and allocations are counted on a GPU")

# %% [markdown]
# ### Check 4: inside `torch.compile`
#
# The kernel is a `torch.library` operator with a fake, so `fullgraph=True` (which refuses any graph break) traces
# through the public function, module and quantisation state included.

# %%
from torch._dynamo.utils import counters

for job in compiling.values():
    job.exception()  # waits: what follows is timed

layer = make_layer(*((4096, 4096) if GPU else (64, 128)), torch.float16, hardware.device)
bitsandbytes_dequantize(layer)  # on a CPU this compiles too: before the counters start
torch.compiler.reset()
counters.clear()
compiled = torch.compile(lambda layer: dequantize_nf4(layer) * 2, fullgraph=True)
doubled = compiled(layer)
breaks = sum(counters["graph_break"].values())
differing = (doubled != dequantize_nf4(layer) * 2).sum().item()
results.add("compile_graph_breaks", "fullgraph", breaks, "graph breaks")
results.add("compile_mismatched", "fullgraph", differing, "weights")
print(f"graph breaks: {breaks}, graphs: {counters['stats']['unique_graphs']}, weights that differ: {differing}")
judge(results, "inside torch.compile", {"no graph break": breaks == 0, "the same weights": differing == 0})
arguments = tuple(nf4_weight(layer.weight.data, layer.weight.quant_state))
print("opcheck:", torch.library.opcheck(torch.ops.unsloth_puzzles.dequantize_nf4, arguments))

# %% [markdown]
# Speed inside `torch.compile`: the puzzle's MLP in fp16, compiled as a whole (Inductor fuses the activation), and the
# operator alone, where a compiled call also pays for Dynamo's guards on the host:

# %%
if GPU:
    plain_mlp, x = harness.build(harness.OFFICIAL[0], "cuda")

    def forward(x):
        gate, up, down = (dequantize_nf4(layer).t() for layer in plain_mlp.layers())
        return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down

    torch.compiler.reset()
    counters.clear()
    compiled_forward = torch.compile(forward, fullgraph=True)
    compiled_alone = torch.compile(lambda: dequantize_nf4(plain_mlp.gate), fullgraph=True)
    pairs = {
        "MLP, 2 x 3333 tokens, 2048x8192, fp16": (lambda: forward(x), lambda: compiled_forward(x), 2 if OLD else 10),
        "one matrix alone, 2048x8192, fp16": (lambda: dequantize_nf4(plain_mlp.gate), compiled_alone, 50),
    }
    for case, (eager, compiled_call, repeat) in pairs.items():
        with torch.no_grad():
            found = timing.wall_time({"eager": eager, "compiled": compiled_call}, rounds=20, calls=repeat)
        fast, slow = found["compiled"], found["eager"]
        results.add("compile_wall_us", case, fast.median, "us", fast.low, fast.high, {"eager": slow.median})
        print(
            f"{case}: compiled {fast.median:.1f} us ({fast.low:.1f} to {fast.high:.1f}), eager {slow.median:.1f} us "
            f"({slow.low:.1f} to {slow.high:.1f}): {fast.median / slow.median:.2f} of its time"
        )
    graphs = counters["stats"]["unique_graphs"]
    judge(results, "one graph each", {"two graphs": graphs == 2, "no graph break": not counters["graph_break"]})
else:
    print("SKIPPED: compiled and eager are timed on a GPU")

# %% [markdown]
# A compiled function that de-quantises one matrix takes longer by the wall clock than the plain call. At every call the
# host checks the guards on the layer and its quantisation state, which takes longer than the kernel. Compile a model,
# where one set of guards covers many layers, and not a single call.

# %% [markdown]
# ### Check 5: the T4's compiler
#
# The kernels are compiled for the T4 (sm_75) whatever GPU is here, in every form: whole, ragged, unaligned, with a
# plain absmax, and with the other table look-ups. Registers, spills, shared memory (64 KB at most) and instructions
# come from those binaries.

# %%
t4_reports = compiling["t4_jobs"].result()
fits = {}
for report in t4_reports:
    results.add("sm75_spills", report.name, report.spills, "bytes")
    results.add("sm75_shared_bytes", report.name, report.shared, "bytes")
    fits[report.name] = report.spills == 0 and report.shared <= 65536
    if report.name.endswith(" whole"):
        print(
            f"{report.name.removesuffix(' whole'):22} {report.registers:2} registers, {report.spills} bytes spilled, "
            f"{report.shared:5} bytes shared, {report.count() / 16:.1f} instructions a weight"
        )
worst = [max(getattr(report, what) for report in t4_reports) for what in ("registers", "shared")]
print(f"{len(t4_reports)} builds: at most {worst[0]} registers and {worst[1]} bytes shared")
judge(results, "built for a T4: no spills, at most 64 KiB shared", fits)

# %% [markdown]
# ### The puzzle's harness
#
# An MLP of three `Linear4bit` layers. Every candidate is checked at the DEFAULT tolerances of
# `torch.testing.assert_close`. Then 1000 rounds of three matrices are timed by the wall clock, with a synchronise after
# each matrix. The candidates alternate, eleven times (five on a T4, which takes ten times as long). A ratio compares
# two consecutive measurements.

# %%
candidates = {"ours": dequantize_nf4} | ({THREE_LAUNCHES: three_launches} if GPU else {})
cases = harness.OFFICIAL if GPU else harness.QUICK
rounds, repeats = (1000, 5 if OLD else 11) if GPU else (1, 1)
seconds = harness.measure(
    candidates, bitsandbytes_dequantize, cases, device=hardware.device, rounds=rounds, repeats=repeats
)
print(f"every check passed: {len(cases)} cases, {len(candidates)} candidates, twice each")


def middle(values):
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), tenths[0], tenths[-1]


def add_harness(case, ours, theirs):
    """Record and print the speed-up and what it comes from; seconds, one a repeat."""
    ratio = middle([b / a for a, b in zip(ours, theirs, strict=True)])
    mine, other = middle([1e6 * t / rounds for t in ours]), middle([1e6 * t / rounds for t in theirs])
    results.add("official_harness_speedup", case, ratio[0], "x", *ratio[1:])
    results.add("official_harness_us", case, mine[0], "us", *mine[1:], {THREE_LAUNCHES: other[0]})
    both = f"ours {mine[0]:.1f} us a round, three launches {other[0]:.1f} us"
    print(f"{case:16} {both}: {ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})")


if GPU:
    for case in cases:
        label = f"{case.hidden}x{case.inner} {SHORT[str(case.dtype).removeprefix('torch.')]}"
        add_harness(label, seconds["ours"][case], seconds[THREE_LAUNCHES][case])
        section.work(bytes=6 * BYTES * case.hidden * case.inner * rounds * repeats)
    for dtype in (torch.float16, torch.bfloat16):
        short = SHORT[str(dtype).removeprefix("torch.")]
        results.add("harness_checks_passed", short, sum(case.dtype == dtype for case in cases), "cases")
    totals = {name: [sum(t) for t in zip(*by_case.values(), strict=True)] for name, by_case in seconds.items()}
    add_harness("all", totals["ours"], totals[THREE_LAUNCHES])
    print("on", HARDWARE)
else:
    print("SKIPPED: the interpreter's time says nothing about a GPU")

# %% [markdown]
# ### Device time, and the host's
#
# Device time from CUDA graphs, buffers rotating over at least four times the L2 cache, candidates interleaved. The
# share of this machine's measured copy bandwidth counts 2.516 bytes a weight for every candidate (the baselines move
# more).

# %%
device_us = {}
if GPU:
    for rows, columns, name in SHAPES:
        dtype = getattr(torch, name)
        moved = bytes_per_weight(dtype) * rows * columns
        sets = max(2, timing.rotations(moved, hardware.l2_bytes))
        layers = [make_layer(rows, columns, dtype, "cuda") for _ in range(sets)]
        found = timing.device_time(
            {key: calls(f, layers) for key, f in CANDIDATES.items()}, rounds=15 if OLD else 30, bytes_per_call=moved
        )
        device_us[rows, columns, name] = found
        case, ours = f"{rows}x{columns} {SHORT[name]}", found["ours"]
        others = {key: result.median for key, result in found.items() if key != "ours"}
        results.add("device_us", case, ours.median, "us", ours.low, ours.high, others)
        three = found[THREE_LAUNCHES]
        ratio = [three.median / ours.median, three.low / ours.high, three.high / ours.low]
        results.add("speedup_vs_unsloth_device", case, ratio[0], "x", *ratio[1:])
        shares = {key: hardware.copy_fraction(moved, us) for key, us in others.items()}
        results.add(
            "copy_bandwidth_fraction", case, hardware.copy_fraction(moved, ours.median), "fraction",
            hardware.copy_fraction(moved, ours.high), hardware.copy_fraction(moved, ours.low), shares,
        )  # fmt: skip
        print(
            f"{case:16} ours {ours.median:6.1f} us ({ours.low:.1f} to {ours.high:.1f}), "
            f"{100 * hardware.copy_fraction(moved, ours.median):.1f} % of the copy bandwidth; three launches "
            f"{others[THREE_LAUNCHES]:6.1f} us: {others[THREE_LAUNCHES] / ours.median:.2f}x"
        )
        del layers
        torch.cuda.empty_cache()
else:
    print("SKIPPED: device time is measured on a GPU")

# %%
if GPU:
    layer = make_layer(1024, 4096, torch.float16, "cuda")
    found = timing.enqueue_time({key: partial(f, layer) for key, f in CANDIDATES.items()})
    others = {key: result.median for key, result in found.items() if key != "ours"}
    ours = found["ours"]
    results.add("host_enqueue_us", "one call, 1024x4096", ours.median, "us", ours.low, ours.high, others)
    print(
        "host time to enqueue one call, 1024x4096:", {key: f"{result.median:.1f} us" for key, result in found.items()}
    )
else:
    print("SKIPPED: the host's share of a launch is measured on a GPU")

# %% [markdown]
# ### Figures: how close to the machine's limit

# %%
SWEEP = [(2**10 * 2**k, 2**10 * 2**k, "float16") for k in range(6)]  # 1 M to 1 G weights
SWEEP = [shape for shape in SWEEP if GPU and shape[0] * shape[1] * 40 < 0.7 * hardware.memory_gib * 2**30]
sweep_us = {}
if GPU:
    for rows, columns, _ in SWEEP:
        moved = BYTES * rows * columns
        sets = max(2, timing.rotations(moved, hardware.l2_bytes))
        layers = [make_layer(rows, columns, torch.float16, "cuda") for _ in range(sets)]
        found = timing.device_time(
            {key: calls(f, layers) for key, f in CANDIDATES.items()}, rounds=15, bytes_per_call=moved
        )
        sweep_us[rows * columns] = {key: result.median for key, result in found.items()}
        ours = found["ours"]
        others = {key: us for key, us in sweep_us[rows * columns].items() if key != "ours"}
        results.add("sweep_device_us", f"{rows}x{columns} fp16", ours.median, "us", ours.low, ours.high, others)
        del layers
        torch.cuda.empty_cache()
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    styles = {"ours": "o-", THREE_LAUNCHES: "s--", "bitsandbytes": "^:", "PEFT": "v:"}
    for name, style in styles.items():
        of = {size: 100 * hardware.copy_fraction(BYTES * size, us[name]) for size, us in sweep_us.items() if name in us}
        axes.plot(list(of), list(of.values()), style, label=name)
    axes.axhline(100, color="gray", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="weights", ylabel="2.516 bytes a weight / time,\n% of copy bandwidth", ylim=(0, None))
    axes.set_title(f"NF4 to fp16, random weights, {HARDWARE} (copies {hardware.copy_bandwidth / 1e12:.2f} TB/s)")
    axes.legend(fontsize=8)
    figure.savefig("resources/a_nf4_bandwidth.png", dpi=110)
    plt.show()
else:
    print("SKIPPED: bandwidth is measured on a GPU")

# %%
if GPU:
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    TOTAL = "official harness\n(wall clock)"
    ours = {
        f"{r}x{c}\n{SHORT[n]}": results.find("speedup_vs_unsloth_device", f"{r}x{c} {SHORT[n]}") for r, c, n in SHAPES
    }
    ours[TOTAL] = results.find("official_harness_speedup", "all")
    against = {f"over {THREE_LAUNCHES}": {label: found[0] for label, found in ours.items() if found}}
    labels = [label for label in ours if any(label in values for values in against.values())]
    width = 0.8 / len(against)
    for i, (name, by_label) in enumerate(against.items()):
        at = [place + width * i for place, label in enumerate(labels) if label in by_label]
        values = [by_label[label] for label in labels if label in by_label]
        heights = [value["value"] for value in values]
        spread = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
        bars = axes.bar(at, heights, width, yerr=spread, label=name, error_kw={"linewidth": 1})
        axes.bar_label(bars, fmt="%.2fx", fontsize=8)
    axes.set_xticks([at + width * (len(against) - 1) / 2 for at in range(len(labels))], labels)
    axes.axhline(1.15, color="gray", linestyle="--", linewidth=1, label="full marks: 1.15x")
    axes.axhline(1, color="black", linewidth=1)
    highest = max((value["high"] for values in against.values() for value in values.values()), default=1)
    axes.set(ylabel="speed-up", ylim=(0, 1.4 * highest))
    axes.set_title(f"Speed-up: device time of one call, last group by the wall clock\n(random weights, {HARDWARE})")
    axes.legend(loc="upper right", fontsize=8)
    figure.savefig("resources/a_nf4_speedup.png", dpi=110)
    plt.show()
else:
    print("SKIPPED: speed-ups are measured on a GPU")

# %% [markdown]
# ### Ablation: what each decision is worth
#
# The same kernel, one decision changed at a time within each group. All variants give the same bits except the
# contracted one.

# %%
if GPU:
    groups = {
        "inline PTX": {
            "default: shuffle, evict_first, 2 x 512 words": Config(),
            "look-up by prmt": Config(lookup="prmt"),
            "no eviction hints": Config(evict=""),
            "16 bytes a thread (1 x 512 words)": Config(unroll=1),
            "64 bytes a thread (4 x 512 words)": Config(unroll=4),
            "128 threads a program (2 x 128 words)": Config(words=128, num_warps=4),
        },
        "plain Triton": {
            "look-up by load, 2 x 128 words": PLAIN,
            "2 x 512 words": PLAIN._replace(words=512, num_warps=16),
            "look-up by tl.gather": PLAIN._replace(lookup="gather"),
            "look-up by 15 selects": PLAIN._replace(lookup="select"),
            "contraction allowed (not exact)": PLAIN._replace(fp_fusion=True),
        },
    }
    variants = {(group, name): config for group, named in groups.items() for name, config in named.items()}
    shapes = {"2048x8192 fp16": (2048, 8192, torch.float16), "4096x14336 bf16": (4096, 14336, torch.bfloat16)}
    table, same = {}, {}
    for shape, (rows, columns, dtype) in shapes.items():
        moved = BYTES * rows * columns
        sets = max(2, timing.rotations(moved, hardware.l2_bytes))
        layers = [make_layer(rows, columns, dtype, "cuda") for _ in range(sets)]

        def with_config(layer, config):
            packed, state = layer.weight.data, layer.weight.quant_state
            out = torch.empty(state.shape, dtype=state.dtype, device="cuda")
            return prepare(nf4_weight(packed, state), out, config).run(out)

        for name, config in variants.items():
            equal = torch.equal(with_config(layers[0], config), bitsandbytes_dequantize(layers[0]))
            same[f"{', '.join(name)}, {shape}"] = equal or config.fp_fusion
        tested = {name: calls(partial(with_config, config=config), layers) for name, config in variants.items()}
        shifted = [torch.empty(rows * columns + 1, dtype=dtype, device="cuda")[1:].view(rows, columns) for _ in layers]
        tested["inline PTX", "a byte a thread (what unaligned memory gets)"] = [
            partial(dequantize_nf4, layer, out=out) for layer, out in zip(layers, shifted, strict=True)
        ]
        table[shape] = timing.device_time(tested, rounds=15, bytes_per_call=moved)
        for (group, name), result in table[shape].items():
            results.add("ablation_us", f"{group}, {name}, {shape}", result.median, "us", result.low, result.high)
        del layers, tested, shifted
        torch.cuda.empty_cache()
    lines = ["| group | variant | " + " | ".join(f"{shape}, us | of the first" for shape in shapes) + " |"]
    lines.append("|---|---|" + "---|---|" * len(shapes))
    for group, name in next(iter(table.values())):
        cells = []
        for found in table.values():
            result, base = found[group, name], found[group, next(iter(groups[group]))]
            cells += [
                f"{result.median:.2f} ({result.low:.2f} to {result.high:.2f})",
                f"{result.median / base.median:.2f}",
            ]
        lines.append(f"| {group} | {name} | " + " | ".join(cells) + " |")
    display(Markdown("\n".join(lines)))
    for shape, found in table.items():
        base = found["inline PTX", next(iter(groups["inline PTX"]))]
        exact = [key for key in found if key not in variants or not variants[key].fp_fusion]
        faster = [", ".join(key) for key in exact if found[key].high < base.low]
        print(f"{shape}: exact variants faster than the default beyond the spread: {faster or 'none'}")
    judge(results, "variants give the same bits", same)
else:
    print("SKIPPED: variants are timed on a GPU")

# %% [markdown]
# The default uses the assembly, because it does in one instruction what plain Triton needs several for (a look-up
# without an access to the L1 cache, a flush without a comparison), and because no compiler flag can contract it. It
# uses the shuffle, because `prmt` needs some fifty instructions more a word. It uses two words a thread: one leaves too
# few loads in flight, four too few threads. At these two sizes 128 and 512 threads a program do not differ measurably.
# Instructions limit the slowest look-ups: selects by their number, `tl.gather` by its accesses to shared memory.
#
# Cache eviction, as the compiled default kernel has it: the kernel reads packed bytes once and never reads the weights
# that it writes, so both are marked to be evicted first.

# %%
for default in (report for report in t4_reports if report.name == "asm float16 whole"):
    hints = default.ptx.count("evict_first")
    results.add("cache_eviction_hints", "default kernel", hints, "hints")
    print(f"{hints} loads and stores of the default kernel for sm_75 carry L1::evict_first")

# %% [markdown]
# ### The linear layer: gradients, memory, decoding
#
# `nf4_linear` against float64: its relative error may exceed that of the same product, made with the whole de-quantised
# matrix in the same dtype, by no more than a few per cent of noise.

# %%
from unsloth_puzzles.nf4 import nf4_linear

no_worse = {}
for dtype in [torch.float32, torch.float16] + [torch.bfloat16] * hardware.bf16:
    layer = make_layer(*((1024, 2048) if GPU else (64, 128)), dtype, hardware.device)
    weight = dequantize_nf4(layer)
    x = torch.randn(96, weight.shape[1], device=hardware.device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(96, weight.shape[0], device=hardware.device, dtype=dtype)

    x64 = x.detach().double().requires_grad_()
    outputs = [(x64 @ weight.double().t(), x64), (nf4_linear(x, layer), x), (x @ weight.t(), x)]
    truth, ours, eager = ((y.detach(), torch.autograd.grad(y, at, upstream.to(y.dtype))[0]) for y, at in outputs)
    for what, exact, mine, theirs in zip(("output", "gradient"), truth, ours, eager, strict=True):
        error, error_eager = ((value.double() - exact).norm() / exact.norm() for value in (mine, theirs))
        short = SHORT[str(dtype).removeprefix("torch.")]
        case = f"{what}, {short}"
        results.add(
            "linear_relative_error", case, error.item(), "relative", baselines={"whole matrix": error_eager.item()}
        )
        print(f"{short} {what:8}: relative error {error:.2e}, with the whole matrix {error_eager:.2e}")
        no_worse[case] = (error <= 1.05 * error_eager).item()
judge(results, "errors of the linear layer", no_worse)

# %% [markdown]
# `patch_linear4bit(model)` puts it under every 4-bit layer of a transformers or PEFT model. Without gradients and for
# few rows, which is decoding, bitsandbytes' fused 4-bit GEMM stays in use: it never writes the 16-bit matrix. A script
# (`make sweeps`) measures at how many rows the two are equally fast, and how fast a model generates before and after.
# It times Unsloth too if it is installed. The results below come from its file, name its hardware and date, and are no
# part of the score.

# %%
SWEEPS = Path("resources/measurements/a_nf4_sweeps.json")
if SWEEPS.exists():
    sweeps = Measurements.load(SWEEPS)
    SWEPT = f"{sweeps.hardware['name']}, {sweeps.date}"
    print(f"measured on {SWEPT}, random weights")
    block = [found for found in sweeps.find("linear_us") if "block" in found["case"]]
    rows = [int(found["case"].split(", ")[-1].split()[0]) for found in block]
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    axes.plot(rows, [found["value"] for found in block], "o-", label="nf4_linear")
    axes.plot(rows, [found["baselines"]["bitsandbytes"] for found in block], "s--", label="bitsandbytes")
    axes.set(xlabel="rows (tokens)", ylabel="device time, us", xscale="log", yscale="log")
    axes.set_title(f"Linear layers of a Llama 3.2 1B block, no gradients\n(random weights, {SWEPT})")
    axes.legend()
    figure.savefig("resources/a_nf4_linear.png", dpi=110)
    plt.show()
    for metric in (
        "linear_forward_backward_us", "linear_forward_backward_mib", "prefill_tokens_per_s",
        "generation_tokens_per_s", "device_us_beside_unsloth", "host_enqueue_us_beside_unsloth",
    ):  # fmt: skip
        for found in sweeps.find(metric):
            theirs = ", ".join(f"{name} {value:.1f}" for name, value in found["baselines"].items())
            print(f"{metric}, {found['case']}: ours {found['value']:.1f}, {theirs} {found['unit']}")
    for found in sweeps.find("sanitizer_errors"):
        print(f"compute-sanitizer, {found['case']}, over odd shapes: {found['value']} errors")
    for found in sweeps.find("harness_speedup_beside_unsloth"):
        print(f"the harness, {found['case']}: {found['value']:.2f}x ({found['low']:.2f} to {found['high']:.2f})")
else:
    print(f"SKIPPED: {SWEEPS.name} is not here")

# %% [markdown]
# ### What a T4 should do
#
# Predicted, not measured: the largest of bytes over its 320 GB/s, instructions (counted in the sm_75 binary above) over
# the issue rate of its 40 multiprocessors, and shuffles and conversions over the rates of their slower units. The
# kernel is bound by memory there too. Bytes alone would make it 1.10x faster than the three launches. Any further
# speed-up depends on how well bitsandbytes' kernels use a T4 and on its host, which was not measured.

# %%
for rows, columns, name in SHAPES if t4_reports else ():
    report = next(found for found in t4_reports if found.name == f"asm {name} whole")
    weights = rows * columns
    parts = {
        "bytes": t4.t4_seconds(bytes=BYTES * weights),
        "instructions": t4.t4_seconds(instructions=report.count() / 16 * weights),
        "shuffles": report.count("SHFL") / 16 * weights / t4.SHUFFLES,
        "conversions": (report.count("F2F") + report.count("F2FP")) / 16 * weights / t4.CONVERSIONS,
    }
    print(f"{rows:5} x {columns:5} {name:8}:", ", ".join(f"{part} {1e6 * us:.0f} us" for part, us in parts.items()))
print("three launches move 2.766 bytes a weight:", f"{2.766 / BYTES:.2f}x;", t4.LABEL)

# %% [markdown]
# ### What this does not do
#
# - It was not run on a T4. The kernels are compiled for it, and its time is predicted above from bytes and
#   instructions; no speed shown here was measured on one.
# - Triton does not officially support sm_75; kernels without a matrix product, such as this one, work there.
# - A newer Unsloth has a fused kernel of its own. The speed-up above is over the three launches of the puzzle, not over
#   that kernel.
# - A patched model does not generate faster. Decoding one row a step uses bitsandbytes' kernel before and after. The
#   difference is a little work on the host around it, and the spread of so short a measurement is wide.
# - Memory that is not 16-byte aligned takes a byte-wise path (see the ablation), which is exact but slower.
# - Decoding does not use it: for one or two rows a fused 4-bit GEMM is faster, and bitsandbytes has one. The number of
#   rows at which the two are equally fast was measured on an H200. On other GPUs bitsandbytes stays in use below 64
#   rows unless `min_rows` says otherwise.
# - NF4 only. FP4 and 8-bit weights are refused by name.

# %% [markdown]
# ### Aimed at, and reached
#
# The aims of this section for an H200, and what this run measured. The time that the host takes to enqueue a call
# depends on its other work: on a busier host all candidates take longer.

# %%
AIMS = [  # metric, case, at least (positive) or at most (negative)
    *(("speedup_vs_unsloth_device", f"{r}x{c} {SHORT[n]}", 1.80) for r, c, n in SHAPES[1:]),
    ("copy_bandwidth_fraction", "4096x14336 fp16", 0.90),
    ("copy_bandwidth_fraction", "4096x14336 bf16", 0.90),
    ("copy_bandwidth_fraction", "8192x28672 bf16", 0.96),
    ("official_harness_speedup", "all", 1.80),
    ("host_enqueue_us", "one call, 1024x4096", -12.0),
]
AIMS += [(metric, found["case"], -0.0) for metric in ("mismatched_weights", "sm75_spills")
         for found in results.find(metric)]  # fmt: skip
AIMS += [("sm75_shared_bytes", found["case"], -65536.0) for found in results.find("sm75_shared_bytes")]
lines, reached = ["| metric | case | aim | measured | |", "|---|---|---|---|---|"], 0
for metric, case, aim in AIMS:
    found = results.find(metric, case)
    at_least = math.copysign(1, aim) > 0
    good = bool(found) and (found[0]["value"] >= aim if at_least else found[0]["value"] <= -aim)
    reached += good
    if found and (good and metric in ("mismatched_weights", "sm75_spills", "sm75_shared_bytes")):
        continue  # only failures are listed
    measured = f"{found[0]['value']:.3g} {found[0]['unit']}" if found else "SKIPPED: not measured here"
    verdict = "reached" if good else "missed" if found else ""
    lines.append(
        f"| {metric} | {case} | {'at least' if at_least else 'at most'} {abs(aim):g} | {measured} | {verdict} |"
    )
display(Markdown("\n".join(lines)))
print(f"{reached} of {len(AIMS)} reached on {HARDWARE}; mismatches and T4 builds are listed only if bad")

# %% [markdown]
# ### Score of this section

# %%
from unsloth_puzzles.bench import scorecard

results.save()
rows = [row for row in scorecard.score("resources/measurements") if row.challenge == "A"]
display(Markdown(scorecard.table(rows)))
_ = section.finish()

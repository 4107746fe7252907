# %% [markdown]
# ## A. NF4 to Triton
#
# **Task.** Convert a double-quantised bitsandbytes NF4 weight to fp16 or bf16 in ONE Triton kernel that also
# de-quantises the absmax. The kernel must run on a Tesla T4, use no large intermediate buffer, and beat Unsloth's
# `fast_dequantize` by 1.15x or more.
#
# **Solution.** `dequantize_nf4` launches one kernel, whose inner part is inline assembly. It gives the same bits as
# bitsandbytes.
#
# | criterion | points (14) | shown by |
# |---|---|---|
# | a single Triton kernel | 3 | check 3 |
# | speed-up of 1.05, 1.10 and 1.15 | 1 + 2 + 2 | the timings (no T4 has run them) |
# | works in `torch.compile` | 1 | check 4 |
# | custom inline assembly works | 3 | check 1 |
# | uses cache eviction | 1 | check 5 |
# | tested in fp16 and bf16 | 1 | check 1, and the timings by the puzzle's harness |
#
# ### The idea
#
# NF4 replaces each weight by a 4-bit index $n_i$ into a table of 16 float32 values, `code`. A byte holds two indices.
# Each block of 64 weights has one scale, the largest absolute value of the block (*absmax*). Double quantisation also
# compresses the absmax: their mean (`offset`) is subtracted, and each absmax becomes an 8-bit index $q_j$ into a table
# of 256 values, `code2`. Each group of 256 absmax, that is 16384 weights, shares one float32 scale, `absmax2`.
# bitsandbytes keeps these tensors in the `quant_state` of a layer's weight.
#
# ```
#  packed byte   h l           two indices: the high nibble first
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
# A *kernel* is a function that runs on the GPU. The CPU (the *host*) *launches* it. When the puzzle was set, Unsloth
# launched three kernels. The first writes the absmax to a float32 buffer, the second adds the offset, the third writes
# the weights. One kernel computes the absmax in registers.

# %%
# @title Imports, names, and the processes that run beside the first checks
import textwrap
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import matplotlib.pyplot as plt
from torch._dynamo.utils import counters

from benchmarks.named_checks import judge
from benchmarks.nf4 import exactness, figures, harness
from benchmarks.nf4.ablation import summary
from benchmarks.nf4.baselines import THREE_LAUNCHES, baselines, bitsandbytes_dequantize, three_launches
from benchmarks.nf4.launches import count_launches
from benchmarks.nf4.records import SHORT, add_ablation, add_device_times, add_harness, add_sweep, beside_unsloth
from benchmarks.nf4.workload import bytes_per_weight, make_layer
from unsloth_puzzles.bench import scorecard, section, t4, timing
from unsloth_puzzles.bench.cross_compile import cross_compile_in_subprocess
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.device import capability
from unsloth_puzzles.nf4 import dequantize_nf4, nf4_linear
from unsloth_puzzles.nf4.build import PLAIN, Config
from unsloth_puzzles.nf4.state import nf4_weight

section.start("A. NF4 to Triton")
GPU = hardware.device == "cuda"
OLD = 0 < capability() < 80  # a T4, often with two slow cores beside it: fewer samples
HALF = (torch.float16, torch.bfloat16)
SHAPES = [(1024, 4096, HALF[0]), (2048, 8192, HALF[0]), *((4096, 14336, dtype) for dtype in HALF)]
SHAPES += [(8192, 28672, HALF[1])]
LARGE = (2048, 8192) if OLD else (4096, 14336)
BYTES = bytes_per_weight(torch.float16)
PATHS = {"asm": Config(), "plain": PLAIN} if GPU else {"plain": PLAIN}
CANDIDATES = {"ours": dequantize_nf4, **baselines("cuda")} if GPU else {}
results = Measurements("resources/measurements/a_nf4.json", hardware)
WHERE = f"{hardware.name}{' held to the limits of a T4' if hardware.rehearsal else ''}, {results.date}"
check = partial(judge, results)  # records the checks, and prints which of them passed

# Compilers for other GPUs and the profiler need processes of their own. Timings begin when all have ended.
background = ThreadPoolExecutor(3)
compiling = {
    name: background.submit(cross_compile_in_subprocess, f"benchmarks.nf4.variants:{name}")
    for name in ("contraction_jobs", "t4_jobs")
}
counting = background.submit(count_launches) if GPU else None
print("started:", ", ".join([*compiling, *(["the count of launches"] if GPU else [])]))

# %% [markdown]
# ### The bound, and a plain reference
#
# | bytes a weight | read | write |
# |---|---|---|
# | packed 4-bit indices | 1/2 | |
# | 8-bit absmax | 1/64 | |
# | float32 absmax2 | 4/16384 | |
# | 16-bit weight | | 2 |
# | **one kernel** | | **2.516** |
# | float32 absmax buffer of the three launches | 2 x 4/64 | 2 x 4/64 |
# | **three launches** | | **2.766** |
#
# The first of the three launches writes the buffer, the second reads and writes it, the third reads it. By bytes alone
# one kernel is at most 1.10x faster than three, so fewer bytes do not suffice for 1.15x. A larger speed-up needs a
# better use of the memory (16-byte stores, all loads before the first store) and less host time (one launch instead of
# three). The timings below show GPU time and host time separately.
#
# The cell below has the formula in plain PyTorch. Each operation of it reads and writes a whole tensor. bitsandbytes'
# GPU code replaces products below 2^-126 (subnormal numbers) by zero, and so does the reference. Then the cell prints
# the bound: 2.516 bytes a weight at the copy bandwidth of this machine and at the datasheet bandwidth of a T4.


# %%
def multiply(a, b):
    """a * b in float32. Products below 2^-126 become zero, as in bitsandbytes' CUDA kernels."""
    tiny = (a * 2.0**24 * b).abs() < 2.0**-102  # the same test on a product that is not subnormal
    return torch.where(tiny, a * b * 0.0, a * b)


def reference(packed, state):
    """De-quantise with one float32 operation after another, and round once at the end."""
    data = packed.view(torch.uint8).flatten().int()  # [n / 2]
    nibbles = torch.stack([data >> 4, data & 15], 1).flatten()[: state.shape.numel()]  # [n]
    absmax = state.absmax  # [n / 64], 8-bit if nested
    if state.nested:
        absmax2 = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]  # [n / 64]
        absmax = multiply(state.state2.code[absmax.int()], absmax2) + state.offset
    weights = multiply(state.code[nibbles], absmax.repeat_interleave(state.blocksize)[: nibbles.numel()])  # [n]
    return weights.to(state.dtype).view(state.shape)


for rows, columns, dtype in SHAPES:
    moved = rows * columns * BYTES
    here = f"{moved / hardware.copy_bandwidth * 1e6:7.1f} us here" if GPU else "unknown here (no GPU)"
    on_t4 = f"{moved / t4.BANDWIDTH * 1e6:6.1f} us on a T4"
    print(f"{rows:5} x {columns:5} {SHORT[dtype]}: {moved / 1e6:6.1f} MB, at least {here}, {on_t4}")

# %% [markdown]
# ### The code
#
# **The kernel.** A Triton kernel is a Python function that runs once per *program*. A program handles a block of
# elements. `tl.program_id` gives the number of the program, `tl.arange` the elements of its block, and `tl.load` and
# `tl.store` access memory. Arguments of type `tl.constexpr` are fixed at compile time. Here an element is one 32-bit
# *word*, which holds eight weights. The kernel takes the inline assembly as a string. With an empty string the same
# source is the plain-Triton path, which also runs in the interpreter.
#
# **The inline assembly.** `tl.inline_asm_elementwise` inserts PTX, NVIDIA's assembly language, for each element. The
# GPU runs a program as threads in groups of 32, called *warps*. A thread of a warp is a *lane*, and a *shuffle* reads
# a register of another lane. The 16 table values lie across the lanes of a half warp. A shuffle reads the value that
# belongs to an index. All instructions exist on a T4 (sm_75). Below sm_80 no instruction rounds to bfloat16, so integer
# arithmetic does. `prmt` (permute bytes), the other look-up, serves the ablation below.
#
# **The launch** (collapsed). For a small matrix the host needs more time than the kernel. `launch.py` calls Triton's C
# launcher with plain addresses. `cache.py` recalls the launch of a weight that passed all checks before. `linear.py` is
# the layer $y = xW^\top + b$ of challenges B and C. Its backward de-quantises $W$ again instead of keeping it.

# %%
# show: unsloth_puzzles/nf4/kernel.py

# %%
# show: unsloth_puzzles/nf4/asm.py

# %%
# fold: unsloth_puzzles/nf4/launch.py
# fold: unsloth_puzzles/nf4/cache.py
# fold: unsloth_puzzles/nf4/dequantize.py
# fold: unsloth_puzzles/nf4/build.py
# fold: unsloth_puzzles/nf4/state.py
# fold: unsloth_puzzles/nf4/linear.py

# %% [markdown]
# ### Check 1: the same bits as bitsandbytes
#
# The check compares bits and has no tolerance. It covers every dtype, both paths, the public function, blocks of 32 to
# 4096 weights, one and two levels of absmax, and sizes that end inside a block or a byte. Each output buffer is filled
# with NaN before a call, so an unwritten weight counts as a difference. The reference is the formula above. On a GPU
# bitsandbytes' own kernels are a second reference. On a CPU bitsandbytes rounds bf16 differently.
#
# A third of the weights have usual scales. The others have scales near 1e-38, where float32 products are flushed to
# zero. The last number of a line counts the weights that only these scales turn to zero. If it is 0 in bf16 or fp32,
# the check fails, because it has not tested the flush. In fp16 such weights round to zero in any case.
#
# `PATHS` holds the two paths of the kernel, with assembly and in plain Triton. `LARGE` is the shape of a large matrix.
# `compiling` holds compilations that started in the background.

# %%
SIZES = [(1, 1), (1, 7), (33, 77), (64, 256)] + ([(129, 1023), (1001, 4099), LARGE] if GPU else [])
bits = {}
for path, config in PATHS.items():
    for dtype in (*HALF, torch.float32):
        references = [reference, exactness.bitsandbytes_kernels] if GPU else [reference]
        found = exactness.compare(config, dtype, SIZES, hardware.device, references)
        name = f"{path} {SHORT[dtype]}"
        results.add("mismatched_weights", name, found.mismatched, "weights")
        bits[name] = found.mismatched == 0 and (found.flushed > 0 or dtype == torch.float16)
        print(
            f"{name:10}: {found.cases} cases, {found.weights:,} weights, {found.mismatched} differ; "
            f"{found.flushed:,} are zero at tiny scales only"
        )
check("the same bits as bitsandbytes", bits)

# %% [markdown]
# ### Check 2: a fused multiply-add changes the last bits
#
# By default Triton may contract `code2 * absmax2 + offset` into one fused multiply-add, which rounds once. bitsandbytes
# multiplies in one kernel and adds in the next, and so rounds twice. The contraction is legal and no bug of Triton. Our
# assembly uses `mul.rn` and `add.rn`, which no compiler contracts. Our plain path is compiled with
# `enable_fp_fusion=False`. The cell compiles the plain path both ways, counts the fused instructions (`fma.rn.f32`),
# and compares the weights. An *ulp* is the distance between neighbouring floating-point numbers. The fused form changes
# float32 weights by a few ulps. Rounding to 16 bits removes almost all of these differences. The changed blocks are
# spread evenly over the matrix. Rounding differences are spread like this, and wrong addresses would not be.

# %%
for report in compiling["contraction_jobs"].result():
    print(f"plain path, {report.name:8}: {report.contracted} fma.rn.f32 in the PTX")
exactly, float32 = {}, None
for dtype in (*HALF, torch.float32):
    layer = make_layer(*(LARGE if GPU else (128, 512)), dtype, hardware.device)
    exact, contracted = dequantize_nf4(layer), exactness.contracted(layer, reference)
    count, case = (contracted != exact).sum().item(), f"{exact.shape[0]}x{exact.shape[1]} {SHORT[dtype]}"
    results.add("contracted_mismatched_weights", case, count, "weights")
    exactly[SHORT[dtype]] = torch.equal(exact, reference(layer.weight.data, layer.weight.quant_state))
    print(f"{SHORT[dtype]}: {count:,} of {exact.numel():,} weights differ with contraction")
    if dtype == torch.float32:
        float32 = (exact, contracted)
check("the formula, without contraction", exactly)
figures.contraction(*float32, WHERE)
plt.show()
del layer, exact, contracted, float32

# %% [markdown]
# ### Checks 3 and 4: one launch, and `torch.compile`
#
# **Check 3.** PyTorch's profiler counts the kernels of one call. The statistics of the allocator count the requests for
# memory. Both run in a process of their own, because a profiled process launches slowly afterwards.
#
# **Check 4.** The kernel is registered as an operator with `torch.library`. `opcheck` is PyTorch's test of a
# registration. Code that `torch.compile` cannot capture splits its graph (a *graph break*). `fullgraph=True` turns a
# break into an error. The timing compiles the MLP of the puzzle, and one matrix alone. A compiled function that only
# de-quantises one matrix is several times slower than the plain call. Each call checks on the host whether the compiled
# code is still valid. A range in parentheses, here and below, goes from the 10th to the 90th percentile.

# %%
if GPU:
    counted = counting.result()
    for name, found in counted.items():
        names = ", ".join(kernel.split("<")[0].removeprefix("void ") for kernel in found["kernels"])
        print(f"{name}: {names}; allocations: {found['allocations']}")
    ours, theirs = (len(found["kernels"]) for found in counted.values())
    results.add("kernel_launches", "one call", ours, "kernels", baselines={THREE_LAUNCHES: theirs})
    requests, requests_theirs = (found["allocations"] for found in counted.values())
    results.add("allocations", "one call", requests, "allocations", baselines={THREE_LAUNCHES: requests_theirs})
    check("one call", {"one kernel": ours == 1, "one allocation, the output's": requests == 1})
else:
    print("SKIPPED: launches and allocations are counted on a GPU")

for job in compiling.values():
    job.exception()  # waits: what follows is timed

layer = make_layer(*((4096, 4096) if GPU else (64, 128)), torch.float16, hardware.device)
bitsandbytes_dequantize(layer)  # on a CPU this compiles too: before the counters start
torch.compiler.reset()
counters.clear()
doubled = torch.compile(lambda layer: dequantize_nf4(layer) * 2, fullgraph=True)(layer)
breaks = sum(counters["graph_break"].values())
differing = (doubled != dequantize_nf4(layer) * 2).sum().item()
results.add("compile_graph_breaks", "fullgraph", breaks, "graph breaks")
results.add("compile_mismatched", "fullgraph", differing, "weights")
check("inside torch.compile", {"no graph break": breaks == 0, "the same weights": differing == 0})
arguments = tuple(nf4_weight(layer.weight.data, layer.weight.quant_state))
print("opcheck:", torch.library.opcheck(torch.ops.unsloth_puzzles.dequantize_nf4, arguments))

if GPU:
    mlp, x = harness.build(harness.OFFICIAL[0], "cuda")

    def forward(x):
        gate, up, down = (dequantize_nf4(layer).t() for layer in mlp.layers())
        return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(forward, fullgraph=True)
    alone = torch.compile(lambda: dequantize_nf4(mlp.gate), fullgraph=True)
    pairs = {
        "MLP, 2 x 3333 tokens, 2048x8192, fp16": (lambda: forward(x), lambda: compiled(x), 2 if OLD else 10),
        "one matrix alone, 2048x8192, fp16": (lambda: dequantize_nf4(mlp.gate), alone, 50),
    }
    for case, (eager, compiled_call, repeat) in pairs.items():
        with torch.no_grad():
            found = timing.wall_time({"eager": eager, "compiled": compiled_call}, rounds=20, calls=repeat)
        fast, slow = found["compiled"], found["eager"]
        results.add("compile_wall_us", case, fast.median, "us", fast.low, fast.high, {"eager": slow.median})
        print(f"{case}: compiled {fast.median:.1f} us ({fast.low:.1f} to {fast.high:.1f}), eager {slow.median:.1f} us")
    graphs = counters["stats"]["unique_graphs"]
    check("one graph each", {"two graphs": graphs == 2, "no graph break": not counters["graph_break"]})
    del mlp, x
else:
    print("SKIPPED: compiled and eager are timed on a GPU")

# %% [markdown]
# ### Check 5: the compiler for the T4
#
# The cell compiles every form of the kernel for sm_75, whatever GPU is here: for whole blocks, for a ragged end, for
# memory that is not 16-byte aligned, for a plain absmax, and with the other table look-ups. From the binaries it reads
# registers, *spills* (registers that are moved to memory), shared memory (at most 64 KiB) and instructions.
#
# The default kernel reads each packed byte once and never reads the weights that it writes. It marks both as
# `evict_first`, so that the L1 cache drops them before other data. The cell counts these marks.
#
# The last lines predict the time on a T4 from the datasheet: bytes over the bandwidth, instructions over the issue
# rate, shuffles and conversions over the rates of their units. The largest of the four is the bound.

# %%
t4_reports = compiling["t4_jobs"].result()
fits = {}
for report in t4_reports:
    results.add("sm75_spills", report.name, report.spills, "bytes")
    results.add("sm75_shared_bytes", report.name, report.shared, "bytes")
    path, output, form = report.name.split(" ", 2)
    fits[f"{path} {output}, {form}"] = report.spills == 0 and report.shared <= 65536
worst = [max(getattr(report, what) for report in t4_reports) for what in ("registers", "shared")]
print(f"{len(t4_reports)} builds: at most {worst[0]} registers and {worst[1]} bytes of shared memory")
check("built for a T4: no spills, at most 64 KiB shared", fits)
by_name = {report.name: report for report in t4_reports}
whole = {name.removesuffix(" whole"): report for name, report in by_name.items() if name.endswith(" whole")}
each = "; ".join(f"{name} {report.count() / 16:.1f}" for name, report in whole.items())
print(textwrap.fill(f"instructions a weight: {each}", 115, subsequent_indent="  "))
hints = by_name["asm float16 whole"].ptx.count("evict_first")
results.add("cache_eviction_hints", "default kernel", hints, "hints")
print(f"{hints} loads and stores of the default kernel for sm_75 carry L1::evict_first")
for rows, columns, dtype in SHAPES:
    report, weights = by_name[f"asm {str(dtype).removeprefix('torch.')} whole"], rows * columns
    parts = {
        "bytes": t4.t4_seconds(bytes=BYTES * weights),
        "instructions": t4.t4_seconds(instructions=report.count() / 16 * weights),
        "shuffles": report.count("SHFL") / 16 * weights / t4.SHUFFLES,
        "conversions": (report.count("F2F") + report.count("F2FP")) / 16 * weights / t4.CONVERSIONS,
    }
    said = ", ".join(f"{part} {1e6 * seconds:.0f} us" for part, seconds in parts.items())
    print(f"{rows:5} x {columns:5} {SHORT[dtype]}: {said}")
print(f"({t4.LABEL})")

# %% [markdown]
# ### Timings: the harness of the puzzle, GPU time, host time
#
# **The harness** of the puzzle is an MLP of three `Linear4bit` layers. It checks every candidate twice at the DEFAULT
# tolerances of `torch.testing.assert_close`. Then it times 1000 rounds by the wall clock. A round de-quantises the
# three matrices, with a synchronise after each. The cell repeats this measurement eleven times (five times on a T4) and
# shows medians. Each ratio compares two consecutive measurements.
#
# **The baseline** is Unsloth's sequence of three launches. Colab does not have Unsloth. `benchmarks/nf4/baselines.py`
# imitates the sequence with the same two C functions of bitsandbytes and the same addition. The imitation looks up the
# functions once and enters no device context. Its host time is still longer than that of the real sequence. The table
# at the end of this section compares ours with the real Unsloth where it was installed.
#
# **GPU time and host time.** A CUDA graph replays launches without the host and so gives the GPU time of one matrix.
# Successive calls use different buffers, together four times as large as the L2 cache, so that no call finds its data
# in the cache. The share of the copy bandwidth counts 2.516 bytes a weight for every candidate. The host time is the
# time to enqueue one call. It grows on a busy host for all candidates.
#
# The candidates alternate in all of these timings.

# %%
candidates = {"ours": dequantize_nf4} | ({THREE_LAUNCHES: three_launches} if GPU else {})
cases = harness.OFFICIAL if GPU else harness.QUICK
rounds, repeats = (1000, 5 if OLD else 11) if GPU else (1, 1)
seconds = harness.measure(
    candidates, bitsandbytes_dequantize, cases, device=hardware.device, rounds=rounds, repeats=repeats
)
for case in cases:
    size = f"{case.batch} x {case.length} tokens, {case.hidden}x{case.inner} {SHORT[case.dtype]}"
    print(f"passed at default tolerances, twice: {size}; {', '.join(candidates)}")
if GPU:
    for dtype in HALF:
        results.add("harness_checks_passed", SHORT[dtype], sum(case.dtype == dtype for case in cases), "cases")
    for case, ours, theirs, ratio in add_harness(results, seconds, THREE_LAUNCHES, rounds):
        both = f"ours {ours:.1f} us a round, three launches {theirs:.1f} us"
        print(f"{case:16} {both}: {ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})")
    print("random weights,", WHERE)
else:
    print("SKIPPED: the interpreter's time says nothing about a GPU")

# %%
if GPU:
    for rows, columns, dtype in SHAPES:
        found = add_device_times(results, hardware, rows, columns, dtype, CANDIDATES, rounds=15 if OLD else 30)
        ours, theirs = found["ours"], found[THREE_LAUNCHES]
        print(
            f"{rows:5} x {columns:5} {SHORT[dtype]}: ours {ours.median:6.1f} us ({ours.low:.1f} to {ours.high:.1f}), "
            f"three launches {theirs.median:6.1f} us: {theirs.median / ours.median:.2f}x"
        )
    layer = make_layer(1024, 4096, torch.float16, "cuda")
    host = timing.enqueue_time({name: partial(call, layer) for name, call in CANDIDATES.items()})
    ours, others = host["ours"], {name: one.median for name, one in host.items() if name != "ours"}
    results.add("host_enqueue_us", "one call, 1024x4096", ours.median, "us", ours.low, ours.high, others)
    print("host time of one call:", ", ".join(f"{name} {one.median:.1f} us" for name, one in host.items()))
    figures.speedup(results, WHERE)
    plt.show()
    sizes = [2**n for n in range(10, 16) if 40 * 4**n < 0.7 * hardware.memory_gib * 2**30]  # 1 M to 1 G weights
    add_sweep(results, hardware, sizes, CANDIDATES)
    figures.bandwidth(results, hardware.copy_bandwidth, WHERE)
    plt.show()
else:
    print("SKIPPED: GPU time, host time and bandwidth are measured on a GPU")

# %% [markdown]
# ### Ablation
#
# The figure times variants of the kernel. Each differs in one decision from the first variant of its group. The first
# variant of all is the default:
#
# - It uses the assembly, which needs fewer instructions than plain Triton (check 5) and which no compiler contracts.
# - It looks codes up by a shuffle, because `prmt` needs about fifty more instructions a word.
# - It handles two words a thread, which is the fastest choice or nearly so.
#
# The output gives the time without eviction hints over the default's time. Its range is the widest one: from the 10th
# percentile over the default's 90th to the 90th over the default's 10th. A variant is called faster if its 90th
# percentile lies below the default's 10th percentile. An *exact* variant gives the same bits as bitsandbytes.

# %%
if GPU:
    timings, same = {}, {}
    for rows, columns, dtype in ((2048, 8192, torch.float16), (4096, 14336, torch.bfloat16)):
        shape = f"{rows}x{columns} {SHORT[dtype]}"
        timings[shape], equal = add_ablation(results, hardware, rows, columns, dtype)
        same |= equal
        print(*(f"{shape}: {line}" for line in summary(timings[shape])), sep="\n")
    check("variants give the same bits", same)
    figures.ablation(timings, WHERE)
    plt.show()
else:
    print("SKIPPED: variants are timed on a GPU")

# %% [markdown]
# ### The linear layer, and sweeps
#
# `nf4_linear` is compared with float64. Its relative error may exceed the error of a product with the whole
# de-quantised matrix in the same dtype by at most 5 %.
#
# `patch_linear4bit(model)` puts `nf4_linear` under every 4-bit layer of a transformers or PEFT model. Decoding
# multiplies few rows (tokens) and has no gradients. There bitsandbytes' own kernel stays in use. It multiplies by the
# packed weights and never writes the 16-bit matrix.
#
# The end of the cell shows an earlier run on a large GPU (`make sweeps`), if its file is present, with hardware and
# date. The score does not use it. The run times the linear layer over the number of rows. If Unsloth was installed, it
# also times Unsloth's new fused kernel and its three launches in one process with ours.

# %%
no_worse = {}
for dtype in [torch.float32, torch.float16] + [torch.bfloat16] * hardware.bf16:
    layer = make_layer(*((1024, 2048) if GPU else (64, 128)), dtype, hardware.device)
    weight = dequantize_nf4(layer)  # [out, in]
    x = torch.randn(96, weight.shape[1], device=hardware.device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(96, weight.shape[0], device=hardware.device, dtype=dtype)

    x64 = x.detach().double().requires_grad_()
    outputs = [(x64 @ weight.double().t(), x64), (nf4_linear(x, layer), x), (x @ weight.t(), x)]
    truth, ours, eager = ((y.detach(), torch.autograd.grad(y, at, upstream.to(y.dtype))[0]) for y, at in outputs)
    for what, exact, mine, theirs in zip(("output", "gradient"), truth, ours, eager, strict=True):
        error, error_eager = (((value.double() - exact).norm() / exact.norm()).item() for value in (mine, theirs))
        case = f"{what}, {SHORT[dtype]}"
        results.add("linear_relative_error", case, error, "relative", baselines={"whole matrix": error_eager})
        print(f"{case:14}: relative error {error:.2e}, with the whole matrix {error_eager:.2e}")
        no_worse[case] = error <= 1.05 * error_eager
check("errors of the linear layer", no_worse)

SWEEPS = Path("resources/measurements/a_nf4_sweeps.json")
if SWEEPS.exists():
    sweeps = Measurements.load(SWEEPS)
    swept = f"{sweeps.hardware['name']}, {sweeps.date}"
    if shown := beside_unsloth(sweeps):
        display(Markdown(f"{swept}, random weights:\n\n{shown}"))
    else:
        print(f"SKIPPED: the sweep of {swept} had no Unsloth to compare with")
    figures.linear(sweeps, swept)
    plt.show()
else:
    print(f"SKIPPED: {SWEEPS.name} is not here")

# %% [markdown]
# ### What this does not do
#
# - No T4 has run the kernel, and Triton does not officially support sm_75. The times on a T4 above are predictions from
#   bytes and instructions.
# - The speed-up on a T4 is neither measured nor predicted. By bytes alone it is at most 1.10x. 1.15x in GPU time
#   requires that the three kernels reach at most 96 % of our bandwidth there (1.10 / 1.15). In wall time fewer launches
#   add to the speed-up, though little where the GPU is slow. So the points for 1.10 and 1.15 depend on how well the
#   three kernels use a T4's memory.
# - The speed-up of the score is over an imitation of Unsloth's three launches. A newer Unsloth has a fused kernel of
#   its own.
# - The harness calls the same three weights repeatedly, so `cache.py` skips the validation after the first call.
# - Decoding one sequence does not use the kernel, so a patched model does not generate it faster. bitsandbytes stays in
#   use below 3 rows on H100 and H200, and below 64 rows on GPUs that were not measured, unless `min_rows` says
#   otherwise.
# - Memory that is not 16-byte aligned takes a byte-wise path. The path is exact and slower (see the ablation).
# - `dequantize_nf4` handles NF4 only. It refuses FP4 and 8-bit weights by name.
#
# ### Score of this section

# %%
results.save()
display(Markdown(scorecard.table([row for row in scorecard.score() if row.challenge == "A"])))
_ = section.finish()

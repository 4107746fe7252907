# %% [markdown]
# ## C. torch.compile without graph breaks
#
# **Task.** QLoRA on Llama 3.2 1B with as much as possible compiled: no graph breaks, no excessive recompilation (30
# compilations is the ceiling), the same loss as uncompiled, memory and speed logged.
#
# **Criteria** (9 points): flex attention for dynamic lengths (3), bitsandbytes compiled or the kernel of A used (1),
# attention compiled (2), MLP compiled (1), loss and layer norms compiled (0, else -1 and -3), max-autotune matrix
# products in Triton (2).

# %% [markdown]
# ### The idea
#
# Compiling a whole training step invites everything that varies into one graph. Instead three regions are compiled,
# each without a break, and what varies between batches enters them as tensors:
#
# ```
#  once a batch, not compiled     embeddings, cos and sin, the attention mask (block indices, documents, window)
#  16 x one compiled function     decoder layer: norms, LoRA, NF4 linears, rotary embedding, attention, MLP
#  one compiled function          final norm
#  one compiled function          the loss and its gradient on a chunk of logits: E's operator
# ```
#
# - **One function for all layers.** Weights, adapters and quantisation states are inputs of the graph, so that sixteen
#   layers, and their recomputation under gradient checkpointing, run one graph. The first layer has one of its own: its
#   input, the embeddings, wants no gradient. What else is no number (gradients or not, the kind of mask) has a function
#   of its own, too. One reason to compile *again* is left: a forward without gradients of so few rows (below 3 on
#   sm_90, below 64 elsewhere) that bitsandbytes' fused kernel is the faster one, in an evaluation or under
#   checkpointing.
# - **Lengths are variables** from the first compilation on: batch and length are marked dynamic, and nothing in the
#   graph compares them with another size that happens to be equal (`use_duck_shape`).
# - **Masks are tensors.** Flex attention's block indices are found by comparing the first and last position, and the
#   first and last document, of each block of 128; window and document ids are tensors. So neither the window nor the
#   packing of a batch is part of the code.
# - **NF4 through A's operator.** Each linear layer de-quantises its weight in the forward and again in the backward; to
#   the compiler the second call depends on the gradient, or both would be merged and every weight kept.
# - **What is kept for the backward** is the partitioner's choice. Told to save a tenth (`activation_memory_budget=0.9`)
#   it makes again whatever costs no matrix product: the MLP's activation, the normed inputs.
# - **Adapters are cheap in FLOPs and dear in traffic and launches.** Their scaling is moved to where they have r
#   columns (`lora.py`); those that read the same input share their first product (`siblings.py`); the outputs of gate's
#   and up's exist only inside the kernel that computes the activation (`swiglu.py`); and what does not depend on one
#   another, such as casting all adapters of a layer, is one launch (`combo_kernels`).
# - **The host does not wait for the GPU** where it need not. transformers searches the positions of each batch for
#   packed documents, also positions that it has made itself, and waits for the answer. A batch that comes without mask
#   and positions is told to have neither padding nor documents, so that the host can run ahead into the next step. A
#   mask or positions that are given have to be looked at, by transformers and here: once a batch. And the backward's
#   Python runs in the thread that calls it, not in autograd's own for the GPU, where it takes a tenth longer and more.
# - **Values are rounded where eager mode rounds them**, also inside fused kernels (`emulate_precision_casts`), so that
#   in 16 bits, too, the loss is the uncompiled model's.
#
# ### The bound, before anything is measured
#
# The weights are frozen: a linear layer costs one product in the forward and one in the backward (dX), the head too.

# %%
from unsloth_puzzles.bench import section
from unsloth_puzzles.bench.models import llama_1b_config

section.start("C. torch.compile without graph breaks")
GPU = hardware.device == "cuda"
config = llama_1b_config()
hidden, inner, layers, heads = (
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads
)  # fmt: skip
size, length = 4, 2048
tokens = size * length
kv = config.num_key_value_heads * config.head_dim
linear = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
products = 2 * 2 * tokens * (linear + hidden * config.vocab_size)
attention_flops = layers * size * heads * config.head_dim * length**2 * (2 + 5)  # causal: half of 4 and of 10
kept = 2 * tokens * layers * (2 * hidden + hidden + 2 * kv + hidden + 2 * inner)
print(f"{products / 1e12:.1f} TFLOP of matrix products + {attention_flops / 1e12:.1f} of attention a step of 4 x 2048")
print(f"kept for the backward at the least, without recomputing products: {kept / 2**30:.2f} GiB in 16 bits")
if hardware.matmul_flops:
    rate = hardware.matmul_flops["bfloat16" if hardware.bf16 else "float16"]
    print(f"at least {1e3 * (products + attention_flops) / rate:.1f} ms here ({rate / 1e12:.0f} TFLOP/s)")
else:
    print("SKIPPED: what that takes here is known where the rate was measured, on a GPU")

# %% [markdown]
# ### The code: attention
#
# What can be asked, and what it means:

# %%
# show: unsloth_puzzles/attention/pattern.py

# %% [markdown]
# What each way to compute it says of itself, and five of them: PyTorch's flash attention for sequences laid end to end,
# flex attention, xformers, SDPA, and the formula.

# %%
# show: unsloth_puzzles/attention/backend.py

# %%
# show: unsloth_puzzles/attention/flash.py

# %% [markdown]
# Flex attention's blocks in closed form, and flex attention:

# %%
# show: unsloth_puzzles/attention/blocks.py

# %%
# show: unsloth_puzzles/attention/flex.py

# %%
# show: unsloth_puzzles/attention/xformers.py

# %%
# show: unsloth_puzzles/attention/sdpa.py

# %%
# show: unsloth_puzzles/attention/dense.py

# %% [markdown]
# One function over them, and the same under transformers' models:

# %%
# show: unsloth_puzzles/attention/interface.py

# %%
# show: unsloth_puzzles/attention/__init__.py

# %%
# show: unsloth_puzzles/attention/models.py

# %% [markdown]
# ### The code: what is compiled, and how that is counted

# %%
# show: unsloth_puzzles/compiled/qlora.py

# %%
# show: unsloth_puzzles/compiled/lora.py

# %%
# show: unsloth_puzzles/compiled/siblings.py

# %%
# show: unsloth_puzzles/compiled/swiglu.py

# %%
# show: unsloth_puzzles/compiled/weights.py

# %%
# show: unsloth_puzzles/compiled/autotune.py

# %%
# show: unsloth_puzzles/compiled/checkpoint.py

# %%
# show: unsloth_puzzles/compiled/count.py

# %%
# write: unsloth_puzzles/compiled/__init__.py

# %%
# write: unsloth_puzzles/comparisons/qlora_steps.py

# %%
import gc
import math
import statistics

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb

from unsloth_puzzles.attention import BACKENDS, attention, backend_table
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.compiled.count import Capture, Counts, count_compilations

DEVICE = hardware.device
HARDWARE = hardware.name + (" held to a T4's limits" if hardware.rehearsal else "")
SIXTEEN = torch.bfloat16 if hardware.bf16 or not GPU else torch.float16
results = Measurements("resources/measurements/c_compile.json", hardware)
issues = Measurements("resources/measurements/d_issues.json", hardware)


def judge(into, case, checks):
    """Record the share of the named checks that hold, and name those that do not. checks: {name: bool}."""
    failed = [name for name, good in checks.items() if not good]
    into.add("checks_passed", case, (len(checks) - len(failed)) / len(checks), "fraction")
    print(f"{case}: {len(checks) - len(failed)} of {len(checks)} checks passed", *failed, sep="\n  FAILED: ")


display(Markdown(backend_table(DEVICE)))

# %% [markdown]
# "No" is what this interface does not offer, which may be less than the library behind a backend could do. A scale and
# grouped queries all of them know; xformers, and SDPA with a mask, are given keys and values repeated for each query
# head. By default SDPA is taken where its flag for causal masks says all; else flash, flex, xformers, SDPA, in this
# order, whichever can, and below sm_80, on a T4, xformers and SDPA (in compiled layers SDPA) before flex.
#
# ### Check 1: every backend against float64
#
# Forward and, on a GPU, backward; each request on each backend that can do it. A backend's error may be no larger than
# that of the formula computed in float32 on the same 16-bit inputs plus two roundings of its dtype, since kernels round
# the probabilities and the output, too; in the gradients of query and key also two roundings of the term that a softmax
# subtracts, which cancels where a query sees few keys. What a backend cannot do it must refuse: the soft cap, by all
# but flex and the formula, which is one check more; all else is compared.

# %%
REQUESTS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 100},
    "packed": {"documents": True},
    "packed with a window": {"documents": True, "window": 50},
    "soft cap": {"soft_cap": 2.0},
}
generator = torch.Generator().manual_seed(SEED)


def drawn(length, dtype, heads=4, kv_heads=2, size=2, width=64):
    """Query, key, value and document ids of a batch."""
    shapes = [(heads, length), (kv_heads, length), (kv_heads, length)]
    data = [torch.randn(size, n, rows, width, generator=generator).to(DEVICE, dtype) for n, rows in shapes]
    return data, (torch.rand(size, length, generator=generator) < 8 / length).cumsum(-1).to(DEVICE)


def output_and_gradients(data, backend, asked):
    data = [tensor.detach().requires_grad_(GPU) for tensor in data]
    out = attention(*data, backend=backend, **asked)
    return [out.detach(), *(torch.autograd.grad(out, data, slope_of(out)) if GPU else ())]


def slope_of(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(SEED)).to(dtype).to(out)


def second_terms(data, asked, out):
    """Norms of what a softmax subtracts in the gradients of query and key: P times the sums of dO * O over a head.

    Kernels round O before they sum. Where the gradient cancels, with a single key all of it, that rounding remains.
    """
    query, key, value = (tensor.double() for tensor in data)
    value.requires_grad_()
    sums = (slope_of(out) * out).norm(dim=-1, keepdim=True) / query.shape[-1] ** 0.5
    of_query = sums * attention(query, key, key, backend="dense", **asked)
    of_key = torch.autograd.grad(attention(query, key, value, backend="dense", **asked), value, sums * query)[0]
    return [0, of_query.norm().item(), of_key.norm().item(), 0]


def errors(data, backend, asked, exact):
    """Norms of what output and gradients differ from float64's by."""
    found = output_and_gradients(data, backend, asked)
    return [(tensor.double() - true).norm().item() for tensor, true in zip(found, exact, strict=True)]


def close(data, backend, asked, beside_sdpa=None):
    """Whether output and gradients are as near to float64's as the formula's and two roundings of the dtype.

    The list `beside_sdpa` gets the errors as multiples of SDPA's on the same data.
    """
    exact = output_and_gradients([t.double() for t in data], "dense", asked)
    terms = second_terms(data, asked, exact[0]) if GPU else [0]
    found, formula = (errors(data, name, asked, exact) for name in (backend, "dense"))
    if beside_sdpa is not None:
        theirs = errors(data, "sdpa", asked, exact)
        beside_sdpa.append([off / other for off, other in zip(found, theirs, strict=True)])
    rounding = [
        2 * torch.finfo(dtype).eps * (true.norm().item() + term) for true, term in zip(exact, terms, strict=True)
    ]
    # NaN fails.
    return all(off <= plain + two + 1e-6 for off, plain, two in zip(found, formula, rounding, strict=True))


dtype = SIXTEEN if GPU else torch.float32
names = ("output", "dQ", "dK", "dV") if GPU else ("output",)
lines = [f"| error, times SDPA's | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
for backend, one in BACKENDS.items():
    if reason := one.missing(torch.device(DEVICE)):
        print(f"SKIPPED: {backend}: {reason}")
        continue
    checks, beside_sdpa = {}, []
    for name, request in REQUESTS.items():
        for rows in (77, 256, 1000) if GPU else (77,):
            data, documents = drawn(rows, dtype)
            asked = {**request, **({"documents": documents} if "documents" in request else {})}
            try:
                comparable = "soft_cap" not in asked and backend != "sdpa"  # SDPA has none
                checks[f"{name}, {rows}"] = close(data, backend, asked, beside_sdpa if comparable else None)
            except ValueError as refusal:
                checks[f"{name}: refused by name"] = f"{backend} cannot do" in str(refusal)
    judge(issues, f"attention, {'SDPA' if backend == 'sdpa' else backend}", checks)
    if beside_sdpa:
        # By the order of its sums alone an error is a hundredth larger or smaller.
        no_worse = {f"comparison {n}": max(of) <= 1.01 for n, of in enumerate(beside_sdpa, 1)}
        judge(issues, f"no larger error than SDPA's, {backend}", no_worse)
        spans = (f"{min(of):.2f} to {max(of):.2f}" for of in zip(*beside_sdpa, strict=True))
        lines.append(f"| {backend} | {' | '.join(spans)} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# ### Check 2: flex attention, two graphs at most
#
# Over 50 lengths, three windows, packed and not, forward and (on a GPU) backward: the result of every one is compared
# with the formula, and the graphs are counted. On a GPU there are two, one for queries shorter than 128 and one for all
# others: Inductor asks whether its decoding kernel could be taken, also where it may not, and keeps the answer as a
# guard. Then `fail_on_recompile` forbids any more, for lengths never seen.

# %%
WINDOWS = (None, 64, 1000)
lengths = [1, 4096, *torch.randint(2, 4096, (50,), generator=generator).tolist()] if GPU else [1, 300, 40, 129, 64]
checks = {"static": {}, "dynamic": {}, "windows": {}, "packed": {}}


def flex_step(rows, window, packed, kinds):
    data, documents = drawn(rows, dtype)
    asked = {"window": window, **({"documents": documents} if packed else {})}
    good = close(data, "flex", asked)
    for kind in kinds:
        checks[kind][f"{rows} rows, window {window}, {'packed' if packed else 'one document'}"] = good


torch._dynamo.reset()  # check 1 has compiled it already
with count_compilations() as counts:
    for number, rows in enumerate(lengths):
        window, packed = WINDOWS[number % 3], number % 2 == 0
        kinds = ["dynamic"] + ["windows"] * (window is not None) + ["packed"] * packed + ["static"] * (number < 3)
        flex_step(rows, window, packed, kinds)
with torch.compiler.set_stance("fail_on_recompile"):
    for rows in (3, 111, 333):
        flex_step(rows, 17, True, ["dynamic", "windows", "packed"])
assert counts.graphs >= 1, "nothing was counted"
print(f"{len(lengths)} lengths from {min(lengths)} to {max(lengths)}: {counts.graphs} graphs")
display(Markdown(counts.table()))
for into in (results, issues):
    judge(into, "flex, dynamic lengths", checks["dynamic"])
    into.add("compilations", "flex", counts.compilations, "compilations")
judge(results, "flex, static lengths", checks["static"])
judge(issues, "flex, sliding windows", checks["windows"])
judge(issues, "flex, packed sequences", checks["packed"])

# %% [markdown]
# ### Check 3: a training run, counted
#
# `transformers.Trainer` over the 4-bit model with adapters, 60 steps, every batch of another length. Graph breaks,
# graphs (a row each of the tables) and reasons are Dynamo's own; compilations are those of Inductor, forward and
# backward. Afterwards, counted apart, batches that pack two documents into a row (another kind of mask) and an
# evaluation (no gradients): new functions, each compiled once. To Dynamo a new function is no recompilation and has no
# reason; its compilations count here like all others. The run is in float32, where packed batches go to flex attention
# and have a function for short queries and one for all others; in 16 bits flash attention takes them, with one.
# Gradient accumulation, saved and loaded adapters, undoing, and TRL's SFTTrainer are not run here but by the tests of
# `tests/compiled`.
#
# This and the runs further below have processes of their own. In a checkout a script has made them before
# (`make sweeps`), and what is shown says on what hardware and when; else they are made here, fewer and smaller. Those
# of another machine or of other code are shown, too, but are no part of the score.

# %%
# write: unsloth_puzzles/comparisons/qlora_trainer.py

# %%
# write: unsloth_puzzles/comparisons/qlora_sweeps.py

# %%
from unsloth_puzzles.comparisons import qlora_sweeps

if GPU:
    few = {"batch": 2, "lengths": [1024] * 12, "dtype": str(SIXTEEN).removeprefix("torch.")}
    few |= {"memory_gib": 15.0} if hardware.rehearsal else {}
    trainer = {}
else:
    few = {"batch": 2, "lengths": [24, 17, 40], "dtype": "float32", "tiny": True}
    trainer = {"steps": 4, "longest": 48, "tiny": True}
FEW = {name: {**run, **trainer} for name, run in qlora_sweeps.TRAINER.items()} | {
    f"{candidate}, {name}": {"candidate": candidate, **given, **few}
    for name, given in list(qlora_sweeps.CHECKPOINTING.items())[: None if GPU else 1]
    for candidate in qlora_sweeps.CANDIDATES
}
gc.collect()
if GPU:
    FEW["compiled, max-autotune"] = {"candidate": "compiled", "max_autotune": True, "profile": True, **few}
    torch.cuda.empty_cache()  # the processes need what the checks above have held
swept = qlora_sweeps.load_or_measure("resources/measurements/c_compile_sweeps.json", FEW, hardware)
SWEPT = f"{swept['hardware']['name']}, {swept['date']}, random weights"
now = (hardware.name, results.versions, qlora_sweeps.sources())
HERE = (swept["hardware"]["name"], swept["versions"], swept["sources"]) == now
print(SWEPT + ("" if HERE else ": not this machine, or not this code, so no figure of it is part of the score"))
for name, run in swept["runs"].items():
    if "error" in run:
        print(f"FAILED: {name}: {run['error']}")
runs = {name: run for name, run in swept["runs"].items() if "step_ms" in run}


# %%
def captures(run, prefix=""):
    return [Capture(**one) for one in run[f"{prefix}captures"]]


training, uncompiled = (swept["runs"][f"trainer, {candidate}"] for candidate in ("compiled", "eager"))
everything = captures(training) + captures(training, "later_")
breaks = sum(training["graph_breaks"].values()) + sum(training["later_graph_breaks"].values())
print(f"{training['steps']} steps of {len(set(training['lengths']))} lengths: {training['compilations']} compilations,")
print(f"{training['compile_seconds']:.0f} s of them; graph breaks: {training['graph_breaks'] or 'none'}; {SWEPT}")
print("what Dynamo allows, as PyTorch has it:", training["limits"])
display(Markdown(Counts(captures(training)).table()))
print(f"packed batches and an evaluation: {training['later_compilations']} compilations more,", end=" ")
print(f"graph breaks: {training['later_graph_breaks'] or 'none'}")
display(Markdown(Counts(captures(training, "later_")).table()))
print("again for a reason of Dynamo's:", *[one.reason for one in everything if one.reason] or ["nothing"], sep="\n  ")
layer = [one for one in everything if one.name.startswith("LlamaDecoderLayer")]
norm = [one for one in everything if one.name.startswith("norm")]
loss_runs = [one for one in everything if one.name.startswith("run_")]
for case, of in (
    ("4-bit linear", layer), ("attention", layer), ("MLP", layer), ("layer norms", layer + norm), ("loss", loss_runs),
):  # fmt: skip
    if not of:
        print(f"FAILED: {case}: was not compiled")
    elif HERE:
        results.add("graph_breaks", case, breaks, "graph breaks")
        results.add("compilations", case, sum(one.compilations for one in of), "compilations")
if HERE:
    results.add("compilations", f"{training['steps']} steps of a Trainer", training["compilations"], "compilations")
    results.add("compilations", "packed, evaluated afterwards", training["later_compilations"], "compilations")
    results.add("graph_breaks", "all", breaks, "graph breaks")

# %% [markdown]
# ### Check 4: the loss is that of the uncompiled model
#
# In float32, without TF32, the same steps, packed batches and evaluation uncompiled: transformers' own attention and
# loss over bitsandbytes' layers. The text is real, the weights are random.

# %%
apart = [abs(a - b) for a, b in zip(training["losses"], uncompiled["losses"], strict=True)]
print(f"float32: {len(apart)} losses differ by at most {max(apart):.1e}; {SWEPT}")
print(f"the first {training['losses'][0]:.4f}, the last of training {training['losses'][training['steps'] - 1]:.4f}")
if HERE:
    results.add("loss_difference", "compiled, float32", max(apart), "loss")
    judge(results, "the uncompiled model's loss, float32", {f"loss {n}": gap <= 1e-4 for n, gap in enumerate(apart, 1)})

# %% [markdown]
# ### Time and memory of a step
#
# Llama 3.2 1B, adapters of rank 16 under all linear layers, 4 x 2048 tokens, bf16, fused AdamW: transformers, PEFT and
# bitsandbytes as they are, beside the same under `compile_qlora`. Between no checkpointing and checkpointing lies the
# compiler's own budget for what is kept. Time is the GPU's, from a step's beginning to its end, while the host goes on
# to the next, as in a training loop that does not read each loss. The host launches thousands of kernels a step, so
# that a busy host slows all of these, the uncompiled ones most, which also wait for the GPU once a step: where a spread
# is wide, so is that of the ratio. Uncompiled runs are made first, compiled ones after them, within minutes on one
# machine: 20 steps each, 12 for other budgets and "flash". Memory is what PyTorch has allocated in a step, at its peak.
#
# The times are those of the default, which rounds where eager mode rounds; "rounding once" is for those who would
# rather be near to float32 than to eager mode.

# %%
heads = ("run", "step, ms", "spread", "peak, GiB", "pinned on the host", "compilations", "graph breaks", "s compiling")
lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
for name, run in runs.items():
    middle, low, high = qlora_sweeps.step_ms(run)
    memory = ("" if run[kind] is None else f"{run[kind]:.2f}" for kind in ("peak_gib", "pinned_gib"))
    counted = (run["compilations"], sum(run["graph_breaks"].values()), f"{run['compile_seconds']:.0f}")
    lines.append(f"| {' | '.join((name, f'{middle:.1f}', f'{low:.1f} to {high:.1f}', *memory, *map(str, counted)))} |")
display(Markdown("\n".join(lines)))
print("spread: 10th to 90th percentile of the second half of the steps. Several runs compile at the same time, so the")
print("seconds are more than a run alone would take; each is timed while the others wait.")
for case in qlora_sweeps.CHECKPOINTING if GPU else ():
    mine, other = (runs.get(f"{candidate}, {case}") for candidate in ("compiled", "eager"))
    if mine and other:
        saved = qlora_sweeps.step_ms(other)[0] - qlora_sweeps.step_ms(mine)[0]
        spent = sum(mine["step_ms"][:2]) - sum(other["step_ms"][:2])
        after = f"paid for after {math.ceil(spent / saved)} steps" if saved > 0 else "never paid for"
        print(f"{case}: compiling costs {spent / 1e3:.0f} s once and saves {saved:.1f} ms a step: {after}")
for case in qlora_sweeps.CHECKPOINTING if GPU and HERE else ():
    mine, other = (runs.get(f"{candidate}, {case}") for candidate in ("compiled", "eager"))
    if mine and other:
        at = f"{case}, {mine['batch']} x {mine['lengths'][0]}, {mine['dtype']}"
        ours, theirs = qlora_sweeps.step_ms(mine), qlora_sweeps.step_ms(other)
        results.add("step_ms", at, *ours[:1], "ms", *ours[1:], {"eager": theirs[0]})
        results.add("peak_gib", at, mine["peak_gib"], "GiB", baselines={"eager": other["peak_gib"]})
        results.add("speedup_vs_eager", at, theirs[0] / ours[0], "x", theirs[1] / ours[2], theirs[2] / ours[1])

# %% [markdown]
# **Where the time goes**: what the GPU works in one more step, by PyTorch's profiler. The bound above is that of
# products and attention alone. Copies to the host and back, with checkpointing, run beside the kernels; what a step
# takes beyond the sum of all else is a GPU that waits: in compiled runs two to four microseconds from a kernel to the
# next, on the average.

# %%
COPIES = "copies to and from the host"


def busy(run):
    """What kernels take of a step, ms."""
    return sum(of["ms"] for kind, of in run["kernels"].items() if kind != COPIES)


profiled = {name: run for name, run in runs.items() if run["kernels"]}
if profiled:
    kinds = list(next(iter(profiled.values()))["kernels"])
    heads = ("run", "step, ms", "busy without these copies, ms", *(f"{kind}, ms" for kind in kinds), "launches")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, run in profiled.items():
        spent = (of["ms"] for of in run["kernels"].values())
        cells = [f"{ms:.1f}" for ms in (qlora_sweeps.step_ms(run)[0], busy(run), *spent)]
        lines.append(f"| {' | '.join((name, *cells))} | {sum(of['launches'] for of in run['kernels'].values())} |")
    display(Markdown("\n".join(lines)))
else:
    print("SKIPPED: the profiler's times are a GPU's, of the runs that the script makes")

# %%
OTHERS = ("parity", "rehearsal", "lengths")  # at other sizes
points = {name: run for name, run in runs.items() if run["peak_gib"] and not name.startswith(OTHERS)}
FRONTIER = ("without checkpointing", *(f"budget {kept}" for kept in qlora_sweeps.BUDGETS), "with checkpointing")
if points:
    figure, (axes, paid) = plt.subplots(1, 2, figsize=(13, 4.2), width_ratios=(3, 2), layout="constrained")
    kept = [points[f"compiled, {name}"] for name in FRONTIER if f"compiled, {name}" in points]
    axes.plot(*zip(*((run["peak_gib"], qlora_sweeps.step_ms(run)[0]) for run in kept), strict=True), ":", color="0.6")
    for number, (name, run) in enumerate(points.items()):
        at = run["peak_gib"], qlora_sweeps.step_ms(run)[0]
        marker, size = ("o", 9) if run in kept else ("^", 8) if run["candidate"] == "eager" else ("x", 7)
        label = f"{name}: {at[0]:.1f} GiB, {at[1]:.0f} ms"
        axes.plot(*at, marker, color=f"C{number}", label=label, markersize=size, zorder=2 + (marker == "x"))
        if run["kernels"]:
            axes.plot([at[0]] * 2, [busy(run), at[1]], color=f"C{number}", linewidth=1)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    axes.set(xlabel="memory allocated in a step, peak, GiB", ylabel="a step, ms")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title("a line ends at the time in which the GPU works, the mark is the step's", fontsize=9)
    for number, case in enumerate(qlora_sweeps.CHECKPOINTING):
        pair = [points.get(f"{candidate}, {case}") for candidate in ("eager", "compiled")]
        if not all(pair):
            continue
        (eager_ms, mine_ms), (warm, lost) = zip(
            *((qlora_sweeps.step_ms(run)[0], sum(run["step_ms"][:2])) for run in pair), strict=True
        )
        lost -= warm
        meet = math.ceil(lost / (eager_ms - mine_ms)) if eager_ms > mine_ms else 0
        steps = (0, 2 * meet or len(pair[1]["step_ms"]))
        paid.plot(steps, [eager_ms * n / 1e3 for n in steps], "--", color=f"C{number}", label=f"eager, {case}")
        paid.plot(steps, [(lost + mine_ms * n) / 1e3 for n in steps], color=f"C{number}", label=f"compiled, {case}")
        if meet:
            paid.plot(meet, eager_ms * meet / 1e3, "o", color=f"C{number}")
            paid.annotate(f"{meet} steps", (meet, eager_ms * meet / 1e3), (6, -10), textcoords="offset points")
    paid.set(xlabel="step", ylabel="since the start, compiling included, s")
    paid.set_title("where compiling has paid for itself (by median steps)", fontsize=9)
    paid.legend(fontsize=8)
    one = next(iter(points.values()))
    shape = f"{one['batch']} x {one['lengths'][0]} tokens, {one['dtype']}"
    figure.suptitle(f"QLoRA of Llama 3.2 1B, {shape}; {SWEPT}", fontsize=10)
    figure.savefig("resources/c_compile_frontier.png", dpi=110)
    plt.show()
else:
    print("SKIPPED: memory is shown for GPUs")

# %% [markdown]
# ### max-autotune: Triton's products against cuBLAS's
#
# The same with `max_autotune=True`: every product in the layers is benchmarked at the first batch's lengths, Triton's
# tiles against cuBLAS. On an H200 nearly all wide products stay with cuBLAS, and most of LoRA's narrow ones, which move
# memory only, become Triton's, with what follows them (scaling, addition) in the same kernel. A step gains next to
# nothing by it here, for several times as much compiling. Triton competes on GPUs with few multiprocessors, too, where
# Inductor would not let it; below sm_80, without Triton's tensor cores, for the narrow products alone. A second run has
# sixty lengths: none is benchmarked or compiled for anew.

# %%
tuned = runs.get("compiled, max-autotune")
if tuned and tuned["products"]:
    found = {}
    for product in tuned["products"]:
        found.setdefault((product["rows"], product["inner"], product["columns"]), []).append(product)
    heads = ("rows x inner x columns", "benchmarked", "won by Triton", "winner, us", "cuBLAS, us", "winners")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for sizes, of in sorted(found.items()):
        won = sum(bool(product["tile"]) for product in of)
        times = (statistics.median(product[name] for product in of) for name in ("winner_us", "cublas_us"))
        winners = dict.fromkeys(product["tile"] or "cuBLAS" for product in of)
        cells = (" x ".join(map(str, sizes)), len(of), won, *(f"{us:.1f}" for us in times), ", ".join(winners))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    display(Markdown("\n".join(lines)))
    launches = tuned["kernels"]["Triton's products"]["launches"] if tuned["kernels"] else 0
    print(f"{SWEPT}: a step launches {launches} matrix products of Triton's")
    varied = runs.get("lengths, max-autotune", tuned)
    again = [one["reason"] for one in varied["captures"] if one["reason"]]
    of_lengths = f"{len(varied['lengths'])} steps of {len(set(varied['lengths']))} lengths"
    print(f"{of_lengths}: {varied['compilations']} compilations,", end=" ")
    print(f"{sum(varied['graph_breaks'].values())} graph breaks, again for a reason of Dynamo's: {again or 'nothing'}")
    if HERE:
        results.add("triton_matmuls", "max-autotune", launches, "launches a step")
        results.add("compilations", "max-autotune", varied["compilations"], "compilations")
        results.add("graph_breaks", "max-autotune", sum(varied["graph_breaks"].values()), "graph breaks")
        case = f"max-autotune, {tuned['batch']} x {tuned['lengths'][0]}, {tuned['dtype']}"
        middle, low, high = qlora_sweeps.step_ms(tuned)
        results.add("step_ms", case, middle, "ms", low, high)
        results.add("peak_gib", case, tuned["peak_gib"], "GiB")
else:
    print("SKIPPED: max-autotune benchmarks products on a GPU")

# %% [markdown]
# ### In 16 bits, step by step
#
# Sixty steps of as many lengths. Three uncompiled runs differ in nothing but the kernel that PyTorch's SDPA takes. The
# compiled run rounds where eager mode rounds, so it should differ from them no more than they among themselves, twice
# that at most. It is the default that was timed above but for its attention, "flash", since cuDNN's plans anew for each
# length. A rehearsal of a T4 is compared likewise: twelve steps of 2 x 1024 tokens in float16, SDPA, 15 GiB of memory,
# and two uncompiled runs. In the figure below the steps that compile lie above the pane of times.
#
# Compiled code could also round once where eager mode rounds several times (`eager_rounding=False`), and in bfloat16
# that shows. LoRA's B begins at zero, an update moves it by the learning rate, 2e-4, and what it then adds to a layer's
# output is less than half a unit in the last place of that output. Eager mode has rounded the output before it adds,
# and rounds again, so that much of the first updates has no effect yet. Code that adds before it rounds is further from
# eager mode's losses, in the first steps most, and nearer to those of a run in float32 with the same packed weights.


# %%
def largest(one, other):
    return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))


for kind, count in (("parity", len(qlora_sweeps.KERNELS)), ("rehearsal", 2)):
    of = {name.removeprefix(f"{kind}, "): run for name, run in runs.items() if name.startswith(kind)}
    eager = [run for name, run in of.items() if name.startswith("eager")]
    mine, once = of.get("compiled"), of.get("compiled, rounding once")
    if mine is None or len(eager) != count:
        print(f"SKIPPED: {kind}: these runs are made by the script, on a GPU")
        continue
    case = f"{kind}, {mine['dtype']}"
    among = max(largest(a, b) for a in eager for b in eager)
    ours = max(largest(mine, other) for other in eager)
    print(f"{case}: largest difference among uncompiled runs {among:.1e}, of the compiled one from them {ours:.1e}")
    if HERE:
        results.add("loss_difference", f"compiled, {case}", ours, "loss", baselines={"uncompiled runs": among})
        if among:
            results.add("loss_difference_ratio", case, ours / among, "x")
        results.add("peak_gib", case, mine["peak_gib"], "GiB")
        judge(results, f"the uncompiled model's loss, {case}", {"at most twice theirs": ours <= 2 * among})
    if once and "float32" in of:
        apart = max(largest(once, other) for other in eager)
        print(f"rounding once: largest difference from uncompiled runs {apart:.1e};", end=" ")
        nearest = min(largest(run, of["float32"]) for run in eager)
        print(f"from float32 {largest(once, of['float32']):.1e}, uncompiled runs at least {nearest:.1e}")

# %%
parity = {name.removeprefix("parity, "): run for name, run in runs.items() if name.startswith("parity")}
if "compiled" in parity and len(parity) > 1:
    mine = parity["compiled"]
    figure, panes = plt.subplots(5, 1, figsize=(8, 10), sharex=True, layout="constrained")
    shown = range(1, len(mine["losses"]) + 1)
    eager = [run for name, run in parity.items() if name.startswith("eager")]
    among = max(largest(a, b) for a in eager for b in eager)

    def off(run, other):
        return [abs(a - b) for a, b in zip(run["losses"], other["losses"], strict=True)]

    for number, (name, run) in enumerate(parity.items()):
        thin = name.startswith(("compiled", "float32"))
        pale = [(1 + part) / 2 for part in to_rgb(f"C{number}")]
        style = {"linewidth": 1.2, "color": f"C{number}"} if thin else {"linewidth": 2.5, "color": pale}
        panes[0].plot(shown, run["losses"], label=name, **style)
        if name != "float32" and run is not eager[0]:
            panes[1].semilogy(shown, off(run, eager[0]), **style)
        if name != "float32" and "float32" in parity:
            panes[2].semilogy(shown, off(run, parity["float32"]), **style)
        if run is mine or run in eager:
            panes[3].plot(shown, run["step_ms"], **style)
            panes[4].plot(shown, run["step_peak_gib"], **style)
    usual = [qlora_sweeps.step_ms(run)[0] for run in (mine, *eager)]
    panes[3].set_ylim(0, 2 * max(usual))  # the steps that compile lie far above
    panes[4].set_ylim(bottom=0)
    panes[1].axhline(2 * among, color="black", linestyle=":", label="twice what uncompiled runs differ")
    names = (
        "loss, nats a token", f"from {next(iter(parity))}'s\nloss, nats", "from float32's\nloss, nats",
        "a step, ms", "peak memory, GiB",
    )  # fmt: skip
    for axes, label in zip(panes, names, strict=True):
        axes.set_ylabel(label)
    panes[-1].set_xlabel("step")
    figure.align_ylabels()
    figure.legend(loc="outside lower center", fontsize=8, ncols=4)
    tokens = f"{mine['batch']} x up to {max(mine['lengths'])} tokens, {mine['dtype']}"
    figure.suptitle(f"QLoRA of Llama 3.2 1B, {tokens}; {SWEPT}", fontsize=9)
    figure.savefig("resources/c_compile_parity.png", dpi=110)
    plt.show()
else:
    print("SKIPPED: these runs are made by the script, on a GPU")

# %% [markdown]
# ### Aimed at, and reached
#
# Set before it was measured, for an H200; Unsloth 2026.10.9 takes 109.5 ms and 9.6 GiB without, 148.4 ms and 2.4 GiB
# with checkpointing by an earlier measurement on another H200, which is no comparison in one run. The ratios of times,
# and the steps after which compiling has paid for itself, owe something to the host of this run, on which the
# uncompiled steps were slow and spread widely. What the GPU works ("busy without these copies" in the table "where the
# time goes") owes nothing to it: there, too, both ratios are above 1.6.

# %%
FULL = "4 x 2048, bfloat16"
AIMS = [  # metric, case, at most (positive) or at least (negative)
    ("step_ms", f"without checkpointing, {FULL}", 100),
    ("peak_gib", f"without checkpointing, {FULL}", 9.6),
    ("step_ms", f"with checkpointing, {FULL}", 135),
    ("peak_gib", f"with checkpointing, {FULL}", 2.4),
    ("speedup_vs_eager", f"without checkpointing, {FULL}", -1.6),
    ("speedup_vs_eager", f"with checkpointing, {FULL}", -1.6),
    ("compilations", "60 steps of a Trainer", 8),
    ("compilations", "flex", 4),
    ("loss_difference", "compiled, float32", 1e-4),
    ("loss_difference_ratio", "parity, bfloat16", 2),
    ("loss_difference_ratio", "rehearsal, float16", 2),
    ("graph_breaks", "all", 0),
    ("compilations", "max-autotune", 8),
]
lines = ["| metric | case | aim | measured | |", "|---|---|---|---|---|"]
for metric, case, aim in AIMS if GPU else ():
    found = results.find(metric, case)
    good = bool(found) and (found[0]["value"] <= aim if aim >= 0 else found[0]["value"] >= -aim)
    text = f"{found[0]['value']:.4g} {found[0]['unit']}" if found else "SKIPPED: not measured here"
    goal = f"at most {aim:g}" if aim >= 0 else f"at least {-aim:g}"
    lines.append(f"| {metric} | {case} | {goal} | {text} | {'reached' if good else 'missed' if found else ''} |")
if GPU:
    display(Markdown("\n".join(lines)))
else:
    print("SKIPPED: the aims are for a GPU")

# %% [markdown]
# ### What this does not do
#
# - Each new kind of mask (a flag for SDPA, blocks for flex attention, documents for flash attention) is compiled once,
#   for the first layer and for the others: a run that packs some of its batches compiles two functions more, and with
#   flex attention four.
# - On a GPU below sm_80 Triton has no tensor cores for flex attention: there flex is taken only where it is asked for,
#   or where nothing else knows what is asked (a soft cap). Its tiles are then 32 x 32: at a head size of 128 in float16
#   keys, values and queries of a tile, and in the backward the gradient beside them, take 4 x 32 x 128 x 2 bytes = 32
#   KiB of the 64 KiB that a T4's multiprocessor has; larger heads have tiles of 16 x 16. That is arithmetic: Inductor
#   writes flex's code for the GPU that is there, so that it could not be compiled for a T4 here. In float32 it is twice
#   as much, which at a head size of 128 leaves nothing for all else: there SDPA is the one to take.
# - With gradient checkpointing the layers' inputs, but for the last one's, wait in pinned memory of the host, which
#   must have room for them: the column of the table above.
# - A loop that reads each loss waits for the GPU once a step, and so does transformers' `Trainer` unless it is told not
#   to look for NaN (`logging_nan_inf_filter=False`). Such steps begin on a GPU that has nothing to do.
# - cuDNN's attention, which PyTorch takes on an H200, plans anew for every length it has not met, a tenth of a second
#   each and more: where lengths vary, `attention="flash"` is the faster choice, as in the runs of 60 lengths above.
# - A mask with padding between real tokens is refused, and so is packing told by `cu_seq_lens_q` without position ids.
# - Dropout in the adapters sets `activation_memory_budget` to 1.0, aloud: below that the compiler may draw a dropout
#   again for the backward, and otherwise.
# - A copy that is made of a compiled model (`copy.deepcopy`) cannot be undone: undo first, copy then. With labels and
#   `return_dict=False` a call returns the loss alone, the logits having never been made.
# - Nothing of this ran on a T4. The rehearsal is an H200 that was allowed 15 GiB.

# %% [markdown]
# ### Score of this section

# %%
from unsloth_puzzles import scorecard

results.save()
issues.save()
rows = [row for row in scorecard.score("resources/measurements") if row.challenge == "C"]
display(Markdown(scorecard.table(rows)))
_ = section.finish()

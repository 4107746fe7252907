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
# A graph of the whole training step would depend on everything that varies between batches. Instead three regions are
# compiled, each without a graph break, and what varies between batches enters them as tensors:
#
# ```
#  once a batch, not compiled     embeddings, cos and sin, the attention mask (block indices, documents, window)
#  16 x one compiled function     decoder layer: norms, LoRA, NF4 linears, rotary embedding, attention, MLP
#  one compiled function          final norm
#  one compiled function          the loss and its gradient on a chunk of logits: E's operator
# ```
#
# - **One function for all layers.** Weights, adapters and quantisation states are inputs of the graph, so that sixteen
#   layers, and their recomputation under gradient checkpointing, run one graph. The non-tensor part of the compile key
#   (gradients or not, the kind of mask) selects another function. The first layer has its own function if its input,
#   the embeddings, needs no gradient; here it needs one, as after `prepare_model_for_kbit_training`. One reason to
#   recompile is left: a forward without gradients of few rows (below 3 on sm_90, below 64 elsewhere), for which
#   bitsandbytes' fused kernel is faster, in an evaluation or under checkpointing.
# - **Lengths are symbolic** from the first compilation on: batch and length are marked dynamic, and without
#   `use_duck_shape` the graph does not compare them with another size that happens to be equal.
# - **Masks are tensors.** Flex attention's block indices are found by comparing the first and last position, and the
#   first and last document, of each block of 128; window and document ids are tensors. Neither the window nor the
#   packing of a batch is part of the compiled code.
# - **NF4 through A's operator.** Each linear layer de-quantises its weight in the forward and again in the backward.
#   The second call takes the gradient as an input. Otherwise the compiler would merge both calls and keep every weight.
# - **The partitioner chooses what is kept for the backward.** With `activation_memory_budget=0.9` it recomputes what
#   needs no matrix product: the MLP's activation and the normed inputs.
# - **Adapters cost few FLOPs but much memory traffic and many launches.** Their scaling is applied where they have r
#   columns (`lora.py`). Adapters that read the same input share their first product (`shared_input.py`). The outputs of
#   gate and up exist only inside the kernel that computes the activation (`swiglu.py`). Independent operations, such as
#   casting all adapters of a layer, are one launch (`combo_kernels`).
# - **The host avoids waiting for the GPU.** transformers searches the positions of each batch for packed documents,
#   even positions that it has made itself, and waits for the result. For a batch without mask and positions it is told
#   that there is neither padding nor a second document, so that the host can run ahead into the next step. A given mask
#   or given positions are inspected, by transformers and here, once a batch. The backward's Python runs in the calling
#   thread, because it takes at least a tenth longer in autograd's own thread for the GPU.
# - **Values are rounded where eager mode rounds them**, inside fused kernels as well (`emulate_precision_casts`), so
#   that the loss agrees with the uncompiled model's in 16 bits, too.
#
# ### The bound, before anything is measured
#
# The weights are frozen: a linear layer costs one product in the forward and one in the backward (dX), the head too.

# %%
from benchmarks.models import llama_1b_config
from unsloth_puzzles.bench import section

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
    print("SKIPPED: the time at least needed here: it follows from the measured matmul rate of a GPU")

# %% [markdown]
# ### The code: attention
#
# The arguments that describe which keys a query attends to:

# %%
# show: unsloth_puzzles/attention/pattern.py

# %% [markdown]
# Five backends compute attention: PyTorch's flash attention for sequences laid end to end, flex attention, xformers,
# SDPA and the formula. The next two files hold flex attention's blocks in closed form, and flex attention:

# %%
# show: unsloth_puzzles/attention/blocks.py

# %%
# show: unsloth_puzzles/attention/flex.py

# %% [markdown]
# One function selects the backend. The same function serves transformers' models:

# %%
# show: unsloth_puzzles/attention/interface.py

# %% [markdown]
# ### The code: what is compiled, and how that is counted

# %%
# show: unsloth_puzzles/compiled/qlora.py

# %%
# show: unsloth_puzzles/compiled/lora.py

# %%
import json
import math
import statistics
from collections import Counter

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb

from benchmarks.compiled import steps as qlora_steps
from benchmarks.compiled.model import qlora_model
from unsloth_puzzles.attention import BACKENDS, attention, backend_table
from unsloth_puzzles.bench.compilations import Capture, Counts, count_compilations
from unsloth_puzzles.bench.experiments import free_memory, judge
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.device import capability

DEVICE = hardware.device
HARDWARE = hardware.name + (" held to a T4's limits" if hardware.rehearsal else "")
SIXTEEN = torch.bfloat16 if hardware.bf16 or not GPU else torch.float16
OLD = 0 < capability() < 80  # a T4: no bfloat16, no tensor cores for Triton, no flash attention
results = Measurements("resources/measurements/c_compile.json", hardware)
free_memory()

display(Markdown(backend_table(DEVICE)))

# %% [markdown]
# "No" means that this interface does not offer the feature, although the library behind the backend may. All backends
# support a custom scale and grouped queries. For xformers, and for SDPA with a mask, keys and values are repeated for
# each query head. The default is SDPA if its causal flag describes the whole pattern. Otherwise it is the first of
# flash, flex, xformers and SDPA that supports the pattern. Below sm_80, on a T4, xformers and SDPA (in compiled layers
# SDPA alone) come before flex. Section D checks each backend against float64.
#
# ### Check 1: flex attention, two graphs at most
#
# Flex attention runs over 52 lengths and three windows, packed and not, forward and (on a GPU) backward. Each result is
# compared with the formula, and the graphs are counted. A GPU needs two graphs, one for queries shorter than 128 and
# one for all others: Inductor tests whether its decoding kernel applies, even where that kernel is disabled, and guards
# on the result. After that, new lengths run under `fail_on_recompile`.

# %%
from benchmarks.attention.checks import check_flex

flex = check_flex(DEVICE, SIXTEEN if GPU else torch.float32)
print(f"{len(flex.lengths)} lengths from {min(flex.lengths)} to {max(flex.lengths)}: {flex.counts.graphs} graphs")
display(Markdown(flex.counts.table()))
judge(results, "flex, dynamic lengths", flex.checks["dynamic"])
judge(results, "flex, static lengths", flex.checks["static"])
if flex.counts.graphs:
    results.add("compilations", "flex", flex.counts.compilations, "compilations")
free_memory()

# %% [markdown]
# ### Check 2: a training run through flex attention, counted
#
# The 4-bit model with adapters is loaded once, for this run and for all that follow; each run begins with the same
# weights. `transformers.Trainer` trains it twice for 50 steps of as many lengths (128 to 320 tokens, on a T4 up to 192;
# on a CPU 4 steps), in float32 without TF32: uncompiled, with transformers' own attention and loss over bitsandbytes'
# layers, and under `compile_qlora` with flex attention (on a CPU, where flex attention cannot be compiled into a layer,
# with SDPA). Dynamo reports graph breaks, graphs (a row of the tables each) and the reasons of recompilations.
# Compilations are Inductor's, forward and backward. Dynamo does not report a new function as a recompilation; its
# compilations count here like all others. On a CPU, batches that pack two documents into a row and an evaluation
# without gradients follow, and are counted separately. Gradient accumulation, saved and loaded adapters, undoing, and
# TRL's SFTTrainer are not run here but by the tests in `tests/compiled`.

# %%
from benchmarks.compiled import trainer as qlora_trainer

STEPS, LENGTHS = (50, {"longest": 192 if OLD else 320, "shortest": 128}) if GPU else (4, {"longest": 48})
trainings, model = {}, None
held_bytes = torch.cuda.memory_allocated() if GPU else 0  # what other sections still hold

# %%
model = qlora_model(DEVICE, torch.float32, not GPU, SIXTEEN if GPU else torch.float32)
print(f"{sum(parameter.numel() for parameter in model.parameters()):,} stored numbers, random weights, seed {SEED}")

# %%
for candidate in qlora_steps.CANDIDATES if model is not None else ():
    try:
        trainings[candidate] = run = qlora_trainer.measure(
            candidate, steps=STEPS, **LENGTHS, attention="flex" if GPU else "auto", tiny=not GPU, model=model,
            afterwards=not GPU,
        )  # fmt: skip
    except Exception as error:
        experiments.failed(f"Trainer, {candidate}", error)
    else:
        print(f"{candidate}: the losses go from {run['losses'][0]:.4f} to {run['losses'][STEPS - 1]:.4f}")


# %% [markdown]
# What each part of the model was compiled to, in the run whose losses are compared below. The operators are those of
# the graphs that Inductor received: NF4 weights by A's operator, flex attention and its backward, the fused MLP, the
# norms' reciprocal roots, the loss's exponentials.

# %%
OPERATORS = {  # part: (the captured functions that contain it, {feature: the operators that show it})
    "4-bit linear": (
        ("LlamaDecoderLayer",),
        {
            "de-quantisation by A's kernel": ("unsloth_puzzles.dequantize_nf4",),
            "and again in the backward": ("unsloth_puzzles.dequantize_nf4_again",),
        },
    ),
    "attention": (
        ("LlamaDecoderLayer",),
        {
            "attention": ("flex_attention",) if GPU else ("aten._scaled_dot_product_flash_attention_for_cpu",),
            "its backward": ("flex_attention_backward",)
            if GPU
            else ("aten._scaled_dot_product_flash_attention_for_cpu_backward",),
        },
    ),
    "MLP": (
        ("LlamaDecoderLayer",),
        {
            "gated activation with its adapters": ("unsloth_puzzles.lora_swiglu",),
            "its backward": ("unsloth_puzzles.lora_swiglu_backward",),
        },
    ),
    "layer norms": (("LlamaDecoderLayer", "norm"), {"reciprocal root": ("aten.rsqrt",)}),
    "loss": (("run_",), {"exponential": ("aten.exp", "aten.exp2"), "logarithm": ("aten.log", "aten.log2")}),
}


def captures(run, prefix=""):
    return [Capture(**one) for one in run[f"{prefix}captures"]]


if "compiled" in trainings:
    run = trainings["compiled"]
    everything = captures(run) + captures(run, "later_")
    breaks = sum(run["graph_breaks"].values()) + sum(run["later_graph_breaks"].values())
    print(f"{run['steps']} steps of {len(set(run['lengths']))} lengths: {run['compilations']} compilations", end=" ")
    print(f"in {run['compile_seconds']:.0f} s; graph breaks: {run['graph_breaks'] or 'none'}; {HARDWARE}")
    print("Dynamo's limits:", run["limits"])
    display(Markdown(Counts(captures(run)).table()))
    if GPU:
        print(
            "SKIPPED: packed batches and an evaluation, which take a minute to compile, are run by the package's tests"
        )
    else:
        print(f"packed batches and an evaluation: {run['later_compilations']} compilations more,", end=" ")
        print(f"graph breaks: {run['later_graph_breaks'] or 'none'}")
        display(Markdown(Counts(captures(run, "later_")).table()))
    again = [one.reason for one in everything if one.reason]
    print("reasons of recompilations:", *again or ["none"], sep="\n  ")
    lines = ["| part | captured in | operators found |", "|---|---|---|"]
    for part, (functions, wanted) in OPERATORS.items():
        of = [one for one in everything if one.name.startswith(functions)]
        shown, checks = Counter(), {}
        for function in functions:  # in each of them, forward and backward together
            counted = sum((Counter(one.operators) for one in of if one.name.startswith(function)), Counter())
            for what, names in wanted.items():
                found = {name: counted[name] for name in names if counted[name]}
                checks[f"{what} in {function}"] = bool(found)
                shown.update(found)
        text = "; ".join(f"{name} x {count}" for name, count in shown.items())
        lines.append(f"| {part} | {', '.join(dict.fromkeys(one.name for one in of))} | {text} |")
        judge(results, f"operators, {part}", checks)
        results.add("compilations", part, sum(one.compilations for one in of), "compilations")
    display(Markdown("\n".join(lines)))
    results.add("compilations", f"{run['steps']} steps of a Trainer", run["compilations"], "compilations")
    if not GPU:
        results.add("compilations", "packed, evaluated afterwards", run["later_compilations"], "compilations")
    results.add("graph_breaks", "all", breaks, "graph breaks")

# %% [markdown]
# ### Check 3: the loss is that of the uncompiled model
#
# The same steps (and packed batches and evaluation, if there were any), compiled and not. The text is real, the weights
# are random.

# %%
if len(trainings) == 2:
    mine, plain = trainings["compiled"], trainings["eager"]
    apart = [abs(a - b) for a, b in zip(mine["losses"], plain["losses"], strict=True)]
    qlora_steps.largest_difference(mine, plain)  # refuses losses that are not finite
    print(f"float32: {len(apart)} losses differ by at most {max(apart):.1e} (1e-4 is allowed); {HARDWARE}")
    results.add("loss_difference", "compiled, float32", max(apart), "loss")
    same = {f"loss {n}": gap <= 1e-4 for n, gap in enumerate(apart, 1)}
    judge(results, "the uncompiled model's loss, float32", same)
    if GPU:
        lengths = {f"{STEPS} lengths": len(set(mine["lengths"])) == STEPS}
        judge(results, "flex, a Trainer run", same | lengths | {"no graph break": not mine["graph_breaks"]})
    else:
        print("SKIPPED: flex attention is compiled into layers on a GPU only")
else:
    print("FAILED: one of the two trainings did not finish, so there is nothing to compare")

# %% [markdown]
# ### Time and memory of a step, and the loss in 16 bits
#
# Adapters of rank 16 under all linear layers, fused AdamW: unmodified transformers, PEFT and bitsandbytes, beside the
# same model under `compile_qlora`; 4 x 2048 tokens in bfloat16, on a T4 2 x 1024 in float16. A step is timed on the
# GPU, from its beginning to its end, while the host continues with the next step, as in a training loop that does not
# read each loss. Uncompiled runs come first and compiled runs after them, all in this process. Memory is the peak that
# PyTorch allocates in a step.
#
# In 16 bits two uncompiled runs differ as well, even if only the attention kernel differs. The compiled run rounds
# where eager mode rounds, so its difference from the uncompiled runs may be at most twice the largest difference among
# them. `max_autotune=True` benchmarks every product in the layers at the first batch's lengths, Triton's tiles against
# cuBLAS. Triton competes also on GPUs with few multiprocessors, where Inductor excludes it by default. Below sm_80
# Triton has no tensor cores, so there it competes for LoRA's narrow products only. There the host also needs about a
# minute to compile a run, so one compiled run covers both max-autotune and gradient checkpointing.

# %%
if OLD or not GPU:
    shape = {"batch": 2, "lengths": (1024,) * 8} if GPU else {"batch": 2, "lengths": (24, 17, 40)}
else:
    shape = {"batch": 4, "lengths": (2048,) * 20}
NAME = str(SIXTEEN).removeprefix("torch.") if GPU else "float32"
SIZE = f"{shape['batch']} x {shape['lengths'][0]}, {NAME}"
short = {**shape, "lengths": shape["lengths"][:12]}
CHECKPOINTING = ("without checkpointing", "with checkpointing")
UNCOMPILED = {  # one model, other kernels for its attention
    "eager, without checkpointing": {**shape, "candidate": "eager"},
    "eager, SDPA by its formula": {**short, "candidate": "eager", "sdpa": "math"},
    "eager, transformers' attention": {**short, "candidate": "eager", "attention": "eager"},
}
SIXTEEN_BIT = UNCOMPILED | {
    "eager, with checkpointing": {**shape, "candidate": "eager", "checkpointing": True},
    "compiled, without checkpointing": {**shape, "candidate": "compiled"},
    "compiled, with checkpointing": {**shape, "candidate": "compiled", "checkpointing": True},
    "compiled, max-autotune": {**short, "candidate": "compiled", "max_autotune": True, "profile": True},
}
if OLD:  # a T4's host needs a minute to compile a run: one run covers both
    SIXTEEN_BIT["compiled, max-autotune"]["checkpointing"] = True
    for case in CHECKPOINTING:
        del SIXTEEN_BIT[f"compiled, {case}"]
if not GPU:
    SIXTEEN_BIT = {name: asked for name, asked in SIXTEEN_BIT.items() if "without checkpointing" in name}
runs, failed = {}, {}

# %%
for name, asked in SIXTEEN_BIT.items() if model is not None else ():
    try:
        runs[name] = qlora_steps.measure(**asked, dtype=NAME, tiny=not GPU, model=model, held_bytes=held_bytes)
    except Exception as error:
        experiments.failed(name, error)
        failed[name] = experiments.failures[-1][1]
    else:
        print(f"{name}: {qlora_steps.step_ms(runs[name])[0]:.1f} ms a step", flush=True)
    free_memory()


# %%
def steps_table(runs, failed):
    """What a step of each run takes, as Markdown; failed: {run: reason}."""
    heads = ["run", "step, ms", "spread", "peak, GiB", "pinned on the host"]
    heads += ["compilations", "graph breaks", "s compiling"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, run in runs.items():
        middle, low, high = qlora_steps.step_ms(run)
        memory = ("" if run[kind] is None else f"{run[kind]:.2f}" for kind in ("peak_gib", "pinned_gib"))
        counted = (run["compilations"], sum(run["graph_breaks"].values()), f"{run['compile_seconds']:.0f}")
        cells = (name, f"{middle:.1f}", f"{low:.1f} to {high:.1f}", *memory, *map(str, counted))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name} | FAILED: {reason} |{' |' * 6}" for name, reason in failed.items()]
    return Markdown("\n".join(lines))


display(steps_table(runs, failed))
print(f"{SIZE}, {HARDWARE}, random weights; spread: 10th to 90th percentile of the second half of the steps")
PAIRS = {case: (f"compiled, {case}", f"eager, {case}") for case in CHECKPOINTING}
if OLD:
    PAIRS = {"max-autotune with checkpointing": ("compiled, max-autotune", "eager, with checkpointing")}
for case, pair in PAIRS.items() if GPU else ():
    mine, other = map(runs.get, pair)
    if mine and other:
        ours, theirs = qlora_steps.step_ms(mine), qlora_steps.step_ms(other)
        saved, spent = theirs[0] - ours[0], sum(mine["step_ms"][:2]) - sum(other["step_ms"][:2])
        after = f"paid for after {math.ceil(spent / saved)} steps" if saved > 0 else "never paid for"
        print(f"{case}: compiling costs {spent / 1e3:.0f} s once and saves {saved:.1f} ms a step: {after}")
        at = f"{case}, {SIZE}"
        results.add("step_ms", at, *ours[:1], "ms", *ours[1:], {"eager": theirs[0]})
        results.add("peak_gib", at, mine["peak_gib"], "GiB", baselines={"eager": other["peak_gib"]})
        results.add("speedup_vs_eager", at, theirs[0] / ours[0], "x", theirs[1] / ours[2], theirs[2] / ours[1])


# %% [markdown]
# The losses of the compiled runs beside those of the uncompiled ones:


# %%
largest = qlora_steps.largest_difference
uncompiled = [runs[name] for name in UNCOMPILED if name in runs]
if len(uncompiled) > 1:
    among = max(largest(a, b) for a in uncompiled for b in uncompiled)
    print(f"{len(uncompiled)} uncompiled runs differ by at most {among:.1e} among themselves")
    for name in (f"compiled, {what}" for what in (*CHECKPOINTING, "max-autotune")):
        if name in runs:
            ours = max(largest(runs[name], other) for other in uncompiled)
            case = name.removeprefix("compiled, ")
            print(f"{name}: {ours:.1e} from them, {ours / among:.2f} times as much (2 is allowed)")
            results.add("loss_difference", f"{case}, {SIZE}", ours, "loss", baselines={"uncompiled runs": among})
            results.add("loss_difference_ratio", case if "autotune" in case else f"{case}, {SIZE}", ours / among, "x")
            judge(results, f"the uncompiled model's loss, {case}, {NAME}", {"at most twice theirs": ours <= 2 * among})
elif not GPU and len(runs) == 2:
    mine, other = runs["compiled, without checkpointing"], runs["eager, without checkpointing"]
    print(f"float32: {len(mine['losses'])} losses differ by at most {largest(mine, other):.1e}")

# %% [markdown]
# What max-autotune chose: the winner of each product and, by PyTorch's profiler, how many of Triton's products a step
# launches.

# %%
tuned = runs.get("compiled, max-autotune")
if tuned:
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
    print(f"{SIZE}, {HARDWARE}: a step launches {launches} matrix products of Triton's;", end=" ")
    print(f"{tuned['compilations']} compilations, {sum(tuned['graph_breaks'].values())} graph breaks")
    results.add("triton_matmuls", "max-autotune", launches, "launches a step")
    results.add("compilations", "max-autotune", tuned["compilations"], "compilations")
    results.add("graph_breaks", "max-autotune", sum(tuned["graph_breaks"].values()), "graph breaks")
    middle, low, high = qlora_steps.step_ms(tuned)
    results.add("step_ms", f"max-autotune, {SIZE}", middle, "ms", low, high)
    results.add("peak_gib", f"max-autotune, {SIZE}", tuned["peak_gib"], "GiB")
else:
    print("SKIPPED: max-autotune benchmarks products on a GPU" if not GPU else "FAILED: there is no max-autotune run")

# %%
model = None
free_memory()

# %% [markdown]
# ### More settings, on a large GPU
#
# A script (`make sweeps`) makes more runs than a notebook has time for and keeps them in a file: 60 steps of as many
# lengths, three uncompiled kernels of attention, other activation memory budgets. The tables and figures below come
# from that file if it is present. They name its hardware and date, and are no part of the score.

# %%
SWEEPS = Path("resources/measurements/c_compile_sweeps.json")
swept = json.loads(SWEEPS.read_text()) if SWEEPS.exists() else {"runs": {}}
SWEPT = f"{swept['hardware']['name']}, {swept['date']}, random weights" if SWEEPS.exists() else ""
print(f"{SWEEPS.name}: {SWEPT}, of an earlier run" if SWEPT else f"SKIPPED: {SWEEPS.name} is not here")
for name, run in swept["runs"].items():
    if "error" in run:
        print(f"in that file {name} is an error: {run['error']}")
runs = {name: run for name, run in swept["runs"].items() if "step_ms" in run}

# %%
if runs:
    display(steps_table(runs, {}))
    print("Several runs compile at the same time, so a run alone compiles in fewer seconds. Steps are timed one run")
    print("at a time.")

# %% [markdown]
# **Where the time goes**: GPU time of one more step, by PyTorch's profiler. The bound above covers products and
# attention only. With checkpointing, copies to and from the host overlap the kernels. The remainder of a step is GPU
# idle time: in compiled runs two to four microseconds between kernels, on average.

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
        cells = [f"{ms:.1f}" for ms in (qlora_steps.step_ms(run)[0], busy(run), *spent)]
        lines.append(f"| {' | '.join((name, *cells))} | {sum(of['launches'] for of in run['kernels'].values())} |")
    display(Markdown("\n".join(lines)))
else:
    print("SKIPPED: the profiler's times are a GPU's, of the runs that the script makes")

# %%
OTHERS = ("parity", "rehearsal", "lengths")  # at other sizes
points = {name: run for name, run in runs.items() if run["peak_gib"] and not name.startswith(OTHERS)}
CHECKPOINTING = ("without checkpointing", "with checkpointing")
BUDGETS = [name.removeprefix("compiled, ") for name in points if name.startswith("compiled, budget")]
FRONTIER = (CHECKPOINTING[0], *BUDGETS, CHECKPOINTING[1])
if points:
    figure, (axes, paid) = plt.subplots(1, 2, figsize=(13, 4.2), width_ratios=(3, 2), layout="constrained")
    kept = [points[f"compiled, {name}"] for name in FRONTIER if f"compiled, {name}" in points]
    axes.plot(*zip(*((run["peak_gib"], qlora_steps.step_ms(run)[0]) for run in kept), strict=True), ":", color="0.6")
    for number, (name, run) in enumerate(points.items()):
        at = run["peak_gib"], qlora_steps.step_ms(run)[0]
        marker, size = ("o", 9) if run in kept else ("^", 8) if run["candidate"] == "eager" else ("x", 7)
        label = f"{name}: {at[0]:.1f} GiB, {at[1]:.0f} ms"
        axes.plot(*at, marker, color=f"C{number}", label=label, markersize=size, zorder=2 + (marker == "x"))
        if run["kernels"]:
            axes.plot([at[0]] * 2, [busy(run), at[1]], color=f"C{number}", linewidth=1)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    axes.set(xlabel="memory allocated in a step, peak, GiB", ylabel="a step, ms")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title("mark: step time; other end of the line: time in which the GPU is busy", fontsize=9)
    for number, case in enumerate(CHECKPOINTING):
        pair = [points.get(f"{candidate}, {case}") for candidate in ("eager", "compiled")]
        if not all(pair):
            continue
        (eager_ms, mine_ms), (warm, lost) = zip(
            *((qlora_steps.step_ms(run)[0], sum(run["step_ms"][:2])) for run in pair), strict=True
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
# ### In 16 bits, step by step
#
# Sixty steps of as many lengths. Three uncompiled runs differ only in the kernel that PyTorch's SDPA uses. The compiled
# run rounds where eager mode rounds, so its difference from them should be at most twice the largest difference among
# them. It uses the defaults timed above except `attention="flash"`, because cuDNN's attention makes a new plan for each
# length. A rehearsal of a T4 is compared in the same way: twelve steps of 2 x 1024 tokens in float16, SDPA, 15 GiB of
# memory, and two uncompiled runs. The steps that compile lie above the range of the time axis in the figure below.
#
# With `eager_rounding=False` compiled code rounds once where eager mode rounds several times. In bfloat16 the
# difference is visible. LoRA's B begins at zero, and an update moves it by the learning rate, 2e-4. What it then adds
# to a layer's output is less than half a unit in the last place of that output. Eager mode rounds the output before and
# after the addition, so many of the first updates have no effect. Code that adds before it rounds gives losses that are
# further from eager mode's, most of all in the first steps, and nearer to those of a float32 run with the same packed
# weights.


# %%
for kind, count in (("parity", 3), ("rehearsal", 2)):  # that many uncompiled runs
    of = {name.removeprefix(f"{kind}, "): run for name, run in runs.items() if name.startswith(kind)}
    eager = [run for name, run in of.items() if name.startswith("eager")]
    mine, once = of.get("compiled"), of.get("compiled, rounding once")
    if mine is None or len(eager) != count:
        print(f"SKIPPED: {kind}: the file of the script is not here, or has no such runs")
        continue
    case = f"{kind}, {mine['dtype']}"
    among = max(largest(a, b) for a in eager for b in eager)
    ours = max(largest(mine, other) for other in eager)
    print(f"{case}: largest difference among uncompiled runs {among:.1e}, of the compiled one from them {ours:.1e}")
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
    usual = [qlora_steps.step_ms(run)[0] for run in (mine, *eager)]
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
# These aims for an H200 were set before the measurement. A step takes as long as the slower of host and GPU. With a
# slow host, the host determines the times, their ratios, and the number of steps after which compiling has paid for
# itself. The table "where the time goes", of an earlier run, shows the GPU's time alone ("busy without these copies").

# %%
FULL = "4 x 2048, bfloat16"
AIMS = [  # metric, case, at most (positive) or at least (negative)
    ("step_ms", f"without checkpointing, {FULL}", 100),
    ("peak_gib", f"without checkpointing, {FULL}", 9.6),
    ("step_ms", f"with checkpointing, {FULL}", 135),
    ("peak_gib", f"with checkpointing, {FULL}", 2.4),
    ("speedup_vs_eager", f"without checkpointing, {FULL}", -1.6),
    ("speedup_vs_eager", f"with checkpointing, {FULL}", -1.6),
    ("compilations", "50 steps of a Trainer", 8),
    ("compilations", "flex", 4),
    ("loss_difference", "compiled, float32", 1e-4),
    ("loss_difference_ratio", f"without checkpointing, {FULL}", 2),
    ("loss_difference_ratio", "max-autotune", 2),
    ("graph_breaks", "all", 0),
    ("compilations", "max-autotune", 8),
]
lines = ["| metric | case | aim | measured | |", "|---|---|---|---|---|"]
for metric, case, aim in AIMS if GPU and not OLD else ():
    found = results.find(metric, case)
    good = bool(found) and (found[0]["value"] <= aim if aim >= 0 else found[0]["value"] >= -aim)
    text = f"{found[0]['value']:.4g} {found[0]['unit']}" if found else "SKIPPED: not measured here"
    goal = f"at most {aim:g}" if aim >= 0 else f"at least {-aim:g}"
    lines.append(f"| {metric} | {case} | {goal} | {text} | {'reached' if good else 'missed' if found else ''} |")
if GPU and not OLD:
    display(Markdown("\n".join(lines)))
    print(f"{sum('reached' in line for line in lines)} of {len(AIMS)} reached on {HARDWARE}")
else:
    print("SKIPPED: the aims are for an H200")

# %% [markdown]
# ### What this does not do
#
# - Each new kind of mask (a flag for SDPA, blocks for flex attention, documents for flash attention) is compiled once,
#   and once more for the first layer if the embeddings need no gradient. A run that packs some of its batches compiles
#   two functions more, and with flex attention four.
# - On a GPU below sm_80 Triton has no tensor cores for flex attention. There flex is used on request only, or if no
#   other backend supports the pattern (a soft cap). Its tiles are then 32 x 32: at a head size of 128 in float16 keys,
#   values and queries of a tile, and in the backward the gradient, take 4 x 32 x 128 x 2 bytes = 32 KiB of the 64 KiB
#   that a T4's multiprocessor has. Larger heads, and float32 at a head size of 128, have tiles of 16 x 16. Inductor
#   generates flex's code for the GPU at hand. A rehearsal compiled it for a T4, which is evidence and no proof.
# - With gradient checkpointing the inputs of all layers but the last are kept in pinned memory of the host, which needs
#   room for them (the column "pinned on the host" above).
# - A loop that reads each loss waits for the GPU once a step. So does transformers' `Trainer`, unless
#   `logging_nan_inf_filter=False`. The GPU is idle at the start of such a step.
# - cuDNN's attention, which PyTorch selects on an H200, makes a plan for every new length, which takes a tenth of a
#   second or more. For varying lengths `attention="flash"` is faster, as in the runs of 60 lengths above.
# - A mask with padding between real tokens is refused, and so is packing by `cu_seq_lens_q` without position ids.
# - Dropout in the adapters sets `activation_memory_budget` to 1.0, with a warning: below 1.0 the compiler may recompute
#   a dropout in the backward, with other random numbers.
# - A copy of a compiled model (`copy.deepcopy`) cannot be undone: undo first, then copy. With labels and
#   `return_dict=False` a call returns the loss only, because the logits are never made.
# - None of this was run on a T4.

# %% [markdown]
# ### Score of this section

# %%
from unsloth_puzzles.bench import scorecard

results.save()
rows = [row for row in scorecard.score("resources/measurements") if row.challenge == "C"]
display(Markdown(scorecard.table(rows)))
_ = section.finish()

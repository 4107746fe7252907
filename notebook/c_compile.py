# %% [markdown]
# ## C. torch.compile without graph breaks
#
# **Task.** Compile as much as possible of the QLoRA training of Llama 3.2 1B: no graph breaks, at most 30 compilations,
# the loss of the uncompiled model. Log memory and speed.
#
# **Solution.** `compile_qlora(model)` compiles the decoder layers, the final norm and the loss of a 4-bit model with
# adapters, and can be undone.
#
# | criterion | points (9) | shown by |
# |---|---|---|
# | flex attention with dynamic lengths | 3 (1 for static lengths) | checks 1 and 3 |
# | bitsandbytes compiled, or the kernel of section A used | 1 | checks 2 and 3 |
# | attention compiled | 2 | checks 2 and 3 |
# | MLP compiled | 1 | checks 2 and 3 |
# | loss and layer norms compiled | 0 (else -1 and -3) | checks 2 and 3 |
# | max-autotune matrix products in Triton | 2 | max-autotune |
#
# ### The idea
#
# `torch.compile` has two main parts. *Dynamo* captures Python code as a graph, and *Inductor* compiles the graph.
# *Eager mode* is PyTorch without compilation. Code that Dynamo cannot capture splits the graph (a *graph break*). Each
# graph has *guards*, conditions under which it is valid. If a guard fails, the code is compiled again. A size marked
# dynamic is *symbolic*: it is a variable of the graph. The *partitioner* decides which activations the forward saves
# and which the backward recomputes.
#
# A graph of the whole training step would depend on everything that varies between batches. This solution compiles
# three regions without a graph break. Whatever varies between batches enters them as a tensor or as a symbolic size.
# The *compile key* is everything else that selects a compiled function.
#
# ```
#  once a batch, not compiled     embeddings, cos and sin, the attention mask (block indices, documents, window)
#  16 x one compiled function     decoder layer: norms, LoRA, NF4 linears, rotary embedding, attention, MLP
#  one compiled function          final norm
#  one compiled function          the loss and its gradient on a chunk of logits: the operator of E
# ```
#
# - **One function serves all layers.** Weights, adapters and quantisation states are inputs of the graph. Another
#   compile key (gradients or not, the kind of mask) selects another function.
# - **Lengths are symbolic.** Batch and length are marked dynamic. `use_duck_shape=False` prevents a guard that ties a
#   length to another size of the same value.
# - **Masks are tensors.** Flex attention receives block indices, window and documents as tensors. Another
#   window, or another packing of the same kind of mask, compiles nothing.
# - **NF4 weights come from the operator of A.** Each linear layer de-quantises in the forward and again in the
#   backward. The second call takes the gradient as an input, so the compiler cannot merge the two calls and keep the
#   weight in between.
# - **The partitioner selects the saved activations.** `activation_memory_budget=0.9` recomputes values that need no
#   matrix product.
# - **Adapters are fused.** An adapter (*LoRA*) adds s B A x to the output of a linear layer, with small matrices A and
#   B and a number s. Adapters with the same input share one product. The MLP's adapters run inside the kernel of the
#   activation, a Triton kernel of this package with a hand-written backward. The graph calls it as an operator, and
#   Inductor compiles the layer around it.
# - **Fused kernels round where eager mode rounds** (`emulate_precision_casts`), so the 16-bit losses agree, too.
#
# **The bound.** The weights are frozen. A linear layer costs one product in the forward and one in the backward (dX).
# The cell after the imports computes the FLOPs of a step and the least time on this GPU.

# %% cellView="form" jupyter={"source_hidden": true} tags=["hide-input"]
# @title The section's imports and settings
import json
import math
from collections import Counter

import matplotlib.pyplot as plt

from benchmarks.compiled import figures as qlora_figures
from benchmarks.compiled import steps as qlora_steps
from benchmarks.models import llama_1b_config
from benchmarks.named_checks import judge
from unsloth_puzzles.bench import section
from unsloth_puzzles.bench.experiments import free_memory
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.device import capability

section.start("C. torch.compile without graph breaks")
DEVICE, GPU = hardware.device, hardware.device == "cuda"
HARDWARE = hardware.name + (" held to a T4's limits" if hardware.rehearsal else "")
SIXTEEN = torch.bfloat16 if hardware.bf16 or not GPU else torch.float16
OLD = 0 < capability() < 80  # a T4: no bfloat16, no tensor cores for Triton, no flash attention
results = Measurements("resources/measurements/c_compile.json", hardware)
free_memory()

# %%
config = llama_1b_config()
hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
size, length = (2, 1024) if OLD else (4, 2048)
tokens, kv = size * length, config.num_key_value_heads * config.head_dim
linear = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
flops = 2 * 2 * tokens * (linear + hidden * config.vocab_size)
flops += layers * size * hidden * length**2 * (2 + 5)  # causal attention: half of 4 and of 10
# saved: the inputs of both norms; query; key and value; attention's output; gate and up
kept = 2 * tokens * layers * (2 * hidden + hidden + 2 * kv + hidden + 2 * inner)
print(f"a step of {size} x {length} tokens: {flops / 1e12:.1f} TFLOP of matrix products and attention;", end=" ")
print(f"{kept / 2**30:.2f} GiB saved for the backward in 16 bits, if no product is recomputed")
rate = hardware.matmul_flops.get("bfloat16" if hardware.bf16 else "float16")
if rate:
    print(f"at least {1e3 * flops / rate:.1f} ms on {HARDWARE} ({rate / 1e12:.0f} TFLOP/s)")
else:
    print("SKIPPED: the least time of a step follows from the matmul rate of a GPU")

# %% [markdown]
# ### Flex attention
#
# *Flex attention* is PyTorch's attention for masks that are Python functions. It compiles the function into the kernel
# and skips blocks of scores that are masked entirely. The mask here is causal. A *window* limits how many tokens back a
# query sees. A *packed* row holds several documents, and a query sees only its own.
#
# `Flex.prepare` builds the block indices once a batch. `Flex.run` has one compiled `_flex` per configuration of dtype,
# heads and gradients. The length is not part of the configuration. `blocks.py` (in the set-up) divides queries and keys
# into blocks of 128. It compares the first and last positions and documents of a query block and a key block to decide
# whether a query may see a key there.

# %%
# show: unsloth_puzzles/attention/flex.py

# %% [markdown]
# **Check 1.** Flex attention runs over many lengths, with different windows and without a window, packed and not,
# forward and (on a GPU) backward. The first three calls are also judged alone, as the checks of static lengths.
#
# Each result is compared with float64. The error may be at most the error of the plain formula plus two roundings of
# the dtype. A rounding is at most half of the dtype's epsilon, so two roundings are one epsilon of the norm. The
# gradients of query and key have a wider limit. They come from the gradient of the scores, dS = P * (dP - D) with the
# probabilities P and D = rowsum(P * dP). If a query sees few keys, dP and D nearly cancel, and their rounding errors
# remain. The limit for these gradients therefore includes four roundings of D.
#
# `plain_attention` is the formula in ten lines. Flex attention may differ from it by two roundings.
#
# A GPU needs two graphs: one for queries shorter than 128, one for all others. Inductor tests whether its decoding
# kernel applies and guards on the result. Three additional lengths with another window then run under
# `fail_on_recompile`, which turns any compilation into an error.

# %%
from benchmarks.attention.checks import Inputs, check_flex
from unsloth_puzzles.attention import attention


def plain_attention(query, key, value, window, documents):
    """softmax(Q K^T / sqrt(d) + mask) V with all scores in memory."""
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1).float() for t in (key, value))
    scores = query.float() @ key.mT / query.shape[-1] ** 0.5  # [batch, heads, length, length]
    position = torch.arange(query.shape[2], device=query.device)
    distance = position[:, None] - position
    visible = (distance >= 0) & (distance < window)
    visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    return scores.masked_fill(~visible, -math.inf).softmax(-1) @ value


FLEX_DTYPE = SIXTEEN if GPU else torch.float32
flex = check_flex(DEVICE, FLEX_DTYPE)
print(f"{len(flex.lengths)} lengths from {min(flex.lengths)} to {max(flex.lengths)}; {HARDWARE}")
print(f"graphs: {flex.counts.graphs}; compilations, forward and backward: {flex.counts.compilations}")
judge(results, "flex, dynamic lengths", flex.checks["dynamic"])
judge(results, "flex, static lengths", flex.checks["static"])
if flex.counts.graphs:
    results.add("compilations", "flex", flex.counts.compilations, "compilations")

data, documents = Inputs(DEVICE, FLEX_DTYPE).draw(300)
data = [tensor.requires_grad_(GPU) for tensor in data]  # as above, so that nothing is compiled again
exact = plain_attention(*data, window=50, documents=documents)
gap = (attention(*data, backend="flex", window=50, documents=documents).float() - exact).norm() / exact.norm()
print(f"300 tokens, packed, window 50: flex is {gap.item():.1e} from the plain lines (relative norm)", end="")
print("" if GPU else "; on a CPU PyTorch evaluates the same formula")
near = gap.item() <= torch.finfo(FLEX_DTYPE).eps + 1e-6
judge(results, "flex, the plain lines", {"300 tokens, packed, window 50": near})
free_memory()

# %% [markdown]
# ### The compiled regions
#
# `compile_qlora` is a list of named steps. Each step has its undo. `layers.py` compiles a layer by exchanging its
# class. The new class calls `Variants`, which holds one compiled function for each compile key. Its central lines are:
#
# ```python
# torch._dynamo.maybe_mark_dynamic(hidden_states, (0, 1))  # batch and length
# key = CompileKey(grad_enabled=..., training=..., mask=..., adapters=...)
# if key not in self._compiled:
#     own = with_own_code(self._forward, name)  # Dynamo keeps compiled code by its code object
#     self._compiled[key] = torch.compile(own, fullgraph=True, options=self._options)
# return self._compiled[key](module, hidden_states, *args, **kwargs)
# ```

# %%
# show: unsloth_puzzles/compiled/qlora.py

# %%
# show: unsloth_puzzles/compiled/layers.py

# %% [markdown]
# **Check 2.** `transformers.Trainer` trains the 4-bit model with adapters twice for 50 steps (T4: 24; CPU: 4), each
# step with another length, in float32 (without TF32, which shortens the inputs of products). The first run is
# uncompiled: transformers' attention and loss over bitsandbytes' layers. The second run is under `compile_qlora` with
# flex attention. The lengths lie between 128 and 320 (T4: 192), and packed rows and an evaluation follow, which need
# further graphs (not on a T4). Flex attention needs further graphs for lengths below 128, too (check 1). A CPU cannot
# compile flex attention into a layer. There the second run uses SDPA (PyTorch's `scaled_dot_product_attention`).
#
# Dynamo reports graphs, graph breaks and the reasons of recompilations. The regions are compiled with `fullgraph=True`,
# which turns a break into an error, so a run that ends has none in them. Embeddings, masks and the optimizer are not
# compiled. Compilations are Inductor's, and forward and backward count separately. The table shows where each part of
# the model was compiled, by the operators of the graphs that Inductor received. A graph can hold several parts, so the
# column does not add up to the number of compilations.
#
# Outputs and gradients of the activation with its adapters are compared with float64. The error of each may be at most
# 1.05 times the error of the plain formula in the same dtype, because sums in another order round differently. The
# checks of the MLP include the result. With the outputs `gate` and `up` of the two frozen layers, the low-rank inputs
# `s A x` of their adapters, and the adapter of the next layer, the plain formula is:
#
# ```python
# act = silu(gate + low_gate @ B_gate.T) * (up + low_up @ B_up.T)           # [tokens, inner]
# low_down = act @ A_down.T                                                 # [tokens, rank]
# ```

# %%
from benchmarks.compiled import trainer as qlora_trainer
from benchmarks.compiled.model import qlora_model
from benchmarks.compiled.parts import find_parts, limits_in_words, parts_table
from benchmarks.compiled.swiglu import check_activation
from unsloth_puzzles.bench.compilations import Capture

STEPS, LENGTHS = (24 if OLD else 50, {"longest": 192 if OLD else 320, "shortest": 128}) if GPU else (4, {"longest": 48})
trainings, model = {}, None
held_bytes = torch.cuda.memory_allocated() if GPU else 0  # what other sections still hold
try:
    model = qlora_model(DEVICE, torch.float32, not GPU, SIXTEEN if GPU else torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} tensor elements", end=" ")
    print(f"(an element of a packed tensor holds two 4-bit weights), random weights, seed {SEED}")
except Exception as error:
    experiments.failed("the QLoRA model", error)
activation = {"activation against float64": False}
try:
    activation = check_activation(DEVICE, dict.fromkeys((torch.float16, SIXTEEN)))
except Exception as error:
    experiments.failed("the activation with its adapters", error)
for candidate in qlora_steps.CANDIDATES if model is not None else ():
    try:
        trainings[candidate] = run = qlora_trainer.measure(
            candidate, steps=STEPS, **LENGTHS, attention="flex" if GPU else "auto", tiny=not GPU, model=model,
            afterwards=not OLD,
        )  # fmt: skip
    except Exception as error:
        experiments.failed(f"Trainer, {candidate}", error)
    else:
        print(f"{candidate}: the losses go from {run['losses'][0]:.4f} to {run['losses'][STEPS - 1]:.4f}")

# What was compiled, by part of the model
judge(results, "MLP's activation", activation)
if "compiled" in trainings:
    run = trainings["compiled"]
    captures = [Capture(**one) for one in (*run["captures"], *run["later_captures"])]
    breaks = Counter(run["graph_breaks"]) + Counter(run["later_graph_breaks"])
    print(f"{run['steps']} steps, lengths {min(run['lengths'])} to {max(run['lengths'])}:", end=" ")
    print(f"{run['compilations']} compilations", end=" ")
    print(f"in {run['compile_seconds']:.0f} s; graph breaks: {dict(breaks) or 'none'}; {HARDWARE}")
    print(limits_in_words(run["limits"]))
    print("reasons of recompilations:", *[one.reason for one in captures if one.reason] or ["none"], sep="\n  ")
    parts = find_parts(captures, on_gpu=GPU)
    display(Markdown(parts_table(parts)))
    for name, part in parts.items():
        judge(results, f"operators, {name}", part.checks | (activation if name == "MLP" else {}))
        results.add("compilations", name, part.compilations, "compilations")
    results.add("compilations", f"{run['steps']} steps of a Trainer", run["compilations"], "compilations")
    results.add("graph_breaks", "all", breaks.total(), "graph breaks")
    if OLD:
        print("SKIPPED: packed batches and an evaluation: left to larger GPUs; the package's tests run them")
    else:
        print(f"packed batches and an evaluation: {run['later_compilations']} more compilations")
        results.add("compilations", "packed, evaluated afterwards", run["later_compilations"], "compilations")

# %% [markdown]
# **Check 3.** The losses of the compiled run are compared with those of the uncompiled run. The text is Python's
# language reference. Both runs begin with the same random weights.
#
# Both runs use AdamW with a learning rate of 2e-5. AdamW amplifies rounding, so a higher rate would compare rounding
# instead of the two implementations. The 16-bit runs below use 2e-4 and measure the rounding difference. AdamW also
# hides a wrong gradient scale from the losses. The cell therefore compares the gradient norms, too, which are not
# clipped. The limits are 1e-4 nats for a loss and 1e-3, relative, for a norm. They are chosen and not derived.
# Gradients that are 1 % too large would exceed the second limit ten times. A *nat* is the unit of a loss by natural
# logarithms.

# %%
if len(trainings) == 2:
    mine, plain = trainings["compiled"], trainings["eager"]
    apart = [abs(a - b) for a, b in zip(mine["losses"], plain["losses"], strict=True)]
    qlora_steps.largest_difference(mine, plain)  # refuses losses that are not finite
    print(f"float32: {len(apart)} losses differ by at most {max(apart):.1e} (limit 1e-4); {HARDWARE}")
    results.add("loss_difference", "compiled, float32", max(apart), "loss")
    same = {f"loss, step {n}": gap <= 1e-4 for n, gap in enumerate(apart, 1)}
    judge(results, "the uncompiled model's loss, float32", same)
    norms = list(zip(mine["gradient_norms"], plain["gradient_norms"], strict=True))
    off = [abs(a - b) / b if b > 0 else math.inf for a, b in norms]
    print(f"float32: {len(off)} gradient norms differ by at most {max(off):.1e} of them (limit 1e-3)")
    scale = {f"gradient norm, step {n}": gap <= 1e-3 for n, gap in enumerate(off, 1)}
    judge(results, "the uncompiled model's gradient norms, float32", scale)
    if GPU:
        lengths = {f"{STEPS} lengths": len(set(mine["lengths"])) == STEPS}
        whole = {"losses within 1e-4": max(apart) <= 1e-4, **lengths, "no graph break": not mine["graph_breaks"]}
        judge(results, "flex, a Trainer run", whole)
    else:
        print("SKIPPED: flex attention is compiled into layers on a GPU only")
else:
    print("FAILED: one of the two trainings did not finish, so there is nothing to compare")

# %% [markdown]
# ### Time and memory of a step
#
# The baseline is unmodified transformers, PEFT and bitsandbytes. Both have adapters of rank 16 under all linear layers
# and fused AdamW. A timed step has 4 x 2048 tokens in bfloat16, on a T4 2 x 1024 in float16. The first four steps of
# every run have four different lengths, so every count of compilations covers dynamic lengths. All later steps have
# one length, and the second half of the steps is timed. A run has 20 steps, and 12 if only its losses or max-autotune
# are of interest (T4: 8). A CPU makes the first four steps only. The table has two times:
#
# - **step**: from the beginning to the end of a step on the GPU's clock, while the host continues with the next step. A
#   slow host increases this time.
# - **GPU busy**: the time of all kernels of one step, from PyTorch's profiler, without copies to and from the host. It
#   comes from a single further step, so it has no range. It can lie a few per cent above the median step.
#
# The busy times compare the implementations. The collapsed cell prints them over the bound. The cost of compiling is
# printed for the first compiled run only, because later runs find parts of their code in Inductor's cache. This cost is
# the time of the first two steps. The table counts Inductor's own time.
#
# *Gradient checkpointing* keeps only the inputs of the layers and computes the forward again in the backward. The bound
# does not include these products. The compiled layer leaves out the product of `down_proj` there, because only the
# output depends on it and nothing reads the output (`unread.py`). The compiled run also moves the inputs to host
# memory, which eager mode does not. "GPU busy" leaves out these copies. On a T4 a run is predicted to compile for about
# a minute, so one compiled run covers both max-autotune and checkpointing.
#
# The timed runs use `attention="auto"`. For a causal mask without window or documents it selects SDPA, which has a flag
# for this mask. Checks 1 and 2 cover flex attention, and one more run is timed with it (not on a T4).
#
# The memory is the peak that PyTorch allocates in a step. Much of the difference comes from the loss. Eager mode holds
# all logits. By the count of section E these take 12 bytes per logit, or 11.7 GiB at 4 x 2048 tokens. The compiled run
# has the loss of section E, which holds one chunk of logits, and the kernel of section A. A run of eager mode with
# these two parts alone shows what the compiled layers add (not on a T4).
#
# **The loss in 16 bits.** Two uncompiled runs differ as well if only the attention kernel differs. Three such runs show
# how much. The limit for a compiled run is twice the largest difference among them, because three runs underestimate
# the spread of all orders of rounding.

# %%
rows, longest, steps = (size, length, 8 if OLD else 20) if GPU else (2, 24, 4)
varied = (longest, 3 * longest // 4, 5 * longest // 8 + 1, 7 * longest // 8)  # the longest first, one of them odd
shape = {"batch": rows, "lengths": varied + (longest,) * (steps - len(varied))}
NAME = str(SIXTEEN).removeprefix("torch.") if GPU else "float32"
SIZE = f"{shape['batch']} x {shape['lengths'][0]}, {NAME}"
short, full = {**shape, "lengths": shape["lengths"][:12]}, {**shape, "profile": True}
CHECKPOINTING = ("without checkpointing", "with checkpointing")
UNCOMPILED = {  # one model, other kernels for its attention
    "eager, without checkpointing": {**full, "candidate": "eager"},
    "eager, SDPA by its formula": {**short, "candidate": "eager", "sdpa": "math"},
    "eager, transformers' attention": {**short, "candidate": "eager", "attention": "eager"},
}
SIXTEEN_BIT = UNCOMPILED | {
    "eager, with checkpointing": {**full, "candidate": "eager", "checkpointing": True},
    "compiled, without checkpointing": {**full, "candidate": "compiled"},
    "compiled, with checkpointing": {**full, "candidate": "compiled", "checkpointing": True},
    "compiled, max-autotune": {**short, "candidate": "compiled", "max_autotune": True, "profile": True},
}
if GPU and not OLD:  # what two parts of the compiled run are worth alone, and the attention of check 1
    SIXTEEN_BIT |= {
        qlora_steps.PARTS: {**full, "candidate": qlora_steps.PARTS},
        "compiled, flex attention": {**full, "candidate": "compiled", "attention": "flex"},
    }
if OLD:
    SIXTEEN_BIT["compiled, max-autotune"]["checkpointing"] = True
    for case in CHECKPOINTING:
        del SIXTEEN_BIT[f"compiled, {case}"]
if not GPU:
    SIXTEEN_BIT = {name: asked for name, asked in SIXTEEN_BIT.items() if "without checkpointing" in name}
runs, failed = {}, {}
for name, asked in SIXTEEN_BIT.items() if model is not None else ():
    try:
        runs[name] = qlora_steps.measure(**asked, dtype=NAME, tiny=not GPU, model=model, held_bytes=held_bytes)
    except Exception as error:
        experiments.failed(name, error)
        failed[name] = experiments.failures[-1][1]
    else:
        print(f"{name}: {qlora_steps.step_ms(runs[name])[0]:.1f} ms a step", flush=True)
    free_memory()
model = None
free_memory()

# %% cellView="form" jupyter={"source_hidden": true} tags=["hide-input"]
# @title The table, the losses in 16 bits, and what is recorded
PAIRS = {case: (f"compiled, {case}", f"eager, {case}") for case in CHECKPOINTING}
if OLD:
    PAIRS = {"max-autotune with checkpointing": ("compiled, max-autotune", "eager, with checkpointing")}
compared = {name: runs[name] for pair in PAIRS.values() for name in reversed(pair) if name in runs}
FLEX = "compiled, flex attention"
compared |= {name: runs[name] for name in (qlora_steps.PARTS, FLEX) if name in runs}
display(Markdown(qlora_figures.steps_table(compared, failed)))
print(f"{SIZE}, {HARDWARE}, random weights; the second half of the steps")
for case, pair in PAIRS.items() if GPU else ():
    mine, other = map(runs.get, pair)
    if mine and other:
        ours, theirs = qlora_steps.step_ms(mine), qlora_steps.step_ms(other)
        at, busy = f"{case}, {SIZE}", [qlora_figures.busy_ms(run) for run in (mine, other)]
        results.add("step_ms", at, *ours[:1], "ms", *ours[1:], {"eager": theirs[0]})
        results.add("peak_gib", at, mine["peak_gib"], "GiB", baselines={"eager": other["peak_gib"]})
        results.add("speedup_vs_eager", at, theirs[0] / ours[0], "x", theirs[1] / ours[2], theirs[2] / ours[1])
        if all(busy):
            results.add("gpu_busy_ms", at, busy[0], "ms", baselines={"eager": busy[1]})
            if rate:
                over = [ms * rate / (1e3 * flops) for ms in busy]
                print(f"{case}: GPU busy over the bound: {over[0]:.2f} compiled, {over[1]:.2f} eager")
            if mine is next(run for run in runs.values() if run["candidate"] == "compiled"):
                print(f"{case}: {qlora_figures.recovery(mine, other)}")
for name in (qlora_steps.PARTS, FLEX):
    if name in runs:
        middle, low, high = qlora_steps.step_ms(runs[name])
        results.add("step_ms", f"{name}, {SIZE}", middle, "ms", low, high)
        results.add("peak_gib", f"{name}, {SIZE}", runs[name]["peak_gib"], "GiB")
        if busy := qlora_figures.busy_ms(runs[name]):
            results.add("gpu_busy_ms", f"{name}, {SIZE}", busy, "ms")
if GPU and compared:
    drawn = {name: run for name, run in compared.items() if name != FLEX}
    qlora_figures.memory_figure(drawn, f"{HARDWARE}, {results.date}").savefig(
        "resources/c_compile_frontier.png", dpi=110
    )
    plt.show()
else:
    print("SKIPPED: the figure shows memory of a GPU")

# The losses in 16 bits
largest = qlora_steps.largest_difference
uncompiled = [runs[name] for name in UNCOMPILED if name in runs]
if len(uncompiled) > 1:
    among = max(largest(a, b) for a in uncompiled for b in uncompiled)
    print(f"{len(uncompiled)} uncompiled runs differ by at most {among:.1e} among themselves")
    for name in (f"compiled, {what}" for what in (*CHECKPOINTING, "max-autotune")):
        if name in runs:
            ours = max(largest(runs[name], other) for other in uncompiled)
            case = name.removeprefix("compiled, ")
            print(f"{name}: {ours:.1e} from them, {ours / among:.2f} times as much (limit 2)")
            results.add("loss_difference", f"{case}, {SIZE}", ours, "loss", baselines={"uncompiled runs": among})
            results.add("loss_difference_ratio", case if "autotune" in case else f"{case}, {SIZE}", ours / among, "x")
            judge(results, f"the uncompiled model's loss, {case}, {NAME}", {"at most twice theirs": ours <= 2 * among})
elif not GPU and len(runs) == 2:
    mine, other = runs["compiled, without checkpointing"], runs["eager, without checkpointing"]
    print(f"float32: {len(mine['losses'])} losses differ by at most {largest(mine, other):.1e}")

# %% [markdown]
# ### Max-autotune
#
# `max_autotune=True` benchmarks every product in the layers at the lengths of the first batch. Triton kernels with
# several tile sizes compete with NVIDIA's library cuBLAS. cuBLAS keeps each product on which Triton is not faster. By
# default Inductor excludes Triton on GPUs with few multiprocessors. Here it competes there, too. Below sm_80 Triton has
# no tensor cores, so it competes for LoRA's narrow products only. The profiler counts Triton's products in a step. The
# table shows the four largest gains of Triton. The step can still gain nothing: the profiler's busy times below show
# what the kernels took together.
#
# The last lines compare this run with the default compilation (not on a T4). A product that is faster alone need not
# make the step faster. The last line is the ratio of the step times: below 1 max-autotune is slower. Where the GPU busy
# times agree, the difference is GPU idle time. The criterion asks for Triton's products without
# excessive recompilation, and not for a faster step.

# %%
tuned = runs.get("compiled, max-autotune")
if tuned:
    won = sum(bool(product["tile"]) for product in tuned["products"])
    launches = tuned["kernels"]["Triton's products"]["launches"] if tuned["kernels"] else 0
    print(f"{SIZE}, {HARDWARE}: Triton wins {won} of {len(tuned['products'])} benchmarked products;", end=" ")
    print(f"a step launches {launches} Triton products; {len(set(tuned['lengths']))} lengths:", end=" ")
    print(f"{tuned['compilations']} compilations, {sum(tuned['graph_breaks'].values())} graph breaks")
    display(Markdown(qlora_figures.products_table(tuned["products"])))
    results.add("triton_matmuls", "max-autotune", launches, "launches a step")
    results.add("compilations", "max-autotune", tuned["compilations"], "compilations")
    results.add("graph_breaks", "max-autotune", sum(tuned["graph_breaks"].values()), "graph breaks")
    middle, low, high = qlora_steps.step_ms(tuned)
    results.add("step_ms", f"max-autotune, {SIZE}", middle, "ms", low, high)
    results.add("peak_gib", f"max-autotune, {SIZE}", tuned["peak_gib"], "GiB")
    print(f"a step takes {middle:.1f} ms ({low:.1f} to {high:.1f})")
    if default := runs.get("compiled, without checkpointing"):
        for what, run in (("default compilation", default), ("max-autotune", tuned)):
            busy = qlora_figures.busy_ms(run) or math.nan
            print(f"{what}: {busy:.1f} ms of GPU busy time, {qlora_steps.step_ms(run)[0]:.1f} ms a step")
        gain = qlora_steps.step_ms(default)[0] / middle
        print(f"default compilation's step time over max-autotune's: {gain:.2f}")
    elif OLD:
        print("SKIPPED: comparison with default compilation: left to larger GPUs")
    else:
        print("FAILED: comparison with default compilation: that run did not finish")
else:
    print("SKIPPED: max-autotune benchmarks products on a GPU" if not GPU else "FAILED: there is no max-autotune run")

# %% [markdown]
# ### Sixty steps in 16 bits
#
# A script (`make sweeps`) trains for 60 steps of 60 lengths and saves the results. If its file is present, the figure
# below is drawn from it, with the hardware and the date of the file. The file may be older than the code of this
# notebook. It is not part of the score.
#
# The three uncompiled runs differ in SDPA's kernel only. The compiled run uses `attention="flash"`, because cuDNN's
# attention makes a plan for each new length. A second compiled run has `eager_rounding=False` and rounds once where
# eager mode rounds several times. LoRA's B begins at zero, so its first updates are smaller than half a unit in the
# last place of the layer's output. Eager mode rounds them away. Code that rounds once keeps them, so its losses are
# nearer to float32's and further from eager mode's.

# %%
SWEEPS = Path("resources/measurements/c_compile_sweeps.json")
swept = json.loads(SWEEPS.read_text()) if SWEEPS.exists() else {"runs": {}}
sixty = {name: run for name, run in swept["runs"].items() if name.startswith("parity") and "losses" in run}
sixty = {name.removeprefix("parity, "): run for name, run in sixty.items()}
eager = [run for name, run in sixty.items() if name.startswith("eager")]
once = sixty.get("compiled, rounding once")
if once and "float32" in sixty and eager:
    print(f"largest difference of a loss on {swept['hardware']['name']}, {swept['date']}, random weights:")
    for what, of in (("uncompiled", eager), ("compiled", [sixty.get("compiled")]), ("compiled, rounding once", [once])):
        if all(of):
            of_eager, of_float32 = (max(largest(a, b) for a in of for b in to) for to in (eager, [sixty["float32"]]))
            print(f"  {what}: {of_eager:.1e} from uncompiled runs in 16 bits, {of_float32:.1e} from float32")
if "compiled" in sixty and len(eager) > 1:
    figure = qlora_figures.parity_figure(sixty, f"{swept['hardware']['name']}, {swept['date']}")
    figure.savefig("resources/c_compile_parity.png", dpi=110)
    plt.show()
else:
    print(f"SKIPPED: {SWEEPS.name}, which a script writes on a GPU, is not here")

# %% [markdown]
# ### What this does not do
#
# - **On a T4 flex attention is predicted to work.** A rehearsal compiled its code for sm_75, which is evidence and not
#   proof. Below sm_80 flex attention is used on request only, or if no other backend supports the pattern. Its tiles
#   are then 32 x 32 or 16 x 16, to fit 32 KiB of shared memory.
# - **Each new kind of mask compiles once** (a flag for SDPA, blocks for flex, documents for flash), and once more for
#   the first layer if the embeddings need no gradient. A forward of few rows without gradients recompiles once, because
#   bitsandbytes' fused kernel is faster there.
# - **Max-autotune need not pay.** A product that is faster alone need not make the step faster (see the last line of
#   its cell).
# - **Gradient checkpointing uses pinned host memory** for the inputs of all layers but the last (see the table).
# - **A loop that reads each loss waits for the GPU once a step.** `Trainer` does so unless
#   `logging_nan_inf_filter=False`.
# - **Refused**: padding between real tokens, and packing by `cu_seq_lens_q` without position ids.
# - **Dropout in the adapters** sets `activation_memory_budget` to 1.0, with a warning. Below 1.0 the backward would
#   draw other random numbers.
# - **A copy of a compiled model** (`copy.deepcopy`) cannot be undone. Undo first, then copy.
#
# The tests in `tests/compiled` cover gradient accumulation, saved and loaded adapters, undo, and TRL's SFTTrainer.
#
# ### Score of this section

# %%
from unsloth_puzzles.bench import scorecard

results.save()
rows = [row for row in scorecard.score("resources/measurements") if row.challenge == "C"]
display(Markdown(scorecard.table(rows)))
_ = section.finish()

# %% [markdown]
# ## E. Memory-efficient backprop
#
# **Task.** The last layer of a language model projects hidden states to logits, 128 K per token. A function turns the
# logits into a loss. Compute the logits in chunks, in a `torch.autograd.Function`, for any such function. Take the
# derivative from autograd and honour the upstream gradient.
#
# **Solution.** `memory_efficient_linear`, and the puzzle's `MemoryEfficientLinear`, hold one chunk of logits for any
# function, unless `keep_logits` allows more. `use_memory_efficient_loss` and `MemoryEfficientGRPOTrainer` put it into
# trainers.
#
# | criterion | points (10) | shown by |
# |---|---|---|
# | 50 % less VRAM | 2 | memory and time at the puzzle's shape |
# | float32 upcast kept, no derivative by hand | 0 (else none for E) | check 2 |
# | cross entropy | 1 | check 1 |
# | other functions | 1 | check 3 |
# | dynamic chunk sizes | 1 | check 4 |
# | the losses of a Llama 1B match | 1 (else none for E) | the curves |
# | GRPO with the memory-efficient linear | 4 | check 6, a real GRPO run, its memory and time |
#
# ### The idea
#
# A loss that is a sum over rows is a sum over chunks of rows. Each chunk's logits are computed, differentiated and
# freed before the next chunk:
#
# ```
#  for each chunk of c rows                                 memory
#    Z  = X[rows] W^T              product 1                one buffer, c x V
#    l  = f(Z, labels[rows]) / N   the user's function      float32 if the function upcasts
#    G  = dl/dZ                    autograd through f       overwrites Z
#    dX[rows] = G W                product 2                dX
#    dW += G^T X[rows]             product 3, if trained    dW
#  loss = sum of all l             N is counted before the first chunk
# ```
#
# - **The forward computes the gradients**, while the logits exist. The backward multiplies them by the upstream
#   gradient, which is a scalar. For such a loss no logit is computed twice.
# - **N is one number for all chunks**: the number of labels that are not ignored, or `num_items_in_batch`. A mean per
#   chunk would be wrong, because chunks hold different numbers of ignored labels.
# - **A function with a value per row** (log-probabilities for GRPO and DPO) has an upstream gradient per row, which the
#   forward does not know. For such a function the backward computes the logits again: four products instead of three.
#   `keep_logits` bytes of them can be kept for it instead. The GRPO trainer keeps three times the memory of the head,
#   for Llama 1B the 16-bit logits of 6144 tokens, so all logits of a small batch. `keep_logits=0` keeps none.
# - **G comes from `torch.autograd`** through the user's function, in eager mode or compiled by Inductor. The operator
#   has no code for a particular loss, and no loss has a `backward`. Three `backward` methods are written by hand: the
#   operator's two (scalar loss, values per row), and that of the product Z = X W^T in `heads.py`, because PyTorch's own
#   would allocate a new dW for every chunk.
#
# **The bound.** With R rows, hidden size H and vocabulary V each product has 2 R H V FLOPs. At the puzzle's shape (R =
# 4 x 4096, H = 4096, V = 128256, 16 bits):
#
# | | memory |
# |---|---|
# | gradients, which every method needs | dX 0.125 GiB; dW 0.98 GiB if the head is trained |
# | a chunk of c rows, here | 2 c V bytes: 0.245 GiB for 1024 rows |
# | all logits, in PyTorch | 16-bit logits, float32 copy, log-softmax, 16-bit gradient: 12 bytes per logit, 23.5 GiB |
#
# A small chunk saves memory and costs time: each chunk reads W twice, and reads and writes dW. The collapsed cell has
# the imports, and prints the least time on this GPU for the rows that fit it: the FLOPs over the measured rate of its
# matrix products.

# %% cellView="form" jupyter={"source_hidden": true} tags=["hide-input"]
# @title The section's imports and names, and the least time on this GPU
import math
import statistics
from functools import partial

import matplotlib.pyplot as plt
import torch.nn.functional as F
from torch import nn

from benchmarks.backprop import baselines, errors, linear_losses, plain_losses
from benchmarks.backprop import figures as backprop_figures
from benchmarks.backprop.errors import relative_difference
from benchmarks.backprop.workload import REFERENCE, TINY, Shape, make_case, release
from benchmarks.named_checks import judge
from unsloth_puzzles.backprop import MemoryEfficientLinear, losses, memory_efficient_linear
from unsloth_puzzles.bench import section
from unsloth_puzzles.bench.experiments import free_memory
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.device import capability

section.start("E. Memory-efficient backprop")
DEVICE, GPU = hardware.device, hardware.device == "cuda"
OLD = GPU and capability() < 80  # a T4: less is timed there, and less is compiled
HARDWARE = hardware.name + (" held to a T4's limits" if hardware.rehearsal else "")
SIXTEEN = torch.bfloat16 if hardware.bf16 or not GPU else torch.float16
SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "float32", torch.float64: "float64"}
results = Measurements("resources/measurements/e_backprop.json", hardware)
WHERE = f"{HARDWARE}, {results.date}"

ROWS_THAT_FIT = 16384 if hardware.memory_gib >= 40 else 8192 if hardware.memory_gib >= 22 else 4096
if hardware.matmul_flops:
    rate = hardware.matmul_flops["bfloat16" if hardware.bf16 else "float16"]
    for what, products in (("head trained", 3), ("head frozen", 2)):
        flops = products * 2 * ROWS_THAT_FIT * REFERENCE.hidden * REFERENCE.vocabulary
        print(f"{what}, {ROWS_THAT_FIT} rows: {flops / 1e12:.1f} TFLOP, at least {1e3 * flops / rate:.1f} ms", end=" ")
        print(f"({rate / 1e12:.0f} TFLOP/s)")
else:
    print("SKIPPED: the time of the matrix products follows from their measured rate on a GPU")

# %% [markdown]
# ### The autograd function and its loop
#
# `linear.py` has the public function and the puzzle's class. `apply` validates the inputs; the forward is one call of
# the loop in `additive.py`. The loop calls the user's function on one chunk and writes the gradient over the logits. In
# eager mode this is, simplified from `eager.py`:
#
# ```python
# leaf = logits.detach().requires_grad_()                  # [rows, vocab]
# value = forward_function(leaf, labels)
# (gradient,) = torch.autograd.grad(value * factor, leaf)  # factor is 1 / N
# logits.copy_(gradient)                                   # the gradient overwrites the logits
# ```
#
# The set-up has the other files: `heads.py` (any module as a head), `losses.py` (plain functions without a derivative),
# `rowwise.py` (the loop for values per row), `chunks.py` (the size of a chunk).

# %%
# show: unsloth_puzzles/backprop/linear.py

# %%
# show: unsloth_puzzles/backprop/additive.py

# %% [markdown]
# #### Check 1: cross entropy
#
# `chunked` is the idea in ten plain lines. The operator is compared with `F.cross_entropy` on the full logits in
# float64. The backward starts from 3.7 times the loss, so the upstream gradient is not 1. Loss and gradients must agree
# to 1e-12 of their norm. There are 111 rows in chunks of 16: the last chunk is ragged, all labels of the first chunk
# are ignored, and the other chunks ignore different numbers of labels.

# %% cellView="form" jupyter={"source_hidden": true} tags=["hide-input"]
# @title Data of checks 1 to 4: hidden states, labels, heads
EXACT = 1e-12
ROWS, HIDDEN, VOCABULARY, CHUNK = 111, 24, 101, 16
generator = torch.Generator(DEVICE).manual_seed(SEED)
drawn = partial(torch.randn, device=DEVICE, dtype=torch.float64, generator=generator)


def new_head(bias=True, dtype=torch.float64, frozen=False):
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias, device=DEVICE, dtype=dtype)
    for parameter in head.parameters():
        parameter.data = (0.5 * drawn(parameter.shape)).to(dtype)
    return head.requires_grad_(not frozen)


def differentiated(loss, *inputs):
    """The loss, and the gradients of 3.7 times it: an upstream gradient that is not 1."""
    return [loss, *torch.autograd.grad(3.7 * loss, inputs)]


x = drawn(3, ROWS // 3, HIDDEN).requires_grad_()
labels = torch.randint(VOCABULARY, (3, ROWS // 3), device=DEVICE, generator=generator)
labels[0, :18] = labels[1, 5:30:3] = -100
flat = labels.flatten()
valid = (flat != -100).sum()
head = new_head()
weights, strength = drawn(VOCABULARY).exp(), drawn(3, ROWS // 3).requires_grad_()
of_mean = {"reduction": "sum", "normalizer": "labels", "chunk_size": CHUNK}
of_sum = {"reduction": "sum", "chunk_size": CHUNK}
parameters = (x, head.weight, head.bias)


def full(head=head, x=x):
    """All logits, (rows, vocabulary)."""
    return head(x).flatten(0, 1)


def same(ours, exact, *inputs):
    """Whether the losses and their gradients agree to `EXACT`."""
    inputs = inputs or parameters
    return relative_difference(differentiated(ours, *inputs), differentiated(exact, *inputs)) <= EXACT


# %%
def chunked(x, weight, labels, function, rows):
    """Mean of `function` over the labels that count, dX and dW, without all logits."""
    count, loss, dx, dw = (labels != -100).sum(), 0, torch.empty_like(x), torch.zeros_like(weight)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        logits = (x[part] @ weight.T).requires_grad_()  # [chunk, vocab]
        value = function(logits, labels[part]) / count
        (slope,) = torch.autograd.grad(value, logits)  # [chunk, vocab], from autograd
        dx[part], loss = slope @ weight, loss + value.detach()
        dw += slope.T @ x[part]
    return loss, dx, dw


checks, bare = {}, new_head(bias=False)
plain = chunked(x.detach().flatten(0, 1), bare.weight.detach(), flat, losses.cross_entropy, CHUNK)
exact = F.cross_entropy(full(bare), flat)
exact = [exact, *(slope.view(-1, HIDDEN) for slope in torch.autograd.grad(exact, (x, bare.weight)))]
checks["the ten plain lines"] = relative_difference(plain, exact) <= EXACT
smoothed = partial(losses.cross_entropy, label_smoothing=0.1)
for name, ours, exact in (
    ("a sum over the number of labels",
     memory_efficient_linear(x, head, labels, losses.cross_entropy, **of_mean), F.cross_entropy(full(), flat)),
    ("a mean per chunk, weighted by its labels",
     memory_efficient_linear(x, head, labels, F.cross_entropy, chunk_size=CHUNK), F.cross_entropy(full(), flat)),
    ("num_items_in_batch, a tensor",
     memory_efficient_linear(x, head, labels, losses.cross_entropy, **of_sum, normalizer=torch.tensor(640)),
     F.cross_entropy(full(), flat, reduction="sum") / 640),
    ("label smoothing",
     memory_efficient_linear(x, head, labels, smoothed, **of_mean), F.cross_entropy(full(), flat, label_smoothing=0.1)),
    ("class weights",
     memory_efficient_linear(x, head, labels, losses.cross_entropy, shared_args=(weights,), **of_sum),
     F.cross_entropy(full(), flat, weights, reduction="sum")),
    ("the puzzle's skeleton and its own function",
     MemoryEfficientLinear.apply(x, head, labels, losses.transformation_function), F.cross_entropy(full(), flat)),
):  # fmt: skip
    checks[name] = same(ours, exact)
for name, other in (("no bias", bare), ("frozen head", new_head(frozen=True))):
    inputs = (x, *(p for p in other.parameters() if p.requires_grad))
    ours = memory_efficient_linear(x, other, labels, losses.cross_entropy, **of_mean)
    checks[name] = same(ours, F.cross_entropy(full(other), flat), *inputs)
tied, table = new_head(bias=False), nn.Embedding(VOCABULARY, HIDDEN, device=DEVICE, dtype=torch.float64)
tied.weight = table.weight  # the embeddings are the head, too
states = table(labels.clamp(min=0))
ours, exact = (
    [loss, *torch.autograd.grad(loss, tied.weight, retain_graph=True)]
    for loss in (
        memory_efficient_linear(states, tied, labels, losses.cross_entropy, **of_mean),
        F.cross_entropy(full(tied, states), flat),
    )
)
checks["tied embeddings"] = relative_difference(ours, exact) <= EXACT
nothing = torch.full_like(labels, -100)
ours = memory_efficient_linear(x, head, nothing, losses.cross_entropy, **of_mean)
slopes = torch.autograd.grad(ours, parameters)
checks["all labels ignored: NaN, and no gradient"] = ours.isnan() and not any(slope.any() for slope in slopes)
judge(results, "cross entropy", checks)

# %% [markdown]
# #### Check 2: the upcast and the derivative
#
# The upcast to float32 belongs to the user's function. `spying` records the 16-bit logits that it receives. The loss
# must be that of a float32 upcast of exactly these logits. A dispatch mode records the dtype of every exponential.
#
# The derivative comes from autograd. No formula could anticipate these three functions: one invented here, one that
# stops a gradient, and one with a deliberately wrong derivative. `gradcheck` compares with finite differences. The last
# check counts the `backward` methods of autograd functions in `unsloth_puzzles/backprop/`.

# %%
from torch.utils._python_dispatch import TorchDispatchMode

seen, exponentials = [], set()


class Exponentials(TorchDispatchMode):
    """Records the dtype of every tensor that is exponentiated."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.exp, torch.ops.aten.exp2):
            exponentials.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def spying(logits, labels):
    seen.append((logits.detach().clone(), labels))
    with Exponentials():
        return losses.cross_entropy(logits, labels)


head16 = new_head(bias=False, dtype=SIXTEEN)
loss = memory_efficient_linear(x.to(SIXTEEN), head16, labels, spying, **of_mean, check_additive=False)
logits, wanted = (torch.cat(parts) for parts in zip(*seen, strict=True))
upcast = F.cross_entropy(logits.float(), wanted)
rounded = F.cross_entropy(logits, wanted).float()
print(f"loss {loss.item():.7f}; upcast by hand {upcast.item():.7f}; without upcast {rounded.item():.7f}")
by_row = [F.cross_entropy(z, wanted, reduction="none") for z in (logits, logits.float())]
judge(
    results,
    "float32 upcast",
    {
        f"the function receives the projection's dtype, {SHORT[SIXTEEN]}": logits.dtype == SIXTEEN,
        "it sees every row once": len(logits) == ROWS,
        "it exponentiates float32": exponentials == {torch.float32},
        "the loss is float32": loss.dtype == torch.float32,
        "and is that of the upcast": relative_difference([loss], [upcast]) <= 1e-6,
        "without which every row would be rounded": relative_difference(by_row[:1], by_row[1:]) > 1e-5,
    },
)


# %%
class Lie(torch.autograd.Function):
    """The identity with a wrong derivative, 42."""

    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, upstream):
        return 42 * upstream


def invented(logits, labels, strength, temperature):
    """A new loss with a value per row and a value for all rows, both of which need gradients."""
    waves = torch.sin(logits / temperature).cumsum(-1).square().mean(-1)
    return (waves * strength + torch.sigmoid(logits).amax(-1) * (labels != -100)).sum()


def half_stopped(logits, labels):
    return losses.cross_entropy((logits + logits.detach() * 2) / 3, labels)


def lying(logits, labels):
    return losses.cross_entropy(Lie.apply(logits), labels)


checks = {}
temperature = torch.tensor(1.3, device=DEVICE, dtype=torch.float64, requires_grad=True)
extra = {"row_args": (strength,), "shared_args": (temperature,)}
ours = memory_efficient_linear(x, head, labels, invented, **extra, **of_sum)
exact = invented(full(), flat, strength.flatten(), temperature)
checks["a function invented here, extra arguments included"] = same(ours, exact, *parameters, strength, temperature)
for name, function in (
    ("a stopped gradient stays stopped", half_stopped),
    ("a wrong derivative is used as it is", lying),
):
    ours = memory_efficient_linear(x, head, labels, function, **of_mean)
    checks[name] = same(ours, function(full(), flat) / valid)
small = [drawn(5, 3).requires_grad_(), nn.Parameter(drawn(7, 3))]
few = torch.tensor([1, -100, 6, 0, 3], device=DEVICE)


def tiny(x, weight, function=losses.cross_entropy, **options):
    layer = nn.Linear(3, 7, bias=False, device=DEVICE, dtype=torch.float64)
    layer.weight = weight
    return memory_efficient_linear(x, layer, few, function, chunk_size=2, **options)


checks["gradcheck, additive"] = torch.autograd.gradcheck(partial(tiny, reduction="sum", normalizer="labels"), small)
per_row = partial(tiny, function=losses.token_log_probs_and_entropy, reduction="none")
checks["gradcheck, two results a row"] = torch.autograd.gradcheck(per_row, small)
sources = {path.name: path.read_text() for path in Path("unsloth_puzzles/backprop").glob("*.py")}
by_hand = {name: text.count("def backward(ctx") + text.count("register_autograd") for name, text in sources.items()}
checks["no backward but the operator's two and its matrix product's"] = {n: k for n, k in by_hand.items() if k} == {
    "linear.py": 1, "rowwise.py": 1, "heads.py": 1,
}  # fmt: skip
judge(results, "derivatives by autograd", checks)

# %% [markdown]
# #### Check 3: other functions
#
# Each function is compared with the same function of full logits in float64 (the references are in `plain_losses.py`).
# Loss and gradients must agree to 1e-12 again. DPO (direct preference optimisation) compares the log-probabilities of a
# chosen and of a rejected sequence.
#
# #### Check 4: any chunk size
#
# Rows, bytes and "auto" give the same result. With 111 rows "auto" is a single chunk. The measurement below shows it
# divide 16384 rows. A hook on the head checks that it never returns more rows of logits at once than the chunk size.
# Invalid sizes, such as 0 or fewer bytes than a row, must be refused.

# %%
teacher, states = new_head(frozen=True), drawn(3, ROWS // 3, HIDDEN)
distil = losses.kl_distillation(teacher, 2.0)
soft = losses.soft_capped(losses.cross_entropy, 3.0)
rows_of = {"reduction": "none", "chunk_size": CHUNK}
two, before, fixed = x[:2], drawn(2), strength.detach()  # DPO: one chosen and one rejected sequence
found = memory_efficient_linear(x, head, labels, losses.token_log_probs_and_entropy, **rows_of)
chosen, entropies = plain_losses.log_probs(full(), flat), plain_losses.entropies(full(), flat)
checks = {}
for name, ours, exact in (
    ("z-loss", memory_efficient_linear(x, head, labels, partial(losses.z_loss, coefficient=0.1), **of_sum),
     plain_losses.z_loss(full(), flat)),
    ("soft cap", memory_efficient_linear(x, head, labels, soft, **of_sum),
     F.cross_entropy(3 * torch.tanh(full() / 3), flat, reduction="sum")),
    ("focal", memory_efficient_linear(x, head, labels, losses.focal, **of_sum), plain_losses.focal(full(), flat)),
    ("distillation, the teacher's logits in chunks, too",
     memory_efficient_linear(x, head, labels, distil, row_args=(states,), **of_sum),
     plain_losses.distillation(full(), flat, full(teacher, states))),
    ("log-probabilities, an upstream gradient each",
     (memory_efficient_linear(x, head, labels, losses.token_log_probs, **rows_of) * fixed).sum(),
     (plain_losses.log_probs(full(), flat) * fixed.flatten()).sum()),
    ("entropy", memory_efficient_linear(x, head, labels, losses.entropy, **rows_of).square().sum(),
     plain_losses.entropies(full(), flat).square().sum()),
    ("DPO",
     losses.dpo_loss(memory_efficient_linear(two, head, labels[:2], losses.token_log_probs, **rows_of).sum(-1), before),
     losses.dpo_loss(plain_losses.log_probs(full(), flat).view(3, -1)[:2].sum(-1), before)),
    ("log-probabilities and entropies together", (found[0] * fixed).sum() + found[1].square().sum(),
     (chosen * fixed.flatten()).sum() + entropies.square().sum()),
):  # fmt: skip
    checks[name] = same(ours, exact)
if GPU and not OLD:
    checks["compiled"] = same(
        memory_efficient_linear(x, head, labels, losses.z_loss, **of_mean, compile=True),
        memory_efficient_linear(x, head, labels, losses.z_loss, **of_mean),
    )
else:
    print("SKIPPED: compiled: left to larger GPUs, since it is predicted to compile for half a minute")
judge(results, "other functions", checks)

truth = differentiated(F.cross_entropy(full(), flat), *parameters)
largest, checks = [], {}
hook = head.register_forward_hook(lambda module, given, logits: largest.append(logits.shape[0]))
for size, most in ((1, 1), (7, 7), (16, 16), (64, 64), (ROWS, ROWS), (10**6, ROWS), ("6464 B", 8), ("auto", ROWS)):
    largest.clear()
    options = {**of_mean, "chunk_size": size}
    loss = memory_efficient_linear(x, head, labels, losses.cross_entropy, **options, check_additive=False)
    agrees = relative_difference(differentiated(loss, *parameters), truth) <= EXACT
    checks[f"at most {most} rows at once with chunk_size={size!r}"] = agrees and max(largest) == most
hook.remove()
for wrong in (0, -1, 1.5, "much", "1 B"):
    try:
        memory_efficient_linear(x, head, labels, losses.cross_entropy, **{**of_mean, "chunk_size": wrong})
        checks[f"chunk_size={wrong!r} is refused"] = False
    except (TypeError, ValueError) as error:
        checks[f"chunk_size={wrong!r} is refused"] = "chunk_size" in str(error)
judge(results, "chunk sizes", checks)

# %% [markdown]
# ### Memory and time at the puzzle's shape
#
# The timing starts at the hidden states and ends with the gradients. One process measures all candidates in turn. The
# peak is the memory on top of inputs and weights, gradients included. Times are medians with the 10th and the 90th
# percentile. A GPU with less memory gets fewer rows (T4: 4096), so that eager mode fits.
#
# - **ours** is the plain `cross_entropy`, compiled on a GPU, with "auto" chunks. Inductor is given block sizes with
#   which a row of logits stays in the L2 cache while it is read three times (`tiles.py`), where the cache is large
#   enough. On a T4 it is not, and Inductor tries several sizes. It runs once more with Liger's chunk size, for a
#   comparison at equal memory (left to GPUs from sm_80 on).
# - **eager** and **torch.compile** are the plain loss on all logits.
# - **Liger FLCE** (fused linear cross entropy) also works in chunks. **Apple CCE** (cut cross entropy) never writes
#   logits to memory. It skips blocks of the gradient that vanish, so its time depends on the data: the random hidden
#   states lean towards their labels, so that the mean loss is about 2, as a trained model's.
# - **bare matrix products** are the products of the same chunks alone. Larger chunks have faster products, so the
#   compiled plain loss, whose only chunk is everything, can take less time.
# - **float32 dW** means that dW is summed in float32.
#
# Ours and Liger's use different chunks by default, so their rows differ in memory, too. The row "ours, Liger's chunk
# size" is the one to compare with Liger's.

# %%
SHAPE = Shape(ROWS_THAT_FIT, REFERENCE.hidden, REFERENCE.vocabulary, SIXTEEN) if GPU else TINY
ROUNDS = 6 if GPU and not OLD else 3
HEADS = {"head trained": True, "head frozen": False}
SHAPE_TEXT = f"{SHAPE.rows} x {SHAPE.hidden} hidden states, vocabulary {SHAPE.vocabulary}, {SHORT[SHAPE.dtype]}"
short = SHORT[SHAPE.dtype]
# On a CPU 16 bits are not worth measuring, and a T4 has no product that adds them to float32: there dW has one dtype.
# On a CPU, and on a T4's host, compiling eager mode's formula would take longer than all other candidates.
ONE_DTYPE = (linear_losses.OURS_FLOAT32, baselines.FLOOR_FLOAT32, baselines.LIGER_FLOAT32)
WITHOUT = () if GPU and not OLD else (*ONE_DTYPE, baselines.COMPILED)
MINE = {  # the floor and the Liger candidate that each is compared with
    linear_losses.OURS: (baselines.FLOOR, baselines.LIGER),
    linear_losses.OURS_FLOAT32: (baselines.FLOOR_FLOAT32, baselines.LIGER_FLOAT32),
}
measured = {}
for name in WITHOUT:
    print(f"SKIPPED: {name}: {'16 bits and compilers are left out on a CPU' if not GPU else 'left to larger GPUs'}")


def measure_head(head_case, train_head):
    """Measure all candidates on one head. Its tensors are freed when it ends, also by an error."""
    case = make_case(SHAPE, DEVICE, train_head=train_head)
    calls, left_out = linear_losses.candidates(case, compile=GPU, without=WITHOUT)
    if baselines.LIGER in calls and not OLD:
        calls[linear_losses.OURS_AS_LIGER] = linear_losses.at_liger_memory(case)
    found = linear_losses.measure(calls, rounds=ROUNDS, may_fail=[name for name in calls if name not in MINE])
    for name, reason in left_out.items():
        print(f"SKIPPED: {name}, {head_case}: {reason}")
    for name, reason in found.failed.items():
        experiments.failed(f"{name}, {head_case}", reason)
    auto = linear_losses.auto_rows(case)
    least = SHAPE.least_gib(auto, train_head)
    print(f"{head_case}: chunks of {auto} rows, which need {least:.3g} GiB with the gradients")
    return found


print(f"{SHAPE_TEXT}, random weights, {HARDWARE}")
for head_case, train_head in HEADS.items():
    try:
        measured[head_case] = measure_head(head_case, train_head)
    except torch.OutOfMemoryError as error:
        experiments.failed(head_case, f"out of memory: {str(error).partition('.')[0]}")
    except Exception as error:
        experiments.failed(head_case, error)
    free_memory()

# %% cellView="form" jupyter={"source_hidden": true} tags=["hide-input"]
# @title The table, and what is recorded
display(Markdown(backprop_figures.head_table({head: found.measured for head, found in measured.items()})))


def compare(metric, case, ours, found, other):
    """Record a ratio of ours over a baseline that was there."""
    one = found.measured
    if other in one and ours in one:
        mine, theirs = one[ours].time, one[other].time
        results.add(metric, case, mine.median / theirs.median, "x", mine.low / theirs.high, mine.high / theirs.low)


AS_LIGER = linear_losses.OURS_AS_LIGER
for head_case, found in measured.items():
    others = {name: one for name, one in found.measured.items() if name not in (*MINE, AS_LIGER)}
    for name, (floor, liger) in MINE.items():
        if name not in found.measured:
            continue
        summed = "float32" if name == linear_losses.OURS_FLOAT32 else short
        detail = "" if head_case == "head frozen" else f", {summed} dW"
        one = found.measured[name]
        beside = {other: value.extra_peak_gib for other, value in others.items()}
        results.add("extra_peak_gib", head_case + detail, one.extra_peak_gib, "GiB", baselines=beside)
        beside = {other: value.time.median / 1e3 for other, value in others.items()}
        milliseconds = (one.time.median / 1e3, "ms", one.time.low / 1e3, one.time.high / 1e3)
        results.add("forward_backward_ms", head_case + detail, *milliseconds, beside)
        compare("time_over_gemm_floor", head_case + detail, name, found, floor)
        compare("time_over_liger", head_case + detail, name, found, liger)
    compare("time_over_liger_at_its_chunk_size", head_case, AS_LIGER, found, baselines.LIGER)
    if baselines.LIGER in others and AS_LIGER in found.measured:
        mine, theirs = found.measured[AS_LIGER], others[baselines.LIGER]
        ratio = mine.time.median / theirs.time.median
        print(f"{head_case}, at Liger's chunk size: ours {mine.extra_peak_gib:.3g} GiB, Liger", end=" ")
        low, high = mine.time.low / theirs.time.high, mine.time.high / theirs.time.low
        print(f"{theirs.extra_peak_gib:.3g} GiB; our time is {ratio:.3f} of Liger's ({low:.2f} to {high:.2f})")
    if baselines.EAGER in others and linear_losses.OURS in found.measured:
        saved = 1 - found.measured[linear_losses.OURS].extra_peak_gib / others[baselines.EAGER].extra_peak_gib
        print(f"{head_case}: {100 * saved:.1f} % less memory than eager")
        if GPU:
            results.add("memory_saved", head_case, saved, "fraction")
    else:
        print(f"SKIPPED: memory saved, {head_case}: ours or eager mode was not measured")
if not GPU:
    print("SKIPPED: the criterion is about VRAM; memory saved on a CPU is shown, and earns nothing")

# %% [markdown]
# #### The error of the gradients
#
# The error is relative to a reference in float64 (float32 on GPUs without float64 tensor cores) from the same 16-bit
# inputs. dW is a sum over chunks. In 16 bits each addition rounds, so fewer and larger chunks give a smaller error.
# `accumulate_dtype=torch.float32` adds the chunks in float32 and needs twice dW's memory. Autograd then rounds dW to
# the dtype of the weight. "Not rounded" is the same sum for a weight that takes its gradient in float32
# (`weight.grad_dtype = None`). The limits are eager mode's error plus 1 % for dX and for a dW that was added in
# float32. For a dW that was added in 16 bits the limit is chosen, twice eager mode's error: Liger's is about as large.
#
# #### The frontier
#
# A script (`make sweeps`) measures five chunk sizes and three vocabularies. It runs apart, because each size is
# compiled anew. If its file is present, the figure and the table show it with the file's hardware and date. They are
# not part of the score. Each blue point is one chunk size of ours. The file may be older than the code of this
# notebook, so the figure's comparison with Liger can differ from the one above by a few per cent. The one above is of
# this run and counts.


# %%
UNROUNDED = "ours, float32 dW, not rounded"


def measure_errors():
    """The errors of all candidates that could be measured above."""
    case = make_case(SHAPE, DEVICE)
    failed = measured["head trained"].failed if "head trained" in measured else ()
    named, _ = linear_losses.losses(case, compile=GPU, without=(baselines.COMPILED, *WITHOUT, *failed))
    if baselines.LIGER in named and not OLD:
        named[linear_losses.OURS_AS_LIGER] = linear_losses.ours(linear_losses.liger_rows(SHAPE), compile=GPU)
    try:
        true = errors.truth(case)
        found = errors.gradient_errors(case, named, true)
        if linear_losses.OURS_FLOAT32 in named:  # and a head that takes its gradient in float32
            wide = make_case(SHAPE, DEVICE, any_gradient_dtype=True)
            of_wide = {UNROUNDED: named[linear_losses.OURS_FLOAT32]}
            found |= errors.gradient_errors(wide, of_wide, true)
        return found
    except torch.OutOfMemoryError:
        print("SKIPPED: the reference in a wider dtype does not fit into this GPU's memory")
        return {}


wrong = measure_errors()
release()
display(Markdown(backprop_figures.error_table(wrong)))
print(f"{SHAPE_TEXT}, random weights, {HARDWARE}")
if baselines.EAGER in wrong:
    eager = wrong[baselines.EAGER]
    of = {"dX": (linear_losses.OURS, "hidden_states"), f"{short} dW": (linear_losses.OURS, "weight")}
    of["float32 dW"] = (linear_losses.OURS_FLOAT32, "weight")
    of["float32 dW, not rounded"] = (UNROUNDED, "weight")
    within = {}
    for what, (name, key) in of.items():
        if name in wrong:
            others = {n: e[key] / eager[key] for n, e in wrong.items() if n not in (*MINE, UNROUNDED, baselines.EAGER)}
            ratio = wrong[name][key] / eager[key]
            results.add("gradient_error_over_eager", f"head trained, {what}", ratio, "x", baselines=others)
            within[what] = ratio <= (2 if key == "weight" and name == linear_losses.OURS and GPU else 1.01)
    judge(results, "errors of the gradients", within)

SWEEPS_FILE = Path("resources/measurements/e_backprop_sweeps.json")
if SWEEPS_FILE.exists():
    sweeps = Measurements.load(SWEEPS_FILE)
    (swept,), (vocabulary,) = sweeps.find("rows"), sweeps.find("frontier_vocabulary")
    SWEPT = f"{swept['value']} rows, {swept['case']}, random weights; {sweeps.hardware['name']}, {sweeps.date}"
    by_head = {head_case: backprop_figures.swept_points(sweeps, "frontier", head_case) for head_case in HEADS}
    figure = backprop_figures.frontier_figure(by_head, f"vocabulary {vocabulary['value']}, {SWEPT}")
    figure.savefig("resources/e_backprop_frontier.png", dpi=110)
    plt.show()
    points = backprop_figures.swept_points(sweeps, "vocabulary", "vocabulary")
    candidates = (linear_losses.OURS, baselines.EAGER, baselines.COMPILED, baselines.LIGER, baselines.CCE)
    display(Markdown(f"Head trained, {SWEPT}:\n\n{backprop_figures.vocabulary_table(points, candidates)}"))
else:
    print(f"SKIPPED: {SWEEPS_FILE.name}, which a script writes on a GPU, is not here")

# %% [markdown]
# ### Llama 3.2 1B: the standard loss and ours
#
# One line patches a model:
#
# ```python
# with use_memory_efficient_loss(model):  # for TRL's SFTTrainer pass the trainer instead of the model
#     trainer.train()
# ```
#
# #### Check 5: a step, and trainers
#
# The check uses a tiny Llama. A step must have the loss and the gradients of the standard loss and return no logits,
# and `undo()` must restore the model. Then `transformers.Trainer` with gradient accumulation and TRL's `SFTTrainer`
# train under both losses and must log the same. An evaluation must give the accuracy of the full logits. The limits are
# 1e-5 (a step) and 2e-5 (three steps of a trainer), relative, for float32 rounding.

# %%
from benchmarks.backprop import patch_checks

for what, check in (("a step", patch_checks.check_step), ("under trainers", patch_checks.check_trainers)):
    try:
        judge(results, f"use_memory_efficient_loss, {what}", check(DEVICE))
    except Exception as error:
        experiments.failed(f"use_memory_efficient_loss, {what}", error)

# %% [markdown]
# #### The curves
#
# Two trainings of 60 steps (T4: 32; QLoRA on a CPU: 3) begin with the same seed and differ in the loss only. The text
# is real. The output says whether the weights are real or random. The steps repeat the same 15 batches four times (T4:
# 8 batches), so learning shows as a fall from pass to pass: the mean loss of the last pass must lie at least 0.01 below
# that of the first. A step has two micro-batches of two sequences in full fine-tuning and one of four under QLoRA. The
# micro-batches have different numbers of ignored labels, and a micro-batch has more rows than a chunk.
#
# - **Full fine-tuning** uses a tied head in float32 without TF32, and SGD without momentum and clipping. AdamW would
#   hide a wrong scale of the gradients. The norm of all gradients is compared at every step, too.
# - **QLoRA** uses the kernel of A, float16 with float32 adapters, and AdamW.
#
# The limits for a loss are 2e-4 (full fine-tuning) and 1e-3 (QLoRA). The limits for the relative difference of two
# gradient norms are 1e-4 and 5e-3. They are chosen to lie far below the differences that the planted faults make. A
# step that both gradient scalers skip, because float16 overflowed, has no norm.
#
# The comparison is itself tested. Two faults are planted into our loss in full fine-tuning, for 20 steps: gradients
# that are 1 % too large, and a mean per chunk. Each must differ from the standard loss by more than 1e-3. The limit for
# the norms of QLoRA is half of the first fault, so the norms show a wrong scale that AdamW hides in the losses.
#
# The output shows the peak memory of both trainings. The sequences are short, so weights, gradients and activations
# take most of it, and logits a small part. The measurement at the puzzle's shape above is the one that counts for
# memory.

# %%
from benchmarks.backprop import llama_curve
from benchmarks.backprop.curve_data import FAULTS, OURS, STANDARD

CURVES = {"full": "full fine-tuning", "qlora": "QLoRA"}
curve_settings = {"full": {}, "qlora": {"batch": 4, "accumulation": 1}}
if not GPU:  # a tiny model; Triton's interpreter takes seconds a step of QLoRA
    curve_settings = {"full": {"length": 64, "chunk_size": 48}, "qlora": {"steps": 3, "length": 64, "chunk_size": 48}}
elif OLD:  # float32 without tensor cores: the time is proportional to the tokens
    for given in curve_settings.values():
        given |= {"length": 128, "chunk_size": 128, "steps": 32}
curves = {}  # by (mode, run)
ROOMY = GPU and not OLD and hardware.memory_gib >= 60  # for the processes of both modes side by side
LEAST_FALL = 0.01  # of the loss, from the first pass to the last: the same labels, so no noise but rounding
free_memory()  # the processes that follow need all of a small GPU
try:
    for mode, found in llama_curve.run_modes(curve_settings, together=ROOMY, timeout=600):
        for run_name, curve in found.items():
            if isinstance(curve, str):
                experiments.failed(f"{CURVES[mode]}, {run_name}", curve)
            else:
                curves[mode, run_name] = curve
except Exception as error:
    experiments.failed("the Llama curves", error)

# %% cellView="form" jupyter={"source_hidden": true} tags=["hide-input"]
# @title Differences of the curves, what is recorded, and the figure
compared = [mode for mode in CURVES if (mode, STANDARD) in curves and (mode, OURS) in curves]
is_tiny = any(curve["tiny"] for curve in curves.values())
LLAMA = "tiny Llama" if is_tiny else "Llama 1B"
LIMITS, NORM_LIMITS = backprop_figures.CURVE_LIMITS, backprop_figures.NORM_LIMITS
apart, norms_apart, learns, match = {}, {}, {}, {}
for mode in compared:
    standard, ours = curves[mode, STANDARD], curves[mode, OURS]
    name, case = CURVES[mode], f"{LLAMA}, {CURVES[mode]}"
    apart[mode] = llama_curve.differences(standard, ours)
    norms_apart[mode] = llama_curve.norm_differences(standard, ours)
    means, theirs = llama_curve.pass_means(ours), llama_curve.pass_means(standard)
    if mode == "full":
        learns[f"{name}: every gradient norm is finite"] = all(map(math.isfinite, norms_apart[mode]))
    learns[f"{name}: every loss is finite"] = all(map(math.isfinite, standard["losses"] + ours["losses"]))
    learns[f"{name}: the last pass lies at least {LEAST_FALL} below the first"] = means[0] - means[-1] >= LEAST_FALL
    learns[f"{name}: our loss made every loss"] = ours["loss_calls"] == ours["steps"] * ours["accumulation"]
    match[f"{name}: losses within {LIMITS[mode]:.0e}"] = max(apart[mode]) <= LIMITS[mode]
    # A step that both gradient scalers skip is NaN. Without any norm the check fails.
    largest_gap = max((gap for gap in norms_apart[mode] if not math.isnan(gap)), default=math.inf)
    match[f"{name}: gradient norms within {NORM_LIMITS[mode]:.0e}"] = largest_gap <= NORM_LIMITS[mode]
    results.add("loss_curve_max_abs_difference", case, max(apart[mode]), "loss")
    results.add("loss_fall", case, means[0] - means[-1], "loss", baselines={"standard loss": theirs[0] - theirs[-1]})
    print(f"{case}, {ours['weights']}: {len(apart[mode])} steps, losses differ by at most {max(apart[mode]):.1e}")
    print("  mean loss of each pass over the batches:", *(f"{mean:.3f}" for mean in means))
    if math.isfinite(largest_gap):
        results.add("loss_curve_gradient_norm_difference", case, largest_gap, "relative")
        print(f"  the gradients' norms differ by at most {largest_gap:.1e} of themselves")
    if ours["peak_gib"]:
        peaks = {"standard loss": standard["peak_gib"]}
        results.add("training_peak_gib", case, ours["peak_gib"], "GiB", baselines=peaks)
        print(f"  peak memory of a run: ours {ours['peak_gib']:.2f} GiB, standard {standard['peak_gib']:.2f} GiB")
faults = {}
for fault in FAULTS:
    if ("full", STANDARD) in curves and ("full", fault) in curves:
        gaps = llama_curve.differences(curves["full", STANDARD], curves["full", fault])
        faults[fault] = [gap if math.isfinite(gap) else 1e9 for gap in gaps]  # a run that diverged differs, too
        case = f"tiny Llama, {fault}" if is_tiny else fault
        results.add("planted_fault_difference", case, max(faults[fault]), "loss")
        above = [step for step, gap in enumerate(faults[fault], 1) if gap > 1e-3]
        seen = f"first above 1e-3 at step {above[0]}" if above else "never above 1e-3: the curve proves nothing"
        print(f"planted fault, {fault}: the loss differs by up to {max(faults[fault]):.1e}, {seen}")
        match[f"planted fault seen: {fault}"] = bool(above)
if compared == list(CURVES):
    judge(results, f"{LLAMA} learns", learns)
    judge(results, f"{LLAMA}: the losses match", match)
else:
    print("SKIPPED: the comparison needs both losses in both modes")
if is_tiny:
    print("SKIPPED: the criterion is about Llama 1B, which needs a GPU; a tiny one was trained")
if compared:
    model_text = llama_curve.title(curves[compared[0], OURS]).partition(";")[0]
    figure = backprop_figures.curve_figure(curves, CURVES, apart, norms_apart, faults, f"{model_text}; {WHERE}")
    Path("resources/q5").mkdir(parents=True, exist_ok=True)
    figure.savefig(f"resources/q5/{'tiny_llama' if is_tiny else 'llama32_1b'}_loss_curve.png", dpi=110)
    plt.show()

# %% [markdown]
# ### GRPO
#
# GRPO (group relative policy optimisation) samples several completions for each prompt. The *advantage* of a completion
# is its reward relative to the other completions of the prompt. The *ratio* of a token is its probability now over that
# when it was sampled. The loss is the negative ratio, weighted by the advantage. It limits the ratio (clipping; `delta`
# limits it a second time) and can penalise the distance from a reference model (KL divergence, weight `beta`). The
# ratio is taken per token or per sequence (the importance level).
#
# TRL's GRPO needs one log-probability and one entropy per sampled token from the head. Our trainer computes them
# without full logits. Everything else is TRL's own code in both trainers:
#
# ```python
# trainer = MemoryEfficientGRPOTrainer(model=model, reward_funcs=reward, args=GRPOConfig(...), train_dataset=rows)
# # in each step, instead of full logits:
# log_probs, entropies = memory_efficient_linear(
#     hidden_states, head, tokens, token_log_probs_and_entropy, reduction="none", keep_logits=...)
# ```
#
# #### Check 6: every loss type
#
# The grid has eight loss types, two importance levels, and two settings of delta, beta and gradient accumulation.
# Loss, every gradient and every metric are compared on the same inputs: in float64 with a plain full-logits trainer
# (limit 1e-10), in float32 with TRL's fused head (limit 1e-5). Our trainer keeps the logits of some chunks for the
# backward and computes those of the others again. The grid and the run below use `compile=False`. The compiled head
# is the default on a GPU. From sm_80 on it is compared once for each loss type, in float64 and without Inductor's
# search for block sizes. The last cell of GRPO times the compiled head with that search, and compares its gradients
# in 16 bits with those of full logits. Their errors may be at most 5 % larger.

# %%
from benchmarks.backprop import grpo, grpo_grid, grpo_head
from benchmarks.models import tiny_llama_config
from unsloth_puzzles.backprop.grpo import MemoryEfficientGRPOTrainer

TIGHT = {torch.float64: 1e-10, torch.float32: 1e-5}
checks, worst = {}, dict.fromkeys(TIGHT, 0.0)
for dtype, case, apart, same_names in grpo_grid.differences(DEVICE):
    worst[dtype] = max(worst[dtype], apart)
    checks[f"{case}, {SHORT[dtype]}"] = same_names and apart <= TIGHT[dtype]
for dtype, apart in worst.items():
    results.add("grpo_largest_difference", f"the grid, {SHORT[dtype]}", apart, "relative")
    print(f"{SHORT[dtype]}: largest relative difference over the grid {apart:.1e}")
judge(results, "GRPO", checks)
if GPU and not OLD:
    compiled = grpo_grid.differences(DEVICE, compile=True)
    judge(results, "GRPO, the compiled head", {case: same and far <= TIGHT[of] for of, case, far, same in compiled})
else:
    print("SKIPPED: the compiled head: left to larger GPUs, where it compiles in less time")

# %% [markdown]
# #### A small GRPO run
#
# A tiny Llama from fixed-seed weights learns to write vowels. The reward is the share of vowels in a completion. TRL's
# trainer and ours both run generation, rewards, advantages and updates from the same seed. The two sample the same
# completions until a rounding difference flips a sampled token. Each batch is used for one update, so the ratio is 1
# and the value of the loss is the same for any log-probabilities. Its gradient depends on them. The run therefore
# compares gradient norms, as long as the rewards agree. The norms may differ by 1e-4 of themselves. The mean reward of
# the last third of the steps must lie at least 0.1 above that of the first third. The limit is chosen; a reward lies
# between 0 and 1.

# %%
SHORTER = {"steps": 24, "sequences": 32, "completion": 12, "learning_rate": 1e-2}
TRAINERS = {"TRL": grpo.GRPOTrainer, "ours": partial(MemoryEfficientGRPOTrainer, compile=False)}
runs, same_steps = {}, None
for name, make in TRAINERS.items():
    try:
        runs[name] = grpo.train(make, use_cpu=not GPU, **SHORTER)
    except Exception as error:
        experiments.failed(f"GRPO run, {name}", error)
    else:
        print(f"{name}: {len(runs[name]['reward'])} steps in {runs[name]['seconds']:.1f} s")


def rise(reward):
    """Mean of the last ten steps less that of the first ten (fewer in a run of fewer than thirty)."""
    ends = min(10, len(reward) // 3)
    return statistics.mean(reward[-ends:]) - statistics.mean(reward[:ends])


rises = {name: rise(run_of["reward"]) for name, run_of in runs.items()}
for name in TRAINERS:
    print(f"{name}: the reward rises by {rises[name]:.3f}" if name in rises else f"{name}: FAILED, no run")
if "ours" in runs:
    beside = {name: value for name, value in rises.items() if name != "ours"}
    results.add("grpo_reward_rise", "GRPO run", rises["ours"], "reward", baselines=beside)
    judge(results, "GRPO run", {"the reward rises by at least 0.1": rises["ours"] >= 0.1})
if len(runs) == len(TRAINERS):
    together = [abs(a - b) < 1e-6 for a, b in zip(runs["ours"]["reward"], runs["TRL"]["reward"], strict=True)]
    same_steps = together.index(False) if False in together else len(together)
    norms = [abs(a - b) / b for a, b in zip(runs["ours"]["grad_norm"], runs["TRL"]["grad_norm"], strict=True)]
    results.add("grpo_steps_with_the_same_rewards", "GRPO run", same_steps, f"steps of {len(together)}")
    if not same_steps:
        judge(results, "GRPO run, the same gradients", {"the rewards of the first step agree": False})
if same_steps:
    worst_norm = max(norms[:same_steps])
    results.add("grpo_gradient_norm_difference", "GRPO run, while the rewards agree", worst_norm, "relative")
    print(f"the rewards agree for {same_steps} of {len(together)} steps, and there the gradients' norms", end=" ")
    print(f"differ by at most {worst_norm:.1e} of themselves (limit 1e-4)")
    judge(results, "GRPO run, the same gradients", {"norms while the rewards agree": worst_norm <= 1e-4})
if runs:
    where = f"tiny Llama, random weights, float32, seed {SEED}; {WHERE}"
    backprop_figures.reward_figure(runs, same_steps, where).savefig("resources/e_backprop_grpo_reward.png", dpi=110)
    plt.show()

# %% [markdown]
# #### Memory and time of GRPO
#
# "Head only" runs from hidden states of 16 x 1024 completion tokens (4 x 1024 on a GPU with less than 40 GiB) to the
# gradients of hidden states and head, for the same clipped loss. "Whole step" is forward, loss and backward of Llama
# 3.2 1B with gradient checkpointing, without generation: 16 x 1024 completion tokens again (8 x 128 on a GPU with less
# than 40 GiB; T4: 8 x 64). "Full logits" holds all logits in float32. TRL 1.16 has a fused head of its own and does not
# call Liger's GRPO loss. A T4 leaves out Liger, and TRL in the whole step, so the figure of a T4 does not show the
# comparisons with them.
#
# - **"Ours"** keeps no logits and holds one chunk of them. "Ours, logits kept" is the trainer's default: it keeps up to
#   three times the memory of the head and saves as much recomputation.
# - **TRL's fused head** has derivatives by hand for log-probabilities and entropy, and adds dW in float32. The row to
#   compare with it is "ours, float32 dW".
# - **Liger's loss** handles one sequence and 4096 tokens of the vocabulary at a time, in many small operators. It
#   computes the logits twice and multiplies the gradients in float32. "Liger, TF32" allows TF32 in these products, and
#   need not be faster: then they are not what takes its time.

# %%
if GPU and hardware.memory_gib >= 40 and not OLD:
    head_sizes, step_sizes = {"dtype": SIXTEEN, "rounds": 3}, {"dtype": SIXTEEN, "rounds": 2}
elif GPU:
    head_sizes = {"dtype": SIXTEEN, "sequences": 4}
    step_sizes = {"dtype": SIXTEEN, "sequences": 8, "completion": 128}
else:
    head_sizes = {"dtype": torch.float32, "sequences": 4, "length": 128, "hidden": 64, "vocab": 2048, "rounds": 1}
    step_sizes = {"config": tiny_llama_config(2048), "sequences": 8, "completion": 32}
    step_sizes |= {"dtype": torch.float32, "rounds": 1}
if OLD:  # without TF32, and slow
    print("SKIPPED: GRPO's Liger, float32 dW, and whole steps of TRL and with logits kept: left to larger GPUs")
    head_sizes |= {"rounds": 2, "without": (grpo_head.LIGER, grpo_head.LIGER_TF32, grpo_head.OURS_FLOAT32)}
    step_sizes |= {"rounds": 1, "completion": 64, "without": (grpo_head.TRL, grpo_head.OURS_KEPT)}
grpo_measured = {}
for what, measure, sizes in (
    ("head only", grpo_head.head_only, head_sizes),
    ("whole step", grpo.whole_step, step_sizes),
):
    free_memory()
    try:
        grpo_measured[what] = measure(device=DEVICE, **sizes)
    except torch.OutOfMemoryError as error:
        experiments.failed(f"GRPO, {what}", f"out of memory: {str(error).partition('.')[0]}")
    except Exception as error:
        experiments.failed(f"GRPO, {what}", error)
free_memory()

# %% cellView="form" jupyter={"source_hidden": true} tags=["hide-input"]
# @title The figure, and what is recorded
shown_cases = {what: found for what, found in grpo_measured.items() if found}
if shown_cases:
    tokens = head_sizes.get("sequences", 16) * head_sizes.get("length", 1024)
    of_step = step_sizes.get("sequences", 16) * step_sizes.get("completion", 1024)
    where = f"head on {tokens} tokens, step of {'Llama 3.2 1B' if GPU else 'a tiny Llama'} on {of_step},"
    where += f" {SHORT[head_sizes['dtype']]}, random weights; {WHERE}"
    figure = backprop_figures.grpo_memory_figure(shown_cases, grpo_head.OURS, where)
    figure.savefig("resources/e_backprop_grpo_memory.png", dpi=110)
    plt.show()
for what, found in grpo_measured.items() if GPU else ():
    if grpo_head.OURS not in found:
        continue
    ours = found[grpo_head.OURS]
    others = {name: one for name, one in found.items() if name != grpo_head.OURS}
    peaks = {name: one["peak_gib"] for name, one in others.items()}
    times = {name: one["time"].median / 1e3 for name, one in others.items()}
    took = ours["time"]
    results.add("grpo_peak_gib", what, ours["peak_gib"], "GiB", baselines=peaks)
    results.add("grpo_ms", what, took.median / 1e3, "ms", took.low / 1e3, took.high / 1e3, times)
    for name, short_name in ((grpo_head.FULL, "full_logits"), (grpo_head.TRL, "trl"), (grpo_head.LIGER, "liger")):
        if name in others:
            results.add(f"grpo_peak_over_{short_name}", what, ours["peak_gib"] / peaks[name], "x")
            results.add(f"grpo_time_over_{short_name}", what, took.median / 1e3 / times[name], "x")
    if "hidden_error" in ours:
        for key in ("hidden_error", "weight_error"):
            beside = {name: one[key] for name, one in others.items()}
            results.add(f"grpo_{key}", what, ours[key], "relative", baselines=beside)
        if grpo_head.FULL in others:
            within = {}
            for key, gradient in (("hidden_error", "dX"), ("weight_error", "dW")):
                plain = others[grpo_head.FULL][key]
                print(f"compiled head, error of {gradient}: {ours[key]:.2e}, with full logits {plain:.2e}")
                within[gradient] = ours[key] <= 1.05 * plain
            judge(results, "GRPO, the compiled head's gradients", within)
if not GPU:
    print("SKIPPED: these are a CPU's figures at a small size; GRPO's memory counts where there is a GPU")

# %% [markdown]
# ### What this does not do
#
# - **Less memory than one chunk of logits.** Apple's CCE never writes a logit to memory. Its extra memory is dX, and dW
#   if the head is trained. It takes several times as long (see the table). It computes the logits twice, which explains
#   a third more; the rest was not examined. CCE and Liger's FLCE compute cross entropy only.
# - **Less time than Liger at Liger's memory.** The times differ by a few per cent, in either direction from run to run.
#   The default has larger chunks than Liger, which need more memory.
# - **The shortest time at any memory.** `torch.compile` of the plain loss holds all logits in 16 bits. TRL's kernel on
#   full logits does the same for GRPO. The tables and figures above show their times, and Liger's at equal memory.
# - **The exact dW by default.** Chunks are added in 16 bits, so the error of dW is larger than eager mode's (see the
#   table of errors). `accumulate_dtype=torch.float32` needs twice dW's memory, and the error is eager mode's.
# - **Small vocabularies.** Their logits are small. The plain loss, compiled or not, and Liger's then take less time
#   (see the first row of the sweep's table).
# - **Less memory or time than TRL's fused head in a whole GRPO step.** Both are equal there within a few per cent. The
#   head alone needs less memory if no logits are kept. Our head takes other functions than TRL's two.
# - **A loss that mixes rows**, such as a contrastive loss over the batch, is not a sum over rows. The first call
#   compares a chunk with its halves and refuses such a loss.
# - **Double backward and `torch.func`** raise an error, because the forward computes the gradients once.
# - **A head in an FSDP2 group of its own** is refused. A replicated head works, and so does a head in the root group,
#   as in section B. The GRPO trainer refuses FSDP and DeepSpeed. Tensor parallelism of the head is not tested.
# - **Speed without a compiler.** A function in eager mode makes several passes over each chunk. The times hold for a
#   compiled function.
# - **Another version of TRL.** The GRPO trainer is written for TRL 1.16 and refuses others. It also refuses
#   `cast_lm_head_to_fp32`, and logits that the model changes in other ways than scaling and soft cap.
# - **Full fine-tuning with AdamW on a T4.** Weights, gradients and moments of 1 B parameters in float32 need more
#   memory than a T4 has, with any loss. The curve uses SGD.
#
# ### Score of this section

# %%
from unsloth_puzzles.bench import scorecard

results.save()
rows = [row for row in scorecard.score("resources/measurements") if row.challenge == "E"]
display(Markdown(scorecard.table(rows)))
_ = section.finish()

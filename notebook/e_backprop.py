# %% [markdown]
# ## E. Memory-efficient backprop
#
# **Task.** The last layer of a language model turns hidden states into logits, 128 K numbers a token, and a function
# turns those into a loss. Never hold the logits: make them in chunks, in a `torch.autograd.Function`, for ANY function
# of them, with its derivative from autograd and the upstream gradient honoured.
#
# **Criteria** (10 points): half the VRAM (2), float32 upcast kept and no derivative by hand (else nothing), cross
# entropy (1), other functions (1), dynamic chunk sizes (1), the losses of a Llama 1B match (1, else nothing), GRPO (4).

# %% [markdown]
# ### The idea
#
# A loss that is a sum over rows is a sum over chunks of rows. Each chunk's logits can be made, differentiated and freed
# before the next chunk's:
#
# ```
#  for each chunk of rows                                   lives in
#    Z  = X[rows] W^T              GEMM 1                   one buffer, rows x V
#    l  = f(Z, labels[rows])       the user's function      float32, if the user says so
#    G  = dl/dZ                    autograd through f       over Z: the same buffer
#    dX[rows] = G W                GEMM 2                   dX
#    dW += G^T X[rows]             GEMM 3, if W is trained  dW
#  loss = sum of l / N             N is known before the first chunk
# ```
#
# $$L=\frac1N\sum_c f(X_cW^\top),\qquad \frac{\partial L}{\partial X_c}=\frac1N\,G_cW,\qquad
# \frac{\partial L}{\partial W}=\frac1N\sum_c G_c^\top X_c,\qquad G_c=\frac{\partial f}{\partial Z_c}$$
#
# - The gradients are made **in the forward**, where the logits are, so no logit is made twice: three matrix products,
#   two if the head is frozen. The backward multiplies them by the upstream gradient, which is a scalar.
# - **N is one number for all chunks**: the number of labels that are not ignored (or `num_items_in_batch`). A mean per
#   chunk would be wrong, because chunks hold different numbers of ignored labels.
# - A function that returns a value **per row** (log-probabilities for GRPO and DPO) has an upstream gradient per row,
#   unknown in the forward. There the backward makes the logits again: four products, exact for any upstream gradient.
# - $G_c$ comes from `torch.autograd` through the user's function, in eager mode or compiled by Inductor, and is written
#   over the logits. The operator has no code for a particular loss.
# - Two `backward` methods are written by hand, as the puzzle's `torch.autograd.Function` demands: the operator's own,
#   which multiplies by the upstream gradient (or does the chunks again), and that of the matrix product $Z=XW^\top$ in
#   `heads.py`, $G_cW$ and $G_c^\top X_c$ above, because PyTorch's own would make a new dW for every chunk. No loss has
#   one.
#
# ### The bound, before anything is measured
#
# With $R$ rows, hidden size $H$ and vocabulary $V$ each matrix product is $2RHV$ FLOPs. Gradients that are returned
# need memory in any method. At the puzzle's shape (4 x 4096 rows, H = 4096, V = 128256, bf16):
#
# | | FLOPs | memory that must be there |
# |---|---|---|
# | logits, dX, dW | 3 x 17.2 TFLOP | dW 0.98 GiB + dX 0.125 GiB |
# | logits, dX (head frozen) | 2 x 17.2 TFLOP | dX 0.125 GiB |
# | a chunk of $c$ rows | | 2 c V bytes: 0.25 GiB for 1024 rows |
# | all logits, as PyTorch makes them | | 2 + 4 + 4 + 2 bytes each, 23.5 GiB |
#
# (All logits: 16 bits, a float32 copy, its log-softmax, a gradient.)
#
# Small chunks save memory and cost time: each one reads W for its logits, reads it again for dX and reads and writes
# dW, 8 bytes per weight, against 6c FLOPs per weight of arithmetic. The best possible time in chunks is that of these
# matrix products alone in the same chunks. It is measured beside all candidates. (With all logits at once the products
# are larger and faster: `torch.compile` of the plain loss can be below this floor.)

# %%
from unsloth_puzzles.bench import section
from unsloth_puzzles.device import capability

section.start("E. Memory-efficient backprop")
GPU = hardware.device == "cuda"
SLOW = GPU and capability() < 80  # a T4: less is timed there, and less is compiled
if hardware.matmul_flops:
    rate = hardware.matmul_flops["bfloat16" if hardware.bf16 else "float16"]
    for what, products in (("head trained", 3), ("head frozen", 2)):
        flops = products * 2 * 4 * 4096 * 4096 * 128256
        print(
            f"{what}: {flops / 1e12:.1f} TFLOP, at least {1e3 * flops / rate:.1f} ms here ({rate / 1e12:.0f} TFLOP/s)"
        )
else:
    print("SKIPPED: the time of the matrix products: it follows from their measured rate on a GPU")

# %% [markdown]
# ### The code
#
# What users call, and the puzzle's class. All checks run in `apply`; the forward is one call of the loop below.

# %%
# show: unsloth_puzzles/backprop/linear.py

# %% [markdown]
# The loop over the chunks, for losses that are sums over rows. Functions with a result per row use another loop,
# `rowwise.py`, which computes the logits again in the backward.

# %%
# show: unsloth_puzzles/backprop/additive.py

# %% [markdown]
# The user's function on one chunk, and autograd through it. Its gradient overwrites the logits. `compiled.py` has the
# same interface with Inductor behind it.

# %%
# show: unsloth_puzzles/backprop/eager.py

# %% [markdown]
# The head may be any module (tied, frozen, LoRA, 4-bit). Its trainable tensors are replaced by leaves, and every
# `F.linear` with one of them adds to one buffer instead of making a dW per chunk: `_Linear`, the matrix product with
# its derivative.

# %%
# show: unsloth_puzzles/backprop/heads.py

# %% [markdown]
# Where the chunks' gradients are added up. A float16 sum over thousands of rows may pass 65504 though their mean is
# small: such a sum is kept times a power of two, found on the device, that leaves room for it.

# %%
# show: unsloth_puzzles/backprop/sums.py

# %% [markdown]
# The losses: plain functions of one chunk's logits, a few lines each. None contains a derivative.

# %%
# show: unsloth_puzzles/backprop/losses.py

# %% [markdown]
# The functions that return a number per row, for policy gradients and preferences:

# %%
# show: unsloth_puzzles/backprop/log_probs.py

# %% [markdown]
# The rest of `unsloth_puzzles/backprop/` is in the set-up: the size of a chunk (`chunks.py`; "auto" is derived from the
# GPU's FLOPs per byte moved), refusals, random numbers, arithmetic in place, the loss under transformers' and TRL's
# trainers, and GRPO. The baselines are in `benchmarks/backprop/`.

# %%
import logging
import math
import statistics
import tempfile
import textwrap
from functools import partial

import matplotlib.pyplot as plt
import torch.nn.functional as F
from IPython.display import Markdown, display
from torch import nn

from benchmarks.backprop import baselines, errors, linear_losses
from benchmarks.backprop.workload import REFERENCE, TINY, Shape, make_case, release
from unsloth_puzzles.backprop import MemoryEfficientLinear, losses, memory_efficient_linear
from unsloth_puzzles.bench.experiments import free_memory, judge
from unsloth_puzzles.bench.record import Measurements

DEVICE = hardware.device
HARDWARE = hardware.name + (" held to a T4's limits" if hardware.rehearsal else "")
SIXTEEN = torch.bfloat16 if hardware.bf16 or not GPU else torch.float16
SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "float32", torch.float64: "float64"}
results = Measurements("resources/measurements/e_backprop.json", hardware)


def far(found, exact):
    """The largest relative difference (Euclidean norm) between two lists of tensors."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, exact, strict=True)]
    return max(((a - b).norm() / b.norm()).item() if b.norm() > 0 else a.norm().item() for a, b in pairs)


def differentiated(loss, *inputs):
    """The loss, and the gradients of 3.7 times it: an upstream gradient that is not 1."""
    return [loss, *torch.autograd.grad(3.7 * loss, inputs)]


# %% [markdown]
# ### Check 1: cross entropy
#
# Loss and gradients are compared in float64 with `F.cross_entropy` on the full logits. They agree to 1e-12 of their
# norm; the order of a sum causes differences of that size. There are 111 rows in chunks of 16: the last chunk is
# ragged, all labels of the first chunk are ignored, and the other chunks ignore different numbers of labels.

# %%
EXACT = 1e-12
ROWS, HIDDEN, VOCABULARY, CHUNK = 111, 24, 101, 16
generator = torch.Generator(DEVICE).manual_seed(SEED)
drawn = partial(torch.randn, device=DEVICE, dtype=torch.float64, generator=generator)


def new_head(bias=True, dtype=torch.float64, frozen=False):
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias, device=DEVICE, dtype=dtype)
    for parameter in head.parameters():
        parameter.data = (0.5 * drawn(parameter.shape)).to(dtype)
    return head.requires_grad_(not frozen)


x = drawn(3, ROWS // 3, HIDDEN).requires_grad_()
labels = torch.randint(VOCABULARY, (3, ROWS // 3), device=DEVICE, generator=generator)
labels[0, :18] = labels[1, 5:30:3] = -100
flat = labels.flatten()
valid = (flat != -100).sum()
head, smoothed = new_head(), partial(losses.cross_entropy, label_smoothing=0.1)
weights = drawn(VOCABULARY).exp()
of_mean = {"reduction": "sum", "normalizer": "labels", "chunk_size": CHUNK}
of_sum = {"reduction": "sum", "chunk_size": CHUNK}


def full(head=head, x=x):
    """All logits, (rows, vocabulary)."""
    return head(x).flatten(0, 1)


parameters = (x, head.weight, head.bias)

# %%
checks = {}
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
    checks[name] = far(differentiated(ours, *parameters), differentiated(exact, *parameters)) <= EXACT

for name, other in (("no bias", new_head(bias=False)), ("frozen head", new_head(frozen=True))):
    inputs = (x, *(p for p in other.parameters() if p.requires_grad))
    ours = differentiated(memory_efficient_linear(x, other, labels, losses.cross_entropy, **of_mean), *inputs)
    checks[name] = far(ours, differentiated(F.cross_entropy(full(other), flat), *inputs)) <= EXACT

table = nn.Embedding(VOCABULARY, HIDDEN, device=DEVICE, dtype=torch.float64)  # tied: the embeddings are the head, too
tied = nn.Linear(HIDDEN, VOCABULARY, bias=False, device=DEVICE, dtype=torch.float64)
tied.weight = table.weight
states = table(labels.clamp(min=0))
ours = memory_efficient_linear(states, tied, labels, losses.cross_entropy, **of_mean)
ours = [ours, *torch.autograd.grad(ours, tied.weight, retain_graph=True)]
exact = F.cross_entropy(full(tied, states), flat)
checks["tied embeddings"] = far(ours, [exact, *torch.autograd.grad(exact, tied.weight)]) <= EXACT

ours, exact = (
    [
        loss,
        *torch.autograd.grad(loss, parameters),
    ]
    for loss in (
        memory_efficient_linear(x, head, torch.full_like(labels, -100), losses.cross_entropy, **of_mean),
        F.cross_entropy(full(), torch.full_like(flat, -100)),
    )
)
checks["all labels ignored: NaN, and no gradient"] = (
    ours[0].isnan() and exact[0].isnan() and far(ours[1:], exact[1:]) == 0
)
judge(results, "cross entropy", checks)

# %% [markdown]
# ### Check 2: the upcast is the user's, the derivative is autograd's
#
# One function records the 16-bit logits that it is given: the loss must be that of a float32 upcast of exactly these
# logits. A dispatch mode records the dtype of every exponential. Three more functions show that the derivative is
# autograd's, because no formula could anticipate them: one invented here, one that stops a gradient, and one with a
# deliberately wrong derivative. The only `backward` methods in `backprop` are those of the operator and of its matrix
# product.

# %%
from torch.utils._python_dispatch import TorchDispatchMode

seen, exponentials = [], set()


class Exponentials(TorchDispatchMode):
    """Notes the dtype of everything that is exponentiated."""

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
        f"the function is given the projection's dtype, {SHORT[SIXTEEN]}": logits.dtype == SIXTEEN,
        "it sees every row once": len(logits) == ROWS,
        "it exponentiates float32": exponentials == {torch.float32},
        "the loss is float32": loss.dtype == torch.float32,
        "and is that of the upcast": far([loss], [upcast]) <= 1e-6,
        "without which every row would be rounded": far(by_row[:1], by_row[1:]) > 1e-5,
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
strength = drawn(3, ROWS // 3).requires_grad_()
temperature = torch.tensor(1.3, device=DEVICE, dtype=torch.float64, requires_grad=True)
inputs = (*parameters, strength, temperature)
extra = {"row_args": (strength,), "shared_args": (temperature,)}
ours = memory_efficient_linear(x, head, labels, invented, **extra, **of_sum)
exact = invented(full(), flat, strength.flatten(), temperature)
checks["a function invented here, extra arguments included"] = (
    far(differentiated(ours, *inputs), differentiated(exact, *inputs)) <= EXACT
)
for name, function in (
    ("a stopped gradient stays stopped", half_stopped),
    ("a wrong derivative is used as it is", lying),
):
    ours = memory_efficient_linear(x, head, labels, function, **of_mean)
    exact = function(full(), flat) / valid
    checks[name] = far(differentiated(ours, *parameters), differentiated(exact, *parameters)) <= EXACT
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
by_hand = {name for name, source in sources.items() if "def backward(ctx" in source}
checks["no backward but the operator's two and its matrix product's"] = by_hand == {
    "linear.py", "rowwise.py", "heads.py"
}  # fmt: skip
judge(results, "derivatives by autograd", checks)

# %% [markdown]
# ### Check 3: other functions
#
# Each function is compared with the same function of full logits in float64: loss and gradients agree to 1e-12.

# %%
teacher = new_head(frozen=True)
teacher_states = drawn(3, ROWS // 3, HIDDEN)
distil = losses.kl_distillation(teacher, 2.0)
soft = losses.soft_capped(losses.cross_entropy, 3.0)
mask = (flat != -100).double()


def z_loss(z):
    return F.cross_entropy(z, flat, reduction="sum") + 0.1 * (z.logsumexp(-1).square() * mask).sum()


def focal(z):
    p = z.softmax(-1).gather(-1, flat.clamp(min=0)[:, None]).squeeze(-1)
    return -((1 - p) ** 2 * p.log() * mask).sum()


def distilled(z):
    truth = F.log_softmax(teacher(teacher_states).flatten(0, 1) / 2, -1)
    return 4 * (F.kl_div(F.log_softmax(z / 2, -1), truth, reduction="none", log_target=True).sum(-1) * mask).sum()


def log_probs(z, temperature=1.0):
    return (z / temperature).log_softmax(-1).gather(-1, flat.clamp(min=0)[:, None]).squeeze(-1) * mask


def entropies(z):
    return torch.distributions.Categorical(logits=z).entropy() * mask


rows_of = {"reduction": "none", "chunk_size": CHUNK}
two = x[:2]  # DPO: one chosen and one rejected sequence
before = drawn(2)
checks = {}
for name, ours, exact in (
    ("z-loss",
     memory_efficient_linear(x, head, labels, partial(losses.z_loss, coefficient=0.1), **of_sum), z_loss(full())),
    ("soft cap", memory_efficient_linear(x, head, labels, soft, **of_sum),
     F.cross_entropy(3 * torch.tanh(full() / 3), flat, reduction="sum")),
    ("focal", memory_efficient_linear(x, head, labels, losses.focal, **of_sum), focal(full())),
    ("distillation, the teacher's logits in chunks, too",
     memory_efficient_linear(x, head, labels, distil, row_args=(teacher_states,), **of_sum), distilled(full())),
    ("log-probabilities, an upstream gradient each",
     (memory_efficient_linear(x, head, labels, losses.token_log_probs, **rows_of) * strength.detach()).sum(),
     (log_probs(full()) * strength.detach().flatten()).sum()),
    ("entropy", memory_efficient_linear(x, head, labels, losses.entropy, **rows_of).square().sum(),
     entropies(full()).square().sum()),
    ("DPO",
     losses.dpo_loss(memory_efficient_linear(two, head, labels[:2], losses.token_log_probs, **rows_of).sum(-1), before),
     losses.dpo_loss(log_probs(full()).view(3, -1)[:2].sum(-1), before)),
):  # fmt: skip
    checks[name] = far(differentiated(ours, *parameters), differentiated(exact, *parameters)) <= EXACT
found = memory_efficient_linear(x, head, labels, losses.token_log_probs_and_entropy, **rows_of)
ours = (found[0] * strength.detach()).sum() + found[1].square().sum()
exact = (log_probs(full()) * strength.detach().flatten()).sum() + entropies(full()).square().sum()
checks["log-probabilities and entropies together"] = (
    far(differentiated(ours, *parameters), differentiated(exact, *parameters)) <= EXACT
)
if GPU and not SLOW:  # a T4's host would compile it for half a minute
    compiled = memory_efficient_linear(x, head, labels, losses.z_loss, **of_mean, compile=True)
    eager = memory_efficient_linear(x, head, labels, losses.z_loss, **of_mean)
    checks["compiled"] = far(differentiated(compiled, *parameters), differentiated(eager, *parameters)) <= EXACT
else:
    print("SKIPPED: compiled: a CPU, and a T4's host, would compile it for half a minute")
judge(results, "other functions", checks)

# %% [markdown]
# ### Check 4: any chunk size
#
# Chunk sizes in rows, in bytes and "auto" give the same result. A hook on the head checks that it never returns more
# rows of logits at once than the chunk size.

# %%
truth = differentiated(F.cross_entropy(full(), flat), *parameters)
largest = []
hook = head.register_forward_hook(lambda module, given, logits: largest.append(logits.shape[0]))
checks = {}
for size, most in ((1, 1), (7, 7), (16, 16), (64, 64), (ROWS, ROWS), (10**6, ROWS), ("6464 B", 8), ("auto", ROWS)):
    largest.clear()
    loss = memory_efficient_linear(
        x, head, labels, losses.cross_entropy, **{**of_mean, "chunk_size": size}, check_additive=False
    )
    same = far(differentiated(loss, *parameters), truth) <= EXACT
    checks[f"chunk_size={size!r}, at most {most} rows at once"] = same and max(largest) == most
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
# Forward and backward from the hidden states, all candidates in turn in one run. The peak is the memory on top of
# inputs and weights, gradients included. Ours is the plain `cross_entropy` shown above, compiled, with "auto" chunks.
# The floor is the bare matrix products in the same chunks. A GPU with less memory gets fewer rows, so that the eager
# baseline fits.


# %%
ROWS_THAT_FIT = 16384 if hardware.memory_gib >= 40 else 8192 if hardware.memory_gib >= 22 else 4096
SHAPE = Shape(ROWS_THAT_FIT, REFERENCE.hidden, REFERENCE.vocabulary, SIXTEEN) if GPU else TINY
ROUNDS = 6 if GPU and not SLOW else 3
HEADS = {"head trained": True, "head frozen": False}
SHAPE_TEXT = f"{SHAPE.rows} x {SHAPE.hidden} hidden states, vocabulary {SHAPE.vocabulary}, {SHORT[SHAPE.dtype]}"
short = SHORT[SHAPE.dtype]
# On a CPU 16 bits are not worth measuring, and a T4 has no product that adds them to float32: there dW has one dtype.
# On a CPU, and on a T4's host, compiling eager mode's formula would take longer than all other candidates.
ONE_DTYPE = (linear_losses.OURS_FLOAT32, baselines.FLOOR_FLOAT32, baselines.LIGER_FLOAT32)
WITHOUT = () if GPU and not SLOW else (*ONE_DTYPE, baselines.COMPILED)
MINE = {  # the floor and the Liger candidate that each is compared with
    linear_losses.OURS: (baselines.FLOOR, baselines.LIGER),
    linear_losses.OURS_FLOAT32: (baselines.FLOOR_FLOAT32, baselines.LIGER_FLOAT32),
}
IN_FLOAT32 = (linear_losses.OURS_FLOAT32, baselines.LIGER_FLOAT32, baselines.FLOOR_FLOAT32)
measured = {}
for name in WITHOUT:
    print(f"SKIPPED: {name}: {'16 bits and compilers are left out on a CPU' if not GPU else 'left to larger GPUs'}")


def measure_head(head_case, train_head):
    """Measure all candidates on one head. Its tensors are freed when it ends, also by an error."""
    case = make_case(SHAPE, DEVICE, train_head=train_head)
    calls, left_out = linear_losses.candidates(case, compile=GPU, without=WITHOUT)
    found = linear_losses.measure(calls, rounds=ROUNDS, may_fail=[name for name in calls if name not in MINE])
    for name, reason in left_out.items():
        print(f"SKIPPED: {name}, {head_case}: {reason}")
    for name, reason in found.failed.items():
        experiments.failed(f"{name}, {head_case}", reason)
    section.work(flops=len(calls) * (ROUNDS + 2) * SHAPE.flops(train_head))
    auto = linear_losses.auto_rows(case)
    least = SHAPE.least_gib(auto, train_head)
    print(f"{head_case}: chunks of {auto} rows, which need {least:.3g} GiB with the gradients")
    return found


# %%
print(f"{SHAPE_TEXT}, random weights, {HARDWARE}")
for head_case, train_head in HEADS.items():
    try:
        measured[head_case] = measure_head(head_case, train_head)
    except torch.OutOfMemoryError as error:
        experiments.failed(head_case, f"out of memory: {str(error).partition('.')[0]}")
    free_memory()

# %%
lines = ["| | candidate | extra peak, GiB | ms | spread | of the floor's time |", "|---|---|---|---|---|---|"]
for head_case, found in measured.items():
    for name, one in found.measured.items():
        floor = found.measured.get(baselines.FLOOR_FLOAT32 if name in IN_FLOAT32 else baselines.FLOOR)
        spread = f"{one.time.low / 1e3:.1f} to {one.time.high / 1e3:.1f}"
        of_floor = f"{one.time.median / floor.time.median:.2f}" if floor else ""
        cells = (head_case, name, f"{one.extra_peak_gib:.3g}", f"{one.time.median / 1e3:.1f}", spread, of_floor)
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {head_case} | {name} | failed | | | |" for name in found.failed]
lines += [f"| {head_case} | not measured | | | | |" for head_case in HEADS if head_case not in measured]
display(Markdown("\n".join(lines)))


def compare(metric, case, ours, found, floor=None):
    """Record a ratio of ours over a baseline that was there."""
    one = found.measured
    if floor in one and ours in one:
        mine, other = one[ours].time, one[floor].time
        results.add(metric, case, mine.median / other.median, "x", mine.low / other.high, mine.high / other.low)


for head_case, found in measured.items():
    others = {name: one for name, one in found.measured.items() if name not in MINE}
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
# ### How exact the gradients are
#
# Relative error of dX and dW against a float64 reference (from the same 16-bit inputs), for labels as a trained model
# sees them. dW is summed over chunks. In 16 bits each addition rounds. In float32 the only rounding left is that of the
# logits' gradient to 16 bits, which eager mode has as well.

# %%
wrong = {}


def measure_errors():
    """The errors of all candidates that could be measured above."""
    case = make_case(SHAPE, DEVICE, any_gradient_dtype=True)
    failed = measured["head trained"].failed if "head trained" in measured else ()
    named, _ = linear_losses.losses(case, compile=GPU, without=(baselines.COMPILED, *WITHOUT, *failed))
    try:
        return errors.gradient_errors(case, named)
    except torch.OutOfMemoryError:
        print("SKIPPED: the reference in a wider dtype does not fit into this GPU's memory")
        return {}


# %%
wrong = measure_errors()
release()

# %%
lines = ["| candidate | dX | dW | loss |", "|---|---|---|---|"]
lines += [f"| {n} | {e['hidden_states']:.2e} | {e['weight']:.2e} | {e['loss']:.1e} |" for n, e in wrong.items()]
display(Markdown("\n".join(lines) if wrong else "No candidate's error was measured."))
if baselines.EAGER in wrong:
    eager = wrong[baselines.EAGER]
    of = {"dX": (linear_losses.OURS, "hidden_states"), f"{short} dW": (linear_losses.OURS, "weight")}
    of["float32 dW"] = (linear_losses.OURS_FLOAT32, "weight")
    for what, (name, key) in of.items():
        if name in wrong:
            others = {n: e[key] / eager[key] for n, e in wrong.items() if n not in (*MINE, baselines.EAGER)}
            ratio = wrong[name][key] / eager[key]
            results.add("gradient_error_over_eager", f"head trained, {what}", ratio, "x", baselines=others)

# %% [markdown]
# ### Time and memory against the chunk size, and against the vocabulary
#
# The frontier: every point of ours is one chunk size, and beside it the bare matrix products in chunks of that size.
# Full logits grow with rows x vocabulary; a chunk with its rows x vocabulary, and dW with hidden size x vocabulary.
# Every size is compiled anew, which takes minutes, so a script measures them (`make sweeps`). The figures name its
# hardware and date. They are no part of the score.

# %%
SWEEPS_FILE = Path("resources/measurements/e_backprop_sweeps.json")
sweeps = None
STYLES = {
    linear_losses.OURS: ("tab:blue", "o-"), baselines.FLOOR: ("gray", "--"), baselines.EAGER: ("tab:red", "s"),
    baselines.COMPILED: ("tab:orange", "^"), baselines.LIGER: ("tab:green", "D"), baselines.CCE: ("tab:purple", "v"),
}  # fmt: skip


def swept_points(metric, case):
    """[(size, {candidate: (GiB, ms)})] of the records whose case begins with `case`; none without sweeps."""
    points = []
    if sweeps is None:
        return points
    for time_of, peak_of in zip(sweeps.find(f"{metric}_ms"), sweeps.find(f"{metric}_peak_gib"), strict=True):
        if time_of["case"].startswith(case):
            times = {linear_losses.OURS: time_of["value"], **time_of["baselines"]}
            peaks = {linear_losses.OURS: peak_of["value"], **peak_of["baselines"]}
            size = next(int(word) for word in time_of["case"].split() if word.isdigit())
            points.append((size, {name: (peaks[name], times[name]) for name in times}))
    return points


def plain_log(axis, steps):
    """A logarithmic axis with ticks at `steps` times the powers of ten, as plain numbers."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_ticks([step * 10.0**k for k in range(-6, 6) for step in steps if low <= step * 10.0**k <= high])
    axis.set_major_formatter("{x:.3g}")
    axis.minorticks_off()


# %%
if SWEEPS_FILE.exists():
    sweeps = Measurements.load(SWEEPS_FILE)
    (swept,) = sweeps.find("rows")
    (vocabulary,) = sweeps.find("frontier_vocabulary")
    SWEPT = f"{swept['value']} rows, {swept['case']}, random weights\n{sweeps.hardware['name']}, {sweeps.date}"
    print(f"measured on {sweeps.hardware['name']}, {sweeps.date}")
else:
    print(f"SKIPPED: {SWEEPS_FILE.name} is not here")

# %%
figure, panes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for axes, head_case in zip(panes, HEADS, strict=True):
    points = swept_points("frontier", head_case)
    for name, (color, style) in STYLES.items():
        of = [at[name] for _, at in points if name in at]
        if of and name in (linear_losses.OURS, baselines.FLOOR):
            axes.plot(*zip(*of, strict=True), style, color=color, label=f"{name}, by chunk size")
        elif of:  # independent of our chunk size: the same point at each
            axes.plot(*of[0], style, color=color, label=name)
    for size, at in points:
        axes.annotate(size, at[linear_losses.OURS], xytext=(3, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="extra peak memory, GiB", ylabel="forward + backward, ms", title=head_case)
    plain_log(axes.xaxis, (1, 2, 5))
    plain_log(axes.yaxis, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))
    if points:
        axes.legend(fontsize=7)
if sweeps:
    figure.suptitle(f"vocabulary {vocabulary['value']}, {SWEPT}", fontsize=10)
    figure.savefig("resources/e_backprop_frontier.png", dpi=110)
    plt.show()
plt.close(figure)

# %%
points = swept_points("vocabulary", "vocabulary")
figure, panes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for which, (axes, label) in enumerate(zip(panes, ("extra peak memory, GiB", "forward + backward, ms"), strict=True)):
    for name, (color, style) in STYLES.items():
        of = [(size, at[name][which]) for size, at in points if name in at]
        if of:
            axes.plot(*zip(*of, strict=True), style if "-" in style else style + "-", color=color, label=name)
    axes.set(xlabel="vocabulary", ylabel=label, yscale="log")
    axes.set_xscale("log", base=2)
    if points:
        axes.legend(fontsize=7)
if sweeps:
    figure.suptitle(f"head trained, {SWEPT}", fontsize=10)
    figure.savefig("resources/e_backprop_vocabulary.png", dpi=110)
    plt.show()
plt.close(figure)

# %% [markdown]
# ### Llama 3.2 1B: the standard loss and ours, from the same seed
#
# Two trainings of 60 steps differ in the loss only. Micro-batches have different numbers of labels that are not
# ignored. A step has two micro-batches of two sequences in full fine-tuning, and one of four under QLoRA. The text is
# real, and a chunk has 256 rows (a micro-batch has 384 or 768, and "auto" would take them at once). On a T4 a sequence
# has 128 tokens, not 192, and a chunk 128 rows. The steps repeat the same 15 batches four times, so that learning shows
# as a fall from pass to pass, with any weights. Two modes:
#
# - **Full fine-tuning** with a tied head in float32 (no TF32), by SGD without momentum and without clipping. AdamW
#   divides every gradient by its size, so a wrong scale of the gradients would not show in its curve; SGD shows it.
#   The norm of all gradients is compared at every step as well.
# - **QLoRA** over A's kernel, in float16 with float32 adapters and AdamW.
#
# The comparison itself is tested: two faults are planted into our loss in the same set-up, gradients that are 1 % too
# large, and a mean per chunk in place of one mean over the batch. Each must differ from the standard loss by more than
# the limit of 1e-3 within the 20 steps that it is run for.
#
# One process makes all runs, one after the other. On a large GPU each mode has a process, and the two run side by side.
# With so few rows the logits are a small part of the peak memory; weights and gradients are most of it. The model is
# patched in one line:
#
# ```python
# with use_memory_efficient_loss(model):   # transformers' Trainer, or a loop; of TRL's SFTTrainer, the trainer
#     trainer.train()
# ```
#
# First the hook alone, on a tiny Llama: loss and gradients of a step, and the model after `undo()`.

# %%
from benchmarks.models import random_llama, tiny_llama_config
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss

model = random_llama(tiny_llama_config(), DEVICE)
ids = torch.randint(256, (3, 40), device=DEVICE, generator=generator)
given = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(40, device=DEVICE) < 11, -100)}


def step(**more):
    loss = model(**given, **more, use_cache=False).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


checks = {}
for name, more in (("mean", {}), ("num_items_in_batch", {"num_items_in_batch": torch.tensor(640, device=DEVICE)})):
    exact = step(**more)
    with use_memory_efficient_loss(model, chunk_size=16) as patch:
        checks[f"loss and gradients, {name}"] = far(step(**more), exact) <= 1e-5
        checks[f"no logits, {name}"] = model(**given, **more).logits is None
        model.eval()
        checks[f"in evaluation too, {name}"] = far([model(**given, **more).loss], exact[:1]) <= 1e-6
        model.train()
    checks[f"undone, {name}"] = model(**given, **more).logits.shape == (3, 40, 256) and not patch.active
judge(results, "use_memory_efficient_loss, a step", checks)

# %% [markdown]
# The same under trainers: `transformers.Trainer` with gradient accumulation, an evaluation whose metric gets predicted
# tokens instead of logits, and TRL's `SFTTrainer` with the metrics it logs. Each is compared with the same training
# without our loss.

# %%
from contextlib import nullcontext

from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

logging.getLogger("transformers").setLevel(logging.ERROR)
disable_progress_bars()
rows = [
    {"input_ids": row.tolist(), "labels": [-100] * prompt + row.tolist()[prompt:]}
    for prompt, row in enumerate(torch.randint(2, 256, (12, 16), generator=torch.Generator().manual_seed(SEED)), 1)
]
words = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>")),
    pad_token="<pad>", eos_token="</s>",
)  # fmt: skip
every_step = {
    "output_dir": tempfile.mkdtemp(), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
    "gradient_accumulation_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": [], "seed": SEED,
    "use_cpu": not GPU, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip


def accuracy(evaluated):
    """Of the likeliest next tokens, which come in place of the logits."""
    predicted, labels = evaluated.predictions[0][:, :-1], evaluated.label_ids[:, 1:]
    return {"accuracy": (predicted == labels)[labels != -100].mean()}


# %%
logged, checks = {}, {}
for kind, config, names in (
    (Trainer, TrainingArguments, ("loss", "grad_norm")),
    (SFTTrainer, SFTConfig, ("loss", "grad_norm", "entropy", "mean_token_accuracy")),
):
    for mine in (False, True):
        model = random_llama(tiny_llama_config(), DEVICE)
        trainer = kind(model, config(**every_step), train_dataset=Dataset.from_list(rows), processing_class=words)
        trainer.remove_callback(PrinterCallback)
        with use_memory_efficient_loss(trainer, chunk_size=16) if mine else nullcontext():
            trainer.train()
        entries = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        logged[kind.__name__, mine] = torch.tensor([[entry[name] for name in names] for entry in entries])
    one, other = logged[kind.__name__, True], logged[kind.__name__, False]
    checks[f"{kind.__name__}: {', '.join(names)} of {len(one)} steps"] = far([one], [other]) <= 2e-5

model = random_llama(tiny_llama_config(), DEVICE)
trainer = Trainer(
    model, TrainingArguments(**every_step), eval_dataset=Dataset.from_list(rows), compute_metrics=accuracy
)
trainer.remove_callback(PrinterCallback)
with use_memory_efficient_loss(trainer, predictions=True):
    found = trainer.evaluate()
ids = torch.tensor([row["input_ids"] for row in rows], device=DEVICE)
wanted = torch.tensor([row["labels"] for row in rows], device=DEVICE)[:, 1:]
with torch.no_grad():
    right = model(ids).logits[:, :-1].argmax(-1) == wanted
share = right[wanted != -100].float().mean().item()
checks["evaluation: a metric without logits"] = abs(found["eval_accuracy"] - share) < 1e-6
judge(results, "use_memory_efficient_loss, under trainers", checks)

# %% [markdown]
# The curves: settings and batches, then the process that makes all trainings.

# %%
from benchmarks.backprop import llama_curve
from benchmarks.backprop.curve_data import FAULTS, OURS, STANDARD

CURVES = {"full": "full fine-tuning", "qlora": "QLoRA"}
curve_settings = {"full": {}, "qlora": {"batch": 4, "accumulation": 1}}
if not GPU:  # a tiny model; Triton's interpreter takes seconds a step of QLoRA
    curve_settings = {"full": {"length": 64, "chunk_size": 48}, "qlora": {"steps": 3, "length": 64, "chunk_size": 48}}
elif SLOW:  # float32 without tensor cores: the time of 60 steps is proportional to the tokens of a step
    for given in curve_settings.values():
        given |= {"length": 128, "chunk_size": 128}
curves = {}  # by (mode, run)
ROOMY = GPU and not SLOW and hardware.memory_gib >= 60  # for the processes of both modes side by side
LEAST_FALL = 0.01  # of the loss, from the first pass to the last: the same labels, so no noise but rounding

# %%
free_memory()  # the processes that follow need all of a small GPU
for mode, found in llama_curve.run_modes(curve_settings, together=ROOMY, timeout=600):
    for run_name, curve in found.items():
        if isinstance(curve, str):
            experiments.failed(f"{CURVES[mode]}, {run_name}", curve)
        else:
            curves[mode, run_name] = curve

# %%
compared = [mode for mode in CURVES if (mode, STANDARD) in curves and (mode, OURS) in curves]
is_tiny = any(curve["tiny"] for curve in curves.values())
LLAMA = "tiny Llama" if is_tiny else "Llama 1B"
apart, norms_apart, learns = {}, {}, {}
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
    results.add("loss_curve_max_abs_difference", case, max(apart[mode]), "loss")
    results.add("loss_fall", case, means[0] - means[-1], "loss", baselines={"standard loss": theirs[0] - theirs[-1]})
    print(f"{case}, {ours['weights']}: {len(apart[mode])} steps, losses differ by at most {max(apart[mode]):.1e}")
    print("  mean loss of each pass over the batches:", *(f"{mean:.3f}" for mean in means))
    if all(map(math.isfinite, norms_apart[mode])):  # in float16 a step may overflow, and is left out by the scaler
        results.add("loss_curve_gradient_norm_difference", case, max(norms_apart[mode]), "relative")
        print(f"  the gradients' norms differ by at most {max(norms_apart[mode]):.1e} of themselves")
    if ours["peak_gib"]:
        peaks = {"standard loss": standard["peak_gib"]}
        results.add("training_peak_gib", case, ours["peak_gib"], "GiB", baselines=peaks)
        print(f"  peak memory of a run: ours {ours['peak_gib']:.2f} GiB, standard {standard['peak_gib']:.2f} GiB")
faults = {}
for fault in FAULTS:
    if ("full", STANDARD) in curves and ("full", fault) in curves:
        gaps = llama_curve.differences(curves["full", STANDARD], curves["full", fault])
        faults[fault] = [gap if math.isfinite(gap) else 1e9 for gap in gaps]  # a run that diverged differs, too
        results.add(
            "planted_fault_difference", f"tiny Llama, {fault}" if is_tiny else fault, max(faults[fault]), "loss"
        )
        above = [step for step, gap in enumerate(faults[fault], 1) if gap > 1e-3]
        seen = "never above 1e-3: the curve proves nothing"
        if above:
            seen = f"first above 1e-3 at step {above[0]}, above it at {len(above)} of {len(faults[fault])} steps"
        print(f"planted fault, {fault}: the loss differs by up to {max(faults[fault]):.1e}, {seen}")
if compared == list(CURVES):
    judge(results, f"{LLAMA} learns", learns)
else:
    print("SKIPPED: the comparison needs both losses in both modes")
if is_tiny:
    print("SKIPPED: the criterion is about Llama 1B, which needs a GPU; a tiny one was trained")

# %%
columns = max(1, len(compared))
figure, panes = plt.subplots(
    3, columns, figsize=(6.5 * columns, 8), squeeze=False, sharex="col", height_ratios=(4, 3, 2), layout="constrained"
)
for (upper, middle, lower), mode in zip(panes.T, compared, strict=False):
    shown = range(1, len(apart[mode]) + 1)
    upper.plot(shown, curves[mode, STANDARD]["losses"], color="tab:orange", linewidth=3, label="standard loss")
    upper.plot(shown, curves[mode, OURS]["losses"], color="tab:blue", linewidth=1.2, label="ours")
    middle.plot(shown, [max(gap, 1e-8) for gap in apart[mode]], ".-", color="tab:blue", label="ours")
    for (fault, gaps), color in zip(
        faults.items() if mode == "full" else (), ("tab:purple", "tab:brown"), strict=False
    ):
        steps_shown = range(1, len(gaps) + 1)
        middle.plot(steps_shown, [max(gap, 1e-8) for gap in gaps], "--", color=color, label=f"planted: {fault}")
    middle.axhline(1e-3, color="tab:red", linestyle=":", linewidth=1, label="limit, 1e-3")
    lower.plot(shown, [max(gap, 1e-8) for gap in norms_apart[mode]], ".-", color="tab:green", label="ours")
    if mode == "full":
        lower.axhline(1e-4, color="tab:red", linestyle=":", linewidth=1, label="limit, 1e-4")
    model_text, batch_text = llama_curve.title(curves[mode, OURS]).split("\n")
    parts = (part.strip() for part in (*model_text.split(";"), *batch_text.split(";")))
    upper.set_title("\n".join(textwrap.fill(part, 80) for part in parts), fontsize=8)
    upper.set_ylabel("loss, nats a token")
    middle.set(ylabel="|difference of losses|\nnats a token, 0 drawn at 1e-8", yscale="log")
    lower.set(xlabel="step", ylabel="gradient norms,\nrelative difference", yscale="log", ylim=(5e-9, None))
    for axes in (upper, middle, lower):
        axes.legend(fontsize=7)
if compared:
    Path("resources/q5").mkdir(parents=True, exist_ok=True)
    figure.savefig(f"resources/q5/{'tiny_llama' if is_tiny else 'llama32_1b'}_loss_curve.png", dpi=110)
    plt.show()
plt.close(figure)

# %% [markdown]
# ### GRPO: every loss type, against full logits and against TRL
#
# TRL's GRPO needs from the head one log-probability per sampled token, and their entropies. Everything after that
# (ratio, clipping, KL, normalisation, metrics) is TRL's own code in both trainers. The grid: loss type x importance
# level x two-sided clipping (delta) x KL (beta) x gradient accumulation, on the same inputs. Two combinations of the
# last three are tried here; the package's tests try all. The comparisons are in float64 against a plain full-logits
# trainer (1e-10) and in float32 against TRL's fused head (1e-5): loss, every gradient, every metric.

# %%
from trl import GRPOTrainer

from benchmarks.backprop import grpo, grpo_head
from unsloth_puzzles.backprop.grpo import MemoryEfficientGRPOTrainer

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
PAIRS = ((None, 0.0, 2), (1.4, 0.04, 1))  # delta, beta, accumulation
SEQUENCES, PROMPT, COMPLETION, WORDS = 8, 5, 7, 131
TIGHT = {torch.float64: 1e-10, torch.float32: 1e-5}


def policy(dtype):
    """A tiny Llama whose logits differ as a trained model's do."""
    tiny_policy = random_llama(tiny_llama_config(WORDS), DEVICE, dtype)
    with torch.no_grad():
        for parameter in tiny_policy.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    return tiny_policy


def completions_of(tiny_policy):
    """Inputs as TRL prepares them: padding on both sides, uneven lengths, some ratios clipped."""
    random = torch.Generator().manual_seed(SEED)
    lengths = torch.tensor([[7], [1], [5], [7], [2], [3], [6], [4]])
    data = {
        "prompt_ids": torch.randint(3, WORDS, (SEQUENCES, PROMPT), generator=random),
        "prompt_mask": (torch.arange(PROMPT) >= torch.tensor([[0], [1], [2], [3], [0], [4], [0], [2]])).long(),
        "completion_ids": torch.randint(3, WORDS, (SEQUENCES, COMPLETION), generator=random),
        "completion_mask": (torch.arange(COMPLETION) < lengths).long(),
        "num_items_in_batch": lengths.sum(),
    }
    noise = torch.randn(3, SEQUENCES, COMPLETION, generator=random, dtype=torch.float64)
    data = {name: value.to(DEVICE) for name, value in data.items()}
    tokens, mask = (torch.cat([data[f"prompt_{part}"], data[f"completion_{part}"]], 1) for part in ("ids", "mask"))
    with torch.no_grad():
        logits = tiny_policy(tokens, attention_mask=mask).logits[:, PROMPT - 1 : -1].double()
    now = logits.log_softmax(-1).gather(-1, data["completion_ids"][..., None]).squeeze(-1)
    old, reference, advantages = (0.5 * noise).to(DEVICE, tiny_policy.dtype)
    data |= {"old_per_token_logps": now.to(old.dtype) + old, "ref_per_token_logps": now.to(old.dtype) + reference}
    return data | {"advantages": 2 * advantages[:, 0]}


def grpo_step(trainer, data, accumulation):
    """Losses, gradients and metrics of one optimiser step."""
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = accumulation
    trainer._metrics["train"].clear()
    trainer.model.zero_grad()
    found = []
    for part in range(accumulation):
        rows = slice(part * SEQUENCES // accumulation, (part + 1) * SEQUENCES // accumulation)
        loss = trainer.compute_loss(trainer.model, {k: v[rows] if v.dim() else v for k, v in data.items()})
        loss.backward()
        found.append(loss.detach())
    logged = {name: list(values) for name, values in trainer._metrics["train"].items()}
    return found, [p.grad.clone() for p in trainer.model.parameters()], logged


# %%
scratch = tempfile.mkdtemp()  # the trainers make the folder, although they save nothing
checks, worst = {}, {dtype: 0.0 for dtype in TIGHT}
for dtype, plain in ((torch.float64, grpo.FullLogitsGRPOTrainer), (torch.float32, GRPOTrainer)):
    ours = partial(MemoryEfficientGRPOTrainer, chunk_size=6, compile=False)
    options = {"per_device_train_batch_size": SEQUENCES, "max_completion_length": COMPLETION}
    tokenizer = grpo.tiny_tokenizer()
    both = [
        grpo.make_trainer(make, policy(dtype), tokenizer, grpo.vowel_share, scratch, **options)
        for make in (ours, plain)
    ]
    data = completions_of(policy(dtype))
    for loss_type in LOSS_TYPES:
        for level in ("token", "sequence"):
            for delta, beta, accumulation in PAIRS:
                found = []
                for trainer in both:
                    trainer.model.train()
                    trainer.loss_type, trainer.importance_sampling_level = loss_type, level
                    trainer.args.delta, trainer.beta = delta, beta
                    found.append(grpo_step(trainer, data, accumulation))
                mine, theirs = found
                values = [[torch.tensor(v) for v in logged.values()] for logged in (mine[2], theirs[2])]
                apart = max(far(mine[0], theirs[0]), far(mine[1], theirs[1]), far(*values))
                worst[dtype] = max(worst[dtype], apart)
                same_names = list(mine[2]) == list(theirs[2])
                case = f"{loss_type}, {level}, delta {delta}, beta {beta}, accumulation {accumulation}, {SHORT[dtype]}"
                checks[case] = same_names and apart <= TIGHT[dtype]
for dtype, apart in worst.items():
    results.add("grpo_largest_difference", f"the grid, {SHORT[dtype]}", apart, "relative")
    print(f"{SHORT[dtype]}: largest relative difference over the grid {apart:.1e}")
judge(results, "GRPO", checks)

# %% [markdown]
# ### A real GRPO run
#
# A tiny Llama from fixed-seed weights learns to write vowels: the reward is the share of vowels among the characters of
# a completion. TRL's trainer and ours both run generation, rewards, advantages and updates from the same seed. The two
# sample the same completions until a rounding difference flips a sampled token. Each batch is used once, so the ratio
# is 1, and the loss is the mean advantage whatever the log-probabilities are. The gradient depends on them, so its norm
# is compared.

# %%
SHORTER = {"steps": 24, "sequences": 32, "completion": 12, "learning_rate": 1e-2}
TRAINERS = {"TRL": GRPOTrainer, "ours": partial(MemoryEfficientGRPOTrainer, compile=False)}
runs = {}


def rise(reward):
    """Mean of the last ten steps less that of the first ten (fewer in a run of fewer than thirty)."""
    ends = min(10, len(reward) // 3)
    return statistics.mean(reward[-ends:]) - statistics.mean(reward[:ends])


# %%
for name, make in TRAINERS.items():
    try:
        runs[name] = grpo.train(make, use_cpu=not GPU, **SHORTER)
    except Exception as error:
        experiments.failed(f"GRPO run, {name}", error)
    else:
        print(f"{name}: {len(runs[name]['reward'])} steps in {runs[name]['seconds']:.1f} s")

# %%
rises = {name: rise(run_of["reward"]) for name, run_of in runs.items()}
same_steps = None
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
    print(f"the same rewards for the first {same_steps} of {len(together)} steps")
if same_steps:
    worst_norm = max(norms[:same_steps])
    results.add("grpo_gradient_norm_difference", "GRPO run, while the rewards agree", worst_norm, "relative")
    print(f"while the rewards agree the gradients' norms differ by at most {worst_norm:.1e} of themselves")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
LINES = {"TRL": {"color": "tab:orange", "linewidth": 3}, "ours": {"color": "tab:blue", "linewidth": 1.2}}
for name, run_of in runs.items():
    left.plot(range(1, len(run_of["reward"]) + 1), run_of["reward"], label=name, **LINES[name])
    right.plot(range(1, len(run_of["entropy"]) + 1), run_of["entropy"], label=name, **LINES[name])
left.set(xlabel="step", ylabel="reward: share of vowels", ylim=(0, 1))
right.set(xlabel="step", ylabel="entropy, nats a token", ylim=(0, None))
for axes in (left, right):
    if same_steps is not None and same_steps < len(together):
        axes.axvline(same_steps + 0.5, color="gray", linestyle=":", label="first different completion")
    if runs:
        axes.legend(fontsize=8)
figure.suptitle(f"GRPO, tiny Llama from fixed-seed random weights, float32, seed {SEED}; {HARDWARE}", fontsize=10)
if runs:
    figure.savefig("resources/e_backprop_grpo_reward.png", dpi=110)
    plt.show()
plt.close(figure)

# %% [markdown]
# ### GRPO's memory and time
#
# The head alone: from hidden states of 16 x 1024 completion tokens (4 x 1024 on a GPU with less than 40 GiB) to the
# gradients of hidden states and head, for the same clipped loss; and a whole step of Llama 3.2 1B (forward, loss,
# backward; gradient checkpointing, no generation). "Full logits" holds them all in float32, as one would write it;
# TRL's own trainer has had a fused head since 1.16. Liger's GRPO loss is shown with and without TF32 (below sm_80 it is
# left out). It is not part of the whole step, since TRL 1.16 no longer calls it.

# %%
if GPU and hardware.memory_gib >= 40 and not SLOW:
    head_sizes, step_sizes = {"dtype": SIXTEEN, "rounds": 3}, {"dtype": SIXTEEN, "rounds": 2}
elif GPU:
    head_sizes = {"dtype": SIXTEEN, "sequences": 4}
    step_sizes = {"dtype": SIXTEEN, "sequences": 8, "completion": 128}
else:
    head_sizes = {"dtype": torch.float32, "sequences": 4, "length": 128, "hidden": 64, "vocab": 2048, "rounds": 1}
    step_sizes = {
        "dtype": torch.float32,
        "config": tiny_llama_config(2048),
        "sequences": 8,
        "completion": 32,
        "rounds": 1,
    }
if SLOW:  # without TF32, and slow
    print("SKIPPED: GRPO's Liger, float32 dW, and TRL's whole step: left to larger GPUs")
    head_sizes |= {"rounds": 2, "without": (grpo_head.LIGER, grpo_head.LIGER_TF32, grpo_head.OURS_FLOAT32)}
    step_sizes |= {"rounds": 1, "completion": 64, "without": (grpo_head.TRL,)}
grpo_measured = {}

# %%
for what, measure, sizes in (
    ("head only", grpo_head.head_only, head_sizes),
    ("whole step", grpo.whole_step, step_sizes),
):
    free_memory()
    try:
        grpo_measured[what] = measure(device=DEVICE, **sizes)
    except torch.OutOfMemoryError as error:
        experiments.failed(f"GRPO, {what}", f"out of memory: {str(error).partition('.')[0]}")
free_memory()

# %%
lines = ["| | candidate | extra peak, GiB | ms | spread | error of dX | error of dW |", "|---|---|---|---|---|---|---|"]
for what, found in grpo_measured.items():
    for name, one in found.items():
        of_gradients = [f"{one[key]:.1e}" if key in one else "" for key in ("hidden_error", "weight_error")]
        spread = f"{one['time'].low / 1e3:.1f} to {one['time'].high / 1e3:.1f}"
        cells = (what, name, f"{one['peak_gib']:.3g}", f"{one['time'].median / 1e3:.1f}", spread, *of_gradients)
        lines.append(f"| {' | '.join(cells)} |")
lines += [f"| {what} | not measured | | | | | |" for what in ("head only", "whole step") if what not in grpo_measured]
display(Markdown("\n".join(lines)))
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
if not GPU:
    print("SKIPPED: these are a CPU's figures at a small size; GRPO's memory counts where there is a GPU")

# %%
figure, panes = plt.subplots(1, max(1, len(grpo_measured)), figsize=(11, 3.6), squeeze=False, layout="constrained")
BARS = {
    grpo_head.OURS: "tab:blue", grpo_head.OURS_FLOAT32: "tab:cyan", grpo_head.TRL: "tab:orange",
    grpo_head.LIGER: "tab:green", grpo_head.LIGER_TF32: "olive",
}  # fmt: skip
shown_cases = {what: found for what, found in grpo_measured.items() if found}
for axes, (what, found) in zip(panes[0], shown_cases.items(), strict=False):
    order = sorted(found, key=lambda name: found[name]["peak_gib"], reverse=True)
    bars = axes.barh(order, [found[n]["peak_gib"] for n in order], color=[BARS.get(n, "tab:red") for n in order])
    texts = [f"{found[n]['peak_gib']:.3g} GiB, {found[n]['time'].median / 1e3:.3g} ms" for n in order]
    axes.bar_label(bars, texts, fontsize=8, padding=3)
    axes.set(
        xlabel="extra peak memory, GiB", title=what, xlim=(0, 1.5 * max(one["peak_gib"] for one in found.values()))
    )
tokens = head_sizes.get("sequences", 16) * head_sizes.get("length", 1024)
figure.suptitle(
    f"GRPO, forward + backward, head on {tokens} tokens and step of "
    f"{'Llama 3.2 1B' if GPU else 'a tiny Llama'}, {SHORT[head_sizes['dtype']]}, random weights; {HARDWARE}",
    fontsize=10,
)
if shown_cases:
    figure.savefig("resources/e_backprop_grpo_memory.png", dpi=110)
    plt.show()
plt.close(figure)

# %% [markdown]
# ### What this does not do
#
# - **Less memory than one chunk of logits.** Apple's CCE never writes a logit to memory: its extra memory is dX, and dW
#   if the head is trained. That is less than ours in both cases, and it needs no chunk size. Liger's chunks are smaller
#   than ours, so it needs a little less as well. CCE takes more time: it makes the logits twice, in Triton, and relies
#   on blocks whose gradients are small enough to be skipped. Both compute cross entropy only.
# - **The shortest time if memory does not matter.** `torch.compile` of the plain loss holds all logits in 16 bits,
#   needs several times our memory, and is as fast or faster; for GRPO so is TRL's own kernel on full logits. The aims
#   below compare GRPO's head only; the cell after this list compares its whole step.
# - **Small vocabularies.** At 8192 ours is no faster than eager mode and slower than Liger's, as the figure over the
#   vocabulary shows. The probable cause is the host, which needs almost as long for a chunk as the GPU. Logits of that
#   size are small and need no chunks.
# - **A loss that mixes rows** (a contrastive loss over the batch, for example) is not a sum over rows. The first call
#   compares a chunk with its halves and refuses such a loss.
# - **Double backward and `torch.func`** raise an error: gradients are made in the forward, once.
# - **A head in an FSDP2 group of its own** is refused: the chunks call the head without a graph, so FSDP2 would leave
#   the group's gradients on their rank. accelerate makes such a group of final norm and head. A head that is replicated
#   works, and so does one in the root group, as `shard_qlora(..., shard_embeddings=True)` makes it: section B trains
#   both. The GRPO trainer refuses FSDP and DeepSpeed. Tensor parallelism of the head is not tested.
# - 16-bit dW is rounded at every chunk, as the errors above show; `accumulate_dtype=torch.float32` adds the chunks in
#   float32, and needs twice dW's memory.
# - The times hold for a compiled function. In eager mode the same function makes several passes over each chunk.
# - The GRPO trainer is written for TRL 1.16 and refuses any other: what the trainer asks of its model is not a public
#   interface. `cast_lm_head_to_fp32` and logits that are neither scaled nor soft-capped but changed otherwise are
#   refused by name.
# - Full fine-tuning of 1 B weights with AdamW in float32 needs 18 GiB of weights, gradients and moments, which is more
#   than a T4 has with any loss. The curve uses SGD, which needs 9 GiB.

# %%
whole_step = grpo_measured.get("whole step", {}) if GPU else {}
for name in (grpo_head.TRL, grpo_head.FULL) if grpo_head.OURS in whole_step else ():
    if name in whole_step:
        ours, other = (whole_step[one]["time"].median / 1e3 for one in (grpo_head.OURS, name))
        slower = "slower" if ours > other else "faster"
        print(f"a whole GRPO step: ours {ours:.1f} ms, {name} {other:.1f} ms: {abs(ours / other - 1):.1%} {slower}")
if grpo_head.OURS not in whole_step:
    print("SKIPPED: a whole GRPO step is compared where it was measured, on a GPU")

# %% [markdown]
# ### Aimed at, and reached
#
# The aims of this section for an H200, and what this run measured. The ratio to the bare matrix products with a frozen
# head has the smallest margin: there the function of a chunk stands beside two products instead of three. An untimed
# call of the same candidate precedes each sample. Without it the products' own time varied by more than that margin,
# probably because the clock rate follows the power that the previous candidate has drawn. It still varies so much that
# another run may miss this aim: the sweep over chunk sizes, a run of its own, has the ratio above it.

# %%
AIMS = [  # metric, case, at most
    ("extra_peak_gib", f"head trained, {short} dW", 1.35),
    ("extra_peak_gib", "head trained, float32 dW", 2.40),
    ("extra_peak_gib", "head frozen", 0.35),
    ("time_over_gemm_floor", f"head trained, {short} dW", 1.10),
    ("time_over_gemm_floor", "head frozen", 1.10),
    ("time_over_liger", f"head trained, {short} dW", 1.00),
    ("time_over_liger", "head frozen", 1.00),
    ("gradient_error_over_eager", "head trained, dX", 1.05),
    ("gradient_error_over_eager", "head trained, float32 dW", 1.00),
    ("loss_curve_max_abs_difference", "Llama 1B, full fine-tuning", 2e-4),
    ("loss_curve_gradient_norm_difference", "Llama 1B, full fine-tuning", 1e-4),
    ("loss_curve_max_abs_difference", "Llama 1B, QLoRA", 1e-3),
    ("grpo_peak_over_full_logits", "head only", 0.35),
    ("grpo_peak_over_trl", "head only", 1.10),
    ("grpo_time_over_trl", "head only", 1.00),
    ("grpo_peak_over_liger", "head only", 1.00),
]
lines, reached = ["| metric | case | at most | measured | |", "|---|---|---|---|---|"], 0
for metric, case, aim in AIMS if GPU else ():
    found = results.find(metric, case)
    good = bool(found) and found[0]["value"] <= aim
    reached += good
    text = f"{found[0]['value']:.4g} {found[0]['unit']}" if found else "SKIPPED: not measured here"
    lines.append(f"| {metric} | {case} | {aim:.4g} | {text} | {'reached' if good else 'missed' if found else ''} |")
if GPU:
    display(Markdown("\n".join(lines)))
    print(f"{reached} of {len(AIMS)} reached on {HARDWARE}")
else:
    print("SKIPPED: the aims are for a GPU at the puzzle's shape")

# %% [markdown]
# ### Score of this section

# %%
from unsloth_puzzles.bench import scorecard

results.save()
rows = [row for row in scorecard.score("resources/measurements") if row.challenge == "E"]
display(Markdown(scorecard.table(rows)))
_ = section.finish()

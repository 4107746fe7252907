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
#   input, the embeddings, wants no gradient.
# - **Lengths are variables** from the first compilation on: batch and length are marked dynamic, and nothing in the
#   graph compares them with another size that happens to be equal (`use_duck_shape`).
# - **Masks are tensors.** Flex attention's block indices are found by comparing the first and last position, and the
#   first and last document, of each block of 128; window and document ids are tensors. So neither the window nor the
#   packing of a batch is part of the code.
# - **NF4 through A's operator.** Each linear layer de-quantises its weight in the forward and again in the backward; to
#   the compiler the second call depends on the gradient, or both would be merged and every weight kept.
# - **What is kept for the backward** is the partitioner's choice. Told to save a tenth (`activation_memory_budget=0.9`)
#   it makes again whatever costs no matrix product: the MLP's activation, the normed inputs.
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
# show: unsloth_puzzles/compiled/count.py

# %%
# write: unsloth_puzzles/compiled/__init__.py

# %%
# write: unsloth_puzzles/comparisons/qlora_steps.py

# %%
from unsloth_puzzles.attention import BACKENDS, attention, backend_table
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.compiled.count import count_compilations

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
# ### What this section does not show yet
#
# Its checks and figures: each backend against float64, the counted training run, its loss beside the uncompiled one's,
# time and memory of its steps. Until a run here measures them the criteria count as not measured. Known and not mended:
# flex attention outside of a compiled layer fails to compile on a GPU if the first length it meets is below 128 (77
# was seen to fail), since Inductor then takes its kernel for decoding; and a model that is trained on plain and packed
# batches and then evaluated on short ones needs more variants of a layer than Dynamo's limit of 8, and stops with an
# error that says so.

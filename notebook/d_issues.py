# %% [markdown]
# ## D. Unsloth's open issues
#
# **Task.** Issues of the Unsloth repository, each worth points of its own. **Criteria** (8 points still open): a
# tool-calling notebook (1), GGUF export of vision fine-tunes (1), one simple interface over xformers, SDPA, flash and
# flex attention (2), sequence classification (1), a vision data collator that mixes text-only and image rows (1), flex
# attention with dynamic lengths, sliding windows and packed sequences (2).
#
# ### The two about attention
#
# Section C needed them, so their code stands there: one interface is `unsloth_puzzles.attention`, and flex attention
# that has two graphs at most for all lengths, windows and packings is its `flex.py` and `blocks.py`.

# %%
from benchmarks.attention.checks import Inputs, check_backends, check_flex
from unsloth_puzzles.attention import BACKENDS, attention
from unsloth_puzzles.bench import section
from unsloth_puzzles.bench.experiments import free_memory, judge
from unsloth_puzzles.bench.record import Measurements

section.start("D. Unsloth's open issues")
GPU = hardware.device == "cuda"
DEVICE = hardware.device
DTYPE = torch.float32 if not GPU else torch.bfloat16 if hardware.bf16 else torch.float16
issues = Measurements("resources/measurements/d_issues.json", hardware)
free_memory()

# %% [markdown]
# The interface in use, on one packed batch with a window:

# %%
(query, key, value), _ = Inputs(DEVICE, DTYPE).draw(200)
documents = torch.arange(200, device=DEVICE).expand(2, -1) // 60  # four documents a row, the last one shorter
exact = attention(*(t.double() for t in (query, key, value)), window=32, documents=documents, backend="dense")
for backend in ("auto", *BACKENDS):
    try:
        found = attention(query, key, value, window=32, documents=documents, backend=backend)
    except (ValueError, RuntimeError) as refusal:
        print(f"{backend:>8}: {refusal}")
        continue
    off = ((found.double() - exact).norm() / exact.norm()).item()
    print(f"{backend:>8}: relative error {off:.1e}")
    if not off <= 4 * torch.finfo(DTYPE).eps:
        experiments.failed(f"{backend}, packed with a window", f"relative error {off:.1e}")

# %% [markdown]
# ### Check 1: every backend against float64
#
# Forward and, on a GPU, backward; each request on each backend that can do it. A backend's error may be no larger than
# that of the formula computed in float32 on the same 16-bit inputs plus two roundings of its dtype, since kernels round
# the probabilities and the output, too; in the gradients of query and key also two roundings of the term that a softmax
# subtracts, which cancels where a query sees few keys. What a backend cannot do it must refuse: the soft cap, by all
# but flex and the formula. A GPU below sm_80 cannot have flash attention: there its check is that it says so.

# %%
lines = []
for backend, one in check_backends(DEVICE, DTYPE, (77, 256, 1000) if GPU else (77,)).items():
    if one.missing:
        print(f"{'REFUSED' if one.checks else 'SKIPPED'}: {backend}: {one.missing}")
    if one.checks:
        judge(issues, f"attention, {'SDPA' if backend == 'sdpa' else backend}", one.checks)
    if one.beside_sdpa:
        # By the order of its sums alone an error is a hundredth larger or smaller.
        no_worse = {f"comparison {n}": max(of) <= 1.01 for n, of in enumerate(one.beside_sdpa, 1)}
        share = sum(no_worse.values()) / len(no_worse)
        issues.add("errors_no_larger_than_sdpas", backend, share, "fraction")
        spans = (f"{min(of):.2f} to {max(of):.2f}" for of in zip(*one.beside_sdpa, strict=True))
        lines.append(f"| {backend} | {' | '.join(spans)} |")
names = ("output", "dQ", "dK", "dV") if GPU else ("output",)
display(
    Markdown("\n".join([f"| error, times SDPA's | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", *lines]))
)

# %% [markdown]
# ### Check 2: flex attention over lengths, windows and packed sequences
#
# 52 lengths, three windows, packed and not: every result is compared with the formula, and the graphs are counted. Then
# `fail_on_recompile` forbids any more, for lengths never seen.

# %%
flex = check_flex(DEVICE, DTYPE)
print(f"{len(flex.lengths)} lengths from {min(flex.lengths)} to {max(flex.lengths)}: {flex.counts.graphs} graphs")
display(Markdown(flex.counts.table()))
judge(issues, "flex, dynamic lengths", flex.checks["dynamic"])
judge(issues, "flex, sliding windows", flex.checks["windows"])
judge(issues, "flex, packed sequences", flex.checks["packed"])
if flex.counts.graphs:
    issues.add("compilations", "flex", flex.counts.compilations, "compilations")

# %% [markdown]
# ### Under models of transformers
#
# The same goes by name, after `register()`, with packed batches told by their position ids. Three small models in
# float32 beside transformers' own eager attention:

# %%
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig

from unsloth_puzzles.attention.models import NAME, register

register()
small = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
}  # fmt: skip
capped = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 10}
MODELS = {
    "Llama": LlamaConfig(**small),
    "Mistral, window 9": MistralConfig(**small, sliding_window=9),
    "Gemma 2, window 9, soft cap": Gemma2Config(**small, sliding_window=9, **capped),
}
ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(SEED)).to(DEVICE)
of_documents = torch.cat([torch.arange(11), torch.arange(29)]).expand(2, -1).to(DEVICE)  # two a row
checks = {}
for name, config in MODELS.items():
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(DEVICE).eval()
    for kind, given in (("one document", {}), ("packed", {"position_ids": of_documents})):
        logits = []
        for implementation in ("eager", NAME):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                logits.append(model(ids, use_cache=False, **given).logits)
        off = ((logits[1] - logits[0]).norm() / logits[0].norm()).item()
        print(f"{name}, {kind}: logits differ by {off:.1e}")
        checks[f"{name}, {kind}"] = off <= 1e-5
judge(issues, "attention under transformers' models", checks)

# %% [markdown]
# ### Score of this section
#
# The other four have no code here: they count as not measured.

# %%
from unsloth_puzzles.bench import scorecard

issues.save()
rows = [row for row in scorecard.score("resources/measurements") if row.challenge == "D"]
display(Markdown(scorecard.table(rows)))
_ = section.finish()

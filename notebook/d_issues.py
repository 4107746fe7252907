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
# Section C needed them, so their code and their checks stand there: one interface is `unsloth_puzzles.attention`
# (every backend against float64, check 1), and flex attention that has two graphs at most for all lengths, windows
# and packings is its `flex.py` and `blocks.py` (check 2). The interface in use, on one packed batch with a window:

# %%
section.start("D. Unsloth's open issues")
(query, key, value), _ = drawn(200, dtype)
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
    assert off <= 4 * torch.finfo(dtype).eps, f"{backend} computes something else"

# %% [markdown]
# Under a model of transformers the same goes by name, after `register()`, with packed batches told by their position
# ids. Three small models in float32 beside transformers' own eager attention:

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
ids = torch.randint(64, (2, 40), generator=generator).to(DEVICE)
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
issues.save()

# %% [markdown]
# ### Score of this section
#
# The other four have no code here: they count as not measured.

# %%
rows = [row for row in scorecard.score("resources/measurements") if row.challenge == "D"]
display(Markdown(scorecard.table(rows)))
_ = section.finish()

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
# Under a model of transformers the same goes by name, `attn_implementation="unsloth_puzzles"` after
# `unsloth_puzzles.attention.models.register()`, with packed batches told by their position ids.
#
# ### Score of this section
#
# The other four have no code here: they count as not measured.

# %%
rows = [row for row in scorecard.score("resources/measurements") if row.challenge == "D"]
display(Markdown(scorecard.table(rows)))
_ = section.finish()

# %% [markdown]
# ## Scorecard
#
# Computed from the measurement files that this run wrote to `resources/measurements/`; no value is typed in. A
# criterion that this machine could not measure, or whose challenge has no section yet, earns nothing and says so.

# %% tags=["report"]
from unsloth_puzzles import scorecard

rows = scorecard.score("resources/measurements")
display(Markdown(scorecard.table(rows)))

# %% [markdown]
# ## Scorecard
#
# Computed from the measurement files that this run wrote to `resources/measurements/`; no value is typed in. A
# criterion that this machine could not measure, or whose challenge has no section yet, earns nothing and says so.
#
# In the committed notebook this cell was executed after the run, on the files that the run had written: the run stopped
# at the first check of section C, which is not in it.

# %% tags=["report"]
from unsloth_puzzles import scorecard

rows = scorecard.score("resources/measurements")
display(Markdown(scorecard.table(rows)))

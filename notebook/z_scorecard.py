# %% [markdown]
# ## Time and memory of the run
#
# The T4 column is a prediction from the bytes that each section moves and the FLOPs it does, on a GPU with a T4's
# bandwidth and rates. It was not measured on one, and it is not part of the score.

# %% tags=["report"]
display(Markdown(section.summary()))

# %% [markdown]
# What raised an error in this run:

# %% tags=["report"]
from unsloth_puzzles.bench import experiments

display(Markdown(experiments.report()))

# %% [markdown]
# ## Scorecard
#
# Computed from the measurement files that this run wrote to `resources/measurements/`; no value is typed in. A
# criterion that this machine could not measure, or whose challenge has no section yet, earns nothing and says so.

# %% tags=["report"]
from unsloth_puzzles import scorecard

rows = scorecard.score("resources/measurements")
display(Markdown(scorecard.table(rows)))

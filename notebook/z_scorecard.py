# %% [markdown]
# ## Time and memory of the run
#
# The GPU peak is PyTorch's in this process; memory of the processes that a section starts is not included. The T4
# column is a lower bound, not a prediction of the section's time: the bytes and FLOPs that the section counts, at this
# run's sizes, over a T4's bandwidth and rates, without the host. It is not part of the score. README reports, under its
# limits, the time on a T4 that the rehearsal predicts.

# %% tags=["report"]
display(Markdown(section.summary()))

# %% [markdown]
# What raised an error or failed a check in this run:

# %% tags=["report"]
from unsloth_puzzles.bench import experiments

display(Markdown(experiments.report()))

# %% [markdown]
# ## Scorecard
#
# Computed from the measurement files that this run wrote to `resources/measurements/`; no value is typed in. A
# criterion without a measurement earns nothing. Where the puzzle has a penalty for what is not shown, a missing
# measurement costs it, unless this machine has no GPU and the measurement needs one.

# %% tags=["report"]
from unsloth_puzzles.bench import scorecard

rows = scorecard.score("resources/measurements")
display(Markdown(scorecard.table(rows)))

# %% [markdown]
# The row "the script on two GPUs" gives its points on any two GPUs and with random weights, because its verdict says
# so. Kaggle's two T4s, which the puzzle asks for, are shown only if the verdict is "met" alone.

# %% [markdown]
# ## Scorecard
#
# The first table gives time and memory of each section. The GPU peak is PyTorch's in this process, without the
# processes that a section starts. The T4 column is a lower bound: the bytes and FLOPs that the section counts, divided
# by the T4's bandwidth and rates. Below the table stands every error and failed check of this run.
#
# The second table is the score. It comes from the files that this run wrote to `resources/measurements/`. A criterion
# without a measurement earns nothing. Where the puzzle has a penalty for missing evidence, a missing measurement costs
# it, unless the measurement needs a GPU and this machine has none. The row "the script on two GPUs" accepts any two
# GPUs and random weights, and its verdict names both. Only the verdict "met" alone shows Kaggle's two T4s.

# %% tags=["report"]
from IPython.display import Markdown, display

from unsloth_puzzles.bench import experiments, scorecard, section

display(Markdown(section.summary()))
display(Markdown(experiments.report()))
display(Markdown(scorecard.table(scorecard.score("resources/measurements"))))

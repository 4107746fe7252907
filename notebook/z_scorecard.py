# %% [markdown]
# ## Scorecard
#
# The first table gives time and memory of each section. The GPU peak is PyTorch's in this process, without the
# processes that a section starts. That of C comes from an uncompiled run. The list below it has every error and failed
# check of this run.
#
# The second table is the score. It comes from the files that this run wrote to `resources/measurements/`. A criterion
# without a measurement earns nothing. Where the puzzle has a penalty for missing evidence, a missing measurement costs
# it, unless the measurement needs a GPU and this machine has none. The puzzle names a T4 for the speed of challenge A
# and Kaggle's two T4s for the script of challenge B. Another GPU earns these points too. Then the verdict says "but not
# on a T4", and the row of the sum says how many points these are. The verdict names random weights for the script of B.
# The models of all other criteria have random weights, too, except those of tool calling and of classification (and of
# the curves in E, if the hub can be reached).

# %% tags=["report"]
from IPython.display import Markdown, display

from unsloth_puzzles.bench import experiments, scorecard, section

display(Markdown(section.summary()))
display(Markdown(experiments.report()))
display(Markdown(scorecard.table(scorecard.score("resources/measurements"))))

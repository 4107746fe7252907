"""The Unsloth Puzzles, solved: one capability a folder, each of which can be imported alone.

``unsloth_puzzles.nf4`` de-quantises bitsandbytes NF4 weights in one Triton kernel; ``unsloth_puzzles.bench`` measures;
``unsloth_puzzles.bench.scorecard`` marks the measurements against the rubric of the puzzles;
``unsloth_puzzles.supported`` says which releases of other libraries are tested.
"""

from unsloth_puzzles.supported import warn_of_untested

__version__ = "0.1.0"

warn_of_untested()

"""The Unsloth Puzzles, solved: one capability a folder, each of which can be imported alone.

nf4              bitsandbytes NF4 weights de-quantised in one Triton kernel
fsdp2            QLoRA sharded over GPUs by FSDP2
compiled         QLoRA under torch.compile without graph breaks
attention        flash, flex, xformers and SDPA behind one function
vision           batches that mix rows of text and of images
gguf             export of fine-tuned models to llama.cpp
classification   sequence classifiers on 4-bit models
tool_calling     conversations with functions
backprop         losses that never hold the logits
bench            measuring, and the scorecard of the puzzles
supported        which releases of other libraries are tested
"""

from unsloth_puzzles.supported import warn_of_untested

__version__ = "0.1.0"

warn_of_untested()

"""QLoRA under torch.compile: which regions are compiled, and how compilations are counted."""

"""QLoRA under torch.compile, and counts of what the compiler does."""

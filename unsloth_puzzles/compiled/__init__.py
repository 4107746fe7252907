"""QLoRA under torch.compile."""

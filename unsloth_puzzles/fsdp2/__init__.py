"""QLoRA sharded by FSDP2: each NF4 weight and its scales are one byte stream, split evenly over the ranks."""

"""Tool calling measured: tools, questions with held-out wordings, a QLoRA run, and what it changed."""

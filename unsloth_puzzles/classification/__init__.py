"""Sequence classification with 4-bit language models: loading, adapters, losses, saving. See `load.load_classifier`."""

"""Batches that mix rows with images and rows without: a collator for vision-language models, and a patch for Mllama."""

"""Baselines, peers, sweeps and harnesses. They import `unsloth_puzzles`, which imports none of them."""

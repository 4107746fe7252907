"""The families' tiny models, each made once."""

import copy
from functools import cache

import pytest

from benchmarks.vision.families import FAMILIES
from unsloth_puzzles.vision.mllama import patch_mllama

QUICK = ("qwen2_vl", "mllama", "pixtral")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


@cache
def family(name: str):
    """Processor and model, Mllama patched; for tests that change neither."""
    processor, model = FAMILIES[name]()
    if name == "mllama":
        patch_mllama(model)
    return processor, model


@cache
def _fresh(name: str):
    return FAMILIES[name]()


def fresh(name: str):
    """Processor and model for a test that changes them, as transformers makes them."""
    return copy.deepcopy(_fresh(name))

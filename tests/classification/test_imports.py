"""Who imports what: of the package the 4-bit helpers alone, and no optional library by importing a folder."""

import subprocess
import sys

from tests.test_layers import imported


def test_classification_stands_on_nf4():
    assert imported("classification") == {"classification", "nf4", "device", "kv_cache", "stored_dtype"}


def test_the_folder_imports_no_library():
    code = "import sys, unsloth_puzzles.classification; print({'transformers', 'peft', 'torch'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"

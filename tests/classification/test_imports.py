"""Importing the folder imports no optional library; `test_layers` knows what it imports of the package."""

import subprocess
import sys


def test_the_folder_imports_no_library():
    code = "import sys, unsloth_puzzles.classification; print({'transformers', 'peft', 'torch'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"

"""Without a GPU the kernels run in Triton's interpreter, and the gpu-marked tests are skipped with a reason."""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Inductor compiles and loads test programs to see whether the compiler knows the vector instructions of the CPU, which
# takes up to 70 s a process. It does; the environment passes that on to subprocesses.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# A library that another process has not yet written, or never finished, cannot be loaded.
_LIBRARIES = tempfile.TemporaryDirectory(prefix="inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _LIBRARIES.name
# PEFT builds an extension for BOFT, and waits for ever if a run that was killed has left the lock of that build.
os.environ["TORCH_EXTENSIONS_DIR"] = f"{_LIBRARIES.name}/extensions"

GPU = torch.cuda.is_available()
if not GPU:
    assert "triton.language" not in sys.modules, "TRITON_INTERPRET must be set before triton is imported"
    os.environ["TRITON_INTERPRET"] = "1"

# How fast hypothesis draws depends on what else the machine does.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

# Files of few tests, each of many seconds.
LONG = (
    "test_mutations.py",
    "test_notebook.py",
    "test_notebook_failures.py",
    "test_cross_compile.py",
    "test_qlora.py",
    "test_trainer.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts with the files that take longest, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)
    if GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))


@pytest.fixture(scope="session")
def smollm2_folder() -> str:
    """The folder of SmolLM2's GGUF file: UNSLOTH_PUZZLES_SMOLLM2, or build/model, where `make test-slow` puts it."""
    from benchmarks.smollm2 import FILE

    folder = os.environ.get("UNSLOTH_PUZZLES_SMOLLM2", str(Path(__file__).parents[1] / "build/model"))
    if not Path(folder, FILE).exists():
        pytest.skip(f"SmolLM2's file could not be had: python -m benchmarks.smollm2 {folder}")
    return folder


@pytest.fixture(autouse=True)
def _same_compiler() -> Iterator[None]:
    """Restore CC and CXX: PEFT leaves both at gcc if BOFT's extension cannot be built, and gcc links no C++."""
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap() -> None:
    """Leave imports and what earlier modules keep out of garbage collections, which take seconds otherwise."""
    gc.collect()
    gc.freeze()

"""Without a GPU the kernels run in Triton's interpreter, and the gpu-marked tests are skipped with a reason."""

import os
import sys

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    assert "triton.language" not in sys.modules, "TRITON_INTERPRET must be set before triton is imported"
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))

"""What the GPU at hand can do, as this package is to see it.

A leaf: it imports nothing of the package, and every other module asks it instead of PyTorch. With
`UNSLOTH_PUZZLES_REHEARSAL=T4` in the environment the answer is a T4's, whatever card is there. Libraries, which ask
PyTorch, still get the truth.

Ask outside of functions that are compiled: an answer that is read while Dynamo traces becomes part of the graph.
"""

import os

import torch

REHEARSAL = "UNSLOTH_PUZZLES_REHEARSAL"
T4 = 75


def rehearsing() -> bool:
    """Whether this process is to behave as on a T4. Raises ValueError for a value of the variable but "T4" or ""."""
    value = os.environ.get(REHEARSAL, "")
    if value not in ("", "T4"):
        raise ValueError(f"{REHEARSAL} must be 'T4' or empty, got {value!r}")
    return value == "T4"


def capability(device: torch.device | str | int | None = None) -> int:
    """Compute capability of `device` (the current one by default) as 10 x major + minor: 75 for a T4, 90 for an H200.

    0 for a CPU, and where there is no CUDA GPU.
    """
    kind = "cuda" if device is None or isinstance(device, int) else torch.device(device).type
    if kind != "cuda" or not torch.cuda.is_available():
        return 0
    if rehearsing():
        return T4
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor

"""What machine is this? One probe decides sizes and what can run."""

import os
import platform
import shutil
import subprocess
import warnings
from dataclasses import dataclass, field
from importlib import metadata

import torch
import triton

from unsloth_puzzles.bench import t4
from unsloth_puzzles.bench.ceilings import measure_copy_bandwidth, measure_matmul_flops
from unsloth_puzzles.device import capability, rehearsing


class MeasuringError(UserWarning):
    """A figure that cannot be true, such as more bandwidth than the machine has."""


@dataclass(frozen=True)
class Hardware:
    """The machine as a notebook may use it: in a rehearsal that is less than what is plugged in.

    `copy_bandwidth` (bytes/s, read + written) and `matmul_flops` (FLOP/s by dtype name) are measured on random data;
    None and {} where they were not. `bf16` is native bf16 matmul (sm_80 and later). `sm` is 10 major + minor.
    """

    name: str
    device: str
    sm: int | None
    count: int
    memory_gib: float
    multiprocessors: int | None
    l2_bytes: int | None
    bf16: bool
    interpreter: bool
    copy_bandwidth: float | None = None
    matmul_flops: dict[str, float] = field(default_factory=dict)
    rehearsal: bool = False

    def copy_fraction(self, bytes_moved: float, microseconds: float) -> float | None:
        """Share of the measured copy bandwidth.

        A share above 1 gives a `MeasuringError` warning: nothing that goes to DRAM is faster than a copy, so the
        buffers were in the L2 cache (see `timing.rotations`) or the bytes were miscounted.

        Args:
            bytes_moved: Bytes read and written.
            microseconds: In this time.

        Returns:
            The share; None where the copy bandwidth was not measured.

        Raises:
            ValueError: `microseconds` is not positive.
        """
        if self.copy_bandwidth is None:
            return None
        if microseconds <= 0:
            raise ValueError(f"microseconds must be a positive time, got {microseconds!r}")
        fraction = bytes_moved / (microseconds * 1e-6) / self.copy_bandwidth
        if fraction > 1:
            message = (
                f"MEASURING ERROR: {fraction:.1%} of the measured copy bandwidth ({self.copy_bandwidth:.3g} bytes/s)"
            )
            warnings.warn(message, MeasuringError, stacklevel=2)
        return fraction

    def describe(self) -> str:
        """One line for a heading or a legend."""
        parts = [self.name + (f" x {self.count}" if self.count > 1 else "")]
        parts += [f"sm_{self.sm}"] if self.sm else []
        parts += [f"{self.memory_gib:.1f} GiB", "bf16" if self.bf16 else "no native bf16"]
        parts += [f"copies {self.copy_bandwidth / 1e12:.2f} TB/s"] if self.copy_bandwidth else []
        parts += [f"{name} matmul {rate / 1e12:.0f} TFLOP/s" for name, rate in self.matmul_flops.items()]
        return ", ".join(parts + (["REHEARSING A T4"] if self.rehearsal else []))


def probe(measure: bool = True) -> Hardware:
    """Look at the machine.

    In a rehearsal (`device.rehearsing`) the process is held to what a T4 offers: the memory that PyTorch's allocator
    can have there, one GPU, no native bf16, sm_75.

    Args:
        measure: On a GPU, measure its copy bandwidth and matrix rates too, which takes a few seconds.

    Raises:
        ValueError: As `device.rehearsing` does.
    """
    rehearsal = rehearsing()
    interpreter = bool(triton.knobs.runtime.interpret)
    if not torch.cuda.is_available():
        return Hardware(
            name="CPU, Triton interpreter" if interpreter else "CPU",
            device="cpu",
            sm=None,
            count=0,
            memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
            multiprocessors=None,
            l2_bytes=None,
            bf16=False,
            interpreter=interpreter,
            rehearsal=rehearsal,
        )
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory_gib = properties.total_memory / 2**30
    if rehearsal and memory_gib > t4.MEMORY_GIB:
        torch.cuda.set_per_process_memory_fraction(t4.ALLOCATOR_GIB / memory_gib)
        memory_gib = t4.MEMORY_GIB
    sm = capability()
    bf16 = sm >= 80
    copy_bandwidth = measure_copy_bandwidth() if measure else None
    matmul_flops = measure_matmul_flops(bf16) if measure else {}
    torch.cuda.empty_cache()  # worker processes may need these 2 GiB
    return Hardware(
        name=properties.name,
        device="cuda",
        sm=sm,
        count=1 if rehearsal else torch.cuda.device_count(),
        memory_gib=memory_gib,
        multiprocessors=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        bf16=bf16,
        interpreter=interpreter,
        copy_bandwidth=copy_bandwidth,
        matmul_flops=matmul_flops,
        rehearsal=rehearsal,
    )


def versions() -> dict[str, str | None]:
    """Versions of the main packages that a figure depends on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    measured = ("torch", "triton", "bitsandbytes", "transformers", "peft", "trl")
    for package in (*measured, "accelerate", "datasets", "xformers", "liger-kernel", "cut-cross-entropy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # with its CUDA tag, which the package's metadata may lack
    found["cuda"] = torch.version.cuda
    found["driver"] = _driver_version()
    return found


def _driver_version() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else None

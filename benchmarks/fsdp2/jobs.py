"""The processes that the notebook's section B starts: where its ranks run, and what each run returns."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import partial

from benchmarks.at_once import at_once
from benchmarks.fsdp2 import script
from benchmarks.fsdp2.ranks import start_ranks
from unsloth_puzzles.bench import experiments
from unsloth_puzzles.bench.child import ChildError
from unsloth_puzzles.bench.experiments import free_memory
from unsloth_puzzles.bench.hardware import Hardware

RANKS, TIMEOUT = 2, 900  # seconds
Job = Callable[[], dict]


class Jobs:
    """Makes the jobs of a machine: functions without arguments that start processes and return what these wrote.

    Args:
        hardware: What `probe()` returned.
        all_gpus: CUDA_VISIBLE_DEVICES before the notebook hid all GPUs but one; None where it was not set.

    Attributes:
        gpus: All GPUs of the machine.
        two_gpus: Whether each of RANKS ranks has a GPU of its own.
        side_by_side: Whether several jobs fit the machine at once.
        where: What two ranks run on, in words.
        visible: The GPUs of the ranks, for CUDA_VISIBLE_DEVICES.
        folder: Where runs write.
    """

    def __init__(self, hardware: Hardware, all_gpus: str | None):
        on_gpu = hardware.device == "cuda"
        self.on_gpu, self.folder = on_gpu, tempfile.mkdtemp()
        if on_gpu and all_gpus is None:
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
            self.gpus = [str(number) for number in range(len(listed.splitlines()))]
        else:
            self.gpus = (all_gpus or "").split(",") if on_gpu else []
        self.two_gpus = len(self.gpus) >= RANKS and not hardware.rehearsal
        large = hardware.memory_gib >= 60 and os.cpu_count() >= 16
        self.side_by_side = on_gpu and not hardware.rehearsal and large
        self.visible = ",".join(self.gpus[: RANKS if self.two_gpus else 1])
        name = hardware.name + (" held to a T4's limits" if hardware.rehearsal else "")
        self.where = (
            f"{RANKS} x {name}, NCCL" if self.two_gpus
            else f"{RANKS} ranks that share one {name} through gloo" if on_gpu
            else f"{RANKS} processes on a CPU, gloo"
        )  # fmt: skip

    def module(self, module: str, *, ranks: int, settings: object = None) -> Job:
        """A job: run a module in this many processes; it returns what the module wrote.

        Args:
            module: One that takes the path of its result and, with `settings`, the path of these.
            ranks: 1 for a plain process.
            settings: What JSON can write.
        """
        paths = [] if settings is None else [self._write(f"{module}, {ranks} settings", settings)]
        return partial(self.run_ranks, module, *paths, ranks=ranks)

    def trainer(self, name: str, model: str, ranks: int) -> Job:
        """A job: the training script on a tiny model, on GPUs if each of two ranks has one, else on the CPU."""
        own = ",".join(self.visible.split(",")[:ranks]) if self.two_gpus else None
        return partial(script.run_tiny, name, model, ranks=ranks, gpus=own, folder=self.folder, timeout=TIMEOUT)

    def run_ranks(self, module: str, *paths: str, ranks: int) -> dict:
        """Run a module in this many processes, and return what it wrote.

        Raises:
            ChildError: It failed, or the memory did not suffice.
        """
        name = f"{module.rpartition('.')[2]}, {ranks} process{'es' if ranks > 1 else ''}"
        out = os.path.join(self.folder, f"{name}.json")
        free_memory()
        options = {"gpus": self.visible if self.on_gpu else None, "show": partial(print, f"{name}:", flush=True)}
        start_ranks(module, out, *paths, ranks=ranks, timeout=TIMEOUT, **options)
        with open(out, encoding="utf-8") as file:
            found = json.load(file)
        for case in found.get("cases", ()):
            if "error" in case:
                raise ChildError(case["error"], "")
        return found

    def _write(self, name: str, settings: object) -> str:
        path = os.path.join(self.folder, f"{name}.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(settings, file)
        return path


def run_all(jobs: Mapping[str, Job], *, together: bool = False) -> dict[str, dict]:
    """Run each of {name: job} and return the results; a job that fails is recorded as failed, and is missing here.

    Args:
        jobs: By name.
        together: Side by side; otherwise one after another.
    """
    found = {}
    for name, result in at_once(jobs, together=together):
        if isinstance(result, Exception):
            experiments.failed(name, result)
        else:
            found[name] = result
    return found

"""Processes that train together: how a benchmark starts them, and what each of them does first and last.

start_ranks("benchmarks.fsdp2.features", "out.json", ranks=2, timeout=300)      from a notebook
start(); ...; finish()                                                        in each rank
"""

import os
import re
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from unsloth_puzzles.bench import child
from unsloth_puzzles.bench.t4 import CONTEXT_GIB

NOISE = ("Failed to load CPU gemm_4bit", "No CUDA runtime is found", "OMP_NUM_THREADS environment variable")
_ERROR = re.compile(r"(?:\[(?P<rank>rank\d+)\]: )?(?P<what>(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_ranks(
    module: str,
    *arguments: str,
    ranks: int,
    timeout: float,
    gpus: str | None = None,
    show: Callable[[str], None] | None = print,
    **variables: str,
) -> list[str]:
    """Run a module in one process, or by torchrun in several on this machine.

    Args:
        module: Its name.
        arguments: Its command line.
        ranks: 1 for a plain process.
        timeout: Seconds, after which all are killed.
        gpus: CUDA_VISIBLE_DEVICES of the processes; None for this process's own.
        show: Is given the lines of output that say something of the run.
        variables: More variables of the environment.

    Returns:
        The output, a line each.

    Raises:
        ChildError: A process failed, or the time was over.
    """
    own = {"CUDA_VISIBLE_DEVICES": gpus} if gpus is not None else {}
    # Two interpreters of Triton and two compilers share the cores.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}  # of libraries, once a rank
    env = child.environment(OMP_NUM_THREADS="1", **quiet, **own, **variables)
    command = (module, *arguments)
    if ranks > 1:  # each rank by way of `child`, which holds it to its part of a limited GPU
        launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m")
        command = (*launcher, child.__name__, *command)

    failed = False

    def show_news(line: str) -> None:
        nonlocal failed
        failed = failed or "Traceback (most recent call last)" in line  # the error says what of it matters
        if show is not None and line.strip() and not failed and not any(noise in line for noise in NOISE):
            show(line)

    shared = ranks if gpus is None or len(gpus.split(",")) < ranks else 1
    try:
        return child.run(*command, timeout=timeout, env=env, show=show_news, gpu_gib=_gib_each(shared))
    except child.ChildError as error:
        raise child.ChildError(_reason(error), error.output) from None


def _reason(error: child.ChildError) -> str:
    """Return the message of the rank that failed first; torchrun's own last line says nothing."""
    said = [match for line in error.output.splitlines() if (match := _ERROR.match(line))]
    return ": ".join(filter(None, said[0].group("rank", "what"))) if said else str(error)


def _gib_each(processes: int) -> float | None:
    """GPU memory for each of the processes that share one GPU; None if this process has no limit on its own."""
    if not torch.cuda.is_initialized() or (part := torch.cuda.get_per_process_memory_fraction()) == 1:
        return None
    left = part * torch.cuda.mem_get_info()[1] - torch.cuda.memory_reserved()
    return left / 2**30 / processes - CONTEXT_GIB


def device() -> torch.device:
    """This rank's: a GPU of its own if there are enough, the one GPU for all, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def backend() -> str:
    """NCCL takes one rank a GPU; gloo moves everything through the CPU's memory."""
    has_own = torch.cuda.is_available() and torch.cuda.device_count() >= WORLD
    return "cuda:nccl,cpu:gloo" if has_own else "gloo"


def start() -> None:
    """Set the device, and with several ranks make the process group."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if WORLD > 1:
        dist.init_process_group(backend())


def mesh() -> DeviceMesh:
    """All ranks in one dimension, also where they share a GPU."""
    return DeviceMesh.from_group(dist.group.WORLD, device().type)


def finish() -> None:
    """Let no rank end while another still needs it, and end this one without Python's own clean-up.

    A thread of gloo that frees its last tensor while Python ends aborts the process, about once in fifteen runs.
    """
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def average(value: torch.Tensor) -> float:
    """The mean over the ranks of a number that each has."""
    mean = value.detach().clone()
    if WORLD > 1:
        dist.all_reduce(mean)
        mean /= WORLD
    return mean.item()


def whole(value: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that is split over the ranks."""
    return value.full_tensor() if WORLD > 1 else value


def gathered(values: torch.Tensor) -> list[float]:
    """The numbers of a tensor of one dimension that is split over the ranks.

    They travel as Python's: gloo's functional all-gather of tensors on one shared GPU crashes the process (torch 2.11).
    """
    if WORLD == 1:
        return values.tolist()
    parts: list = [None] * WORLD
    dist.all_gather_object(parts, values.to_local().tolist())
    return [number for part in parts for number in part]

"""What Inductor is told about kernels over rows of logits, so that each row is read from memory once.

A loss and its gradient read a row of logits three times: for the maximum, for the sum and for the gradient.

Blocks: Inductor's own choice, blocks of 2048 logits and 512 threads, has four rows at work on each multiprocessor. On
an H200 these are 129 MiB for 128256 logits in 16 bits; its L2 cache holds 60 and has lost the beginning of a row when
its end has been read. Here one row is at work on each, by 1024 threads, and a row's second and third read hit the
cache.

Splits: with fewer than two rows a multiprocessor, Inductor splits each row over several blocks and makes a kernel of
each of the three reads. The first call's number of rows decides that for all later calls. Here no row is split, nor a
part of one.
"""

from collections.abc import Callable
from typing import Any

import torch

from unsloth_puzzles.device import capability

# Whose Inductor asks for choices in this way. It is no public interface. The code that it writes was read with 2.10,
# 2.11 and 2.15. No GPU has run it yet after a first call of few rows. The block sizes were run and timed with 2.11.
_VERSIONS = tuple(f"2.{minor}." for minor in range(10, 16))
_TIMED = "2.11."
_THREADS = 1024  # the most that a block can have, and no multiprocessor has room for two such blocks at 64 registers
_BLOCK = 16 * _THREADS  # logits: two loads of 16 bytes for each thread
_SIZES = {"XBLOCK": 1, "R0_BLOCK": _BLOCK, "num_warps": _THREADS // 32, "num_stages": 1}
_USUAL_THREADS = 512  # of Inductor's choice, for each row
_MOST_OPERATIONS = 120  # cross entropy and its gradient have 67, z-loss 88, the focal loss 158
# The key of Inductor's cache of compiled code knows its options, not these choices. This one has no other effect here.
_IN_KEY = {"coordinate_descent_search_radius": 3}


def compile_for_rows(program: Callable, options: dict[str, object], logits: torch.Tensor) -> Callable:
    """torch.compile `program`, on a GPU with these choices.

    The block sizes are only for torch 2.11 and a GPU (from sm_80 on) whose cache holds one row for each multiprocessor,
    but not those of usual blocks.

    Args:
        program: A function of tensors, of which some are such logits. Compiled when it is first called.
        options: Inductor's.
        logits: [rows, vocab].

    Returns:
        The compiled function.
    """
    if not (logits.is_cuda and torch.__version__.startswith(_VERSIONS) and not torch.version.hip):
        return torch.compile(program, fullgraph=True, options=options)
    from torch._inductor.virtualized import V

    run = torch.compile(program, fullgraph=True, options=options | _IN_KEY)
    choices = _row_choices(logits.shape[-1], torch.__version__.startswith(_TIMED) and _fits_cache(logits))

    def run_with_choices(*given):
        with V.set_choices_handler(choices):  # this thread's, read while it compiles
            return run(*given)

    return run_with_choices


def _fits_cache(logits: torch.Tensor) -> bool:
    gpu = torch.cuda.get_device_properties(logits.device)
    at_work = logits.shape[-1] * logits.element_size() * gpu.multi_processor_count  # bytes, one row on each
    return (
        capability(logits.device) >= 80
        and at_work <= gpu.L2_cache_size < gpu.max_threads_per_multi_processor // _USUAL_THREADS * at_work
    )


def _row_choices(vocabulary: int, blocks: bool) -> Any:
    """A handler for the choices that Inductor makes, for rows of this length; `blocks`: it gives block sizes, too."""
    from torch._inductor.codegen.triton import FixedTritonConfig
    from torch._inductor.virtualized import V

    class RowChoices(type(V.choices)):
        def reduction_split_factor(self, device, reduction_numel_hint, numel_hint, inner_reduction):
            if inner_reduction and reduction_numel_hint <= vocabulary and numel_hint > 1:  # of a row or a part of it
                return 1
            return super().reduction_split_factor(device, reduction_numel_hint, numel_hint, inner_reduction)

        def triton_kernel_kwargs(self, kernel_cls, features, groups, kernel_kwargs):
            given = super().triton_kernel_kwargs(kernel_cls, features, groups, kernel_kwargs)
            if not blocks or features.reduction_numel != vocabulary or not _is_plain(features, groups, given):
                return given
            return {**given, "fixed_config": FixedTritonConfig(dict(_SIZES)), "override_cooperative_reduction": False}

    return RowChoices()


def _is_plain(features: Any, groups: list, given: dict) -> bool:
    """Whether a kernel reduces rows longer than a block, and nothing else: such a kernel has these two block sizes.

    Not if it computes so much for each logit that memory is not what it waits for: Inductor tries blocks for it.
    """
    return (
        bool(features.reduction_numel > _BLOCK)
        and sum(features.op_counts().values()) <= _MOST_OPERATIONS
        and set(groups[0]) == {"x", "r0_"}
        and not given.get("mix_order_reduction")
        and not any(map(features.contains_op, ("scan", "sort")))
    )

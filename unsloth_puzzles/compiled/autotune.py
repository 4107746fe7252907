"""Matrix products by Triton where they beat cuBLAS's: Inductor's max-autotune, and what it found.

A product is benchmarked at the sizes of the first batch, each of its candidates compiled before. Inductor's list is
shortened to tiles that suit the product, since compiling them all takes minutes: wide products get tiles of 128 x 128,
LoRA's narrow ones (rank r on one side) the eight largest of the tall tiles. Below sm_80, where Triton has no tensor
cores, wide products get no tiles, and narrow ones two that fit the 64 KiB of shared memory of a T4.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch._inductor import select_algorithm
from torch._inductor import utils as inductor_utils
from torch._inductor.virtualized import V

from unsloth_puzzles.device import capability

OPTIONS = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON", "autotune_num_choices_displayed": 0}
_WIDE = 256  # rows, columns and inner size of a product that fills tiles of 128 x 128
_TALL = 64  # rows of a tile for the others
_MOST = 8  # tiles for a narrow product
_FEW = 2  # tiles for a narrow product below sm_80: a T4 often has two slow cores beside it to compile them
_PRINTS = ("PRINT_AUTOTUNE", "_log_autotune_choices_stats")  # a line a product on the standard error
_SHARED = 48 * 2**10  # bytes of shared memory for the operands of such a tile


@dataclass(frozen=True)
class Product:
    """The benchmark of a matrix product, (rows, inner) @ (inner, columns).

    Attributes:
        winner: the name of the fastest candidate.
        winner_us: its time in microseconds.
        cublas_us: that of cuBLAS's fastest candidate, NaN without one.
        tile: rows, inner size and columns of the tile, and the warps, if the winner is Triton's.
    """

    rows: int
    columns: int
    inner: int
    winner: str
    winner_us: float
    cublas_us: float
    tile: str = ""


@contextmanager
def triton_competes() -> Iterator[list[Product]]:
    """Let Triton compete for the matrix products that are compiled with `OPTIONS`, until the block ends.

    Inductor itself lets Triton compete only on GPUs with 68 multiprocessors or more; a T4 has 40.

    Yields:
        A list, filled with each product as it is benchmarked.
    """
    products: list[Product] = []
    selector = select_algorithm.get_algorithm_selector_cache()

    def keep(timings, name, input_nodes, choices, *_) -> None:
        found = {choice: 1e3 * ms for choice, ms in timings.items() if math.isfinite(ms)}
        if found and _is_product(choices):
            best = min(found, key=found.get)
            cublas = min((us for choice, us in found.items() if not _is_triton(choice)), default=math.nan)
            products.append(Product(*_sizes(best), best.name, found[best], cublas, _shown(best)))

    before, inductor_utils.is_big_gpu = inductor_utils.is_big_gpu, lambda *_: True
    printed = {name: getattr(select_algorithm, name) for name in _PRINTS}
    select_algorithm.PRINT_AUTOTUNE, select_algorithm._log_autotune_choices_stats = False, lambda *_: None
    level = select_algorithm.log.level
    select_algorithm.log.setLevel(logging.CRITICAL)  # a tile that does not fit is left out, with an error message each
    selector.add_feedback_saver(keep)
    selector.add_preprocessing_fn(suited)
    try:
        yield products
    finally:
        inductor_utils.is_big_gpu = before
        select_algorithm.log.setLevel(level)
        for name, value in printed.items():
            setattr(select_algorithm, name, value)
        selector.feedback_saver_fns.remove(keep)
        selector.preprocessing_fns.remove(suited)


def suited(choices: list) -> list:
    """Drop Triton's candidates that do not suit the product.

    Args:
        choices: Inductor's candidates for one operator (`ChoiceCaller`).

    Returns:
        Those that are worth compiling; all of them if the operator is not a product of two matrices.
    """
    if not _is_product(choices):
        return choices
    wide, old = min(_sizes(choices[0])) >= _WIDE, 0 < capability() < 80
    if wide and old:
        return [choice for choice in choices if not _is_triton(choice)]

    def suits(choice) -> bool:
        m, _, n = _tile(choice)
        return m * n >= 128 * 128 if wide else m >= _TALL

    tiles = [choice for choice in choices if _is_triton(choice)]
    kept = [choice for choice in tiles if suits(choice)] or tiles
    if old:
        kept = [choice for choice in kept if _shared_bytes(choice) <= _SHARED][:_FEW]
    elif not wide:
        kept = sorted(kept, key=lambda choice: -math.prod(_tile(choice)))[:_MOST]
    return [choice for choice in choices if not _is_triton(choice) or choice in kept]


def _is_product(choices: list) -> bool:
    """Whether these are candidates for a product of two matrices, Triton's among them."""
    return any(_is_triton(choice) for choice in choices) and all(len(_inputs(choice)) == 2 for choice in choices)


def _is_triton(choice) -> bool:
    return isinstance(choice, select_algorithm.TritonTemplateCaller) and "tile_shape" in choice.log_info


def _tile(choice) -> tuple[int, int, int]:
    """Rows, inner size and columns of a tile."""
    m, k, n = (int(part) for part in str(choice.log_info["tile_shape"]).strip("()").split(","))
    return m, k, n


def _shared_bytes(choice) -> int:
    """Shared memory for the operands' tiles in all stages."""
    m, k, n = _tile(choice)
    itemsize = _inputs(choice)[0].get_dtype().itemsize
    return (m * k + k * n) * itemsize * int(choice.log_info.get("num_stages", 1))


def _shown(choice) -> str:
    if not _is_triton(choice):
        return ""
    return f"{' x '.join(map(str, _tile(choice)))}, {choice.log_info.get('num_warps', '?')} warps"


def _inputs(choice) -> list:
    """The last two are the matrices; `addmm` has what is added before them."""
    return [node for node in choice.input_nodes if len(node.get_size()) == 2][-2:]


def _sizes(choice) -> tuple[int, int, int]:
    """Rows, columns and inner size, at the first batch's lengths."""
    (rows, inner), (_, columns) = (_hints(node.get_size()) for node in _inputs(choice))
    return rows, columns, inner


def _hints(sizes) -> list[int]:
    known = V.graph.sizevars
    hint: Callable = getattr(known, "optimization_hint", None) or known.size_hint
    return [int(hint(size)) for size in sizes]

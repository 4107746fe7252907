"""Max-autotune: which candidates compete, which times are recorded, and that Inductor is restored."""

import logging
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import select_algorithm
from torch._inductor import utils as inductor_utils
from torch._inductor.virtualized import V

from unsloth_puzzles.compiled import autotune

SMALL_TILE, TALL_TILE, WIDE_TILE = (16, 32, 16), (64, 32, 16), (128, 32, 128)


class Node:
    def __init__(self, *size):
        self.size = size

    def get_size(self):
        return self.size

    def get_dtype(self):
        return torch.float16


class Triton(select_algorithm.TritonTemplateCaller):
    """A candidate of Triton's without a kernel."""

    def __init__(self, name, inputs, tile):
        self.name, self.input_nodes = name, inputs
        self.log_info = {} if tile is None else {"tile_shape": str(tile), "num_warps": 4}

    def __repr__(self):
        return self.name


def product(rows, inner, columns, *added):
    return [*added, Node(rows, inner), Node(inner, columns)]


def candidates(inputs, *tiles):
    """cuBLAS's, and one of Triton's for each tile."""
    cublas = SimpleNamespace(name="mm", input_nodes=inputs)
    return [cublas, *(Triton(f"triton_mm_{number}", inputs, tile) for number, tile in enumerate(tiles))]


@contextmanager
def lowering(hint=int):
    """Inductor's graph, as far as it is asked for sizes."""
    with V.set_graph_handler(SimpleNamespace(sizevars=SimpleNamespace(optimization_hint=hint))):
        yield


def kept(inputs, *tiles, hint=int):
    choices = candidates(inputs, *tiles)
    with lowering(hint):
        left = autotune.suited(choices)
    assert left[0] is choices[0]  # cuBLAS's always stays
    return [tile for choice, tile in zip(choices[1:], tiles, strict=True) if any(choice is one for one in left)]


def test_wide_products_get_square_tiles():
    tiles = SMALL_TILE, TALL_TILE, WIDE_TILE, (64, 32, 256), (64, 32, 128)
    assert kept(product(1024, 512, 1024), *tiles) == [WIDE_TILE, (64, 32, 256)]
    assert kept(product(256, 256, 256), *tiles) == [WIDE_TILE, (64, 32, 256)]


@pytest.mark.parametrize("sizes", [(1024, 512, 16), (1024, 16, 512), (16, 1024, 512)])
def test_narrow_products_get_tall_tiles(sizes):
    assert kept(product(*sizes), SMALL_TILE, TALL_TILE, WIDE_TILE) == [TALL_TILE, WIDE_TILE]


def test_narrow_products_get_the_eight_largest_tiles():
    tiles = [(64, 16 * factor, 16) for factor in (3, 9, 1, 8, 2, 7, 4, 10, 6, 5)]
    assert kept(product(1024, 512, 16), *tiles) == [tile for tile in tiles if tile[1] > 32]
    assert len(kept(product(1024, 512, 1024), *[WIDE_TILE] * 12)) == 12


def test_below_sm_80_narrow_products_get_two_tiles_and_wide_ones_none(monkeypatch):
    monkeypatch.setattr(autotune, "capability", lambda: 75)
    large = (128, 256, 16)  # 72 KiB
    tiles = large, TALL_TILE, SMALL_TILE, (64, 64, 16), (64, 16, 16), (128, 32, 16)
    assert kept(product(1024, 512, 16), *tiles) == [TALL_TILE, (64, 64, 16)]
    assert kept(product(1024, 512, 1024), *tiles) == []
    assert kept(product(1024, 512, 16), large) == []  # cuBLAS alone


def test_bias_of_addmm_is_not_a_factor():
    for added in (Node(16), Node(1024, 16)):
        assert kept(product(1024, 512, 16, added), SMALL_TILE, TALL_TILE) == [TALL_TILE]


def test_dynamic_sizes_are_those_of_the_first_batch():
    sizes = {"rows": 2048}
    hint = lambda size: sizes.get(size, size)  # noqa: E731
    assert kept(product("rows", 512, 512), TALL_TILE, WIDE_TILE, hint=hint) == [WIDE_TILE]
    sizes["rows"] = 100
    assert kept(product("rows", 512, 512), TALL_TILE, WIDE_TILE, hint=hint) == [TALL_TILE, WIDE_TILE]


def test_all_tiles_stay_if_none_suits():
    assert kept(product(1024, 512, 1024), SMALL_TILE, TALL_TILE) == [SMALL_TILE, TALL_TILE]
    assert kept(product(1024, 512, 16), SMALL_TILE) == [SMALL_TILE]


def test_choices_that_are_not_matrix_products_stay():
    batched = [Node(4, 64, 64), Node(4, 64, 64)]
    for choices in (
        candidates(batched, SMALL_TILE, WIDE_TILE),
        candidates(product(1024, 512, 1024), None),  # another template, without a tile
        candidates(product(1024, 512, 1024)),  # without Triton
        [],
    ):
        with lowering():
            assert autotune.suited(choices) is choices


def registered():
    selector = select_algorithm.get_algorithm_selector_cache()
    kept = [*selector.feedback_saver_fns], [*selector.preprocessing_fns]
    printed = [getattr(select_algorithm, name) for name in autotune._PRINTS]
    return inductor_utils.is_big_gpu, *kept, [*printed, select_algorithm.log.level]


def test_small_gpu_counts_as_big_until_exit(monkeypatch):
    monkeypatch.setattr(inductor_utils, "is_big_gpu", lambda index_or_device=0: False)
    before = registered()
    with autotune.triton_competes():
        assert inductor_utils.is_big_gpu() is True and inductor_utils.is_big_gpu(torch.device("cuda", 0)) is True
        _, savers, preprocessing, printed = registered()
        assert printed[0] is False and printed[1] is not before[-1][1] and printed[2] == logging.CRITICAL
        assert len(savers) == len(before[1]) + 1 and preprocessing == [*before[2], autotune.suited]
    assert registered() == before
    with pytest.raises(ZeroDivisionError), autotune.triton_competes():
        raise ZeroDivisionError
    assert registered() == before


def benchmarked(*rounds):
    """The products found when Inductor has benchmarked (candidates, their times in ms), ..."""
    with autotune.triton_competes() as products, lowering():
        (*_, keep) = select_algorithm.get_algorithm_selector_cache().feedback_saver_fns
        for choices, times in rounds:
            timings = dict(zip(choices, times, strict=True))
            keep(timings, "mm", choices[0].input_nodes, choices, None, None)
    return products


class Cublas:
    def __init__(self, inputs):
        self.name, self.input_nodes = "mm", inputs


def test_fastest_choice_is_recorded_beside_cublas():
    inputs = product(1024, 512, 16)
    cublas, first, second = Cublas(inputs), Triton("triton_mm_0", inputs, SMALL_TILE), Triton("t", inputs, TALL_TILE)
    lost, won, alone = benchmarked(
        ([cublas, first], (0.5, math.inf)), ([cublas, first, second], (0.5, 0.25, 0.75)), ([first], (0.25,))
    )
    assert lost == autotune.Product(rows=1024, columns=16, inner=512, winner="mm", winner_us=500, cublas_us=500)
    assert won == autotune.Product(1024, 16, 512, "triton_mm_0", 250, 500, "16 x 32 x 16, 4 warps")
    assert alone.winner_us == 250 and math.isnan(alone.cublas_us)


def test_failed_choices_and_other_operators_are_not_recorded():
    inputs, batched = product(1024, 512, 16), [Node(4, 64, 64), Node(4, 64, 64)]
    failed = [Cublas(inputs), Triton("triton_mm_0", inputs, SMALL_TILE)]
    others = [Cublas(batched), Triton("triton_bmm_0", batched, SMALL_TILE)]
    assert benchmarked((failed, (math.inf, math.inf)), (others, (1.0, 2.0)), ([Cublas(inputs)], (1.0,))) == []


@pytest.mark.gpu
def test_autotuned_products_are_correct_on_gpu():
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, narrow, square = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((1024, 512), (512, 16), (1024, 1024))
    )

    def both(x, narrow, square):
        return x @ narrow, square @ square

    compiled = torch.compile(both, fullgraph=True, options=autotune.OPTIONS)
    with torch._inductor.utils.fresh_cache(), autotune.triton_competes() as products:
        found = compiled(x, narrow, square)
    assert {(one.rows, one.inner, one.columns) for one in products} == {(1024, 512, 16), (1024, 1024, 1024)}
    for one in products:
        assert 0 < one.winner_us <= one.cublas_us < math.inf
        assert bool(one.tile) == one.winner.startswith("triton")
    exact = both(*(tensor.double() for tensor in (x, narrow, square)))
    for one, expected in zip(found, exact, strict=True):  # bfloat16's rounding of the result, 2^-9 of it each
        assert (one.double() - expected).norm() <= 2**-8 * expected.norm()
    torch._dynamo.reset()

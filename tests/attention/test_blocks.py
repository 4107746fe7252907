"""The blocks that flex attention visits: nothing that is seen lies outside, and nothing is visited in vain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention.conftest import draw_documents, make_batch
from unsloth_puzzles.attention.blocks import BLOCK, Blocks, visible_blocks
from unsloth_puzzles.attention.pattern import Batch, Pattern, dense_mask

LENGTHS = st.one_of(st.integers(1, 700), st.sampled_from((1, 2, 127, 128, 129, 255, 256, 257, 512)))


def by_blocks(mask: torch.Tensor, q_blocks: int, k_blocks: int) -> torch.Tensor:
    """(batch, 1, query blocks, key blocks, BLOCK * BLOCK), False beyond the ends."""
    whole = torch.zeros(len(mask), 1, q_blocks * BLOCK, k_blocks * BLOCK, dtype=torch.bool)
    whole[:, :, : mask.shape[2], : mask.shape[3]] = mask
    return whole.view(len(mask), 1, q_blocks, BLOCK, k_blocks, BLOCK).transpose(3, 4).flatten(-2)


@settings(max_examples=80, deadline=None)
@given(
    LENGTHS, st.data(), st.booleans(), st.sampled_from((None, 1, 2, 100, 128, 129, 300, 10**6)),
    st.sampled_from((None, 0.002, 0.01, 0.2)), st.integers(0, 99),
)  # fmt: skip
def test_visible_blocks_equal_those_of_the_dense_mask(length, data, causal, window, share, seed):
    q_length = data.draw(st.sampled_from(sorted({length, 1, (length + 1) // 2})))
    pattern = Pattern(causal or window is not None, window)
    documents = None if share is None else draw_documents(length, share, seed=seed)
    assert_judged_rightly(pattern, make_batch(length, q_length, documents=documents))


def assert_judged_rightly(pattern: Pattern, batch: Batch) -> None:
    partial, full = visible_blocks(pattern, batch, Blocks(pattern, batch).documents)
    seen = dense_mask(pattern, batch)
    everything = torch.ones(batch.size, 1, batch.q_length, batch.kv_length, dtype=torch.bool)
    seen = everything if seen is None else seen.expand_as(everything)
    cut = by_blocks(seen, *partial.shape[-2:])
    assert torch.equal(partial | full, cut.any(-1))
    assert torch.equal(full, cut.all(-1))


def test_block_with_two_documents_is_partial():
    """It begins in the document that the block of keys before it is in, and ends in the next."""
    documents = (torch.arange(256) >= 151).int().expand(2, -1)
    assert_judged_rightly(Pattern(), make_batch(256, documents=documents))


def test_block_that_the_window_reaches_into_is_visited():
    assert_judged_rightly(Pattern(window=100), make_batch(256))


@pytest.mark.parametrize("length", [1, 60, 128, 500])
def test_tables_list_blocks_in_order_by_query_and_by_key(length):
    pattern = Pattern(window=150)
    blocks = Blocks(pattern, make_batch(length, documents=draw_documents(length, 0.01)))
    partial, full = visible_blocks(pattern, make_batch(length), blocks.documents)
    assert all(size >= 2 for table in blocks.tables for size in table.shape[2:])
    pairs = list(zip(blocks.tables[::2], blocks.tables[1::2], strict=True))
    for (number, indices), visible in zip(pairs, (partial, full, partial.mT, full.mT), strict=True):
        assert number.dtype == indices.dtype == torch.int32
        for row in range(2):
            for block in range(visible.shape[2]):
                listed = indices[row, 0, block, : number[row, 0, block]].tolist()
                assert listed == visible[row, 0, block].nonzero()[:, 0].tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.data(), st.sampled_from((None, 1, 7)), st.booleans())
def test_mask_inside_a_block_equals_the_dense_mask(length, data, window, packed):
    q_length = data.draw(st.integers(1, length))
    pattern = Pattern(window=window)
    batch = make_batch(length, q_length, documents=draw_documents(length, 0.2) if packed else None)
    mask = Blocks(pattern, batch).block_mask(q_length, length)
    assert mask.shape == (2, 1, q_length, length)
    rows = torch.arange(2)[:, None, None, None]
    found = mask.mask_mod(rows, 0, torch.arange(q_length)[:, None], torch.arange(length))
    expected = dense_mask(pattern, batch)
    whole = torch.ones(2, 1, q_length, length, dtype=torch.bool)
    assert torch.equal(found & whole, whole if expected is None else expected & whole)

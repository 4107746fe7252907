"""Which keys a query sees: against the definition, position by position, and against transformers' masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils

from tests.attention.conftest import draw_documents, make_batch, sees
from unsloth_puzzles.attention import prepare
from unsloth_puzzles.attention.pattern import Pattern, dense_mask, number_documents


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.data(), st.booleans(), st.sampled_from((None, 1, 2, 5, 40, 1000)),
    st.sampled_from((None, 0.0, 0.1, 0.5, 1.0)),
)  # fmt: skip
def test_dense_mask_equals_the_definition(length, data, causal, window, share):
    q_length = data.draw(st.integers(1, length))
    pattern = Pattern(causal or window is not None, window)
    batch = make_batch(length, q_length, documents=None if share is None else draw_documents(length, share))
    found = dense_mask(pattern, batch)
    expected = sees(pattern, batch)
    assert expected.diagonal(length - q_length, 1, 2).all()  # every query sees itself: no row is empty
    if found is None:
        assert expected.all()
    else:
        assert torch.equal(found.expand(2, 1, q_length, length)[:, 0], expected)


@pytest.mark.parametrize("window", [1, 3, 7])
def test_window_equals_that_of_transformers(window):
    """It sees as many tokens, itself included."""
    i, j = torch.arange(20)[:, None], torch.arange(20)
    theirs = masking_utils.sliding_window_causal_mask_function(window)(torch.tensor(0), torch.tensor(0), i, j)
    ours = dense_mask(Pattern(window=window), make_batch(20))[0, 0]
    assert torch.equal(ours, theirs)
    assert ours.sum(-1).tolist() == [min(window, n + 1) for n in range(20)]


def test_documents_are_numbered_by_stretches():
    ids = torch.tensor([[5, 5, 2, 2, 5, 5], [1, 1, 1, 1, 1, 1]])
    assert number_documents(ids).tolist() == [[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    "options, argument",
    [
        ({"window": 0}, "window"), ({"window": -3}, "window"), ({"window": 2.5}, "window"),
        ({"window": True}, "window"),
        ({"window": 5, "causal": False}, "window"), ({"soft_cap": 0.0}, "soft_cap"), ({"soft_cap": -1.0}, "soft_cap"),
    ],
)  # fmt: skip
def test_invalid_patterns_are_refused_by_name(options, argument):
    with pytest.raises(ValueError, match=f"^{argument} must be "):
        Pattern(**options)


def test_inconsistent_batches_are_refused():
    for asked, documents in ((Pattern(), None), (Pattern(causal=False), torch.zeros(2, 4, dtype=torch.int32))):
        with pytest.raises(
            ValueError, match=r"^query must have at most as many positions as key \(4\).*, got 5; the layout is"
        ):
            prepare(asked, make_batch(4, 5, documents=documents))
    with pytest.raises(ValueError, match=r"^query must have a multiple of the 3 key heads, got 4 heads; the layout"):
        make_batch(4, kv_heads=3)
    with pytest.raises(ValueError, match=r"^documents must have shape .*, got \(2, 3\)"):
        make_batch(4, documents=torch.zeros(2, 3))

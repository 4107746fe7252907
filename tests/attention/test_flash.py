"""What PyTorch's flash attention is asked for; its results are compared on a GPU."""

import pytest
import torch

from tests.attention.conftest import draw, draw_documents, make_batch
from unsloth_puzzles.attention import flash
from unsloth_puzzles.attention.pattern import Pattern


@pytest.mark.parametrize(
    ("options", "window_size"), [({}, (-1, 0)), ({"causal": False}, (-1, -1)), ({"window": 5}, (4, 0))], ids=str
)
def test_varlen_attn_gets_scale_window_and_document_starts(monkeypatch, options, window_size):
    given = []

    def varlen_attn(query, key, value, *positional, **named):
        given.append((key.shape, *positional, named))
        return query

    monkeypatch.setattr(flash, "varlen_attn", varlen_attn)
    backend, pattern, query_key_value = flash.Flash(), Pattern(**options), draw(9)
    starts = backend.prepare(pattern, make_batch(9, documents=draw_documents(9, 0.3)))
    assert torch.equal(backend.run(*query_key_value, pattern, starts, 0.4), query_key_value[0])
    ((shape, of_queries, of_keys, *lengths, named),) = given
    assert shape == (18, 2, 16) and lengths == [9, 9]
    assert of_queries is starts and of_keys is starts and starts[0] == 0 and 9 in starts and starts[-1] == 18
    assert named == {"scale": 0.4, "window_size": window_size}

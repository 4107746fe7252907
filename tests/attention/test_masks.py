"""Masks of transformers, read or made dense: a real token sees what transformers' own dense mask lets it see."""

import random
import re

import pytest
import torch
import transformers
from torch.distributed.utils import _apply_to_tensors
from transformers import LlamaConfig, masking_utils

from tests.attention.conftest import make_batch
from unsloth_puzzles.attention import masks
from unsloth_puzzles.attention.interface import prepare
from unsloth_puzzles.attention.mask_check import check
from unsloth_puzzles.attention.masks import Lengths, Unreadable, dense, read
from unsloth_puzzles.attention.model_mask import ModelMask
from unsloth_puzzles.attention.models import make_mask, register
from unsloth_puzzles.attention.pattern import Pattern, dense_mask

ROWS = 2
REMAPS = hasattr(masking_utils, "remap_positions_for_packed_sequence")
CONFIG = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)


def seen(mask_function, lengths, attention_mask=None):
    """(batch, q_length, kv_length) as we read it."""
    pattern, documents = read(mask_function, lengths, attention_mask)
    size = (lengths.batch_size, lengths.q_length, lengths.kv_length)
    found = dense_mask(pattern, make_batch(size[2], size[1], size=size[0], documents=documents))
    return torch.ones(size, dtype=torch.bool) if found is None else found.expand(size[0], 1, *size[1:])[:, 0]


def theirs(mask_function, lengths, attention_mask=None):
    """The same by transformers' eager attention, which adds 0 where a key is seen."""
    made = masking_utils.eager_mask(
        **vars(lengths), mask_function=mask_function, attention_mask=attention_mask, use_vmap=True
    )
    return made[:, 0] == 0


def draw_function(rng: random.Random, length: int, depth: int = 0):
    """A mask function, or two or three of them combined."""
    kinds = ("causal", "bidirectional", "window", "sliding", "packed", "chunked", "chunked causal", "and", "and", "or")
    kinds += ("wide", "blocks", "again", "own", *(("remapped", "remapped") if REMAPS else ()))
    kind = rng.choice(kinds if depth < 2 else kinds[:7])
    if kind == "causal":
        return masking_utils.causal_mask_function
    if kind == "bidirectional":
        return masking_utils.bidirectional_mask_function
    if kind == "window":
        return masking_utils.sliding_window_overlay(rng.randint(1, length + 1))
    if kind == "sliding":
        return masking_utils.sliding_window_causal_mask_function(rng.randint(1, length + 1))
    if kind == "wide":
        return masking_utils.sliding_window_bidirectional_mask_function(rng.randint(1, length + 1))
    if kind == "own":
        return lambda b, h, q, k: (k <= q) | (k == 0)
    if kind in ("packed", "again", "blocks"):
        ids = torch.tensor([[rng.random() < 0.3 for _ in range(length)] for _ in range(ROWS)]).cumsum(-1)
        if kind == "blocks":
            return masking_utils.blockwise_overlay(ids - 1)
        ids = ids if kind == "packed" else ids % 2
        return masking_utils.packed_sequence_mask_function(ids)
    if kind in ("chunked", "chunked causal"):
        padding = torch.tensor([rng.randint(0, 3) for _ in range(ROWS)])
        make = masking_utils.chunked_overlay if kind == "chunked" else masking_utils.chunked_causal_mask_function
        return make(rng.randint(1, length), padding)
    if kind == "remapped":
        part = draw_function(rng, length, 2)
        starts = torch.tensor([[i == 0 or rng.random() < 0.3 for i in range(length)] for _ in range(ROWS)])
        places = torch.arange(length)
        positions = places - (places * starts).cummax(-1).values
        remapped = masking_utils.remap_positions_for_packed_sequence(part, positions)
        return masking_utils.and_masks(remapped, masking_utils.packed_sequence_mask_function(starts.cumsum(-1)))
    parts = [draw_function(rng, length, depth + 1) for _ in range(rng.choice((2, 3)))]
    return (masking_utils.and_masks if kind == "and" else masking_utils.or_masks)(*parts)


def draw_case(seed: int):
    rng = random.Random(seed)
    end = rng.randint(1, 12)  # positions so far
    kv_length = end if rng.random() < 0.6 else rng.randint(1, end)
    q_length = kv_length if rng.random() < 0.5 else rng.randint(1, kv_length)
    offset = end - q_length if rng.random() < 0.9 else 0  # 0: a static cache, or another sequence's keys
    lengths = Lengths(ROWS, q_length, kv_length, offset, end - kv_length)
    attention_mask = None
    if rng.random() < 0.5:
        attention_mask = torch.ones(ROWS, end, dtype=torch.bool)
        for row in attention_mask:
            left, right = rng.randint(0, end // 2), rng.randint(0, end // 3)
            row[:left], row[end - right :] = False, False
            row[rng.randrange(end)] &= rng.random() < 0.8
    return draw_function(rng, end), lengths, attention_mask


def compare(seeds) -> tuple[int, int]:
    """How many of the drawn masks were read, and how many were made dense."""
    count = [0, 0]
    for seed in seeds:
        function, lengths, attention_mask = draw_case(seed)
        right = theirs(function, lengths, attention_mask)
        real = torch.ones(ROWS, lengths.q_length, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask[:, lengths.q_offset : lengths.q_offset + lengths.q_length]
        # Without causality the queries may be another sequence's, as in cross attention: none of them is padding.
        unpadded = theirs(function, lengths)
        if not torch.equal(unpadded, unpadded.tril(lengths.q_offset - lengths.kv_offset)):
            real = torch.ones_like(real)
        real = real & right.any(-1)  # transformers lets a query that sees nothing see everything, which nobody wants
        try:
            ours = seen(function, lengths, attention_mask)
            count[0] += 1
        except Unreadable:
            ours = dense(function, lengths, attention_mask, True, torch.device("cpu"))[:, 0]
            count[1] += 1
        assert ours.any(-1).all(), seed
        assert torch.equal(ours[real], right[real]), seed
    return tuple(count)


def test_random_combinations_equal_transformers_masks():
    was_read, was_dense = compare(range(250))
    assert was_read > 50 and was_dense > 50


@pytest.mark.slow
def test_many_random_combinations_equal_transformers_masks():
    compare(range(250, 6000))


RIGHT = torch.tensor([[1, 1, 1, 1, 0, 0]]).bool()
GAP = torch.tensor([[1, 0, 1, 1, 1, 1]]).bool()
AGAIN = torch.tensor([[0, 0, 1, 1, 0, 0]])
PACKED = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1, 1]]))
SPLIT = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 0, 0, 1]]))


@pytest.mark.parametrize(
    "parts, last_row",
    [
        ((masking_utils.causal_mask_function, PACKED, SPLIT), [0, 0, 0, 0, 0, 1]),
        ((masking_utils.causal_mask_function, SPLIT, PACKED), [0, 0, 0, 0, 0, 1]),
        (tuple(map(masking_utils.sliding_window_causal_mask_function, (2, 4))), [0, 0, 0, 0, 1, 1]),
        (tuple(map(masking_utils.sliding_window_causal_mask_function, (4, 2))), [0, 0, 0, 0, 1, 1]),
        ((masking_utils.bidirectional_mask_function, masking_utils.causal_mask_function, PACKED), [0, 0, 0, 1, 1, 1]),
        (
            (
                masking_utils.chunked_causal_mask_function(4, torch.zeros(1)),
                masking_utils.chunked_overlay(5, torch.ones(1)),
            ),
            [0, 0, 0, 0, 1, 1],
        ),
    ],
)  # fmt: skip
def test_combined_masks_of_one_kind_narrow_each_other(parts, last_row):
    found = seen(masking_utils.and_masks(*parts), Lengths(1, 6, 6, 0, 0))
    assert found[0, -1].int().tolist() == last_row
    assert torch.equal(found, theirs(masking_utils.and_masks(*parts), Lengths(1, 6, 6, 0, 0)))


def test_mask_function_is_combined_with_packed_positions():
    """As a model makes it: transformers adds documents of the positions to those of the function."""
    register()
    embeddings, positions = torch.zeros(1, 6, 64), torch.tensor([[0, 1, 2, 0, 1, 2]])

    def make(implementation):
        config = LlamaConfig(hidden_size=64, num_attention_heads=4, attn_implementation=implementation)
        return masking_utils.create_causal_mask(config, embeddings, None, None, positions, and_mask_function=SPLIT)

    found, right = make("unsloth_puzzles_dense"), make("eager") == 0
    found = found.data if isinstance(found, ModelMask) else found
    assert torch.equal(found, right) and right[0, 0, -2].int().tolist() == [0, 0, 0, 1, 1, 0]
    if not REMAPS:  # newer releases apply the function to positions in a document, which are all in its first part
        assert right[0, 0, -1].int().tolist() == [0, 0, 0, 0, 0, 1]


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]])


@pytest.mark.parametrize("kind", ["causal", "sliding_window_causal", "chunked_causal"])
@pytest.mark.parametrize("positions", [POSITIONS, POSITIONS + 2, POSITIONS[:1]], ids=["rows", "from two on", "one row"])
def test_packed_positions_are_read_as_a_model_makes_them(kind, positions, monkeypatch):
    """Whatever function this transformers describes them by; an unknown one would be made dense."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, attn_implementation="eager")
    config.sliding_window, config.attention_chunk_size, given = 3, 2, {}
    own = masking_utils.eager_mask
    monkeypatch.setitem(
        masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping,
        "eager",
        lambda **all: given.update(all) or own(**all),
    )
    right = getattr(masking_utils, f"create_{kind}_mask")(config, torch.zeros(ROWS, 8, 64), None, None, positions) == 0
    found = seen(given["mask_function"], Lengths(ROWS, 8, 8, 0, 0), given["attention_mask"])
    assert torch.equal(found[:, None], right) and not right.all()


@pytest.mark.skipif(not REMAPS, reason="this transformers gives no part of a mask other positions")
def test_other_positions_of_packed_sequences_are_dense_or_refused():
    packed = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1, 1]]))
    for parts, positions, message in (
        ([], [0, 1, 2, 0, 1, 2], "position_ids must count up by 1 within a packed sequence"),
        ([packed], [0, 1, 3, 0, 1, 2], "position_ids must count up by 1 within a packed sequence"),
        ([packed], [0, 1, 2, 0, 1], r"position_ids must be those of all queries and keys \(1, 6\), got \(1, 5\)"),
    ):
        remapped = masking_utils.remap_positions_for_packed_sequence(
            masking_utils.causal_mask_function, torch.tensor([positions])
        )
        with pytest.raises(Unreadable, match=f"^{message}"):
            read(masking_utils.and_masks(remapped, *parts), Lengths(1, 6, 6, 0, 0), None)


@pytest.mark.parametrize(
    "function, attention_mask, message",
    [
        (masking_utils.or_masks(PACKED, SPLIT), None, "mask_function must be .*or_masks"),
        (masking_utils.blockwise_overlay(torch.zeros(1, 6)), None, "mask_function must be .*blockwise_overlay"),
        (masking_utils.padding_mask_function(torch.ones(1, 6).bool()), None, "mask_function must be .*padding_mask"),
        (masking_utils.add_offsets_to_mask_function(PACKED, 0, 0), None, "mask_function must be .*add_offsets"),
        (masking_utils.sliding_window_bidirectional_mask_function(2), None, "mask_function must be .*window_bidirec"),
        (masking_utils.sliding_window_overlay(2), None, r"mask_function must have causal_.*window \(2\)"),
        (masking_utils.packed_sequence_mask_function(AGAIN), None, "packed_sequence_mask must .* one stretch"),
        (masking_utils.bidirectional_mask_function, RIGHT, "attention_mask must be ones where queries see later"),
        (masking_utils.causal_mask_function, GAP, "attention_mask must have padding at the ends"),
        (masking_utils.causal_mask_function, torch.ones(1, 5).bool(), "attention_mask must have 6 .*got 5"),
    ],
)  # fmt: skip
def test_unreadable_masks_are_dense_or_refused(function, attention_mask, message):
    lengths = {"batch_size": 1, "q_length": 6, "kv_length": 6}
    given = {"config": CONFIG, "dtype": torch.float32, "device": "cpu", "mask_function": function}
    for backend in ("flex", "flash", "xformers"):
        with pytest.raises(ValueError, match=rf"^{message}.*; backends sdpa and dense take any mask$"):
            make_mask(backend, **lengths, **given, attention_mask=attention_mask)
    for backend in ("auto", "sdpa", "dense"):
        made = make_mask(backend, **lengths, **given, attention_mask=attention_mask)
        right = theirs(function, Lengths(1, 6, 6, 0, 0), attention_mask)
        assert torch.equal(made[:, 0][right.any(-1)], right[right.any(-1)])


def test_cross_attention_with_as_many_queries_as_padded_keys_is_dense():
    """Every query sees the real keys, also a query at the position of a key that is padding."""
    made = make_mask(
        "auto", batch_size=1, q_length=6, kv_length=6, config=CONFIG, dtype=torch.float32, device="cpu",
        mask_function=masking_utils.bidirectional_mask_function, attention_mask=RIGHT,
    )  # fmt: skip
    assert isinstance(made, torch.Tensor) and made[0, 0].int().tolist() == [[1, 1, 1, 1, 0, 0]] * 6


def test_offsets_may_be_tensors():
    """A cache with a window counts in tensors once it has been cut, as after a rejected proposal of tokens."""
    made = make_mask(
        "dense", batch_size=1, q_length=1, kv_length=5, q_offset=torch.tensor(13), kv_offset=torch.tensor(9),
        mask_function=masking_utils.sliding_window_causal_mask_function(4), config=CONFIG, dtype=torch.float32,
        device="cpu",
    )  # fmt: skip
    assert isinstance(made, ModelMask) and made.data[0, 0, 0].tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("positions", [None, torch.tensor([[0, 1, 2, 0, 1]])], ids=["one document", "packed"])
def test_each_device_has_a_mask_of_its_own(positions):
    """Layers of one model may lie on several devices; the documents come from the first."""
    function = masking_utils.causal_mask_function
    if positions is not None:
        packed = masking_utils.packed_sequence_mask_function(masking_utils.find_packed_sequence_indices(positions))
        function = masking_utils.and_masks(function, packed)
    made = make_mask(
        "dense", batch_size=1, q_length=5, kv_length=5, mask_function=function, config=CONFIG, dtype=torch.float32,
        device="cpu",
    )  # fmt: skip
    assert isinstance(made, ModelMask) and made.packed is (positions is not None)
    query, key = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    expected = made.attend(query, key, key)
    elsewhere = made.attend(query.to("meta"), key.to("meta"), key.to("meta"))
    assert elsewhere.is_meta and elsewhere.shape == expected.shape
    assert {mask.data.device.type for mask in made._prepared.values()} == {"cpu", "meta"}
    assert torch.equal(made.attend(query, key, key), expected)


def test_masks_pass_through_what_casts_the_arguments_of_layers():
    """FSDP2 takes a dataclass apart and builds it anew, which a subclass with arguments of its own does not survive."""
    made = make_mask(
        "dense", batch_size=1, q_length=3, kv_length=3, mask_function=masking_utils.causal_mask_function, config=CONFIG,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    of_batch = prepare(Pattern(), make_batch(3), "dense")
    assert isinstance(made, ModelMask)
    for mask in (made, of_batch):
        assert _apply_to_tensors(lambda tensor: tensor.half(), {"attention_mask": mask})["attention_mask"] is mask


def test_check_notices_changed_mask_functions(monkeypatch):
    check()

    def sliding_window_overlay(sliding_window):
        def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx >= q_idx - sliding_window  # one more

        return inner_mask

    monkeypatch.setattr(masking_utils, "sliding_window_overlay", sliding_window_overlay)
    monkeypatch.setattr(masks, "_WINDOW", sliding_window_overlay(1).__code__)
    with pytest.raises(
        RuntimeError,
        match=r"^transformers must have the masks of 5\.15 to 5\.24, got another masking_utils\.sliding_window_overlay"
        rf"; this is transformers {re.escape(transformers.__version__)}$",
    ):
        check()

"""Every group is of one kind, and every row is drawn."""

from collections import Counter

import pytest
import torch

from benchmarks.vision.checks import ONE, TEXT
from unsloth_puzzles.vision.sampler import KindSampler, has_images

KINDS = [place % 3 == 0 for place in range(23)]  # 8 and 15 rows


def _groups(indices: list[int], group: int) -> list[list[int]]:
    return [indices[start : start + group] for start in range(0, len(indices), group)]


@pytest.mark.parametrize("group", [1, 4, 5, 40])
@pytest.mark.parametrize("shuffle", [True, False])
def test_groups_are_of_one_kind_and_whole(group, shuffle):
    sampler = KindSampler(KINDS, group, shuffle=shuffle)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) and {*drawn} == {*range(23)}
    assert all(len({KINDS[index] for index in one}) == 1 and len(one) == group for one in _groups(drawn, group))


def test_incomplete_groups_are_left_out():
    sampler = KindSampler(KINDS, 4, drop_last=True)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 8 + 12 and max(Counter(drawn).values()) == 1


def test_order_is_of_seed_and_epoch():
    sampler = KindSampler(KINDS, 4, seed=1)
    first = list(sampler)
    assert first == list(sampler) == list(KindSampler(KINDS, 4, seed=1))
    sampler.set_epoch(1)
    assert list(sampler) != first
    kinds = [KINDS[one[0]] for one in _groups(first, 4)]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)


def test_rows_that_have_images():
    inline = {"messages": [{"role": "user", "content": [{"type": "image", "image": ONE["images"][0]}]}]}
    assert [has_images(row) for row in (ONE, TEXT, inline, {**TEXT, "images": None})] == [True, False, True, False]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((), 2), "kinds must hold one per row, got none"),
        ((KINDS, 0), "group must be a positive integer, got 0"),
        ((KINDS, True), "group must be a positive integer, got True"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        KindSampler(*arguments)


@pytest.mark.parametrize("kinds", [torch.tensor(KINDS), [torch.tensor(kind) for kind in KINDS]], ids=["whole", "each"])
def test_tensors_are_refused_of_which_none_equals_another(kinds):
    with pytest.raises(TypeError, match=r"^kinds must be plain values such as bools, got tensors; use \.tolist\(\)$"):
        KindSampler(kinds, 2)


def test_order_does_not_depend_on_the_default_device():
    sampler = KindSampler(KINDS, 4)
    with torch.device("meta"):
        order = list(sampler)
    assert order == list(sampler)


def test_groups_larger_than_all_kinds_are_refused():
    with pytest.raises(ValueError, match="group must be at most the rows of some kind, got 40; use drop_last=False"):
        KindSampler(KINDS, 40, drop_last=True)

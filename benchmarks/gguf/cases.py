"""The exports that challenge D compares with transformers: families, settings, and how large an error may be.

for case in CASES: found = check_case(case, "cpu", tokens=32)
"""

import tempfile
from collections.abc import Mapping
from typing import NamedTuple

import pandas

from benchmarks.gguf.models import FAMILIES
from benchmarks.gguf.proof import DEVIATIONS, Compared, prove
from unsloth_puzzles.bench import markdown

LIMIT, TEXT_LIMIT, LIMIT_8_BITS = 3e-4, 1e-4, 0.1  # nats: with an image, without, and in 8 bits
DEFAULT = {"quantization": "q8_0", "projector": "f16"}  # the default types of `export_gguf`
CASES = {family: (family, {}) for family in FAMILIES} | {  # by name: family, options of `prove`
    "llama, DoRA": ("llama", {"use_dora": True}),
    "llava_siglip, q8_0 and f16": ("llava_siglip", DEFAULT),
    "qwen2_vl, q8_0 and f16": ("qwen2_vl", DEFAULT),
}


class Checked(NamedTuple):
    """The findings of `check_case`."""

    errors: dict[str, tuple[float, float]]  # nats by question: deviations emulated, and not
    checks: dict[str, bool]
    moved: float  # nats, by which the adapter moves the first log-probability
    equal: tuple[float, float]  # shares of the answers whose tokens are equal: deviations emulated, and not
    # Of a table: case, tokens equal, the same without emulation, errors and limits without and with an image, error
    # without emulation, deviations
    row: tuple[str, ...]


def deviations_table() -> str:
    """Markdown: where llama.cpp differs from transformers, numbered as in `cases_table`."""
    listed = [(n, one.what, one.source, ", ".join(one.families)) for n, one in enumerate(DEVIATIONS, 1)]
    return markdown.table(pandas.DataFrame(listed, columns=["", "llama.cpp (xllamacpp) has", "where", "families"]))


def cases_table(found: Mapping[str, Checked]) -> str:
    """Markdown: a row a case, from what `check_case` returned for it."""
    columns = ["case", "answers with equal tokens", "the same without emulation", "error, text (nats)",
               "error, image (nats)", "error without emulation (nats)", "deviations emulated",
               "change of the first log-probability by the adapter (nats)"]  # fmt: skip
    rows = [(*one.row, f"{one.moved:.2f}") for one in found.values()]
    return markdown.table(pandas.DataFrame(rows, columns=columns))


def group_of(case: str) -> str:
    """ "LLaVA", "Qwen-VL" or "text"."""
    family, _ = CASES[case]
    return "LLaVA" if "llava" in family else "Qwen-VL" if "qwen" in family else "text"


def in_8_bits(case: str) -> bool:
    """Whether a case has the default types; the others are in float32."""
    return CASES[case][1] is DEFAULT


def check_case(case: str, device: str, tokens: int) -> Checked:
    """Train, export and compare a case.

    In float32 all tokens must be equal. In 8 bits a near-tie may select another token, so errors count up to the first
    different token. There the largest error must also be below a third of what the adapter changes.

    Args:
        case: One of CASES.
        device: Where transformers computes.
        tokens: Of each answer in float32; in 8 bits it is 8.
    """
    family, options = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        proof = prove(family, folder, device, tokens=8 if in_8_bits(case) else tokens, **options)
    errors, checks = {}, {}
    for one in proof.answers:
        question = f"adapter {one.adapter}, {'image' if one.image else 'text'}"
        limit = _limit(case, one.image)
        checks[f"{case}, {question}"] = one.emulated_error < limit if in_8_bits(case) else one.within(limit)
        errors[question] = one.emulated_error, one.error
    if in_8_bits(case):
        largest = max(one.emulated_error for one in proof.answers)
        checks[f"{case}, error below a third of the adapter's effect"] = largest < proof.moved / 3
    else:
        checks[f"{case}, the adapter matters"] = proof.moved > 20 * LIMIT
    equal = tuple(sum(one) / len(proof.answers) for one in _equal(proof.answers))
    return Checked(errors, checks, proof.moved, equal, _row(case, proof.answers))


def _equal(answers: tuple[Compared, ...]) -> tuple[list[bool], list[bool]]:
    """Whether the tokens of each answer are equal: deviations emulated, and not."""
    return [one.emulated_equal for one in answers], [one.equal for one in answers]


def _limit(case: str, image: bool) -> float:
    return LIMIT_8_BITS if in_8_bits(case) else LIMIT if image else TEXT_LIMIT


def _row(case: str, answers: tuple[Compared, ...]) -> tuple[str, ...]:
    cells = []
    for image in (False, True):
        errors = [one.emulated_error for one in answers if one.image == image]
        cells.append(f"{max(errors):.1e} (limit {_limit(case, image):.0e})" if errors else "-")
    names = [one.what for one in DEVIATIONS]
    applying = sorted({names.index(what) + 1 for one in answers for what in one.deviations})
    equal = [f"{sum(one)} of {len(one)}" for one in _equal(answers)]
    plain = f"{max(one.error for one in answers):.1e}"
    return case, *equal, *cells, plain, ", ".join(map(str, applying)) or "none"

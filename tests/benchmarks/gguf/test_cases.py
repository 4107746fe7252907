"""What a case of GGUF export is judged by, with answers that are made up."""

import matplotlib.pyplot as plt
import pytest

from benchmarks.gguf import cases
from benchmarks.gguf.figure import types_figure
from benchmarks.gguf.proof import DEVIATIONS, Compared, Proof
from benchmarks.gguf.round_trip import Exported

GELU = DEVIATIONS[0].what


def proof(text: float, image: float, equal: bool = True, moved: float = 1.0) -> Proof:
    """Without emulation the tokens of answers with an image differ."""
    answers = [
        Compared(side, seeing, not seeing, 10 * error, equal, error, (GELU,) if seeing else ())
        for side in ("on", "off")
        for seeing, error in ((False, text), (True, image))
    ]
    return Proof(tuple(answers), moved)


@pytest.fixture
def check(monkeypatch):
    def run(case: str, found: Proof) -> tuple[cases.Checked, dict]:
        given = {}
        monkeypatch.setattr(
            cases, "prove", lambda family, folder, device, **options: given.update(family=family, **options) or found
        )
        return cases.check_case(case, "cpu", tokens=32), given

    return run


def test_errors_within_the_limits_pass(check):
    found, given = check("llava_clip", proof(9e-5, 2.9e-4))
    assert given == {"family": "llava_clip", "tokens": 32} and all(found.checks.values()) and len(found.checks) == 5
    assert found.errors["adapter on, image"] == (2.9e-4, pytest.approx(2.9e-3))
    assert found.equal == (1.0, 0.5)
    assert found.row == (
        "llava_clip", "4 of 4", "2 of 4", "9.0e-05 (limit 1e-04)", "2.9e-04 (limit 3e-04)", "2.9e-03", "1"
    )  # fmt: skip
    rows = cases.cases_table({"llava_clip": found}).splitlines()
    assert rows[2] == f"| {' | '.join(found.row)} | 1.00 |" and rows[0].count("|") == rows[2].count("|")
    assert cases.deviations_table().splitlines()[2].startswith(f"| 1 | {GELU} |")


@pytest.mark.parametrize(
    "wrong, failing",
    [
        (proof(1.1e-4, 1e-5), ["adapter on, text", "adapter off, text"]),
        (proof(1e-5, 3.1e-4), ["adapter on, image", "adapter off, image"]),
        (proof(1e-5, 1e-5, moved=5e-3), ["the adapter matters"]),
        (
            proof(1e-5, 1e-5, equal=False),
            [f"adapter {side}, {kind}" for side in ("on", "off") for kind in ("text", "image")],
        ),
    ],
)
def test_a_wrong_answer_fails_its_check(check, wrong, failing):
    found, _ = check("qwen2_vl", wrong)
    assert [name for name, good in found.checks.items() if not good] == [f"qwen2_vl, {name}" for name in failing]


def test_in_8_bits_tokens_may_part(check):
    found, given = check("qwen2_vl, q8_0 and f16", proof(0.09, 0.09, equal=False))
    assert all(found.checks.values()) and len(found.checks) == 5
    assert given == {"family": "qwen2_vl", "tokens": 8, **cases.DEFAULT}


@pytest.mark.parametrize(
    "wrong, failing",
    [
        (proof(0.01, 0.11), ["adapter on, image", "adapter off, image"]),
        (proof(0.08, 0.01, moved=0.23), ["error below a third of the adapter's effect"]),
        (proof(0.01, 0.08, moved=0.23), ["error below a third of the adapter's effect"]),
    ],
)
def test_a_wrong_answer_in_8_bits_fails_its_check(check, wrong, failing):
    case = "qwen2_vl, q8_0 and f16"
    found, _ = check(case, wrong)
    assert [name for name, good in found.checks.items() if not good] == [f"{case}, {name}" for name in failing]


def test_every_case_has_a_group():
    assert {cases.group_of(case) for case in cases.CASES} == {"LLaVA", "Qwen-VL", "text"}
    assert [case for case in cases.CASES if cases.in_8_bits(case)] == [
        "llava_siglip, q8_0 and f16",
        "qwen2_vl, q8_0 and f16",
    ]


def _exported(size: float, error: float, *warnings: str) -> Exported:
    return Exported(int(size * 2**20), True, 32, 0.0, error, "", True, warnings)


def test_a_figure_has_a_point_a_type():
    found = {"f32": _exported(500, 1e-5), "q8_0": _exported(140, 0.2), "q4_0": _exported(75, 0.7)}
    figure = types_figure(found, "Types")
    (axes,) = figure.axes
    assert {one.get_text(): one.xy for one in axes.texts} == {
        "f32": (500, 1e-5), "q8_0": (140, 0.2), "q4_0": (75, 0.7),
    }  # fmt: skip
    assert axes.lines[0].get_xydata().tolist() == [[500, 1e-5], [140, 0.2], [75, 0.7]]
    said = "The error is 0.2 nats with q8_0, at 28% of f32's size, and 0.7 nats with q4_0\nTypes"
    assert figure.get_suptitle() == said
    plt.close("all")


def test_labels_of_neighbours_stand_on_different_sides_and_name_other_blocks():
    found = {"f32": _exported(500, 1e-5), "q8_0": _exported(140, 0.04), "q4_0": _exported(75, 0.7)}
    found["q4_k_m"] = _exported(100, 0.2, "240 tensors with rows of 576")
    figure = types_figure(found, "Types")
    (axes,) = figure.axes
    assert {one.get_text(): one.get_va() for one in axes.texts} == {
        "q4_0": "bottom", "q4_k_m (576 columns: mostly blocks of 32)": "top", "q8_0": "bottom", "f32": "top",
    }  # fmt: skip
    figure.canvas.draw()
    inside = axes.get_window_extent()
    for one in axes.texts:
        box = one.get_window_extent()
        assert inside.x0 < box.x0 and box.x1 < inside.x1, one.get_text()
    plt.close("all")


def test_the_title_has_the_smallest_type_of_those_at_hand():
    found = {"f32": _exported(500, 1e-5), "q8_0": _exported(140, 0.04), "q4_k_m": _exported(100, 0.2)}
    said = types_figure(found, "Types").get_suptitle()
    assert said == "The error is 0.04 nats with q8_0, at 28% of f32's size, and 0.2 nats with q4_k_m\nTypes"
    plt.close("all")

import json
from dataclasses import replace

import pytest

from unsloth_puzzles.bench.challenges import FILES, TITLES
from unsloth_puzzles.bench.hardware import Hardware
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.bench.rubric import FULL, QLORA, RUBRIC
from unsloth_puzzles.bench.scorecard import _amount, score, table, totals

MACHINE = Hardware("NVIDIA Test", "cuda", 90, 1, 8.0, 2, 1, True, False)
CPU = Hardware("CPU", "cpu", None, 0, 8.0, None, None, False, True)
TWO_T4S = "2 x Tesla T4, NCCL, Llama 3.1 8B"
PERFECT_A = {
    ("official_harness_speedup", "all"): 2.0,
    ("kernel_launches", "one call"): 1,
    ("compile_graph_breaks", "fullgraph"): 0,
    ("compile_mismatched", "fullgraph"): 0,
    ("mismatched_weights", "asm fp16"): 0,
    ("mismatched_weights", "asm bf16"): 0,
    ("cache_eviction_hints", "default kernel"): 2,
    ("harness_checks_passed", "fp16"): 1,
    ("harness_checks_passed", "bf16"): 2,
}


@pytest.fixture
def judge(tmp_path):
    def judged(challenge, values, machine=MACHINE):
        measurements = Measurements(tmp_path / FILES[challenge], machine)
        for (metric, case), value in values.items():
            measurements.add(metric, case, value, "units")
        measurements.save()
        return [row for row in score(tmp_path) if row.challenge == challenge]

    return judged


def perfect(challenge) -> dict[tuple[str, str], float]:
    """A value for each condition of the best levels: the bound itself, or just over where it must be over."""
    values = {}
    for criterion in RUBRIC:
        for condition in criterion.levels[0][1] if criterion.challenge == challenge else ():
            case = condition.case or TWO_T4S
            values[condition.metric, case] = condition.bound + (condition.comparison == ">")
    return values


def points(rows, word=""):
    return sum(row.points for row in rows if word in row.criterion)


def test_the_rubric_holds_every_point():
    assert {name: possible for name, (_, possible) in totals(score("/nowhere")).items()} == {
        "A": 14,
        "B": 10,
        "C": 9,
        "D": 8,
        "E": 10,
        "all": 51,
    }
    assert set(FILES) == set(TITLES) == {criterion.challenge for criterion in RUBRIC}


@pytest.mark.parametrize(
    ("challenge", "expected"),
    [
        ("A", [3, 1, 2, 2, 0, 1, 3, 1, 1]),
        ("B", [5, 3, 2]),
        ("C", [3, 1, 2, 1, 0, 0, 2]),
        ("D", [1, 1, 2, 1, 1, 2]),
        ("E", [2, 0, 1, 1, 1, 1, 4]),
    ],
)
def test_points_of_each_criterion_in_the_order_of_the_rubric(judge, challenge, expected):
    rows = judge(challenge, PERFECT_A if challenge == "A" else perfect(challenge))
    assert [row.points for row in rows] == [row.possible for row in rows] == expected
    assert {row.verdict.partition(",")[0] for row in rows} == {"met"} and {row.hardware for row in rows} == {
        "NVIDIA Test"
    }


def test_nothing_measured_is_no_pass_and_no_penalty():
    rows = score("/nowhere")
    assert {(row.verdict, row.points, row.measured, row.hardware) for row in rows} == {("not measured here", 0, "", "")}


@pytest.mark.parametrize(
    ("speed_up", "expected"),
    [
        (0.90, -3),
        (1.00, -3),
        (1.01, 0),
        (1.0499, 0),
        (1.05, 1),
        (1.08, 1),
        (1.10, 3),
        (1.1499, 3),
        (1.15, 5),
        (2.0, 5),
    ],
)
def test_speed_up_points_add_up(judge, speed_up, expected):
    rows = judge("A", {("official_harness_speedup", "all"): speed_up})
    assert points(rows, "speed-up") == expected


@pytest.mark.parametrize(
    ("metric", "case", "value", "lost"),
    [
        ("kernel_launches", "one call", 3, 3),
        ("kernel_launches", "one call", 0, 3),
        ("compile_graph_breaks", "fullgraph", 1, 2),  # the point, and the penalty
        ("compile_mismatched", "fullgraph", 5, 2),
        ("mismatched_weights", "asm fp16", 1, 3),
        ("mismatched_weights", "asm bf16", 1, 3),
        ("cache_eviction_hints", "default kernel", 0, 1),
        ("harness_checks_passed", "fp16", 0, 2),
        ("harness_checks_passed", "bf16", 0, 2),
        ("official_harness_speedup", "all", 0.99, 8),
    ],
)
def test_each_measurement_of_a_counts(judge, metric, case, value, lost):
    assert points(judge("A", {**PERFECT_A, (metric, case): value})) == 14 - lost


@pytest.mark.parametrize(
    ("missing", "lost"),
    [
        (("kernel_launches", "one call"), 3),
        (("mismatched_weights", "asm fp16"), 3),
        (("mismatched_weights", "asm bf16"), 3),
        (("cache_eviction_hints", "default kernel"), 1),
        (("compile_graph_breaks", "fullgraph"), 1 + 1),
        (("compile_mismatched", "fullgraph"), 1 + 1),
        (("harness_checks_passed", "fp16"), 1 + 1),
        (("harness_checks_passed", "bf16"), 1 + 1),
        (("official_harness_speedup", "all"), 5 + 3),
    ],
)
def test_a_missing_measurement_of_a_is_no_pass_and_costs_the_penalty_of_what_is_not_shown(judge, missing, lost):
    rows = judge("A", {key: value for key, value in PERFECT_A.items() if key != missing})
    assert points(rows) == 14 - lost
    unmeasured = [row for row in rows if row.verdict == "not measured here"]
    assert all(row.points == 0 and row.hardware == "" for row in unmeasured)
    penalised = [row for row in rows if row.verdict == "not met"]
    assert all(row.points < 0 and "not measured" in row.measured for row in penalised)
    assert len(penalised) == (lost not in (1, 3))


def test_an_attempted_challenge_without_records_has_every_penalty_of_what_is_not_shown(judge):
    """The "else" rows of A and C. A row "with excessive recompilation" needs a count of compilations."""
    assert [row.points for row in judge("A", {})] == [0, 0, 0, 0, -3, -1, 0, 0, -1]
    assert [row.points for row in judge("C", {})] == [0, -2, 0, 0, -1, -3, 0]
    assert [points(judge(challenge, {})) for challenge in "BDE"] == [0, 0, 0]


def test_a_machine_without_a_gpu_is_not_penalised_for_what_needs_one(judge):
    assert [row.points for row in judge("A", {}, CPU)] == [0, 0, 0, 0, 0, -1, 0, 0, 0]
    assert [row.points for row in judge("C", {}, CPU)] == [0, -2, 0, 0, -1, -3, 0]


@pytest.mark.parametrize(
    ("missing", "lost"),
    [
        (("graph_breaks", "all"), (1 + 2) + 2 + 1 + 1 + 3),
        (("loss_difference", "compiled, float32"), (1 + 2) + 2 + 1 + 1 + 3),
        (("checks_passed", "operators, 4-bit linear"), 1 + 2),
        (("checks_passed", "operators, loss"), 1),
        (("checks_passed", "operators, layer norms"), 3),
        (("compilations", "attention"), 2),
        (("compilations", "MLP"), 1),
        (("compilations", "max-autotune"), 2),
    ],
)
def test_a_missing_measurement_of_c_is_no_pass_and_costs_the_penalty_of_what_is_not_shown(judge, missing, lost):
    best = perfect("C")
    assert missing in best
    assert points(judge("C", {key: value for key, value in best.items() if key != missing})) == 9 - lost


def test_a_known_failure_counts_although_its_companion_is_not_measured(judge):
    rows = judge("A", {("mismatched_weights", "asm fp16"): 7})
    (row,) = (row for row in rows if "asm" in row.criterion)
    assert row.verdict == "not met"
    assert row.measured == "mismatched weights (asm fp16): 7; mismatched weights (asm bf16): not measured"


def test_b_without_compile_and_without_the_kaggle_example(judge):
    best = perfect("B")
    rows = judge("B", {**best, ("loss_difference", "FSDP2 compiled against one GPU"): 0.1})
    assert (rows[0].points, rows[0].verdict, points(rows)) == (3, "partly met", 8)
    for values in (
        {**best, ("steps_trained", TWO_T4S): 59},
        {**best, ("steps_trained", "2 x NVIDIA Test, NCCL, 4 layers, random weights"): 59},
        {key: value for key, value in best.items() if key[0] != "steps_trained"},
        {**best, ("checks_passed", "the script on two GPUs"): 0.75},
        {key: value for key, value in best.items() if key != ("checks_passed", "the script on two GPUs")},
    ):
        assert points(judge("B", values)) == 0


ELSEWHERE = "met, but not on a T4"


@pytest.mark.parametrize(
    ("name", "case", "verdict"),
    [
        ("Tesla T4", TWO_T4S, "met"),
        ("Tesla T4", "2 x Tesla T4, NCCL, 4 layers, random weights", "met, with random weights"),
        ("NVIDIA Test", "2 x NVIDIA Test, NCCL, Llama 3.1 8B", ELSEWHERE),
        ("NVIDIA T400 4GB", "2 x NVIDIA T400 4GB, NCCL, Llama 3.1 8B", ELSEWHERE),
        ("NVIDIA Test", "2 x NVIDIA Test, NCCL, 4 layers, random weights", f"{ELSEWHERE}, with random weights"),
    ],
)
def test_the_script_on_two_gpus_says_where_it_was_met(judge, name, case, verdict):
    values = {key: value for key, value in perfect("B").items() if key[0] != "steps_trained"}
    rows = judge("B", values | {("steps_trained", case): 60}, replace(MACHINE, name=name))
    assert [row.points for row in rows] == [5, 3, 2] and [row.verdict for row in rows] == ["met", "met", verdict]
    assert rows[-1].criterion.startswith("the script on two GPUs (asked for: Kaggle's 2 x T4")
    assert rows[-1].measured == f"steps trained ({case}): 60; all checks passed of: the script on two GPUs"


@pytest.mark.parametrize(
    ("metric", "case", "value", "expected"),
    [
        ("checks_passed", "no byte changes", 0.9, 0),
        ("checks_passed", "features of FSDP2", 0.9, 0),
        ("checks_passed", "through SFTTrainer", 0.9, 0),
        ("checks_passed", "60 steps, uncompiled", 0.9, 0),
        ("checks_passed", "60 steps, compiled", 0.9, 3),
        ("loss_difference", "FSDP2 against one GPU", 1.1e-5, 0),
        ("loss_difference", "FSDP2 compiled against one GPU", 1.1e-5, 3),
        ("graph_breaks", "FSDP2 compiled", 1, 3),
        ("compilations", "FSDP2 compiled", 31, 3),
    ],
)
@pytest.mark.parametrize("missing", [False, True])
def test_each_measurement_of_training_on_two_ranks_counts(judge, metric, case, value, expected, missing):
    values = perfect("B")
    del values[metric, case]
    rows = judge("B", values if missing else {**values, (metric, case): value})
    assert rows[0].points == expected


@pytest.mark.parametrize(
    ("metric", "case", "value", "lost"),
    [
        ("checks_passed", "flex, dynamic lengths", 0.5, 2),
        ("checks_passed", "flex, static lengths", 0.5, 3),
        ("graph_breaks", "all", 1, (1 + 2) + 2 + 1 + 1 + 3),
        ("compilations", "attention", 30, 0),
        ("compilations", "attention", 31, 2 + 3),
        ("compilations", "MLP", 31, 1 + 3),
        ("triton_matmuls", "max-autotune", 0, 2),
        ("graph_breaks", "max-autotune", 1, 2),
        ("loss_difference_ratio", "max-autotune", 2.01, 2),
        ("checks_passed", "flex, a Trainer run", 0.5, 2),
        ("checks_passed", "operators, 4-bit linear", 0.5, 1 + 2),
        ("checks_passed", "operators, attention", 0.5, 2),
        ("checks_passed", "operators, MLP", 0.5, 1),
        ("checks_passed", "operators, loss", 0.5, 1),
        ("checks_passed", "operators, layer norms", 0.5, 3),
        ("loss_difference", "compiled, float32", 1.01e-4, (1 + 2) + 2 + 1 + 1 + 3),
        ("compilations", "max-autotune", 31, 2 + 2),
    ],
)
def test_penalties_of_c(judge, metric, case, value, lost):
    best = perfect("C")
    assert (metric, case) in best
    assert points(judge("C", {**best, (metric, case): value})) == 9 - lost


@pytest.mark.parametrize(
    ("metric", "case", "value", "expected"),
    [
        ("checks_passed", "float32 upcast", 0, 0),
        ("checks_passed", "derivatives by autograd", 0.9, 0),
        ("loss_curve_max_abs_difference", FULL, 2.1e-4, 0),
        ("loss_curve_gradient_norm_difference", FULL, 1.1e-4, 0),
        ("loss_curve_max_abs_difference", QLORA, 1.1e-3, 0),
        ("planted_fault_difference", "gradients x 1.01", 1e-3, 0),
        ("planted_fault_difference", "a mean per chunk", 1e-3, 0),
        ("checks_passed", "Llama 1B learns", 0.5, 0),
        ("memory_saved", "head trained", 0.49, 8),
        ("memory_saved", "head frozen", 0.49, 8),
        ("checks_passed", "other functions", 0.9, 9),
        ("checks_passed", "GRPO", 0.99, 6),
        ("grpo_reward_rise", "GRPO run", 0.0, 6),
        ("grpo_peak_over_full_logits", "head only", 0.6, 6),
    ],
)
def test_gates_of_e_take_every_point_away(judge, metric, case, value, expected):
    best = perfect("E")
    assert (metric, case) in best
    assert points(judge("E", {**best, (metric, case): value})) == expected


def test_a_gate_leaves_the_other_challenges_alone(tmp_path, judge):
    judge("A", PERFECT_A)
    judge("E", {**perfect("E"), ("loss_curve_max_abs_difference", FULL): 1.0})
    assert totals(score(tmp_path)) == {
        "A": (14, 14),
        "B": (0, 10),
        "C": (0, 9),
        "D": (0, 8),
        "E": (0, 10),
        "all": (14, 51),
    }


def test_table_shows_measured_values_and_sums(judge):
    text = table(judge("A", {**PERFECT_A, ("official_harness_speedup", "all"): 2.03456}))
    measured = "official harness speedup (all): 2.035"
    speed = f"| A | speed-up of 1.15 or more over the three launches | 2 of 2 | {measured} | {ELSEWHERE} |"
    assert speed in text
    said = "5 of them not shown on the GPU that the puzzle names"
    assert f"| **A** | **A. NF4 to Triton** | **14 of 14** |  | {said} |" in text
    on_t4 = table(judge("A", PERFECT_A, replace(MACHINE, name="Tesla T4")))
    assert "2 of 2" in on_t4 and ELSEWHERE not in on_t4 and "not shown" not in on_t4
    columns = {line.count("|") for line in text.splitlines()}
    assert columns == {7}


def test_a_file_of_another_form_is_an_error_and_not_a_zero(tmp_path):
    (tmp_path / FILES["A"]).write_text(json.dumps({"records": []}))
    with pytest.raises(ValueError, match="must have exactly the keys"):
        score(tmp_path)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (1, "kernels", "1"), (30714, "bytes", "30714"), (2.00784, "x", "2.008x"), (1.9073e-06, "loss", "1.91e-06 nats"),
        (0.94365, "fraction", "94.4 %"), (0.6176, "reward", "0.6176"),
    ],
)  # fmt: skip
def test_amounts_have_the_digits_that_a_reader_needs(value, unit, shown):
    assert _amount(value, unit) == shown

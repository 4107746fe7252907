"""RESULTS.md holds what resources/ holds: the tables follow the JSON, and what is not there is said not to be."""

import json
import re
from pathlib import Path

import pytest

from tools.build_notebook import ROOT
from tools.build_readme import release, results
from tools.matrix_table import matrix_table
from tools.measured_tables import RATIOS, amount, gpu_tests, metric_table, shown_unit
from tools.readme_contents import CHECKS, FIGURES, SWEPT, TABLES, TURNED, WORST
from unsloth_puzzles.bench.code_digest import code_digest, package_files


def _record(metric: str, case: str, value: float, unit: str, **optional: object) -> dict:
    fields = {"metric": metric, "case": case, "value": value, "unit": unit}
    return fields | {"low": None, "high": None, "baselines": {}} | optional


MEASURED = {
    "hardware": {"name": "NVIDIA Test", "device": "cuda"},
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "bitsandbytes": "0.50.2"},
    "date": "2026-11-22",
    "digest": None,
    "records": [
        _record("official_harness_speedup", "all", 1.9, "x", low=1.85, high=1.95, baselines={"PEFT": 0.5}),
        _record("mismatched_weights", "asm fp16", 0, "weights"),
        _record("mismatched_weights", "asm bf16", 45, "weights"),
        _record("copy_bandwidth_fraction", "8192x28672", 0.964, "fraction"),
    ],
}


def test_committed_results_have_every_measured_value() -> None:
    """Read back from the page, not through the generator's own layout."""
    page = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    for name, tables in TABLES.items():
        path = ROOT / "resources" / "measurements" / name
        records = json.loads(path.read_text(encoding="utf-8"))["records"] if path.exists() else []
        challenge = page.split(f"\n### {name[0].upper()}. ")[1].split("\n### ")[0]
        others = {record["metric"]: f"`{record['metric']}`" for record in records}
        for metric, caption in (others | dict(tables)).items():
            for record in (r for r in records if r["metric"] == metric and metric not in WORST):
                section = challenge.split(f"**{caption}")[1].split("\n**")[0]
                if metric in CHECKS and record["value"] == 1:
                    assert record["case"] in " ".join(section.split())
                    continue
                if metric in TURNED:
                    heads, ours = re.findall(r"^\| (?:ours)? ?\| (.+) \|$", section, flags=re.MULTILINE)
                    cells = dict(zip(heads.split(" | "), (text.split()[0] for text in ours.split(" | ")), strict=True))
                    assert cells[record["case"]] == amount(record["value"], "")
                    continue
                cells = dict(re.findall(r"^\| (.+?) \| (\S+(?: %)?)", section, flags=re.MULTILINE))
                cells |= dict(re.findall(r"\*\* \((.+)\): (\S+?(?: %)?)(?: \(.+\))?\.$", " ".join(section.split())))
                unit = shown_unit(record) if record["unit"] in RATIOS else ""
                value = record["value"] / (1e9 if record["unit"] == "bytes/s" else 1)  # shown in GB/s
                assert cells[record["case"]] == amount(value, unit)


def test_table_shows_spread_and_baselines(tmp_path: Path) -> None:
    page = results(_resources(tmp_path))
    assert "| case | ours | PEFT |" in page
    assert "| all | 1.90x (1.85x to 1.95x) | 0.50x |" in page
    assert "copy bandwidth** (8192x28672): 96.4 %." in page
    assert "45 weights, the largest of 2 cases" in page
    assert "NVIDIA Test, 2026-11-22, torch 2.11.0" in page


def test_missing_measurements_are_named(tmp_path: Path) -> None:
    page = results(_resources(tmp_path))
    assert "Host time to enqueue one call**: not measured." in page
    of_b = page.split("### B.")[1].split("###")[0]
    assert "\n\nNot measured yet.\n\nSweeps in `b_fsdp2_sweeps.json`: not measured yet." in of_b


def test_sweeps_of_a_challenge_without_a_run_are_shown(tmp_path: Path) -> None:
    resources = _resources(tmp_path)
    swept = {**MEASURED, "records": [_record("scaling", "compiled, 1 rows a GPU", 1.75, "x")]}
    (resources / "measurements" / "b_fsdp2_sweeps.json").write_text(json.dumps(swept))
    of_b = results(resources).split("### B.")[1].split("###")[0]
    assert "Not measured yet." in of_b and "over that of one** (compiled, 1 rows a GPU): 1.75x." in of_b


def test_sweeps_of_other_code_than_the_release_say_so(tmp_path: Path) -> None:
    resources = _resources(tmp_path)
    (resources / "measurements" / "e_backprop_sweeps.json").write_text(json.dumps({**MEASURED, "digest": "d"}))
    for digest, said in (("d", ""), ("another", ", with other code than the committed notebook's")):
        assert f"Sweeps in `e_backprop_sweeps.json`, a run of their own{said}: NVIDIA Test" in results(
            resources, digest
        )


def test_checks_that_passed_are_named_and_only_the_others_are_rows() -> None:
    records = [
        _record("checks_passed", "flex, static lengths", 1.0, "fraction"),
        _record("checks_passed", "loss", 0.75, "fraction"),
        _record("checks_passed", "MLP", 0.9999, "fraction"),
    ]
    shown = metric_table(records, "checks_passed", "Checks")
    assert shown.startswith("**Checks**: all in 1 of 3 groups (flex, static lengths).\n\n| case | ours |")
    assert shown.endswith("| loss | 75.0 % |\n| MLP | >99.9 % |")
    assert metric_table(records[:1], "checks_passed", "Checks") == (
        "**Checks**: all in 1 of 1 groups (flex, static lengths)."
    )
    assert "all in 0 of 1 groups.\n" in metric_table(records[1:2], "checks_passed", "Checks")


def test_metric_without_a_caption_is_shown_under_its_name(tmp_path: Path) -> None:
    resources = _resources(tmp_path)
    for file, challenge in (("d_issues.json", "D"), ("e_backprop_sweeps.json", "E")):
        records = [_record("newly_measured", "a case", 1.0, "fraction"), _record("checks_passed", "a check", 1.0, "x")]
        (resources / "measurements" / file).write_text(json.dumps({**MEASURED, "records": records}))
        section = results(resources).split(f"### {challenge}.")[1].split("###")[0]
        assert "**`newly_measured`, from 0 to 1** (a case): 1." in section
        assert section.count("a check") == 1


def _metrics_of_the_source() -> set[str]:
    """Those that the notebook and its benchmarks add under names that are written out."""
    files = [
        *ROOT.glob("notebook/*.py"),
        *ROOT.glob("benchmarks/**/*.py"),
        ROOT / "unsloth_puzzles/bench/experiments.py",
    ]
    added = re.compile(r"""\b(?:results|found)\.add\(\s*"(\w+)"|yield _(?:record|plain|rate)\("(\w+)\"""")
    return {first or second for path in files for first, second in added.findall(path.read_text(encoding="utf-8"))}


def test_no_heading_of_the_committed_results_is_a_metric() -> None:
    page = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    measured = {
        record["metric"]
        for path in (ROOT / "resources" / "measurements").glob("*.json")
        for record in json.loads(path.read_text(encoding="utf-8")).get("records", ())
    }
    headings = re.findall(r"^(?:#+ (.+)|\*\*(.+?)\*\*)", page, flags=re.MULTILINE)
    words = {re.split("[`,]", one.lstrip("`"))[0] for heading in headings for one in heading if one}
    assert measured and words and not words & measured


def test_every_metric_has_a_title_before_it_is_measured() -> None:
    swept = [tables for of_file in SWEPT.values() for tables in of_file.values()]
    titled = {metric for tables in (*TABLES.values(), *swept) for metric, _ in tables}
    metrics = _metrics_of_the_source()
    assert {"checks_passed", "linear_relative_error", "gguf_equal_tokens", "linear_us"} <= metrics
    assert not metrics - titled


def test_committed_results_have_no_row_of_100_percent() -> None:
    rows = [line for line in (ROOT / "RESULTS.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert rows and not [row for row in rows if re.search(r"\| 100(\.0)? %", row)]


def test_scores_are_numbers_from_0_to_1() -> None:
    records = [_record("tool_calling", "parse rate", 1.0, "fraction", low=0.985, high=1.0, baselines={"before": 0.25})]
    shown = metric_table(records, "tool_calling", "Tool calling")
    assert shown.startswith("**Tool calling, from 0 to 1**") and "| parse rate | 1 (0.985 to 1) | 0.25 |" in shown


def test_rates_in_bytes_are_shown_in_gigabytes() -> None:
    record = _record("gather", "a layer", 165_002_185_830, "bytes/s", low=1.6e11, high=1.7e11)
    assert metric_table([record], "gather", "Bandwidth") == "**Bandwidth, GB/s** (a layer): 165 (160 to 170)."
    shown = metric_table([record | {"baselines": {"predicted": 3e11}}], "gather", "Bandwidth")
    assert shown.endswith("| case | ours | predicted |\n| --- | --- | --- |\n| a layer | 165 (160 to 170) | 300 |")


def test_a_unit_that_the_caption_names_is_not_repeated() -> None:
    records = [_record("kernels", "a call", 2, "kernels"), _record("time", "a call", 2.5, "us")]
    assert metric_table(records, "kernels", "Kernels of one call") == "**Kernels of one call** (a call): 2."
    assert metric_table(records, "time", "Time of use") == "**Time of use, us** (a call): 2.5."


@pytest.mark.parametrize("rows, folded", [(20, False), (21, True)])
def test_a_long_table_is_folded(rows: int, folded: bool) -> None:
    shown = metric_table([_record("time", f"case {n}", 1.0, "us") for n in range(rows)], "time", "Time")
    assert shown.startswith("**Time, us**\n\n") and shown.count("\n| case ") == rows + 1
    assert (f"\n\n<details><summary>{rows} rows</summary>\n\n| case | ours |" in shown) == folded
    assert shown.endswith("|\n\n</details>") == folded


@pytest.mark.parametrize("value, shown", [(1.0, "100.0 %"), (0.9996, ">99.9 %"), (0.9994, "99.9 %"), (0.0, "0.0 %")])
def test_a_fraction_below_1_is_not_written_as_100_percent(value: float, shown: str) -> None:
    assert amount(value, "fraction") == shown


@pytest.mark.parametrize(
    "value, unit, shown",
    [
        (3.83e-7, "x", "3.8e-07"), (0.004, "x", "4.0e-03"), (0.006, "x", "0.01x"), (0.0, "x", "0.00x"),
        (1e-5, "fraction", "1.0e-05"), (0.0006, "fraction", "0.1 %"), (3.83e-7, "relative", "3.83e-07 relative"),
    ],
)  # fmt: skip
def test_small_ratios_are_not_written_as_zero(value: float, unit: str, shown: str) -> None:
    assert amount(value, unit) == shown


def test_figures_are_in_the_section_of_their_challenge(tmp_path: Path) -> None:
    resources = _resources(tmp_path)
    for name in ("a_nf4_bandwidth.png", "a_nf4_new_one.png"):
        (resources / name).write_bytes(b"")
    (resources / "d_confusion.png").write_bytes(b"")
    assert f"{resources.name}/d_confusion.png" in results(resources).split("### D.")[1].split("### E.")[0]
    section = results(resources).split("### B.")[0]
    assert f"![a nf4 new one]({resources.name}/a_nf4_new_one.png)" in section
    assert f"![{FIGURES['a_nf4_bandwidth']}]({resources.name}/a_nf4_bandwidth.png)" in section


def test_turned_table_has_a_row_per_candidate_and_figures_may_lie_elsewhere(tmp_path: Path) -> None:
    resources = _resources(tmp_path)
    beside = {"eager": 23.5, "Liger FLCE": 1.23, "Apple CCE": 1.11}
    records = [
        _record("extra_peak_gib", "head trained", 1.3, "GiB", baselines=beside),
        _record("extra_peak_gib", "head frozen", 0.31, "GiB", baselines={"eager": 23.5}),
    ]
    path = resources / "measurements" / "e_backprop.json"
    path.write_text(json.dumps({**MEASURED, "records": records}))
    (resources / "q5").mkdir()
    (resources / "q5" / "llama32_1b_loss_curve.png").write_bytes(b"")
    page = results(resources)
    section = page.split("### E.")[1]
    for line in ("|  | head trained | head frozen |", "| ours | 1.3 | 0.31 |", "| Liger FLCE | 1.23 | - |"):
        assert line in section
    assert page.count("q5/llama32_1b_loss_curve.png") == section.count("q5/llama32_1b_loss_curve.png") == 1


def test_gpu_tests_list_each_reason_of_a_skip_once(tmp_path: Path) -> None:
    kept = {name: MEASURED[name] for name in ("hardware", "versions", "date", "digest")}
    skips = [{"test": "t::a", "reason": "needs two GPUs"}, {"test": "t::b", "reason": "needs two GPUs"}]
    path = tmp_path / "gpu_tests.json"
    path.write_text(json.dumps(kept | {"passed": 40, "failed": 0, "skipped": 2, "failures": [], "skips": skips}))
    assert gpu_tests(path).startswith("40 passed, 0 failed, 2 skipped. NVIDIA Test")
    assert gpu_tests(path).count("- skipped: needs two GPUs") == 1


def test_gpu_tests_of_other_code_say_so(tmp_path: Path) -> None:
    kept = {name: MEASURED[name] for name in ("hardware", "versions", "date", "digest")}
    path = tmp_path / "gpu_tests.json"
    same = code_digest(package_files())
    for digest, ending in ((same, ""), ("another", " The package has changed since.")):
        counts = {"passed": 4, "failed": 0, "skipped": 0, "failures": [], "skips": []}
        path.write_text(json.dumps(kept | counts | {"digest": digest}))
        assert gpu_tests(path).endswith(f"bitsandbytes {MEASURED['versions']['bitsandbytes']}.{ending}")


def test_gpu_tests_name_failures(tmp_path: Path) -> None:
    kept = {name: MEASURED[name] for name in ("hardware", "versions", "date", "digest")}
    path = tmp_path / "gpu_tests.json"
    path.write_text(json.dumps(kept | {"passed": 4, "failed": 1, "skipped": 0, "failures": ["t::a[x]"], "skips": []}))
    assert gpu_tests(path).endswith("\n\n- failed: `t::a[x]`")


def test_release_says_what_it_is_of_and_whether_the_tests_passed() -> None:
    of = {"date": "2026-11-28", "hardware": "NVIDIA Test", "commit": "c0ffee" * 6, "digest": "d"}
    assert "on 2026-11-28 on an NVIDIA Test, at commit `c0ffeec0ff`." in release(of)
    assert "make test-slow" not in release(of)
    assert "`make test-slow` was not run with its code." in release({**of, "tests": "not run"})


def test_tables_have_at_most_four_columns(tmp_path: Path) -> None:
    rows = [line for line in results(_resources(tmp_path)).splitlines() if line.startswith("|")]
    assert rows and max(row.count("|") for row in rows) <= 5


def _resources(folder: Path) -> Path:
    resources = folder / "resources"
    (resources / "measurements").mkdir(parents=True)
    (resources / "measurements" / "a_nf4.json").write_text(json.dumps(MEASURED))
    return resources


def test_releases_of_libraries_show_tests_builds_and_what_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "matrix.json"
    assert matrix_table(path) == "Not measured yet."
    head = {
        "date": "2026-11-30",
        "digest": code_digest(package_files()),
        "versions": {"torch": "2.15.0"},
        "ended": True,
    }
    tests = head | {"passed": 7, "failed": 1, "error": 2, "skipped": 3}
    kernels = head | {"builds": 9, "failed": [{"name": "a"}]}
    stale = {"tests": tests | {"digest": "another", "ended": False}}
    path.write_text(json.dumps({"newest": {"kernels": kernels, "tests": tests}, "oldest": stale}))
    oldest, newest = matrix_table(path).splitlines()[2:]
    where = "7 passed, 3 failed, 3 skipped, 2026-11-30"
    assert oldest == f"| oldest | torch 2.15.0 | {where}, not to its end, other code | not run |"
    assert newest == f"| newest | torch 2.15.0 | {where} | 8 of 9, 2026-11-30 |"

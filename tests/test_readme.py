"""README.md holds what resources/ holds: the tables follow the JSON, and what is not there is said not to be."""

import ast
import json
import re
from pathlib import Path

import pytest

from tools import build_readme
from tools.build_notebook import ROOT
from tools.build_readme import readme, release, results
from tools.measured_tables import RATIOS, amount, gpu_tests
from tools.readme_contents import FIGURES, TABLES, TURNED, WORST
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


def test_committed_readme_is_what_the_measurements_give() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme()


def test_committed_readme_has_every_measured_value() -> None:
    """Read back from the page, not through the generator's own layout."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, tables in TABLES.items():
        path = ROOT / "resources" / "measurements" / name
        records = json.loads(path.read_text(encoding="utf-8"))["records"] if path.exists() else []
        challenge = page.split(f"\n### {name[0].upper()}. ")[1].split("\n### ")[0]
        for metric, caption in tables:
            for record in (r for r in records if r["metric"] == metric and metric not in WORST):
                section = challenge.split(f"**{caption}")[1].split("\n**")[0]
                if metric in TURNED:
                    heads, ours = re.findall(r"^\| (?:ours)? ?\| (.+) \|$", section, flags=re.MULTILINE)
                    cells = dict(zip(heads.split(" | "), (text.split()[0] for text in ours.split(" | ")), strict=True))
                    assert cells[record["case"]] == amount(record["value"], "")
                    continue
                cells = dict(re.findall(r"^\| (.+?) \| (\S+(?: %)?)", section, flags=re.MULTILINE))
                unit = record["unit"] if record["unit"] in RATIOS else ""
                assert cells[record["case"]] == amount(record["value"], unit)


def test_table_shows_spread_and_baselines(tmp_path: Path) -> None:
    page = results(_resources(tmp_path))
    assert "| case | ours | PEFT |" in page
    assert "| all | 1.90x (1.85x to 1.95x) | 0.50x |" in page
    assert "| 8192x28672 | 96.4 % |" in page
    assert "45 weights, the largest of 2 cases" in page
    assert "NVIDIA Test, 2026-11-22, torch 2.11.0" in page


def test_missing_measurements_are_named(tmp_path: Path) -> None:
    page = results(_resources(tmp_path))
    assert "Host time to enqueue one call**: not measured." in page
    assert page.split("### B.")[1].split("###")[0].strip().endswith("Not measured yet.")


def test_page_without_any_measurement_holds_no_figure(tmp_path: Path) -> None:
    page = readme(tmp_path)
    assert "Not measured yet." in page and "<!--" not in page
    assert not re.search(r"\d\.\d\dx", page)


def test_figures_are_in_the_section_of_their_challenge(tmp_path: Path) -> None:
    resources = _resources(tmp_path)
    for name in ("a_nf4_bandwidth.png", "a_nf4_new_one.png"):
        (resources / name).write_bytes(b"")
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


def test_check_finds_a_page_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = readme()
    monkeypatch.setattr(build_readme, "ROOT", tmp_path)
    monkeypatch.setattr(build_readme, "readme", lambda: made)
    assert build_readme.main(["--check"]) == 1
    (tmp_path / "README.md").write_text(made, encoding="utf-8")
    assert build_readme.main(["--check"]) == 0
    (tmp_path / "README.md").write_text(made + " ", encoding="utf-8")
    assert build_readme.main(["--check"]) == 1


def test_tables_have_at_most_four_columns(tmp_path: Path) -> None:
    rows = [line for line in readme(_resources(tmp_path)).splitlines() if line.startswith("|")]
    assert rows and max(row.count("|") for row in rows) <= 5


def test_library_examples_run() -> None:
    """As they stand, on the CPU; of those that need a real model, imports and names only."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("trl")
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    weight, compiled, model, loss, trainers, attention, *others = examples
    names: dict = {}
    for example in (weight, compiled, loss, attention):
        exec(example.replace('"cuda"', '"cpu"'), names)
    assert names["weight"].shape == (1024, 512) and str(names["weight"].dtype) == "torch.float16"
    assert names["y"].shape == (4, 1024)
    assert names["hidden_states"].grad.norm() > 0 and names["head"].weight.grad.norm() > 0
    assert names["out"].shape == names["query"].shape
    for example in (model, trainers, *others):
        imports = [node for node in ast.parse(example).body if isinstance(node, ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "imports", "exec"), names)
    for name in (
        "patch_linear4bit", "use_memory_efficient_loss", "MemoryEfficientGRPOTrainer", "compile_qlora", "pack_nf4",
        "fsdp2_arguments", "prepare_trainer", "VisionCollator", "patch_mllama", "export_gguf", "load_classifier",
        "add_adapters", "save_classifier", "ToolBox", "run_conversation",
    ):  # fmt: skip
        assert callable(names[name])


def _resources(folder: Path) -> Path:
    resources = folder / "resources"
    (resources / "measurements").mkdir(parents=True)
    (resources / "measurements" / "a_nf4.json").write_text(json.dumps(MEASURED))
    return resources

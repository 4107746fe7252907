"""Every Triton kernel that a process or its worker compiles is recorded, and those that no T4 can run are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.rehearsal import sm75
from tools.rehearsal.section import HOOK

KERNELS = Path(__file__).with_name("kernels.py")


@pytest.mark.parametrize("where", ["here", "worker"])
def test_planted_kernels_are_caught(where: str, tmp_path: Path) -> None:
    _record(tmp_path, str(KERNELS), where, "copies", "needs_sm80", "takes_too_much")
    found = {kernel["name"]: kernel for kernel in sm75.compile_all(tmp_path / "kernels", workers=2)}
    assert found["copies"]["verdict"] == sm75.FINE and found["copies"]["registers"] > 0
    assert found["copies"]["shared"] == 0
    errors = sm75.errors(list(found.values()))
    assert len(errors) == 2
    assert "needs_sm80" in errors[0] and "sm_80 or higher" in errors[0]
    assert "takes_too_much takes 131072 bytes" in errors[1]
    totals = sm75.totals(list(found.values()))
    assert (totals["seen"], totals["failed"], totals["over 64 KiB"]) == (3, 1, 1)
    assert found["takes_too_much"]["dot"] == "tf32"


def test_kernels_compiled_for_a_report_are_counted_apart(tmp_path: Path) -> None:
    _record(tmp_path, "-m", "unsloth_puzzles.bench.cross_compile", "unsloth_puzzles.nf4.variants:contraction_jobs")
    found = sm75.compile_all(tmp_path / "kernels")
    assert {kernel["purpose"] for kernel in found} == {"report"}
    assert sm75.totals(found)["seen"] == 0 and sm75.totals(found)["compiled for a report only"] == len(found) > 0


def test_what_cannot_be_read_is_not_decidable_and_no_error(tmp_path: Path) -> None:
    _kernel(tmp_path, "broken", ir="module {")
    _kernel(tmp_path, "gluon", ir="", undecidable="a Gluon kernel")
    found = sm75.compile_all(tmp_path)
    assert {kernel["name"]: kernel["verdict"] for kernel in found} == dict.fromkeys(
        ("broken", "gluon"), sm75.UNDECIDABLE
    )
    assert sm75.errors(found) == [] and sm75.totals(found)["not decidable"] == 2


def test_a_compiler_that_ends_or_hangs_costs_one_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "hangs", "z"):
        _kernel(tmp_path, name, ir="", undecidable="nothing to compile")
    real = subprocess.Popen

    def start(command: list[str], **options):
        script = "import sys, json, time\nfrom tools.rehearsal import sm75\nfrom pathlib import Path\n"
        script += "for name in sys.argv[1:]:\n  if 'hangs' in name: time.sleep(60)\n"
        script += "  print(json.dumps(sm75.compile_one(Path(name))), flush=True)"
        return real([sys.executable, "-c", script, *command[3:]], **options)

    monkeypatch.setattr(sm75.subprocess, "Popen", start)
    monkeypatch.setattr(sm75, "SECONDS", 3.0)
    found = {kernel["name"]: kernel for kernel in sm75.compile_all(tmp_path)}
    assert found["hangs"]["verdict"] == sm75.FAILED and "longer than 3 s" in found["hangs"]["reason"]
    assert found["z"]["verdict"] == sm75.UNDECIDABLE


def test_the_sitecustomize_that_is_hidden_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the hidden one')")
    done = _python(tmp_path / "record", "-c", "import sys; print('torch' in sys.modules)", path=[str(tmp_path)])
    assert done.stdout.split("\n")[:2] == ["the hidden one", "False"]


def test_a_listener_of_others_is_called_too(tmp_path: Path) -> None:
    script = (
        "import triton, sys; seen = []; triton.knobs.compilation.listener = lambda **_: seen.append(1)\n"
        f"sys.path.insert(0, {str(KERNELS.parent)!r}); import kernels; kernels.compile_for_sm90(['copies']); print(seen)"
    )
    assert _python(tmp_path, "-c", script).stdout.strip() == "[1]"
    assert len(list((tmp_path / "kernels").glob("*.json"))) == 1


def _record(record: Path, *arguments: str) -> None:
    done = _python(record, *arguments)
    assert done.returncode == 0, done.stderr


def _python(record: Path, *arguments: str, path: list[str] | None = None) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables = {"UNSLOTH_PUZZLES_RECORD": str(record), "TRITON_CACHE_DIR": str(record / "cache")}
    variables["PYTHONPATH"] = os.pathsep.join([str(HOOK), *(path or [])])
    return subprocess.run([sys.executable, *arguments], env=kept | variables, capture_output=True, text=True)


def _kernel(folder: Path, name: str, **fields: str) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"name": name, "purpose": "launch", "options": {}, **fields}))

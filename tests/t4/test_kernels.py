"""Every kernel that any process compiles is recorded, and those that a T4 cannot have are found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.t4.kernels import MOST_SHARED, Built, compile_recorded
from tools.t4.limits import HOOK

NAMES = ("fits", "takes_too_much_shared_memory", "rounds_as_no_t4_can")


@pytest.fixture(scope="module", params=["here", "worker"])
def built(request, tmp_path_factory) -> dict[str, Built]:
    """What was recorded of kernels that a process, or a worker of it, has compiled for another GPU."""
    record, caches = (tmp_path_factory.mktemp(name) for name in ("record", "caches"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"T4_RECORD": str(record), "TRITON_CACHE_DIR": str(caches)}
    environment["PYTHONPATH"] = os.pathsep.join([str(HOOK), str(Path(__file__).parent)])
    script = Path(__file__).with_name("planted.py")
    done = subprocess.run(
        [sys.executable, str(script), request.param, *NAMES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {one.name: one for one in compile_recorded(record)}


def test_every_kernel_is_recorded(built):
    assert sorted(built) == sorted(NAMES)


def test_kernel_that_fits_a_t4_builds(built):
    assert (built["fits"].error, built["fits"].shared, built["fits"].dot) == ("", 0, "")


def test_shared_memory_over_the_limit_is_reported(built):
    one = built["takes_too_much_shared_memory"]
    assert one.error == "" and one.shared > MOST_SHARED and one.dot == "f32"


def test_instruction_that_a_t4_lacks_is_an_error(built):
    assert "requires .target sm_80 or higher" in built["rounds_as_no_t4_can"].error


def test_compilation_that_takes_too_long_is_an_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"name": "fine", "options": {"num_warps": 4}}')
    path.with_suffix(".ttir").write_text("module { tt.func public @fine(%p: !tt.ptr<f32>) { tt.return } }\n")
    assert compile_recorded(tmp_path) == [Built("fine")]
    (one,) = compile_recorded(tmp_path, seconds=0.01)  # not enough to start Python
    assert one.error == "the compiler took longer than 0 s"


def test_kernel_that_was_not_recorded_is_undecided(tmp_path):
    (tmp_path / "unrecorded-1.json").write_text('{"name": "lost", "error": "StopIteration: "}')
    assert compile_recorded(tmp_path) == [Built("lost", decided=False)]


def test_empty_record_has_no_kernel(tmp_path):
    assert compile_recorded(tmp_path) == []


def test_hook_without_a_record_only_runs_the_shadowed_sitecustomize(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os\nos.environ['SHADOWED'] = 'ran'\n")
    code = "import os, sys; print(os.environ['SHADOWED'], type(sys.meta_path[0]).__name__)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HOOK), str(tmp_path)])}
    environment.pop("T4_RECORD", None)
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    shadowed, finder = said.stdout.split()
    assert shadowed == "ran" and finder != "_After"


@pytest.mark.parametrize("unseen", [False, True], ids=["no GPU used", "a GPU used unseen"])
def test_hook_watches_every_way_to_start_gpu_work(tmp_path, unseen):
    # torch.cuda.memory imports _lazy_init by name, and a child whose memory is limited calls it there first
    code = (
        "import sys, torch\n"
        "found = [m._lazy_init.__module__ for n, m in list(sys.modules.items()) if n.startswith('torch.cuda')"
        " and '_lazy_init' in vars(m)]\n"
        "print(len(found), *set(found))\n"
        f"torch.cuda._initialized = {unseen}\n"
    )
    environment = {**os.environ, "T4_RECORD": str(tmp_path), "PYTHONPATH": str(HOOK)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    number, *of = done.stdout.split()
    assert int(number) > 1 and of == ["sitecustomize"]
    assert [path.read_text() for path in tmp_path.glob("unseen-*.txt")] == ["-c"] * unseen

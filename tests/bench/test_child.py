"""Processes of their own: their output, their end, and what they are allowed."""

import os
import sys
import textwrap
import threading
import time

import pytest

from unsloth_puzzles.bench import child, t4
from unsloth_puzzles.bench.child import ChildError, run


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module and make it importable, here and in processes."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str, name: str = "written_for_a_test") -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return write


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_run_shows_and_returns_output(module):
    shown = []
    name = module("import sys; print(sys.argv[1:], __name__); print('error', file=sys.stderr)")
    assert run(name, "a", "b c", timeout=60, show=shown.append) == ["['a', 'b c'] __main__", "error"]
    assert shown == ["['a', 'b c'] __main__", "error"]


def test_failure_has_the_last_line_and_the_output(module):
    with pytest.raises(ChildError, match=r"ended with status 1: ValueError: no such thing") as caught:
        run(module("print('before'); raise ValueError('no such thing')"), timeout=60, show=None)
    assert "before" in caught.value.output and "Traceback" in caught.value.output


def test_timeout_ends_the_process_tree(module):
    name = module(
        """
        import subprocess, sys, time
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(other.pid)
        time.sleep(60)
        """
    )
    lines, began = [], time.monotonic()
    with pytest.raises(ChildError, match="took longer than 2 s"):
        run(name, timeout=2, show=lines.append)
    assert time.monotonic() - began < 20
    assert wait_for(lambda: not is_alive(int(lines[0])))


def test_run_does_not_wait_for_a_grandchild_that_holds_the_pipe(module):
    name = module(
        """
        import subprocess, sys
        print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid)
        """
    )
    began = time.monotonic()
    (pid,) = run(name, timeout=40, show=None)
    assert time.monotonic() - began < 20 and wait_for(lambda: not is_alive(int(pid)))


def test_silent_process_reports_progress(module):
    shown = []
    run(module("import time; time.sleep(2)"), timeout=60, show=shown.append, quiet_seconds=0.5)
    assert shown and all("at work for" in line for line in shown)


def test_end_all_ends_processes_of_other_threads(module):
    name = module("import os, time; print(os.getpid()); time.sleep(60)")
    pids, errors = [], []

    def wait():
        try:
            run(name, timeout=60, show=pids.append)
        except ChildError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert wait_for(lambda: bool(pids))
    child.end_all()
    thread.join(10)
    assert not thread.is_alive() and len(errors) == 1 and not is_alive(int(pids[0]))


def test_child_imports_from_where_its_parent_does(module):
    module("VALUE = 7", "another_module")
    assert run(module("import another_module; print(another_module.VALUE)"), timeout=60, show=None) == ["7"]


def test_command_can_run_under_a_program(module):
    name = module("import os; print(os.environ['GIVEN'])")
    assert run(name, timeout=60, show=None, under=["/usr/bin/env", "GIVEN=yes"]) == ["yes"]


def test_gpu_share_is_passed_on_and_applied(module, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 0.25)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 16 * 2**30))
    name = module(f"import os; print(os.environ.get({child.GPU_SHARE!r}))")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**30)
    (share,) = run(name, timeout=60, show=None)
    assert float(share) == pytest.approx(0.25 - (1 + t4.CONTEXT_GIB) / 16)
    assert run(name, timeout=60, show=None, gpu_gib=8) == ["0.5"]
    bare = module("import os, sys; print('torch' in sys.modules, repr(os.environ['CUDA_VISIBLE_DEVICES']))")
    monkeypatch.setenv(child.GPU_SHARE, "0.25")  # of this process
    assert run(bare, timeout=60, show=None, gpu_gib=0) == ["False ''"]
    set_to = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_to.append)
    monkeypatch.setenv(child.GPU_SHARE, "0.25")
    monkeypatch.setattr(sys, "argv", sys.argv)
    child.main(module("print('ran')", "a_third"))
    assert set_to == [0.25]

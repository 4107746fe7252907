"""The windows of a rehearsal's profiler: long cells have several, and none is renewed at a bad moment."""

import importlib.util
import json
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from tools.t4.limits import HOOK


class Profile:
    """A profiler that counts the kernels since it started."""

    started = 0

    def __init__(self, **options):
        self.kineto_results = SimpleNamespace(events=lambda: [event() for _ in range(3)])

    def _prepare_trace(self):
        pass

    def _start_trace(self):
        Profile.started += 1

    def __exit__(self, *exception):
        pass


def event():
    return SimpleNamespace(device_type=lambda: "DeviceType.CUDA", name=lambda: "fill", duration_ns=lambda: 2e3)


@pytest.fixture
def hook(tmp_path, monkeypatch):
    monkeypatch.delenv("T4_RECORD", raising=False)
    spec = importlib.util.spec_from_file_location("hook_of_the_rehearsal", HOOK / "sitecustomize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.RECORD, module.WINDOW_SECONDS, module.capturing = str(tmp_path), 0.01, False
    cuda = SimpleNamespace(is_initialized=lambda: True, is_current_stream_capturing=lambda: module.capturing)
    autograd = SimpleNamespace(profiler=SimpleNamespace(profile=Profile))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, autograd=autograd))
    monkeypatch.setattr(Profile, "started", 0)
    return module


def records(folder) -> list[dict]:
    return [json.loads(line) for path in folder.glob("profile-*.jsonl") for line in path.read_text().splitlines()]


def test_long_window_is_renewed_under_its_name_and_nothing_is_lost(hook, tmp_path):
    hook.windows.open("a long cell")
    time.sleep(0.02)
    hook.windows.renew(signal.SIGUSR1, None)
    hook.windows.close()
    found = records(tmp_path)
    assert [(one["window"], one["kernels"]) for one in found] == [("a long cell", {"fill": [3, 6.0]})] * 2
    assert found[0]["wall_seconds"] >= 0.02 and Profile.started == 2 and not hook.windows.busy


def test_window_tells_how_much_memory_the_profiler_held(hook, tmp_path, monkeypatch):
    held = iter([5_000, 2_000, 2_000, 3_000])
    monkeypatch.setattr(hook, "_anonymous_bytes", lambda: next(held))
    for _ in range(2):
        hook.windows.open("a cell")
        hook.windows.close()
    assert [one["profiler_bytes"] for one in records(tmp_path)] == [3_000, 0]


def test_own_memory_without_pages_of_files_is_read(hook):
    before = hook._anonymous_bytes()
    block = bytearray(64 * 2**20)
    assert before > 0 and hook._anonymous_bytes() - before == pytest.approx(len(block), rel=0.2)


@pytest.mark.parametrize("state", ["short", "closed", "busy", "capturing a CUDA graph"])
def test_window_is_not_renewed(hook, tmp_path, state):
    if state != "closed":
        hook.windows.open("a cell")
    if state == "short":
        hook.WINDOW_SECONDS = 60
    hook.windows.busy, hook.capturing = state == "busy", state == "capturing a CUDA graph"
    time.sleep(0.02)
    hook.windows.renew()
    assert records(tmp_path) == [] and Profile.started == (state != "closed")


def test_window_is_renewed_by_a_signal_while_the_main_thread_computes(hook, tmp_path, monkeypatch):
    pauses = iter([0.02])
    monkeypatch.setattr(hook.time, "sleep", lambda seconds: pause(next(pauses, 60)))
    pause = threading.Event().wait
    before = signal.signal(signal.SIGUSR1, hook.windows.renew)
    try:
        hook.windows.open("a cell")
        threading.Thread(target=hook._ask_to_renew, args=(threading.main_thread().ident,), daemon=True).start()
        began = time.monotonic()
        while not records(tmp_path) and time.monotonic() - began < 5:
            sum(range(1000))
        found, is_open = records(tmp_path), hook.windows.current is not None
    finally:
        hook.windows.close()  # the thread lives on, and its next signal would end a process without this handler
        signal.signal(signal.SIGUSR1, before)
    assert [one["window"] for one in found] == ["a cell"] and is_open

"""In every Python process of a rehearsal: what Triton compiles is recorded, and how long the GPU works.

Python imports this file at its start, since the rehearsal puts its folder first on PYTHONPATH. It imports neither torch
nor triton: it waits until somebody else does. Records go to the folder that T4_RECORD names.
"""

import atexit
import contextlib
import ctypes
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import threading
import time

RECORD = os.environ.get("T4_RECORD")
WINDOW_SECONDS = 5  # a longer one would hold gigabytes of events, and be silent for long at its end
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "default_dot_input_precision")


def record_kernel(*, metadata, metadata_group, **ignored) -> None:
    """Triton's compilation listener: keep a kernel's TTIR with its options, once. It never raises.

    What is compiled for sm_75 anyway is compiled to be read, and is not launched here.
    """
    name = str(metadata.get("name", "?"))
    if getattr(metadata.get("target"), "arch", None) == 75:
        return
    try:
        path = next(path for name, path in metadata_group.items() if name.endswith(".ttir"))
        with open(path, encoding="utf-8") as file:
            ttir = file.read()
        options = {name: metadata[name] for name in OPTIONS if metadata.get(name) is not None}
        kept = {"name": name, "options": options, "shared_here": metadata.get("shared")}
        digest = hashlib.sha256((ttir + json.dumps(options, sort_keys=True)).encode()).hexdigest()[:24]
        _write(f"{digest}.ttir", ttir)
        _write(f"{digest}.json", json.dumps(kept))
    except Exception as error:
        digest = hashlib.sha256(name.encode()).hexdigest()[:24]
        _write(f"unrecorded-{digest}.json", json.dumps({"name": name, "error": f"{type(error).__name__}: {error}"}))


def _write(name: str, text: str) -> None:
    path = os.path.join(RECORD, name)
    if not os.path.exists(path):
        unfinished = f"{path}.{os.getpid()}"
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(unfinished, path)


class Windows:
    """Windows of PyTorch's profiler, one open at most, each summed up by kernel and appended to a file at its end."""

    def __init__(self):
        self.current, self.name, self.seconds, self.opened = None, "", 0.0, 0.0
        self.broken = self.busy = False

    def open(self, name: str) -> None:
        torch = sys.modules.get("torch")
        if self.current is not None or self.broken or torch is None or not torch.cuda.is_initialized():
            return
        began, self.busy = time.perf_counter(), True
        try:
            self.current = torch.autograd.profiler.profile(use_cpu=False, use_device="cuda", use_kineto=True)
            self.current.of_the_rehearsal = True
            self.current._prepare_trace()
            self.current._start_trace()
        except Exception as error:
            self._fail(error)
        self.opened = time.perf_counter()
        self.name, self.seconds, self.busy = name, self.opened - began, False

    def close(self) -> None:
        if self.current is None:
            return
        began, self.busy, window, self.current = time.perf_counter(), True, self.current, None
        try:
            window.__exit__(None, None, None)
            kernels: dict[str, list[float]] = {}
            for event in window.kineto_results.events():
                if "CUDA" in str(event.device_type()):
                    total = kernels.setdefault(event.name(), [0, 0.0])
                    total[0] += 1
                    total[1] += event.duration_ns() / 1e3
            full = _anonymous_bytes()
            del window
            _give_back()
            freed = full - _anonymous_bytes()
        except Exception as error:
            return self._fail(error)
        line = {"window": self.name, "process": os.getpid(), "notebook": _is_notebook(), "kernels": kernels}
        line["profiler_bytes"] = max(0, freed)
        line["wall_seconds"] = began - self.opened
        line["hook_seconds"] = self.seconds + time.perf_counter() - began
        with open(os.path.join(RECORD, f"profile-{os.getpid()}.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.busy = False

    def renew(self, *signal_and_frame) -> None:
        """Close a window that has been open for long, and open the next of this name: the handler of a signal.

        It does nothing while a window is opened or closed, and during the capture of a CUDA graph, which the profiler
        would end.
        """
        long = time.perf_counter() - self.opened > WINDOW_SECONDS
        if self.current is None or self.busy or not long or sys.modules["torch"].cuda.is_current_stream_capturing():
            return
        self.close()
        self.open(self.name)

    def _fail(self, error: Exception) -> None:
        self.broken, self.busy, self.current = True, False, None
        with open(os.path.join(RECORD, f"broken-{os.getpid()}.txt"), "w", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}: {error}\n")


def _anonymous_bytes() -> int:
    """RAM of this process that belongs to no file; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def _give_back() -> None:
    """Give the memory of freed events back to the system: it is the profiler's, which a T4 will not run."""
    with contextlib.suppress(OSError, AttributeError):  # another libc than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


windows = Windows()


def watch_cells() -> None:
    """Give each later cell of this IPython kernel a window of its own, a long one several."""
    from IPython import get_ipython

    events = get_ipython().events
    events.register("pre_run_cell", lambda info: windows.open((info.raw_cell or "").strip()[:60]))
    events.register("post_run_cell", lambda result: windows.close())
    signal.signal(signal.SIGUSR1, windows.renew)  # it runs in the main thread, which the profiler belongs to
    signal.siginterrupt(signal.SIGUSR1, False)  # system calls of libraries go on
    threading.Thread(target=_ask_to_renew, args=(threading.main_thread().ident,), daemon=True).start()


def _ask_to_renew(main: int) -> None:
    while True:
        time.sleep(1)
        if windows.current is not None and time.perf_counter() - windows.opened > WINDOW_SECONDS:
            signal.pthread_kill(main, signal.SIGUSR1)


def _set_listener(knobs) -> None:
    before = knobs.compilation.listener

    def listener(**given):
        record_kernel(**given)
        if before is not None:
            before(**given)

    knobs.compilation.listener = listener


def _make_room_for_others(module) -> None:
    """Close our window while somebody else profiles: PyTorch has one profiler."""
    profile, name = module.profile, []
    prepare, leave = profile._prepare_trace, profile.__exit__

    def _prepare_trace(self):
        if not hasattr(self, "of_the_rehearsal") and windows.current is not None:
            name.append(windows.name)
            windows.close()
        return prepare(self)

    def __exit__(self, *exception):
        done = leave(self, *exception)
        if name and not hasattr(self, "of_the_rehearsal"):
            windows.open(name.pop())
        return done

    profile._prepare_trace, profile.__exit__ = _prepare_trace, __exit__


def _open_at_first_use(cuda) -> None:
    """In a process that is no IPython kernel one window lasts from the first use of CUDA to the end."""
    initialise = cuda._lazy_init

    def _lazy_init():
        first = not cuda._initialized
        done = initialise()
        if first and cuda._initialized and not _is_notebook():
            windows.open(" ".join(sys.argv)[-60:])
        return done

    for name, module in list(sys.modules.items()):  # torch.cuda.memory and others have imported it by now
        if name.startswith("torch.") and vars(module).get("_lazy_init") is initialise:
            module._lazy_init = _lazy_init
    atexit.register(_close_at_exit, cuda)


def _close_at_exit(cuda) -> None:
    """Name a process that has used the GPU unseen: the prediction would be too small."""
    if cuda._initialized and windows.current is None and not _is_notebook():
        _write(f"unseen-{os.getpid()}.txt", " ".join(sys.argv)[-60:])
    windows.close()


def _is_notebook() -> bool:
    return "ipykernel.kernelapp" in sys.modules


AFTER = {
    "triton.knobs": _set_listener,
    "torch.autograd.profiler": _make_room_for_others,
    "torch.cuda": _open_at_first_use,
}


class _After(importlib.abc.MetaPathFinder):
    """Calls a function of `AFTER` when its module has been imported."""

    def find_spec(self, name, path, target=None):
        act = AFTER.pop(name, None)
        if act is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            try:
                act(module)
            except Exception as error:
                _write(f"broken-hook-{os.getpid()}.txt", f"{name}: {type(error).__name__}: {error}\n")

        spec.loader.exec_module = exec_module
        return spec


def _import_the_shadowed() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    others = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if RECORD:
    sys.meta_path.insert(0, _After())
_import_the_shadowed()

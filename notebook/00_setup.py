# %% [markdown]
# # Unsloth Puzzles: the submission of Rohit Nagraj
#
# <!-- badges -->
#
# Five challenges on fine-tuning large language models on small GPUs, one section each. Every solution is a part of the
# package `unsloth_puzzles`.
#
# <!-- scorecard -->
#
# **Run it.** *Runtime → Run all*, on Colab (T4), on Kaggle (T4 x 2), on any CUDA machine, or without a GPU. Without a
# GPU the kernels run in Triton's interpreter on small shapes. Section B earns points only where there are two GPUs. The
# notebook writes all files that it needs. Each section also runs alone after the set-up. An experiment that cannot run
# on this machine prints `SKIPPED: reason`. A skip never counts as a pass.
#
# **Read it.** Each section begins with the task and its criteria and ends with its score. The sections show the central
# files of the package in full. Collapsed cells hold the other files and the helpers. `RESULTS.md`, in the repository
# behind the GitHub badge, has every table.
#
# **On a T4.** No T4 has run this notebook. Statements about a T4 are predictions and say so. A rehearsal on a larger
# GPU imitates the memory, the CPU cores and the compute capability of a T4. `RESULTS.md` says which sections it covers.
#
# <!-- contents -->

# %% [markdown]
# ## Set-up
#
# The first cell installs missing packages. It replaces packages that are too old, and any TRL other than 1.16. It does
# not touch torch and triton. The second cell hides all GPUs but one, so that no trainer spreads a model over two.
# Without a GPU it selects Triton's interpreter. The next cells write the package and the benchmarks. The last cell
# measures the copy bandwidth and the matmul rates of this machine. The sections compare their timings with these rates.
#
# All sections use the same helpers. `results.add(metric, case, value, unit)` records a number for the scorecard.
# `judge(results, name, checks)` prints and records named checks. `experiments.failed` records an error. A failed
# experiment or check prints `FAILED`, and the run continues. The scorecard lists all failures. `section.start` and
# `section.finish` measure the time and the memory of a section. `GPU` is true on CUDA. `sm_75` is NVIDIA's name for the
# compute capability 7.5, which a T4 has. `OLD` is true below sm_80, where fewer samples are taken.

# %%
# @title Install: pinned versions, and what is kept
import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import threading

PINNED = {
    "bitsandbytes": "0.50.2",
    "transformers": "5.17.0",
    "peft": "0.21.0",
    "accelerate": "1.15.0",
    "trl": "1.16.0",
    "datasets": "5.2.0",
    "numpy": "2.4.6",
    "matplotlib": "3.11.2",
    "scikit-learn": "1.9.1",
}
ALONE = {  # without their dependencies, which are installed already; torch must stay
    "torchvision": "0.26.0",
    "gguf": "0.19.0",
    "xllamacpp": "2026.10.11549",
    "libgguf": "0.2.2",
}
FOR_GPUS = {  # an attention backend, and kernels of other projects to time beside ours; each is optional
    "xformers": "0.0.35",
    "liger-kernel": "0.8.5",
    "cut-cross-entropy": "25.1.1",
}
OLDEST = {"bitsandbytes": (0, 50), "transformers": (5, 15), "peft": (0, 20), "accelerate": (1, 15), "numpy": (2, 0)}
OLDEST["datasets"] = (4, 7)  # what TRL 1.16 asks for; Colab has 4.0


def installed(package):
    """Its version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version):
    return tuple(map(int, version.split(".")[:2]))


def is_fit(package):
    version = installed(package)
    if package == "trl":  # how its GRPO trainer asks the model for log-probabilities differs from release to release
        return version is not None and release(version) == release(PINNED["trl"])
    return version is not None and release(version) >= OLDEST.get(package, (0, 0))


def install(*requirements):
    """Run pip, show what it collects and that it is at work, and return whether it succeeded."""
    command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", *requirements]
    lines, ended = [], threading.Event()

    def report():
        while not ended.wait(25):
            print("... pip is at work", flush=True)

    threading.Thread(target=report, daemon=True).start()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        limit = threading.Timer(900, pip.kill)
        limit.start()
        for line in pip.stdout:
            lines.append(line.strip())
            if line.strip().startswith(("Collecting", "Downloading", "Installing")):
                print(line.strip()[:100], flush=True)
        limit.cancel()
    ended.set()
    importlib.invalidate_caches()
    if pip.returncode:
        print("FAILED: pip install", *requirements, *lines[-3:], sep="\n  ")
    return pip.returncode == 0


assert installed("torch") and installed("triton"), "torch and triton must be there: choose a GPU runtime"
before = {package: installed(package) for package in PINNED | ALONE}
missing = [f"{package}=={version}" for package, version in PINNED.items() if not is_fit(package)]
done = missing if missing and install(*missing) else []
gpu = shutil.which("nvidia-smi")
alone = ALONE | (FOR_GPUS if gpu else {})
alone = [f"{package}=={version}" for package, version in alone.items() if not installed(package)]
if gpu and "+cu12" not in installed("torch") and not installed("nvidia-cuda-runtime-cu12"):
    alone.append("nvidia-cuda-runtime-cu12==12.8.90")  # what the wheel of xformers is linked with
done += [requirement for requirement in alone if install("--no-deps", requirement)]
print("installed:", " ".join(done) if done else "nothing, all is there")
for package, version in (PINNED | ALONE | FOR_GPUS).items():
    now, was = installed(package), before.get(package)
    if was not in (None, now):
        needed = ".".join(map(str, OLDEST.get(package, release(version))))
        print(f"replaced: {package} {was} by {now}; {needed}{'' if package == 'trl' else ' or newer'} is needed")
    elif now not in (version, None):
        print(f"kept: {package} {now} (tested with {version})")

# %%
# @title Environment: one visible GPU, warnings, seed, and the magic that writes files
import logging
import os
import random
import warnings
from pathlib import Path

ALL_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # for programs that take more than one
os.environ["CUDA_VISIBLE_DEVICES"] = (ALL_GPUS if ALL_GPUS is not None else "0").split(",")[0]

import torch
from IPython.core.magic import register_cell_magic
from IPython.display import Markdown, display

if not torch.cuda.is_available():
    assert "triton.language" not in sys.modules, "restart the kernel: triton was imported before this cell ran"
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["KINETO_LOG_LEVEL"] = "5"  # PyTorch's profiler reports a missing GPU as an error
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # their widgets would be saved in the notebook
warnings.filterwarnings("ignore", message=".*IProgress not found.*")  # so does tqdm where ipywidgets is missing
warnings.filterwarnings("ignore", message=".*no current CUDA context.*")  # of the backward's thread, which sets one
warnings.filterwarnings("ignore", message=".*Guards may run slower on Python 3.13.0.*")
for of_pytorch in ("TypedStorage is deprecated", "Profiler clears", "TensorFloat32 tensor cores", "Online softmax"):
    warnings.filterwarnings("ignore", message=f"\\s*.*{of_pytorch}.*")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package that only its CPU path would use

SEED = 3407
random.seed(SEED)
torch.manual_seed(SEED)
print("seed", SEED)


@register_cell_magic
def writefiles(line, cell):
    """Write the files of the cell; a line `# file: PATH` begins each."""
    begin = "# file: "
    files = ("\n" + cell).split("\n" + begin)[1:]
    for name, content in (file.split("\n", 1) for file in files):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content.rstrip("\n") + "\n", encoding="utf-8")
    print(len(files), "files written")


# %%
# package

# %%
# benchmarks

# %%
# @title Import the written package, report failures, remove old measurements
sys.path.insert(0, str(Path.cwd()))
importlib.invalidate_caches()

import unsloth_puzzles

written = (Path.cwd() / "unsloth_puzzles").resolve()
assert Path(unsloth_puzzles.__file__).resolve().parent == written, "another unsloth_puzzles was imported"

from unsloth_puzzles.bench import experiments
from unsloth_puzzles.bench.challenges import FILES

experiments.watch()
Path("resources/measurements").mkdir(parents=True, exist_ok=True)
for name in FILES.values():  # an earlier run must not earn points in this one
    Path("resources/measurements", name).unlink(missing_ok=True)
print("imported unsloth_puzzles from the files above; no earlier measurements are left")

# %%
from unsloth_puzzles.bench import section
from unsloth_puzzles.bench.hardware import probe, versions

section.start("Set-up")
hardware = probe()
section.finish()
print(hardware.describe())
print(", ".join(f"{name} {version or 'not installed'}" for name, version in versions().items()))

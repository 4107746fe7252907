"""An adapter trained on an NF4 model, exported, and run by the engine: the answers of both, adapter on and off.

proof = prove("qwen2_vl", folder)
proof.on.equal, proof.on.error, proof.moved
"""

from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.gguf.engine import Answer, ask
from benchmarks.gguf.models import picture, tiny
from benchmarks.gguf.reference import (
    answer,
    class_token_last,
    distance,
    epsilon_of_norms,
    gelu_by_table,
    half_convolution,
)
from benchmarks.models import nf4_config
from unsloth_puzzles.gguf.export import export_gguf

SIZES = {"qwen3_vl": (96, 128), "qwen2_vl": (84, 112), "qwen2_5_vl": (168, 224)}  # of images that are not resized
SQUARE = (56, 56)
LINEAR = r".*\b(q|k|v|o|gate|up|down)_proj"


class Compared(NamedTuple):
    """The engine beside transformers."""

    equal: bool  # tokens of all answers
    error: float  # the largest difference of log-probabilities
    emulated: float  # the same beside transformers with the engine's known deviations


class Proof(NamedTuple):
    """What an export is worth."""

    on: Compared
    off: Compared
    moved: float  # how far the adapter moves the engine's first log-probability


def requests(family: str) -> list[dict]:
    """A question without an image, and with one if the family sees."""
    asked = [{"text": "What is this? It's 1234 times 56."}]
    if family != "llama":
        asked.append({"text": "What is this?", "image": picture(*SIZES.get(family, SQUARE), seed=1)})
    return asked


def prove(
    family: str, folder: str | Path, device: str = "cpu", *, tokens: int = 32, steps: int = 8, **lora: object
) -> Proof:
    """Train, export in float32, and compare.

    Args:
        family: of `models.tiny`.
        folder: for the model and the files.
        device: where transformers computes; the engine runs on the CPU.
        tokens: how many each answer has.
        steps: of training.
        **lora: further settings of `LoraConfig`.
    """
    model, processor = qlora(family, Path(folder, "base"), device, **lora)
    train(model, processor, family, steps)
    ours, theirs = {}, {}
    for name in ("on", "off"):
        if name == "off":
            model.base_model.disable_adapter_layers()
        paths = export_gguf(model, processor, Path(folder, name), "f32", "f32", progress=False)
        theirs[name] = ask(*paths, requests(family), tokens=tokens)
        ours[name] = [answer(model, processor, one, tokens) for one in requests(family)]
    model.base_model.enable_adapter_layers()
    emulate(model, family)
    emulated = {"on": [answer(model, processor, one, tokens) for one in requests(family)]}
    model.base_model.disable_adapter_layers()
    emulated["off"] = [answer(model, processor, one, tokens) for one in requests(family)]
    model.base_model.enable_adapter_layers()
    compared = {name: _compared(theirs[name], ours[name], emulated[name]) for name in ("on", "off")}
    moved = abs(theirs["on"][-1].log_probs[0] - theirs["off"][-1].log_probs[0])
    return Proof(compared["on"], compared["off"], moved)


def _compared(theirs: list[Answer], ours: list[Answer], emulated: list[Answer]) -> Compared:
    plain = [distance(one, other) for one, other in zip(theirs, ours, strict=True)]
    known = [distance(one, other) for one, other in zip(theirs, emulated, strict=True)]
    error = max((off if equal else float("inf")) for equal, off in known)
    return Compared(all(equal for equal, _ in plain), max(off for _, off in plain), error)


def emulate(model: torch.nn.Module, family: str) -> None:
    """Give transformers' model the engine's known deviations.

    llama.cpp 2026.10 computes the RMS norms of the `qwen2vl` architecture with an epsilon of 0, whatever the file says,
    puts CLIP's class token last, convolves in float16, and has GELU in a table of float16.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    gelu_by_table(base)
    half_convolution(base)
    if family.startswith("qwen2"):
        epsilon_of_norms(base, 0.0)
    if family == "llava_clip":
        class_token_last(base)


def qlora(family: str, folder: Path, device: str = "cpu", **lora: object) -> tuple[PeftModel, object]:
    """A tiny model whose text part is in NF4, with adapters, and its processor."""
    # bitsandbytes' CPU kernel needs rows of whole blocks of 64
    model, processor = tiny(family, intermediate_size=192)
    model.save_pretrained(folder)
    config = nf4_config(torch.float32)
    config.llm_int8_skip_modules = ["lm_head", "model.vision_tower", "model.multi_modal_projector", "model.visual"]
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
    model = auto.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map={"": device})
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # or it re-packs its weight when it runs in eval mode
    target = LINEAR if family == "llama" else r".*language_model.*" + LINEAR[2:]
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": target, **lora})), processor


def train(model: PeftModel, processor, family: str, steps: int) -> None:
    """Fit the adapters to one answer a request."""
    tokenizer = getattr(processor, "tokenizer", processor)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    for step in range(steps):
        request = requests(family)[step % len(requests(family))]
        if "image" in request:
            content = [{"type": "image"}, {"type": "text", "text": request["text"]}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False) + "A class."
            batch = processor(text=[text], images=[[request["image"]]], return_tensors="pt")
        else:
            batch = tokenizer([request["text"] + " A number."], return_tensors="pt")
            batch.pop("token_type_ids", None)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

"""An adapter trained on an NF4 model, exported, and run by the engine: the answers of both, adapter on and off.

proof = prove("qwen2_vl", folder)
proof.answers[0].equal, proof.answers[0].error, proof.moved
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.gguf.engine import Answer, ask
from benchmarks.gguf.models import FAMILIES, picture, tiny
from benchmarks.gguf.reference import (
    answer,
    class_token_last,
    epsilon_of_norms,
    gelu_by_table,
    half_convolution,
)
from benchmarks.models import nf4_config
from unsloth_puzzles.gguf.export import export_gguf
from unsloth_puzzles.gguf.merge import merged_state_dict

SIZES = {"qwen3_vl": (96, 128), "qwen2_vl": (84, 112), "qwen2_5_vl": (168, 224)}  # of images that are not resized
SQUARE = (56, 56)
LINEAR = r".*\b(q|k|v|o|gate|up|down)_proj"


class Deviation(NamedTuple):
    """A computation of llama.cpp (xllamacpp 2026.10) that differs from transformers', whatever the file says."""

    what: str
    source: str
    families: tuple[str, ...]
    without_image: bool  # whether it shows in answers without an image
    apply: Callable[[torch.nn.Module], None]  # gives it to transformers' model


SEEING = tuple(family for family in FAMILIES if family != "llama")
DEVIATIONS = (
    Deviation("GELU from a table of float16", "GGML_GELU_FP16 in ggml-cpu/vec.h", SEEING, False, gelu_by_table),
    Deviation(
        "pixels and kernel of the patch convolution rounded to float16", "ggml_conv_2d in ggml.c", SEEING, False,
        half_convolution,
    ),
    Deviation(
        "RMS norms with an epsilon of 0", "llama_model_qwen2vl::load_arch_hparams, which does not read it",
        ("qwen2_vl", "qwen2_5_vl"), True, partial(epsilon_of_norms, epsilon=0.0),
    ),
    Deviation("class token of CLIP last", "llama.cpp issue 25814", ("llava_clip",), False, class_token_last),
)  # fmt: skip


class Compared(NamedTuple):
    """An answer of the engine beside transformers'. Errors are of log-probabilities, over what both choose alike."""

    adapter: str  # "on" or "off"
    image: bool
    equal: bool  # all tokens
    error: float
    emulated_equal: bool  # the same beside transformers with the deviations that apply
    emulated_error: float
    deviations: tuple[str, ...]  # none: then both pairs are the same

    def within(self, limit: float) -> bool:
        """Whether all tokens are equal and the error is below `limit`, with the deviations that apply emulated."""
        return self.emulated_equal and self.emulated_error < limit


class Proof(NamedTuple):
    """The comparisons that show what an export is worth."""

    answers: tuple[Compared, ...]
    moved: float  # how far the adapter moves the engine's first log-probability


def requests(family: str) -> list[dict]:
    """A question without an image, and with one if the family sees."""
    asked = [{"text": "What is this? It's 1234 times 56."}]
    if family != "llama":
        asked.append({"text": "What is this?", "image": picture(*SIZES.get(family, SQUARE), seed=1)})
    return asked


def prove(
    family: str,
    folder: str | Path,
    device: str = "cpu",
    *,
    tokens: int = 32,
    steps: int = 8,
    quantization: str = "f32",
    projector: str = "f32",
    **lora: object,
) -> Proof:
    """Train, export, and compare.

    Args:
        family: of `models.tiny`.
        folder: for the model and the files.
        device: where transformers computes; the engine runs on the CPU.
        tokens: how many each answer has.
        steps: of training.
        quantization: of the exported text model.
        projector: of the exported vision tower.
        **lora: further settings of `LoraConfig`.
    """
    model, processor = qlora(family, Path(folder, "base"), device, **lora)
    train(model, processor, family, steps)
    asked, theirs, ours, emulated = requests(family), {}, {}, {}
    for side in ("on", "off"):
        with _adapter(model, side):
            paths = export_gguf(model, processor, Path(folder, side), quantization, projector, progress=False)
            theirs[side] = ask(*paths, asked, tokens=tokens)
            pairs = zip(asked, theirs[side], strict=True)
            ours[side] = [answer(model, processor, one, their.tokens) for one, their in pairs]
    applying = [deviations(family, "image" in one) for one in asked]
    emulate(model, family)
    for side in ("on", "off"):
        with _adapter(model, side):
            emulated[side] = [
                answer(model, processor, one, their.tokens) if known else plain
                for one, their, known, plain in zip(asked, theirs[side], applying, ours[side], strict=True)
            ]
    answers = tuple(
        Compared(side, "image" in asked[n], *beside(their, ours[side][n]), *beside(their, emulated[side][n]),
                 tuple(one.what for one in applying[n]))
        for side in ("on", "off")
        for n, their in enumerate(theirs[side])
    )  # fmt: skip
    return Proof(answers, abs(theirs["on"][-1].log_probs[0] - theirs["off"][-1].log_probs[0]))


def _adapter(model: PeftModel, side: str):
    return model.disable_adapter() if side == "off" else nullcontext()


def beside(one: Answer, other: Answer) -> tuple[bool, float]:
    """Whether prompts and tokens are equal, and the largest difference of log-probabilities until tokens part.

    Without a common first token the difference is that of the first, of two tokens then.
    """
    same = [a == b for a, b in zip(one.tokens, other.tokens, strict=True)]
    alike = same.index(False) if False in same else len(same)
    pairs = list(zip(one.log_probs, other.log_probs, strict=True))[: max(1, alike)]
    equal = one.prompt_tokens == other.prompt_tokens and all(same)
    return equal, max(abs(a - b) for a, b in pairs)


def deviations(family: str, image: bool) -> tuple[Deviation, ...]:
    """Those that show in an answer with or without an image."""
    return tuple(one for one in DEVIATIONS if family in one.families and (image or one.without_image))


def emulate(model: torch.nn.Module, family: str) -> None:
    """Give transformers' model all deviations of its family."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for one in deviations(family, image=True):
        one.apply(base)


def merging_errors(model: PeftModel) -> tuple[float, float]:
    """Errors of the merged weights of NF4 layers with LoRA, over the norm of what the adapters change.

    The reference is dequantize(W) + scale * B A in float64.

    Returns:
        Of `merged_state_dict`, and of PEFT's `merge_and_unload`, which is given a copy of the model.
    """
    ours, theirs = merged_state_dict(model), copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merge lora module to 4-bit")  # PEFT says so of what is measured here
        theirs = theirs.merge_and_unload()
    squares = torch.zeros(3, dtype=torch.float64)
    for name, module in model.get_base_model().named_modules():
        if not hasattr(module, "lora_A") or not module.lora_A:
            continue
        change = module.get_delta_weight("default").double().cpu()
        exact = _dequantized(module.base_layer) + change
        found = (ours[f"{name}.weight"].double(), _dequantized(theirs.get_submodule(name)))
        squares += torch.stack([change.square().sum(), *((one - exact).square().sum() for one in found)])
    mine, pefts = (squares[1:] / squares[0]).sqrt().tolist()
    return mine, pefts


def _dequantized(layer: torch.nn.Module) -> torch.Tensor:
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).double().cpu()


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

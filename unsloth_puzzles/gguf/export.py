"""Export a fine-tune, its adapters merged, as GGUF files that llama.cpp and Ollama run.

text, projector = export_gguf(model, processor, "exported", quantization="q4_k_m")
"""

import os
import warnings
from collections import Counter
from pathlib import Path

from torch import nn

from unsloth_puzzles.gguf.merge import merged_state_dict
from unsloth_puzzles.gguf.quantization import PROJECTORS, QUANTIZATIONS, checked_quantization
from unsloth_puzzles.gguf.text import stop_ids, text_config, text_file
from unsloth_puzzles.gguf.tokenizer import ENDS, end_ids
from unsloth_puzzles.gguf.vision import KINDS, vision_file
from unsloth_puzzles.gguf.writer import named_at_the_end, write

TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")


def export_gguf(
    model: nn.Module,
    processor,
    folder: str | os.PathLike,
    quantization: str = "q8_0",
    projector: str = "f16",
    *,
    progress: bool = True,
) -> tuple[Path, Path | None]:
    """Write a model of transformers, with its active adapters merged in float32, as GGUF.

    The model is left as it is. Tensors are read, merged, quantised and written a chunk of rows at a time. All files get
    their names when all are whole. An export that is killed leaves `*.unfinished` files, which the next one into the
    folder removes. Vectors are kept in float32. Rows that a type's blocks do not divide are kept in another type (see
    `quantization.FALLBACK`; at last F16), and a warning counts them.

    The file has room for three tokens that end a generation: the tokenizer's `eos_token_id`, and then those of
    `model.generation_config`. A warning names further ones. The `Modelfile` has all that are added tokens.

    Args:
        model: Llama, Mistral, Qwen2, Qwen3, LLaVA (CLIP or SigLIP tower), Qwen2-VL, Qwen2.5-VL or Qwen3-VL in 4 (NF4)
            or 16 bits or float32, with LoRA, rsLoRA or DoRA of PEFT; trained copies and tokens, too.
        processor: its processor, or its tokenizer if it has no vision tower; a byte-level BPE.
        folder: gets `model-QUANTIZATION.gguf`, `mmproj-PROJECTOR.gguf` of a vision model, and an Ollama `Modelfile`.
            It is made if it is missing.
        quantization: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, or with the package `libgguf` q6_k, q5_k_m, q4_k_m;
            in upper case, too.
        projector: the type of the vision tower and the projector: f32, f16, bf16 or q8_0.
        progress: whether a bar shows the bytes written.

    Returns:
        (path of the text model, path of the projector or None).

    Raises:
        TypeError: `model` is not a module, or is in a wrapper that `merged_state_dict` refuses.
        ValueError: naming what the engine or the file cannot hold: the architecture, a setting or a parameter of it,
            the tokenizer, adapters that cannot be merged, values out of range.
        ImportError: a K-quant without `libgguf`.
        OSError: a file cannot be written, as on a full disk. None is left, and those of an earlier export stay.
    """
    from tqdm import tqdm

    quantization = checked_quantization(quantization)
    projector = checked_quantization(projector, PROJECTORS, "projector")
    weights = merged_state_dict(model)
    base = getattr(model, "get_base_model", lambda: model)()
    kind = getattr(getattr(base, "config", None), "model_type", type(base).__name__)
    if kind not in (*TEXT_MODELS, *KINDS):
        raise ValueError(f"model must be one of {', '.join((*TEXT_MODELS, *KINDS))}, got {kind!r}")
    text_config(base)
    tokenizer = getattr(processor, "tokenizer", processor)
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if kind in KINDS and not hasattr(processor, "image_processor"):
        raise ValueError(f"processor must have an image processor for {kind}, got {type(processor).__name__}")
    text = text_file(base, weights, tokenizer, template, quantization)
    vision = vision_file(base, weights, processor, projector) if kind in KINDS else None
    _report(text[1], quantization)
    _report_stops(tokenizer, stop_ids(base))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"model-{quantization}.gguf", folder / f"mmproj-{projector}.gguf" if vision else None
    files = [file for file in (text, vision) if file is not None]
    total = sum(tensor.bytes for _, tensors in files for tensor in tensors)
    with (
        named_at_the_end([*(path for path in paths if path is not None), folder / "Modelfile"]) as unfinished,
        tqdm(total=total, unit="B", unit_scale=True, desc="GGUF", disable=not progress) as bar,
    ):
        for path, (header, tensors) in zip(unfinished, files, strict=False):
            write(path, header, tensors, bar.update)
        _write_modelfile(unfinished[-1], paths, tokenizer, stop_ids(base))
    return paths


def _report(tensors: list, quantization: str) -> None:
    wanted = {*QUANTIZATIONS[quantization][:2]}
    kept = Counter((tensor.type.name, tensor.source.shape[-1]) for tensor in tensors
                   if len(tensor.source.shape) > 1 and tensor.type not in wanted)  # fmt: skip
    if kept:
        listed = ", ".join(f"{number} with rows of {columns} in {name}" for (name, columns), number in kept.items())
        warnings.warn(f"export_gguf: tensors that {quantization} does not fit are kept in other types: {listed}",
                      stacklevel=3)  # fmt: skip


def _report_stops(tokenizer, stops: list[int]) -> None:
    left_out = end_ids(tokenizer, stops)[len(ENDS) :]
    if left_out:
        listed = ", ".join(f"{number} ({tokenizer.decode([number])!r})" for number in left_out)
        warnings.warn(f"export_gguf: a GGUF file has room for {len(ENDS)} tokens that end a generation, so llama.cpp "
                      f"does not stop at {listed}; give it their text as stop strings", stacklevel=3)  # fmt: skip


def _write_modelfile(path: Path, files: tuple[Path, Path | None], tokenizer, stops: list[int]) -> None:
    """Write the file that `ollama create NAME -f Modelfile` reads, in the folder of the files.

    Of `stops` it names the added tokens. The text of an ordinary token may come from other tokens, too.
    """
    lines = [f"FROM ./{file.name}" for file in files if file is not None]
    added = tokenizer.added_tokens_decoder
    for number in end_ids(tokenizer, stops):
        if number in added or number == tokenizer.eos_token_id:
            token = tokenizer.convert_ids_to_tokens(number)
            quote = '"""' if '"' in token else '"'
            lines.append(f"PARAMETER stop {quote}{token}{quote}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")

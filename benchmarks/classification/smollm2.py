"""SmolLM2-135M-Instruct as a folder that transformers loads, from a GGUF file: trained weights without a hub."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EOS, PAD = 2, 0  # <|im_end|>, <|endoftext|>; what transformers reads from the file is <|im_start|> and none


def find_gguf(place: str | Path) -> Path:
    """The GGUF file that `place` is, or the only one in that folder.

    Raises:
        FileNotFoundError: There is none, or more than one.
    """
    place = Path(place)
    files = [place] if place.is_file() else sorted(place.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"place must be a .gguf file or a folder with one, got {len(files)} in {place}")
    return files[0]


def convert(place: str | Path, folder: str | Path | None = None) -> Path:
    """Write the weights of a GGUF file of SmolLM2 as a float32 checkpoint, which can be loaded in NF4.

    The file is Q4_1: NF4 on top of it rounds a second time.

    Args:
        place: See `find_gguf`.
        folder: Where to; None makes a temporary folder. It is reused if it holds a checkpoint.

    Returns:
        The folder: 0.6 GB.
    """
    folder = Path(folder or tempfile.mkdtemp(prefix="smollm2-"))
    if (folder / "model.safetensors").exists():
        return folder
    file = find_gguf(place)
    names = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **names)
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)  # they would have it saved as a GGUF model
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **names)
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.convert_ids_to_tokens([EOS, PAD])
    model.config.eos_token_id, model.config.pad_token_id = EOS, PAD
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # last: its file says that the folder is complete
    return folder

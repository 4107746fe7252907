"""Llama models, in 4 bits or not, with real weights where they can be had and random ones, said aloud, where not."""

import re
import urllib.error
import urllib.request
import warnings
from functools import cache
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from huggingface_hub import constants, try_to_load_from_cache
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

MIRROR = "unsloth/Llama-3.2-1B"  # the weights of meta-llama/Llama-3.2-1B, without its gate
SEED = 3407


def llama_1b_config() -> LlamaConfig:
    """The architecture of Llama 3.2 1B: 1.24 billion weights, 0.97 of them in linear layers that become 4-bit."""
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
    )


def tiny_llama_config(vocab_size: int = 256, layers: int = 2) -> LlamaConfig:
    """The same kind of model in miniature, for a CPU: grouped heads, tied embeddings, linear layers of 64 and 128."""
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """bitsandbytes NF4, double-quantised, computing in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def random_nf4_llama(
    config: LlamaConfig, device: str | torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = SEED
) -> PreTrainedModel:
    """A Llama of `config` with random weights that bitsandbytes has quantised; the same weights for the same seed.

    The linear layers of the blocks are NF4, double-quantised; embeddings, norms and head are in `dtype`. The weights
    are drawn in `dtype` on `device`, whose generator decides what a seed means. Neither disk nor network is read.
    """
    return _load(None, device, dtype, config=config, state_dict=random_llama(config, device, dtype, seed).state_dict())


def random_llama(
    config: LlamaConfig, device: str | torch.device, dtype: torch.dtype = torch.float32, seed: int = SEED
) -> PreTrainedModel:
    """A Llama of `config` in `dtype` with random weights, drawn as for `random_nf4_llama`, not quantised."""
    device = torch.device(device)
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(default)


def load_llama(
    path_or_name: str | None = None,
    *,
    device: str | torch.device,
    dtype: torch.dtype = torch.bfloat16,
    config: LlamaConfig | None = None,
    seed: int = SEED,
    four_bit: bool = True,
) -> tuple[PreTrainedModel, str]:
    """A 4-bit Llama (or not: `four_bit`) and its weights' source: "real weights, NAME" or "random weights, seed N".

    `path_or_name` is a local directory or a name on the hub, by default Llama 3.2 1B's ungated mirror. If it is
    not available (no network, no access, no such directory), a warning says why and the model is `random_nf4_llama` (or
    `random_llama`) of `config` (Llama 3.2 1B by default).
    """
    name = path_or_name or MIRROR
    try:
        _need_source(name)
        return _load(name, device, dtype, four_bit), f"real weights, {name}"
    except OSError as refusal:  # so transformers reports a missing file, a gate and no network alike
        reason = (str(refusal).strip() or type(refusal).__name__).splitlines()[0]
        warnings.warn(f"RANDOM WEIGHTS, because {name} is not available: {reason}", stacklevel=2)
    make = random_nf4_llama if four_bit else random_llama
    return make(config or llama_1b_config(), device, dtype, seed), f"random weights, seed {seed}"


def _need_source(name: str) -> None:
    """Raise an OSError at once if the hub is needed and cannot be reached: its client would retry for half a minute."""
    if Path(name).is_dir():
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"path_or_name must be a directory or a name on the hub (OWNER/MODEL), got {name!r}")
    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    if refusal := hub_refuses():
        raise OSError(refusal)


def random_nf4_layer(
    rows: int,
    columns: int,
    *,
    nested: bool = True,
    bias: bool = False,
    blocksize: int = 64,
    quant_type: str = "nf4",
    storage: torch.dtype = torch.uint8,
) -> Linear4bit:
    """A layer of bitsandbytes on the CPU, [rows, columns] in 4 bits, that computes in float32."""
    made = Linear4bit(columns, rows, bias=bias, compute_dtype=torch.float32, device="cpu")
    made.weight = Params4bit(
        torch.randn(rows, columns), requires_grad=False, compress_statistics=nested, quant_type=quant_type,
        blocksize=blocksize, quant_storage=storage,
    )  # fmt: skip
    made.to("cpu")
    if made.weight.quant_state is None:
        made.weight._quantize("cpu")
    return made


@cache
def hub_refuses() -> str:
    """Why the hub does not answer, or an empty text; asked once a process, since no answer takes five seconds."""
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        pass  # so somebody answers; what he has, transformers will find out
    except OSError as error:
        return f"the hub cannot be reached: {getattr(error, 'reason', error) or type(error).__name__}"
    return ""


def _load(name: str | None, device, dtype: torch.dtype, four_bit: bool = True, **arguments) -> PreTrainedModel:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = LlamaForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            device_map={"": torch.device(device)},
            quantization_config=nf4_config(dtype) if four_bit else None,
            **arguments,
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs that have it bitsandbytes would re-pack the weights at the first forward in eval mode, with absmax
            # rounded to bf16 for good: results would depend on the CPU, and no other code could read the weights.
            module.support_avx512bf16_for_cpu = False
    return model

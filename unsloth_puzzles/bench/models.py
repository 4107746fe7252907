"""Llama models in 4 bits, with real weights where they can be had and random ones, said aloud, where they cannot."""

import warnings
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

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
    """The same kind of model in miniature, for a CPU: grouped heads, tied embeddings, every linear layer 64-divisible."""
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

    The linear layers of the blocks are NF4, double-quantised; embeddings, norms and head are in `dtype`. The weights are
    drawn in `dtype` on the CPU, so that they do not depend on the device. Nothing is read from disk or network.
    """
    devices = [] if torch.device(device).type == "cpu" else [torch.device(device)]
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            weights = LlamaForCausalLM(config).state_dict()
        finally:
            torch.set_default_dtype(default)
    return _load(None, device, dtype, config=config, state_dict=weights)


def load_llama(
    path_or_name: str | None = None,
    *,
    device: str | torch.device,
    dtype: torch.dtype = torch.bfloat16,
    config: LlamaConfig | None = None,
    seed: int = SEED,
) -> tuple[PreTrainedModel, str]:
    """A 4-bit Llama and where its weights come from: "real weights, NAME" or "random weights, seed N".

    `path_or_name` is a local directory or a name on the hub, by default Llama 3.2 1B's ungated mirror. If it cannot be
    had (no network, no access, no such directory), a warning says why and the model is `random_nf4_llama` of `config`
    (Llama 3.2 1B by default).
    """
    name = path_or_name or MIRROR
    try:
        if not Path(name).is_dir():
            _ask_hub(name)
        return _load(name, device, dtype), f"real weights, {name}"
    except (
        OSError
    ) as refusal:  # transformers and the hub client raise it for a missing file, a gate and no network alike
        reason = (str(refusal).strip() or type(refusal).__name__).splitlines()[0]
        warnings.warn(f"RANDOM WEIGHTS: {name} is not to be had: {reason}", stacklevel=2)
    return random_nf4_llama(config or llama_1b_config(), device, dtype, seed), f"random weights, seed {seed}"


def _ask_hub(name: str) -> None:
    """Fetch the smallest file first: without a network that fails at once, where loading a model would retry for long."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_download(name, "config.json", etag_timeout=5)
    except HFValidationError as error:  # a path that is no directory
        raise OSError(str(error)) from error


def _load(name: str | None, device, dtype: torch.dtype, **arguments) -> PreTrainedModel:
    model = LlamaForCausalLM.from_pretrained(
        name,
        dtype=dtype,
        device_map={"": torch.device(device)},
        quantization_config=nf4_config(dtype),
        **arguments,
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs that have it bitsandbytes would re-pack the weights at the first forward in eval mode, with absmax
            # rounded to bf16 for good: results would depend on the CPU, and no other code could read the weights.
            module.support_avx512bf16_for_cpu = False
    return model

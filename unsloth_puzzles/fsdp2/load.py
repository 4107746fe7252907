"""The base model of a fine-tuning in NF4, from a checkpoint of either kind or with random weights."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from unsloth_puzzles.stored_dtype import cast_unquantised

SEED = 3407


def load(name: str, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    """The model in NF4 on `device`, double-quantised unless its checkpoint says otherwise.

    Both kinds of checkpoints become the same layers, on any number of ranks. Each rank reads the whole checkpoint:

    - in 16 bits, whose linear layers bitsandbytes quantises on `device`, tensor by tensor; the head stays as it is;
    - pre-quantised by bitsandbytes as NF4, whose bytes are taken as they are. `dtype` replaces the compute dtype that
      the checkpoint names, which is often bfloat16: a GPU below sm_80 emulates that.

    Args:
        name: A model of the hub, or a folder. With `layers` only its configuration is read.
        device: Where it goes, tensor by tensor.
        dtype: What it computes in, and the dtype of what is not quantised.
        layers: Make a model of that many layers with random weights instead of loading them.

    Raises:
        ValueError: The checkpoint is quantised by another method than bitsandbytes' NF4.
    """
    config = AutoConfig.from_pretrained(name)
    config.use_cache = False
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    if layers is not None:
        return _random(config, layers, device, dtype, quantization)
    given = getattr(config, "quantization_config", None)
    if given is not None and dict(given).get("bnb_4bit_quant_type") != "nf4":
        raise ValueError(f"model must be in 16 bits or in bitsandbytes' NF4, got {dict(given)}")
    if given is not None:
        config.quantization_config = {**given, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    chosen = {} if given is not None else {"quantization_config": quantization}
    model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, device_map={"": device}, **chosen)
    if given is not None:
        cast_unquantised(model, dtype)
    return model


def _random(config, layers: int, device: torch.device, dtype: torch.dtype, quantization) -> PreTrainedModel:
    """`layers` layers of the architecture with random weights, drawn on `device` and quantised there."""
    config.num_hidden_layers = layers
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else ()), device:
        (torch.manual_seed if on_gpu else torch.default_generator.manual_seed)(SEED)  # the former seeds all devices
        drawn = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return type(drawn).from_pretrained(
        None, config=config, state_dict=drawn.state_dict(), dtype=dtype, device_map={"": device},
        quantization_config=quantization,
    )  # fmt: skip

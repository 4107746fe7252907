"""A tiny Llama with random weights as a checkpoint, a byte-level tokenizer for it, and batches."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unsloth_puzzles.classification.adapters import add_adapters
from unsloth_puzzles.classification.load import load_classifier
from unsloth_puzzles.classification.losses import SINGLE

LABELS = ["red", "green", "blue"]
TEXTS = ["one two", "a much longer text", "x"]


def byte_tokenizer(special=("<s>", "</s>", "<pad>"), **tokens) -> PreTrainedTokenizerFast:
    """Each byte is a token, after `special` ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(special))
    given = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        **({"pad_token": "<pad>"} if "<pad>" in special else {}),
        **tokens,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)


def config(tokenizer: PreTrainedTokenizerFast, **given) -> LlamaConfig:
    small = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **{**small, **given})


def save_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **given) -> str:
    """A causal LM in float32."""
    tokenizer = tokenizer or byte_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(config(tokenizer, **given)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_quantised(source: str, folder: Path, **given) -> str:
    """The same in 4 bits, with the list of skipped modules that public checkpoints in 4 bits have in their config."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        **{
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
            "llm_int8_skip_modules": ["lm_head", "multi_modal_projector"],
            **given,
        },
    )
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=quantization, dtype=torch.float32)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def classifier(
    checkpoint: str, labels=LABELS, problem_type=SINGLE, adapters=True, gradient_checkpointing=False, **given
):
    """Model and tokenizer; with adapters whose B is not zero, unless told otherwise."""
    torch.manual_seed(0)
    options = {"device": "cpu", **given}
    model, tokenizer = load_classifier(checkpoint, labels, problem_type=problem_type, **options)
    return (with_adapters(model, gradient_checkpointing=gradient_checkpointing) if adapters else model), tokenizer


def with_adapters(model, **options):
    model = add_adapters(model, **{"r": 4, **options})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # they begin as zeros, under which lora_A has no gradient
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def batch(tokenizer, texts=TEXTS) -> dict[str, torch.Tensor]:
    return dict(tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))


def alone(model, tokenizer, texts=TEXTS) -> torch.Tensor:
    """Logits [texts, num_labels] of each text in a batch of its own, without padding."""
    return torch.cat([model(**batch(tokenizer, [text])).logits for text in texts])


def losses_of_steps(model, batches, learning_rate=1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for one in batches:
        loss = model(**one).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses

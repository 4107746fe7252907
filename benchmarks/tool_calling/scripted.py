"""A model that says what it is told to, turn by turn: the loop of calls without weights."""

import torch

from benchmarks.models import tiny_llama_config
from benchmarks.tool_calling.byte_tokenizer import byte_tokenizer


class Scripted(torch.nn.Module):
    """Stands in for a causal LM in `run_conversation`.

    Args:
        replies: What it generates, one after the other, with the stop token where it ends its turn.
        format: A chat format's name, for the tokenizer.
        positions: Most tokens of a prompt and its reply.

    Attributes:
        tokenizer: A byte-level tokenizer.
        prompts: The texts that it was asked to go on from.
    """

    def __init__(self, *replies: str, format: str = "qwen2.5", positions: int = 4096):
        super().__init__()
        self.replies, self.prompts, self.training, self.device = list(replies), [], False, "cpu"
        self.tokenizer = byte_tokenizer(format)
        self.config = tiny_llama_config(len(self.tokenizer))
        self.config.max_position_embeddings = positions

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: object) -> torch.Tensor:
        """The prompts with the next replies, one for each row."""
        if self.training or options["do_sample"] or options["repetition_penalty"] != 1.0:
            raise ValueError("generate must be greedy and in evaluation mode, got other options")
        self.prompts += [self.tokenizer.decode(r[m.bool()]) for r, m in zip(input_ids, attention_mask, strict=True)]
        texts = [self.replies.pop(0) for _ in input_ids]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        width = max(map(len, ids))
        new = torch.tensor([one + [options["pad_token_id"]] * (width - len(one)) for one in ids])
        return torch.cat([input_ids, new], 1)

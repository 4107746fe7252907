"""What transformers answers, greedily and in float32, to the requests that an engine gets."""

from collections.abc import Sequence

import torch

from benchmarks.gguf.engine import Answer


@torch.no_grad()
def answer(model: torch.nn.Module, processor, request: dict, tokens: int | Sequence[int]) -> Answer:
    """Answer one request of `engine.ask` without a cache.

    Args:
        model: in float32, or in 4 bits that compute in float32.
        processor: its processor or tokenizer.
        request: has "prompt" or "text", and perhaps "image".
        tokens: how many to generate; or the tokens of another answer. Then one forward pass finds the most likely
            token after each beginning of that answer. Both ways give the same up to the first token that differs.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    image = request.get("image")
    text = request.get("prompt")
    if text is None:
        content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": request["text"]}]
        messages = [{"role": "user", "content": content if processor is not tokenizer else request["text"]}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if image is None:
        batch = dict(tokenizer(text, return_tensors="pt"))
    else:
        batch = dict(processor(text=[text], images=[[image]], return_tensors="pt", add_special_tokens=False))
    batch = {name: value.to(model.device) for name, value in batch.items()}
    ids = batch.pop("input_ids")
    batch.pop("token_type_ids", None)
    batch.pop("attention_mask")
    kinds = batch.pop("mm_token_type_ids", None)

    def most_likely(ids: torch.Tensor, places: int) -> tuple[list[float], list[int]]:
        """Log-probabilities and tokens at the last places of `ids` [1, length]."""
        more = {} if kinds is None else {"mm_token_type_ids": _padded(kinds, ids.shape[1])}
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **batch, **more).logits
        log_probs, best = logits[0, -places:].double().log_softmax(-1).max(-1)
        return log_probs.tolist(), best.tolist()

    prompt = ids.shape[1]
    if isinstance(tokens, int):
        log_probs, found = [], []
        for _ in range(tokens):
            (log_prob,), (best,) = most_likely(torch.cat([ids, ids.new_tensor([found])], dim=1), 1)
            log_probs.append(log_prob)
            found.append(best)
    else:
        log_probs, found = most_likely(torch.cat([ids, ids.new_tensor([tokens[:-1]])], dim=1), len(tokens))
    return Answer(prompt, found, log_probs, tokenizer.decode(found))


def _padded(kinds: torch.Tensor, length: int) -> torch.Tensor:
    """Generated tokens are text, kind 0."""
    return torch.nn.functional.pad(kinds, (0, length - kinds.shape[1]))


def distance(one: Answer, other: Answer) -> tuple[bool, float]:
    """Whether prompt and tokens are equal, and the largest difference of log-probabilities."""
    equal = one.prompt_tokens == other.prompt_tokens and one.tokens == other.tokens
    return equal, max(abs(a - b) for a, b in zip(one.log_probs, other.log_probs, strict=True))


def epsilon_of_norms(model: torch.nn.Module, epsilon: float) -> None:
    """Set the epsilon of the text model's RMS norms, to show what an engine computes that ignores the file's."""
    text = getattr(model.model, "language_model", model.model)
    for module in text.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = epsilon


class TableGelu(torch.nn.Module):
    """GELU as llama.cpp's CPU code has it: a table from float16 to float16, of the tanh or the sigmoid formula."""

    def __init__(self, quick: bool):
        super().__init__()
        self.quick = quick

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.half().float()
        if self.quick:
            return (half * torch.sigmoid(1.702 * half)).half().float()
        table = torch.nn.functional.gelu(half, approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))


def gelu_by_table(model: torch.nn.Module) -> None:
    """Exchange each GELU of tower and projector for the engine's."""
    kinds = {"GELU": False, "GELUActivation": False, "GELUTanh": False, "QuickGELUActivation": True}
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ in kinds:
                setattr(module, name, TableGelu(kinds[type(child).__name__]))


def half_convolution(model: torch.nn.Module) -> None:
    """Round pixels and kernel of the patch embedding to float16, as llama.cpp does whatever the file's type."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            module.weight.data = module.weight.data.half().float()
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].half().float(),))


def class_token_last(model: torch.nn.Module) -> None:
    """Let a CLIP tower place its class token behind the patches, as llama.cpp does (its issue 25814).

    Each token then gets another one's position, and of the features that are handed on the first patch is dropped in
    place of the class token.
    """
    embeddings = model.model.vision_tower.embeddings

    def forward(pixel_values: torch.Tensor, **_) -> torch.Tensor:
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [batch, patches, hidden]
        last = embeddings.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([patches, last], dim=1) + embeddings.position_embedding.weight

    embeddings.forward = forward

"""Token losses of rows alone and in a batch, and the work of the vision tower."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.vision.chat import picture

TOWERS = ("visual", "vision_model", "vision_tower")  # names of the vision tower in the families' models


def user(*content: str | None) -> dict:
    """A message of the user; None stands for an image."""
    blocks = [{"type": "image"} if one is None else {"type": "text", "text": one} for one in content]
    return {"role": "user", "content": blocks}


def assistant(text: str) -> dict:
    """A message of the assistant."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def row(*messages: dict, images: Sequence[tuple[int, int]] = ()) -> dict:
    """A row of messages with random images of the given widths and heights."""
    return {"messages": list(messages), "images": [picture(*size, seed) for seed, size in enumerate(images, 1)]}


ONE = row(user(None, "What is this?"), assistant("A function of two arguments."), images=[(56, 56)])
TEXT = row(user("What is a class?"), assistant("A template for objects, which has attributes and methods."))
SHORT = row(user("Yes or no?"), assistant("No."))
TWO = row(user("Compare: ", None, None, "please"), assistant("They differ."), images=[(84, 56), (56, 112)])
AFTER = row(user("First some text and only then an image: ", None), assistant("Yes."), images=[(40, 90)])
TURNS = row(user("Hello"), assistant("Good day."), user("Here it is: ", None), assistant("I see."), images=[(64, 48)])
LARGE = row(user(None, "And this one?"), assistant("Larger."), images=[(120, 100)])
BATCHES = {
    "mixed": [ONE, TEXT, TWO, SHORT],
    "all text": [TEXT, SHORT],
    "all image": [ONE, AFTER],
    "several images": [TWO, ONE, TWO],
    "image after text": [AFTER, TURNS, TEXT],
    "varying sizes": [ONE, LARGE, SHORT, AFTER],
}


def token_losses(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The cross entropy of each label, a vector for each row."""
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits.float()[:, :-1]
    labels = batch["labels"][:, 1:].to(model.device)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # [rows, length - 1]
    return [one[label != -100] for one, label in zip(losses, labels, strict=True)]


def largest_difference(model: torch.nn.Module, collate: Callable, rows: Sequence[Mapping]) -> list[float]:
    """For each row the largest difference of a token's loss in the batch from its loss when the row is alone.

    A row whose number of labels differs counts as infinitely far off.
    """
    together = token_losses(model, collate(rows))
    alone = [token_losses(model, collate([one]))[0] for one in rows]
    return [
        (a - b).abs().max().item() if a.shape == b.shape else float("inf") for a, b in zip(together, alone, strict=True)
    ]


def gradients(model: torch.nn.Module, batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over all labels, of all batches together."""
    model.zero_grad()
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
    for batch, count in zip(batches, counts, strict=True):  # not each family's loss takes num_items_in_batch
        (model(**batch, use_cache=False).loss * count / sum(counts)).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def relative_difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The norm of the difference of two sets of gradients over the norm of the second."""
    zero = torch.zeros(())
    names = {*found, *expected}
    off = sum((found.get(name, zero) - expected.get(name, zero)).square().sum() for name in names).sqrt()
    return (off / sum(one.square().sum() for one in expected.values()).sqrt()).item()


def tower_of(model: torch.nn.Module) -> torch.nn.Module:
    """The vision tower of a model of one of the families."""
    return next(getattr(model.model, name) for name in TOWERS if hasattr(model.model, name))


def tower_flops(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> int:
    """FLOPs of the forward pass that are spent in the vision tower."""
    tower, spent = tower_of(model), [0]
    counter = FlopCounterMode(display=False, custom_mapping=_ON_CPU)

    def finish(*_) -> None:
        counter.__exit__(None, None, None)
        spent.append(counter.get_total_flops())

    before = tower.register_forward_pre_hook(lambda *_: (counter.__enter__(), None)[1])
    after = tower.register_forward_hook(finish)
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        before.remove()
        after.remove()
    return sum(spent)


def _attention_flops(query, key, value, *others, **options) -> int:
    return sdpa_flop_count(query, key, value)


# The kernel of attention on a CPU, which the counter does not know.
_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}

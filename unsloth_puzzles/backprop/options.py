"""The options of a call of `memory_efficient_linear`, checked."""

from dataclasses import dataclass

import torch

from unsloth_puzzles.backprop.chunks import kept_bytes


@dataclass(frozen=True)
class Options:
    """The options of `memory_efficient_linear`; the defaults are those of the puzzle's skeleton."""

    reduction: str = "mean"
    function_takes: str = "linear"
    normalizer: object = None
    ignore_index: int | None = -100
    chunk_size: int | str = "auto"
    accumulate_dtype: torch.dtype | None = None
    compile: bool = False
    check_additive: bool = True
    keep_logits: int | str = 0

    def __post_init__(self):
        for name, allowed in (("reduction", ("mean", "sum", "none")), ("function_takes", ("logits", "linear"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, need one of {', '.join(map(repr, allowed))}")
        if self.normalizer is not None and self.reduction != "sum":
            raise ValueError(f"normalizer: got {self.normalizer!r} with reduction={self.reduction!r}, need 'sum'")
        if isinstance(self.normalizer, str) and self.normalizer != "labels":
            raise ValueError(f"normalizer: got {self.normalizer!r}, need a number, a 0-dim tensor or 'labels'")
        if not isinstance(self.normalizer, int | float | str | torch.Tensor | None):
            kind = type(self.normalizer).__name__
            raise TypeError(f"normalizer: got {kind}, need a number, a 0-dim tensor or 'labels'")
        if isinstance(self.normalizer, torch.Tensor) and (
            self.normalizer.numel() != 1 or self.normalizer.requires_grad
        ):
            raise ValueError("normalizer: got a tensor of several values or one that requires grad, need a constant")
        if self.counts_labels and self.ignore_index is None:
            raise ValueError("ignore_index: got None, need an index: the labels that are not equal to it are counted")
        if kept_bytes(self.keep_logits) and (self.reduction != "none" or self.function_takes == "linear"):
            raise ValueError(
                f"keep_logits: got {self.keep_logits!r} with reduction={self.reduction!r}, "
                f"function_takes={self.function_takes!r}; need 'none' and 'logits': only those are computed again"
            )
        if self.compile and self.function_takes == "linear":
            raise ValueError("compile: got True with function_takes='linear', need 'logits': only that is compiled")
        if self.accumulate_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"accumulate_dtype: got {self.accumulate_dtype}, need None, torch.float32 or float64")

    @property
    def counts_labels(self) -> bool:
        """Whether the loss is divided by the number of labels that are not `ignore_index`."""
        return self.reduction == "mean" or isinstance(self.normalizer, str)

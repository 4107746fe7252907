"""The options of a call of `memory_efficient_linear`, checked."""

from dataclasses import dataclass
from numbers import Real

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
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        if self.normalizer is not None and self.reduction != "sum":
            raise ValueError(f"normalizer must be None with reduction={self.reduction!r}, got {self.normalizer!r}")
        if isinstance(self.normalizer, str) and self.normalizer != "labels":
            raise ValueError(f"normalizer must be a number, a 0-dim tensor or 'labels', got {self.normalizer!r}")
        if not isinstance(self.normalizer, Real | str | torch.Tensor | None):
            kind = type(self.normalizer).__name__
            raise TypeError(f"normalizer must be a number, a 0-dim tensor or 'labels', got {kind}")
        if isinstance(self.normalizer, torch.Tensor) and (
            self.normalizer.numel() != 1 or self.normalizer.requires_grad
        ):
            raise ValueError(
                "normalizer must be one constant, got a tensor of several values or one that requires grad"
            )
        if self.counts_labels and self.ignore_index is None:
            raise ValueError("ignore_index must be an index, got None: the labels that are not equal to it are counted")
        if kept_bytes(self.keep_logits) and (self.reduction != "none" or self.function_takes == "linear"):
            raise ValueError(
                f"keep_logits must be 0 but for reduction='none' and function_takes='logits', got {self.keep_logits!r} "
                f"with {self.reduction!r} and {self.function_takes!r}: only those logits are computed again"
            )
        if self.compile and self.function_takes == "linear":
            raise ValueError(
                "compile must be False with function_takes='linear', got True: only functions of logits are compiled"
            )
        if self.accumulate_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(
                f"accumulate_dtype must be None, torch.float32 or torch.float64, got {self.accumulate_dtype}"
            )

    @property
    def counts_labels(self) -> bool:
        """Whether the loss is divided by the number of labels that are not `ignore_index`."""
        return self.reduction == "mean" or isinstance(self.normalizer, str)

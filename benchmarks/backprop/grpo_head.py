"""The head of GRPO alone, forward and backward: peak, time and error of ours and of its alternatives.

    head_only(device="cuda")        # 16 x 1024 tokens

Results are plain dicts by candidate: "ours" (which keeps no logits, and once more as the trainer keeps some for the
backward, and with the head's gradient summed in float32, as TRL does), "TRL" (the fused head of trl 1.16), "Liger"
(`LigerFusedLinearGRPOLoss`, if it can be imported; it multiplies the gradients in float32, so once more with TF32
allowed), "full logits" (in float32, as one would write it) and "full logits, TRL's kernel" (as the head made them, one
Triton kernel on a GPU).
"""

import importlib.util
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import entropy_from_logits, selective_log_softmax_and_entropy

from benchmarks.backprop.candidates import OURS, OURS_FLOAT32, OURS_KEPT, measure_candidates, peak_gib
from benchmarks.models import SEED
from unsloth_puzzles.backprop.grpo import default_keep_logits
from unsloth_puzzles.backprop.linear import memory_efficient_linear
from unsloth_puzzles.backprop.token_scores import row_scores

TRL, LIGER, LIGER_TF32 = "TRL", "Liger", "Liger, TF32"
FULL, FULL_KERNEL = "full logits", "full logits, TRL's kernel"
EPSILON = 0.2
_TILE = 32768  # of the vocabulary: what TRL's fused head passes
_ROWS = 2048  # of the reference at a time


def head_only(
    *,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    sequences: int = 16,
    length: int = 1024,
    hidden: int = 2048,
    vocab: int = 128256,
    chunk_size: int | str = "auto",
    rounds: int = 5,
    without: Iterable[str] = (),
) -> dict[str, dict]:
    """From hidden states (sequences * length, hidden) to the GRPO loss and the gradients of hidden states and head.

    The loss is DAPO's, with ratios to old log-probabilities that are partly clipped; tokens are drawn from the policy.
    Every candidate but Liger, which does not offer them, returns the entropies that TRL logs. Those in `without` are
    left out. One that fails (out of memory, say) is printed with the reason, and missing in what is returned.

    Returns, by candidate: "peak_gib" above the state before, gradients included; "time", a `Timing` in microseconds;
    "loss_error" (absolute), "hidden_error" and "weight_error" (relative norms) against float32 on the same inputs.
    """
    case = _Case(device, dtype, sequences, length, hidden, vocab)
    calls = {name: partial(_forward_backward, loss, case) for name, loss in _losses(case, chunk_size).items()}
    loss, *gradients = case.reference()

    def one(call) -> dict:
        found, *slopes = call()  # compiles
        hidden_error, weight_error = (_relative(a, b) for a, b in zip(slopes, gradients, strict=True))
        loss_error = abs(found.item() - loss.item())
        del slopes
        errors = {"loss_error": loss_error, "hidden_error": hidden_error, "weight_error": weight_error}
        return {**errors, "peak_gib": peak_gib(call)}

    wanted = {name: call for name, call in calls.items() if name not in {*without}}
    return measure_candidates("head only", wanted, one, device, rounds)


class _Case:
    """Hidden states, head, drawn tokens, old log-probabilities and advantages of `head_only`."""

    def __init__(self, device, dtype, sequences, length, hidden, vocab):
        generator = torch.Generator(device).manual_seed(SEED)
        random = partial(torch.randn, device=device, generator=generator)
        self.shape = (sequences, length)
        # Logits of standard deviation 2.7: about as peaked as a trained model's.
        self.x = (3 * random(sequences * length, hidden)).to(dtype).requires_grad_()
        self.head = nn.Linear(hidden, vocab, bias=False, device=device, dtype=dtype)
        self.head.weight.data = (random(vocab, hidden) * 0.02 * (2048 / hidden) ** 0.5).to(dtype)
        self.tokens, self.old = self._drawn(random)
        self.advantages = random(sequences)
        self.mask = torch.ones(self.shape, device=device)

    @torch.no_grad()
    def _drawn(self, random):
        tokens, old = [], []
        for x in self.x.float().split(_ROWS):
            log_p = (x @ self.head.weight.float().t()).log_softmax(-1)
            uniform = torch.special.ndtr(random(log_p.shape)).clamp(1e-7, 1 - 1e-7)
            tokens.append((log_p - (-uniform.log()).log()).argmax(-1))  # Gumbel: a draw from softmax
            # A fifth of the ratios lies beyond the clip and none near it, where rounding would decide.
            drift = torch.where(random(len(x)).abs() > 1.28, 0.5, 0.04) * random(len(x)).sign()
            old.append(log_p.gather(-1, tokens[-1][:, None]).squeeze(-1) + drift)
        return torch.cat(tokens), torch.cat(old)

    def loss(self, log_probs: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """DAPO's loss from (rows,) log-probabilities: the clipped objective over the number of tokens."""
        ratio = (log_probs - self.old[rows]).exp()
        advantages = self.advantages.repeat_interleave(self.shape[1])[rows]
        clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
        return -torch.min(ratio * advantages, clipped * advantages).sum() / self.mask.sum()

    def reference(self):
        """Loss and gradients in float32, no TF32, a few rows at a time."""
        allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
        weight = self.head.weight.detach().float().requires_grad_()
        total, slopes = 0, []
        for start in range(0, len(self.x), _ROWS):
            rows = slice(start, start + _ROWS)
            x = self.x[rows].detach().float().requires_grad_()
            log_p = F.linear(x, weight).log_softmax(-1)
            loss = self.loss(log_p.gather(-1, self.tokens[rows, None]).squeeze(-1), rows)
            loss.backward()
            total, slopes = total + loss.detach(), [*slopes, x.grad]
        torch.backends.cuda.matmul.allow_tf32 = allowed
        return total, torch.cat(slopes), weight.grad


def _losses(case: _Case, chunk_size: int | str) -> dict[str, Callable[[], torch.Tensor]]:
    scores = partial(row_scores, temperature=1.0, scale=1.0, cap=None, with_entropy=True)
    compile = case.x.is_cuda

    def ours(accumulate_dtype=None, keep_logits=0):
        options = {"chunk_size": chunk_size, "compile": compile, "accumulate_dtype": accumulate_dtype}
        options |= {"reduction": "none", "keep_logits": keep_logits}
        return case.loss(memory_efficient_linear(case.x, case.head, case.tokens, scores, **options)[0])

    def fused_head():
        outputs = ("log_probs", "entropy")
        arguments = (case.x, case.head.weight, None, case.tokens, 1.0, _TILE, None, 1.0, outputs)
        return case.loss(ChunkedLogProbFunction.apply(*arguments)[0])

    def full():
        logits = case.head(case.x)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        with torch.no_grad():
            entropy_from_logits(logits)
        return case.loss(logits.log_softmax(-1).gather(-1, case.tokens[:, None]).squeeze(-1))

    def full_kernel():
        logits = case.head(case.x)
        return case.loss(selective_log_softmax_and_entropy(logits, case.tokens, entropy_requires_grad=False)[0])

    found = {
        OURS: ours,
        OURS_KEPT: partial(ours, keep_logits=default_keep_logits(case.head)),
        OURS_FLOAT32: partial(ours, torch.float32),
        TRL: fused_head,
        FULL: full,
        FULL_KERNEL: full_kernel,
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        liger_loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", compiled=compile)

        def liger(tf32=False):
            allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
            try:
                return liger_call()
            finally:
                torch.backends.cuda.matmul.allow_tf32 = allowed

        def liger_call():
            shaped = (t.view(*case.shape, *t.shape[1:]) for t in (case.x, case.tokens, case.old))
            x, tokens, old = shaped
            weight = case.head.weight
            return liger_loss(x, weight, tokens, case.mask, case.advantages, old_per_token_logps=old)[0]

        found[LIGER] = liger
        if compile:
            found[LIGER_TF32] = partial(liger, tf32=True)
    return found


def _forward_backward(loss: Callable[[], torch.Tensor], case: _Case):
    value = loss()
    return value.detach(), *torch.autograd.grad(value, [case.x, case.head.weight])


def _relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.float() - exact).norm() / exact.norm()).item()

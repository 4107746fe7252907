"""GRPO beside its alternatives: the head alone, a whole step, and a short run whose reward rises.

    head_only(device="cuda")        # peak, time and error of the head, forward and backward, on 16 x 1024 tokens
    whole_step(device="cuda")       # the same of a step of Llama 3.2 1B: model, head, loss, backward; no generation
    train(GRPOTrainer), train(MemoryEfficientGRPOTrainer)

Results are plain dicts by candidate: "ours" (and with the head's gradient summed in float32, as TRL does), "TRL" (the
fused head of trl 1.16), "Liger" (`LigerFusedLinearGRPOLoss`, if it can be imported; it multiplies the gradients in
float32, so once more with TF32 allowed), "full logits" (in float32, as one would write it) and "full logits, TRL's
kernel" (as the head made them, one Triton kernel on a GPU).
A script, which no part of the package imports.
"""

import importlib.util
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import entropy_from_logits, selective_log_softmax_and_entropy

from benchmarks.backprop.workload import release
from benchmarks.models import SEED, llama_1b_config, tiny_llama_config
from benchmarks.text import paragraphs
from unsloth_puzzles.backprop.grpo import MemoryEfficientGRPOTrainer, kept_bytes, row_scores
from unsloth_puzzles.backprop.linear import memory_efficient_linear
from unsloth_puzzles.bench.experiments import failed
from unsloth_puzzles.bench.memory import peak_memory
from unsloth_puzzles.bench.timing import Timing, event_time, wall_time

OURS, OURS_FLOAT32, TRL, LIGER, LIGER_TF32 = "ours", "ours, float32 dW", "TRL", "Liger", "Liger, TF32"
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
        return {**errors, "peak_gib": _peak_gib(call)}

    wanted = {name: call for name, call in calls.items() if name not in {*without}}
    return _measured("head only", wanted, one, device, rounds)


def whole_step(
    *,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    config: LlamaConfig | None = None,
    sequences: int = 16,
    prompt: int = 128,
    completion: int = 1024,
    gradient_checkpointing: bool = True,
    rounds: int = 3,
    without: Iterable[str] = (),
    **ours: object,
) -> dict[str, dict]:
    """Loss and backward of one GRPO step of `config` (Llama 3.2 1B), random weights, all of them trained.

    The three trainers share one model and one batch. `ours` are options of `MemoryEfficientGRPOTrainer`. A trainer
    whose step fails is printed with the reason, and missing in what is returned; those in `without` are left out.
    Returns, by candidate, "peak_gib" above the weights (gradients included), "time" (`Timing`, microseconds), "loss".
    """
    config = config or llama_1b_config()
    torch.manual_seed(SEED)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
        inputs = _random_batch(config.vocab_size, sequences, prompt, completion)
    calls = {}
    classes = {OURS: partial(MemoryEfficientGRPOTrainer, **ours), TRL: GRPOTrainer, FULL: FullLogitsGRPOTrainer}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in classes.items():
            if name in without:
                continue
            settings = {"per_device_train_batch_size": sequences, "max_completion_length": completion}
            settings["use_cpu"] = torch.device(device).type == "cpu"
            trainer = make_trainer(make, model, tiny_tokenizer(), lambda completions, **_: [0.0], folder, **settings)
            trainer.current_gradient_accumulation_steps = 1  # set by the training loop
            # Each trainer has put its own forward on the model: taken off again, so that the next finds the model's.
            calls[name] = partial(_step, trainer, vars(model).pop("forward"), inputs)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        return _measured(
            "whole step", calls, lambda call: {"loss": call().item(), "peak_gib": _peak_gib(call)}, device, rounds
        )


def train(
    trainer_class: Callable[..., GRPOTrainer],
    *,
    steps: int = 50,
    learning_rate: float = 3e-3,
    completion: int = 24,
    sequences: int = 64,
    use_cpu: bool = False,
    seed: int = SEED,
    **settings: object,
) -> dict[str, list[float] | float]:
    """A real run of `steps` updates: a tiny Llama, fixed-seed weights, float32; its reward is checked in the text.

    The reward is `vowel_share`; the prompts are the beginnings of paragraphs of Python's language reference. The same
    seed starts from the same weights and the same prompts, and samples the same completions as long as the policies
    agree. For a model this small compiling takes longer than training: give `partial(MemoryEfficientGRPOTrainer,
    compile=False)`. `settings` go to `GRPOConfig`.

    Returns "reward", "loss", "entropy" and "grad_norm", a value per step each, and "seconds".
    """
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_llama_config(vocab_size=len(tokenizer)))
    settings = {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "max_completion_length": completion,
        "per_device_train_batch_size": sequences,
        "use_cpu": use_cpu,
        "seed": seed,
        **settings,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(trainer_class, model, tokenizer, vowel_share, folder, **settings)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    curves = {name: [entry[name] for entry in logged] for name in ("reward", "loss", "entropy", "grad_norm")}
    return {**curves, "seconds": seconds}


def vowel_share(completions: list[str], **_) -> list[float]:
    """The share of a completion's characters that are lower-case vowels: 0 to 1, and 0 for an empty one."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


class FullLogitsGRPOTrainer(GRPOTrainer):
    """TRL's trainer with all of the completion's logits, in float32 (or wider): the plain reference."""

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **inputs
    ):
        if inputs.get("compute_aux_loss"):
            raise ValueError("compute_aux_loss: got True, need False: the reference is for dense models")
        with self.accelerator.autocast():
            outputs = model(input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep + 1)
        logits = _wide(outputs.logits[:, :-1])
        logits = logits if self.temperature == 1 else logits / self.temperature
        tokens, valid = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:].bool()
        chosen = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        if not compute_entropy:
            return torch.where(valid, chosen, 0), None, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._entropy_bonus_enabled):
            entropies = entropy_from_logits(logits)
        return torch.where(valid, chosen, 0), torch.where(valid, entropies, 0), None


def make_trainer(
    make: Callable[..., GRPOTrainer], model, tokenizer, reward: Callable, folder: str, **settings
) -> GRPOTrainer:
    """A trainer that logs every step, saves and reports nothing, and neither casts nor checkpoints unless told to."""
    quiet = {"report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    plain = {"bf16": False, "gradient_checkpointing": False, "num_generations": 8, "lr_scheduler_type": "constant"}
    prompts = [" ".join(text.split()[:6]) for text in paragraphs()[:256]]
    trainer = make(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(output_dir=folder, **{**quiet, **plain, **settings}),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def tiny_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE, trained here and now on Python's language reference; bos 0, eos 1, pad 2."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": list(special.values()), "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(paragraphs(), trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


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

    def ours(accumulate_dtype=None):
        options = {"chunk_size": chunk_size, "compile": compile, "accumulate_dtype": accumulate_dtype}
        options |= {"reduction": "none", "keep_logits": kept_bytes(case.head)}
        return case.loss(memory_efficient_linear(case.x, case.head, case.tokens, scores, **options)[0])

    def fused_head():
        outputs = ("log_probs", "entropy")
        arguments = (case.x, case.head.weight, None, case.tokens, 1.0, _TILE, None, 1.0, outputs)
        return case.loss(ChunkedLogProbFunction.apply(*arguments)[0])

    def full():
        logits = _wide(case.head(case.x))
        with torch.no_grad():
            entropy_from_logits(logits)
        return case.loss(logits.log_softmax(-1).gather(-1, case.tokens[:, None]).squeeze(-1))

    def full_kernel():
        logits = case.head(case.x)
        return case.loss(selective_log_softmax_and_entropy(logits, case.tokens, entropy_requires_grad=False)[0])

    found = {
        OURS: ours,
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


def _random_batch(vocab: int, sequences: int, prompt: int, completion: int) -> dict[str, torch.Tensor]:
    """What the trainer's preparation returns, on the default device; completions of uneven lengths."""
    lengths = torch.randint(completion // 2, completion + 1, (sequences, 1))
    completion_mask = (torch.arange(completion) < lengths).long()
    return {
        "prompt_ids": torch.randint(3, vocab, (sequences, prompt)),
        "prompt_mask": torch.ones(sequences, prompt, dtype=torch.long),
        "completion_ids": torch.randint(3, vocab, (sequences, completion)),
        "completion_mask": completion_mask,
        "advantages": torch.randn(sequences),
        "num_items_in_batch": completion_mask.sum(),
    }


def _step(trainer: GRPOTrainer, forward: Callable, inputs: dict) -> torch.Tensor:
    trainer.model.forward = forward
    try:
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        return loss.detach()
    finally:
        del trainer.model.forward
        trainer.model.zero_grad(set_to_none=True)  # now, not before: gradients belong to the peak


def _measured(what: str, calls: dict[str, Callable], one: Callable, device: str, rounds: int) -> dict[str, dict]:
    """`one(call)` of each candidate, and the times of all in turn; without those that fail.

    Anyone may run out of memory. Another error is let through if it is ours.
    """
    results = {}
    for name, call in calls.items():
        try:
            results[name] = one(call)
        except Exception as error:
            if name in (OURS, OURS_FLOAT32) and not isinstance(error, torch.OutOfMemoryError):
                raise
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            failed(f"GRPO, {what}, {name}", reason)
            traceback.clear_frames(error.__traceback__)
        release()
    fit = {name: calls[name] for name in results}
    for name, timing in (_time(fit, device, rounds) if fit else {}).items():
        results[name]["time"] = timing
    return results


def _peak_gib(call: Callable[[], object]) -> float:
    return peak_memory(call)[1] / 2**30


def _time(calls: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, Timing]:
    timer = event_time if torch.device(device).type == "cuda" else wall_time
    return timer(calls, rounds=rounds)


def _relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.float() - exact).norm() / exact.norm()).item()


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()

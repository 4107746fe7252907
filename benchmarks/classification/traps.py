"""Four faults of classifiers in 4 bits, on a tiny Llama: what transformers and PEFT do, and what ours does.

    checkpoints = Checkpoints("cuda", layers=2)
    rows, checks = check_traps(checkpoints)

The traps: a head over a 4-bit checkpoint, LoRA without a task type, padding that is the end-of-text token, and gradient
accumulation.
"""

import tempfile
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.models import SEED, random_llama, tiny_llama_config
from unsloth_puzzles.classification.adapters import add_adapters, load_trained, save_classifier
from unsloth_puzzles.classification.load import load_classifier
from unsloth_puzzles.classification.losses import PROBLEM_TYPES, REGRESSION, SINGLE, class_weights, weigh_classes

NAMES, END = ["red", "green", "blue"], "</s>"
TEXTS = ["one</s>", "a longer text</s>", "x</s>"]
LARGEST = 1e-5  # rounding in float32 is some 1e-7
LABELS = {
    PROBLEM_TYPES[0]: torch.tensor([0, 2, 1]),
    PROBLEM_TYPES[1]: torch.tensor([[1.0, 0, 0], [0, 1, 1], [1, 0, 1]]),
    PROBLEM_TYPES[2]: torch.tensor([[0.5, 1, -1], [0, 2, 1], [1, 0, 1]]),
}


class Checkpoints:
    """A tiny Llama with random weights and a byte-level tokenizer, saved in float32 and in NF4.

    The NF4 checkpoint is saved as public ones are: its list of layers to skip does not know the head.

    Args:
        device: Where models go.
        layers: Of the model.

    Attributes:
        plain, quantised: The folders.
    """

    def __init__(self, device: str, layers: int):
        self.device = device
        self._plain, self._quantised = tempfile.TemporaryDirectory(), tempfile.TemporaryDirectory()
        self.plain, self.quantised = self._plain.name, self._quantised.name
        for folder in (self.plain, self.quantised):
            _byte_tokenizer().save_pretrained(folder)
        shape = tiny_llama_config(vocab_size=272, layers=layers)
        shape.intermediate_size = 64
        random_llama(shape, "cpu", seed=SEED).save_pretrained(self.plain)
        listed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"])
        LlamaForCausalLM.from_pretrained(
            self.plain, quantization_config=listed, dtype=torch.float32, device_map={"": device}
        ).save_pretrained(self.quantised)

    def ours(self, problem_type: str = SINGLE, source: str | None = None):
        """A classifier of `load_classifier` with adapters of `add_adapters`, and its tokenizer."""
        torch.manual_seed(SEED)
        model, tokenizer = load_classifier(
            source or self.plain, NAMES, problem_type=problem_type, dtype=torch.float32, device=self.device
        )
        return add_adapters(model, r=4), tokenizer

    def theirs(self, seed: int = SEED, **options: object):
        """transformers' own classifier in float32; `seed` draws its head."""
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(self.plain, num_labels=len(NAMES), **options)
        return model.to(self.device)

    def rows(self, tokenizer, texts: Sequence[str]):
        """The texts as a batch on the device."""
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        return batch.to(self.device)

    @torch.no_grad()
    def logits(self, model, tokenizer) -> torch.Tensor:
        """Those of TEXTS in one batch."""
        return model.eval()(**self.rows(tokenizer, TEXTS)).logits

    @torch.no_grad()
    def logits_alone(self, model, tokenizer) -> torch.Tensor:
        """Those of TEXTS, each in a batch of its own."""
        return torch.cat([model.eval()(**self.rows(tokenizer, [text])).logits for text in TEXTS])


def check_traps(made: Checkpoints) -> tuple[list[tuple[str, str, str]], dict[str, bool]]:
    """A row for each trap (its name, transformers and PEFT, ours), and the checks of ours."""
    rows, checks = [], {}
    for trap in (_head, _saving, _padding, _accumulation):
        found = trap(made)
        rows += found[0]
        checks |= found[1]
    return rows, checks


def _head(made: Checkpoints):
    try:
        theirs = AutoModelForSequenceClassification.from_pretrained(made.quantised, num_labels=len(NAMES))
        head = theirs.score.weight
        theirs = f"loads a head in {_name(head)}" + ("" if head.is_floating_point() else ": quantised, not trainable")
    except NotImplementedError as error:
        theirs = f"cannot load: {error}"
    model, tokenizer = made.ours(source=made.quantised)
    head = _score(model).weight
    ours = f"loads a head in {_name(head)}, trained: {head.requires_grad}"
    return [("a head over a 4-bit checkpoint", theirs, ours)], {
        "head float32 and trained": head.dtype == torch.float32 and head.requires_grad,
        "padding apart from the end of texts": tokenizer.pad_token_id != tokenizer.eos_token_id,
    }


def _saving(made: Checkpoints):
    model, tokenizer = made.ours()
    pad = {"pad_token_id": tokenizer.pad_token_id}
    theirs = get_peft_model(made.theirs(**pad), LoraConfig(r=4, target_modules=["q_proj"]))
    trained = theirs.get_base_model().score.weight.requires_grad
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(made.theirs(SEED + 1, **pad), folder)
    their_off = _apart(made.logits(loaded, tokenizer), made.logits(theirs, tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        save_classifier(model, tokenizer, folder)
        loaded = load_trained(folder, device=made.device)[0]
    off = _apart(made.logits(loaded, tokenizer), made.logits(model, tokenizer))
    said = f"head trained: {trained}, logits off by {their_off:.2f} after saving and loading"
    ours = f"head trained: {_score(model).weight.requires_grad}, logits off by {off:.2g}"
    return [("LoRA without a task type", said, ours)], {"the head is saved": off == 0}


def _padding(made: Checkpoints):
    model, tokenizer = made.ours()
    alone, checks, worst = made.logits_alone(model, tokenizer), {}, 0.0
    theirs = made.theirs(pad_token_id=1)
    with torch.no_grad():
        theirs.score.weight.copy_(_score(model).weight)
    misread = made.logits(theirs, tokenizer)
    theirs.config.pad_token_id = tokenizer.pad_token_id
    their_off = _apart(misread, made.logits_alone(theirs, tokenizer))
    for side in ("left", "right"):
        for pad in (tokenizer.pad_token, END):
            other = PreTrainedTokenizerFast.from_pretrained(made.plain, pad_token=pad, padding_side=side)
            other.add_special_tokens({"pad_token": pad})
            off = _apart(made.logits(model, other), alone)
            worst = max(worst, off)
            checks[f"padded {side} with {pad}"] = off <= LARGEST
    ours = f"logits off by {worst:.0e} at most, padded on either side with either token"
    return [("padding = end of text", f"logits off by {their_off:.2f}", ours)], checks


def _accumulation(made: Checkpoints):
    rows, checks = [], {}
    for kind, labels in LABELS.items():
        model, tokenizer = made.ours(kind)
        if kind != REGRESSION:
            weigh_classes(model, class_weights(labels, len(NAMES)))
        whole, parts = _whole_and_parts(made, model, tokenizer, labels)
        theirs = made.theirs(pad_token_id=tokenizer.pad_token_id, problem_type=kind)
        said = "loss {:.6f} in one batch, {:.6f} in three".format(*_whole_and_parts(made, theirs, tokenizer, labels))
        name = kind.replace("_", " ")
        rows.append((f"accumulation, {name}", said, f"{whole:.6f} in one batch, {parts:.6f} in three"))
        checks[f"accumulated, {name}"] = abs(parts - whole) <= LARGEST
    return rows, checks


@torch.no_grad()
def _whole_and_parts(made: Checkpoints, model, tokenizer, labels: torch.Tensor) -> tuple[float, float]:
    """The loss of a batch, and the sum of the losses of its rows as the Trainer accumulates them."""
    batch, labels, parts = made.rows(tokenizer, TEXTS), labels.to(made.device), 0.0
    for row in range(len(TEXTS)):
        part = {name: one[row : row + 1] for name, one in batch.items()}
        parts += model(**part, labels=labels[row : row + 1], num_items_in_batch=labels.numel()).loss
    return model(**batch, labels=labels).loss.item(), parts.item()


def _score(model) -> torch.nn.Module:
    """The trained head of ours."""
    return model.get_base_model().score.modules_to_save["default"]


def _name(tensor: torch.Tensor) -> str:
    """The dtype, as in "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().max().item()


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte; padding is the end of a text."""
    alphabet = ["<s>", END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(alphabet[:2])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token=END, pad_token=END)

"""Under the trainers of transformers and TRL, with 4-bit weights, adapters and the NF4 kernel."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from benchmarks.vision.checks import (
    AFTER,
    BATCHES,
    ONE,
    TEXT,
    TURNS,
    gradients,
    largest_difference,
    relative_difference,
    token_losses,
)
from benchmarks.vision.families import FAMILIES
from tests.vision.models import EVERY, family, fresh
from unsloth_puzzles.nf4 import patch_linear4bit
from unsloth_puzzles.vision.collator import VisionCollator
from unsloth_puzzles.vision.mllama import patch_mllama
from unsloth_puzzles.vision.sampler import KindSampler, has_images

ROWS = [TEXT, ONE, AFTER, TURNS]


def _arguments(cls, folder, rows=4, **others):
    return cls(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **others,
    )


def _patched(name: str):
    processor, model = fresh(name)
    if name == "mllama":
        patch_mllama(model)
    return processor, model


def _first_loss(name: str) -> float:
    processor, model = family(name)
    collate = VisionCollator(processor)
    return torch.cat([token_losses(model, collate([one]))[0] for one in ROWS]).mean().item()


def _losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", EVERY)
def test_trainer_of_transformers(name, tmp_path):
    processor, model = _patched(name)
    arguments = _arguments(TrainingArguments, tmp_path, remove_unused_columns=False)
    trainer = Trainer(model, arguments, train_dataset=ROWS, data_collator=VisionCollator(processor))
    losses = _losses(trainer)
    assert losses[0] == pytest.approx(_first_loss(name), abs=1e-4) and losses[1] < losses[0]


@pytest.mark.parametrize("name", EVERY)
def test_trainer_of_trl(name, tmp_path):
    processor, model = _patched(name)
    columns = [{"messages": one["messages"], "images": one["images"] or None} for one in ROWS]
    trainer = SFTTrainer(
        model,
        _arguments(SFTConfig, tmp_path, gradient_checkpointing=True),
        train_dataset=Dataset.from_list(columns),  # Arrow: a block of text gets the keys of one with an image
        processing_class=processor,
        data_collator=VisionCollator(processor),
    )
    losses = _losses(trainer)
    assert losses[0] == pytest.approx(_first_loss(name), abs=1e-4) and losses[1] < losses[0]


def test_sampler_under_a_trainer(tmp_path):
    batches = []

    class Grouped(Trainer):
        def _get_train_sampler(self, dataset=None):
            return KindSampler([has_images(row) for row in self.train_dataset], self.args.train_batch_size)

        def training_step(self, model, inputs, *others):
            batches.append("pixel_values" in inputs)
            return super().training_step(model, inputs, *others)

    processor, model = _patched("pixtral")
    rows = [ONE, TEXT, AFTER, TEXT]
    arguments = _arguments(TrainingArguments, tmp_path, 2, remove_unused_columns=False)
    _losses(Grouped(model, arguments, train_dataset=rows, data_collator=VisionCollator(processor)))
    assert sorted(batches[:2]) == [False, True]


def _four_bit(name: str, folder, chosen: str):
    """The family's model with the linear layers of these names in NF4, loaded as users load it."""
    processor, model = fresh(name)
    linear = [key for key, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    skipped = [key for key in linear if chosen not in key] or None
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=skipped,
    )  # fmt: skip
    model.save_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=quantised, dtype=torch.float32, device_map={"": "cpu"}
    )
    if name == "mllama":
        patch_mllama(model)
    return processor, model


@pytest.mark.parametrize(
    "name, chosen",
    [
        ("mllama", "layers.3.cross_attn.k_proj"),  # each layer takes a second in Triton's interpreter
        *(pytest.param(name, ".", marks=pytest.mark.slow) for name in FAMILIES),
    ],
)
def test_4_bit_weights_with_the_nf4_kernel_and_adapters(name, chosen, tmp_path):
    processor, model = _four_bit(name, tmp_path, chosen)
    collate, rows = VisionCollator(processor), BATCHES["mixed"]
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)).eval()
    with patch_linear4bit(model) as patch:
        assert len(patch.names) > 20 or chosen in patch.names[0]
        assert max(largest_difference(model, collate, rows)) <= 1e-5
        found = gradients(model, [collate(rows)])
        alone = gradients(model, [collate([one]) for one in rows])
    assert {"vision" in name or "visual" in name for name in found} == {True, False}
    _de_quantise(model.double())
    with _Float64():
        exact = gradients(model, [_double(collate([one])) for one in rows])
        assert relative_difference(gradients(model, [_double(collate(rows))]), exact) <= 1e-12
    # With random adapters float32 alone is off by up to 5e-5, which is SigLIP's.
    inexact = relative_difference({name: one.double() for name, one in alone.items()}, exact)
    assert relative_difference({name: one.double() for name, one in found.items()}, exact) <= 2 * inexact


class _Float64(TorchFunctionMode):
    """Float64 where a model asks for float32, which it does in norms and in the mean of the loss, whatever its dtype.

    In float32 the weight of a label, 1/23 * 23/44 in a row alone and 1/44 in the batch, differs by 8e-8, for instance.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args, kwargs = tree_map(lambda one: torch.float64 if one is torch.float32 else one, (args, kwargs or {}))
        return function(*args, **kwargs)


def _de_quantise(model) -> None:
    """Put float64 linear layers in the place of the 4-bit ones under the adapters."""
    for part in [*model.modules()]:
        layer = getattr(part, "base_layer", None)
        if isinstance(layer, Linear4bit):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
            plain.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
            if layer.bias is not None:
                plain.bias.data = layer.bias.data
            part.base_layer = plain.requires_grad_(False)


def _double(batch) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}

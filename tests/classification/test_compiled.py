"""`compile_qlora` with classifiers: the losses of transformers, step by step, few graphs, and all undone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from benchmarks.models import nf4_config
from tests.classification.models import LABELS, batch, byte_tokenizer, classifier, losses_of_steps
from tests.compiled.models import BACKENDS, compiled_by, traced_only
from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.classification.losses import MULTI, PROBLEM_TYPES, SINGLE, weigh_classes
from unsloth_puzzles.compiled.classifier import compile_loss
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.nf4 import patch_linear4bit

TEXTS = (["one two", "longer", "x"], ["three", "four"])


def _labels(problem_type, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    if problem_type == SINGLE:
        return torch.randint(3, (rows,), generator=generator)
    numbers = torch.randn(rows, 3, generator=generator)
    return (numbers > 0).float() if problem_type == MULTI else numbers


def _batches(tokenizer, problem_type):
    return [
        {**batch(tokenizer, texts), "labels": _labels(problem_type, len(texts), seed)}
        for seed, texts in enumerate(TEXTS)
    ]


def _plain(checkpoint, problem_type=None):
    """Without anything of this package."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, num_labels=3, pad_token_id=2, quantization_config=nf4_config(torch.float32), dtype=torch.float32,
        problem_type=problem_type,
    )  # fmt: skip
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


@pytest.mark.slow
@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_are_those_of_transformers(checkpoint, problem_type, backend):
    batches = _batches(byte_tokenizer(), problem_type)
    expected = torch.tensor(losses_of_steps(_plain(checkpoint, problem_type), batches))
    patched, _ = classifier(checkpoint, LABELS, problem_type)
    with patch_linear4bit(patched):
        found = {"patched": losses_of_steps(patched, batches)}
    compiled, _ = classifier(checkpoint, LABELS, problem_type)
    with compiled_by(backend), count_compilations() as counts, compile_qlora(compiled):
        found["compiled"] = losses_of_steps(compiled, batches)
    for name, losses in found.items():
        assert (torch.tensor(losses) - expected).abs().max() <= 1e-5, (name, losses, expected)
    names = [one.name for one in counts.captures]
    assert names == ["LlamaDecoderLayer_first", "LlamaDecoderLayer", "norm", "classification_loss"], counts.table()
    assert counts.graph_breaks == {} and all(one.reason is None for one in counts.captures)


@pytest.mark.slow
def test_classifiers_of_transformers_are_compiled_as_they_are(checkpoint):
    """The first call decides the kind of problem from the labels; it is not compiled, so that nothing is twice."""
    batches, model = _batches(byte_tokenizer(), SINGLE), _plain(checkpoint)
    expected = torch.tensor(losses_of_steps(_plain(checkpoint), batches))
    loss = model.get_base_model().loss_function
    with traced_only(), count_compilations() as counts, compile_qlora(model) as compiled:
        found = torch.tensor(losses_of_steps(model, batches))
        assert compiled.loss is None and "classifier: its loss compiled" in compiled.steps
    assert (found - expected).abs().max() <= 1e-5
    assert [one.name for one in counts.captures].count("classification_loss") == 1 and counts.graph_breaks == {}
    assert model.get_base_model().loss_function is loss and "_loss_function" not in vars(model.get_base_model())


@pytest.mark.parametrize(
    "texts, numbers, graphs",
    [
        ([["a", "bb"], ["a", "bb", "ccc"]], [None], 2),
        pytest.param(
            [["a", "bb"], ["a", "bb", "ccc"], ["a"], ["b"]], [None, 3, 4, torch.tensor(7)], 8, marks=pytest.mark.slow
        ),
    ],
)
def test_kinds_of_calls_are_compiled_once(checkpoint, texts, numbers, graphs):
    """With and without gradients, of one row and of more, divided by a number, a tensor or neither."""
    model, tokenizer = classifier(checkpoint, four_bit=False)
    weigh_classes(model, torch.tensor([0.5, 1.0, 4.0]))
    calls = [
        {**batch(tokenizer, rows), "labels": _labels(SINGLE, len(rows), 1), "num_items_in_batch": number}
        for rows in texts
        for number in numbers
    ]

    def results():
        found = []
        for call in calls:
            with torch.no_grad():
                found.append(model(**call).loss)
            model.zero_grad()
            loss = model(**call).loss
            loss.backward()
            found += [loss.detach(), model.get_base_model().score.modules_to_save.default.weight.grad.norm()]
        return torch.stack(found)

    expected, base = results(), model.get_base_model()
    loss = base.loss_function
    with traced_only(), count_compilations() as counts:
        undo = compile_loss(base, {})
        found = results()
        undo()
    assert ((found - expected).abs() <= 1e-6 * expected.abs()).all()
    assert [one.name for one in counts.captures] == ["classification_loss"] * graphs, counts.table()
    assert all(one.reason is None for one in counts.captures) and base.loss_function is loss


def test_a_compiled_divisor_is_not_rounded_to_the_default_dtype(checkpoint):
    model, tokenizer = classifier(checkpoint, adapters=False, four_bit=False)
    given = {**batch(tokenizer), "labels": _labels(SINGLE, 3, 1), "num_items_in_batch": 257.0}
    expected = model(**given).loss
    torch.set_default_dtype(torch.bfloat16)
    try:
        with traced_only():
            undo = compile_loss(model, {})
            found = model(**given).loss
            undo()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and (found - expected).abs() <= 1e-6 * expected


@pytest.mark.slow
def test_padding_on_either_side_and_checkpointing(checkpoint):
    model, _ = classifier(checkpoint, gradient_checkpointing=True)
    given = [
        {**batch(byte_tokenizer(padding_side=side)), "labels": _labels(SINGLE, 3, 0)} for side in ("left", "right")
    ]
    expected = [model(**one).loss.item() for one in given]
    with traced_only(), compile_qlora(model):
        found = [model(**one).loss for one in given]
        found[0].backward()
    assert torch.allclose(torch.stack(found), torch.tensor(expected), rtol=1e-5, atol=0)
    assert (found[0] - found[1]).abs() <= 1e-5


def test_options_of_causal_models_are_refused(checkpoint):
    model, _ = classifier(checkpoint)
    before = [type(module) for module in model.modules()]
    for options in ({"loss": torch.nn.functional.cross_entropy}, {"chunk_size": 4}, {"predictions": True}):
        with pytest.raises(ValueError, match=rf"^{next(iter(options))} must be left out for a classifier"):
            compile_qlora(model, **options)
    assert [type(module) for module in model.modules()] == before
    with traced_only(), compile_qlora(model), pytest.raises(ValueError, match=r"^model must not be compiled yet"):
        weigh_classes(model, None)

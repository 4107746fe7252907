"""No rank waits for one that has failed or that has another model; ranks may have other numbers of labels."""

import json
import time

import pytest

from benchmarks.fsdp2.ranks import start_ranks
from tests.fsdp2.script import start

SAME = "ValueError: model must have the same {} on all ranks, got "
Q, K, V = (f"base_model.model.model.layers.0.self_attn.{name}_proj.lora_A.default.weight: " for name in "qkv")
FIRST, SECOND = " on rank 0 and ", " on rank 1"
A = "(4, 64) of torch.float32"
INSTEAD = {
    "values of trained parameters": "call transformers.set_seed(n) on every rank before get_peft_model",
    "frozen weights": "load the same weights on every rank",
}

DIFFERENT = [
    ("packed layers", "NF4 layers", f"14 of them{FIRST}7 of them"),
    ("no packed layer", "NF4 layers", f"14 of them{FIRST}0 of them"),
    ("shapes", "trained parameters", f"{Q}{A}{FIRST}{Q}(8, 64) of torch.float32"),
    ("names", "trained parameters", f"{K}{A}{FIRST}{V}{A}"),
    ("dtypes", "trained parameters", f"{Q}{A}{FIRST}{Q}(4, 64) of torch.bfloat16"),
    ("one more", "trained parameters", f"28 of them{FIRST}29 of them"),
    ("shapes, under a Trainer", "trained parameters", f"{Q}{A}{FIRST}{Q}(8, 64) of torch.float32"),
]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "out.json"
    start_ranks("tests.fsdp2.different_ranks", str(out), ranks=2, timeout=300, TRITON_INTERPRET="1")
    return json.loads(out.read_text())


@pytest.mark.parametrize("name, what, differing", DIFFERENT, ids=[case[0] for case in DIFFERENT])
def test_both_ranks_refuse_models_that_differ(errors, name, what, differing):
    first, second = errors[name]
    assert first == second == SAME.format(what) + differing + SECOND


@pytest.mark.parametrize(
    "name, what",
    [
        ("other adapters", "values of trained parameters"),
        ("other 4-bit weights", "frozen weights"),
        ("other embeddings", "frozen weights"),
        ("rows in another order", "frozen weights"),
        ("another table", "frozen weights"),
    ],
)
def test_both_ranks_refuse_values_that_differ(errors, name, what):
    first, second = errors[name]
    assert first == second and str(first).startswith(SAME.format(what))
    assert str(first).endswith(f"{SECOND}; {INSTEAD[what]}")


@pytest.mark.parametrize(
    "name, message",
    [
        ("an optimizer by name", "ValueError: optim must be one of adamw_torch, adamw_torch_fused, sgd, which take"),
        (
            "an optimizer by class",
            "ValueError: optimizer_cls_and_kwargs must be of Adam, AdamW, SGD of torch.optim, got",
        ),
        ("a trained head under TRL", "ValueError: model must have a frozen head under a trainer of TRL, got a trained"),
        ("compiled by the Trainer", "ValueError: torch_compile must be False, got True"),
        ("evaluated before it is trained", "RuntimeError: trainer must train before it evaluates or predicts, got no"),
        ("predicts before it is trained", "RuntimeError: trainer must train before it evaluates or predicts, got no"),
        ("evaluated in bfloat16", "ValueError: bf16_full_eval must be False, got True"),
        ("evaluated in float16", "ValueError: fp16_full_eval must be False, got True"),
        ("some tokens, under a Trainer", "ValueError: model must have no trainable_token_indices under a Trainer, got"),
        ("not prepared", "RuntimeError: trainer must be prepared before it trains; call prepare_trainer(trainer)"),
    ],
)
def test_cases_that_fsdp2_breaks_are_refused_on_both_ranks(errors, name, message):
    first, second = errors[name]
    assert first == second and str(first).startswith(message)


@pytest.mark.parametrize(
    "name",
    [
        "the same",
        "the same, under a Trainer",
        "a frozen head under TRL",
        "a trained head under a Trainer",
        "evaluated at the start of its training",
        "float32 trained in bfloat16",
        "float32 trained in bfloat16, eager attention",
    ],
)
def test_models_that_are_the_same_are_taken(errors, name):
    assert errors[name] == [None, None]


@pytest.mark.parametrize("name", ["unequal labels, under a Trainer", "unequal labels, by shard_qlora"])
def test_ranks_with_unequal_labels_have_the_loss_and_norm_of_one_process(errors, name):
    assert errors[name] == [None, None]


def test_a_rank_that_fails_ends_all_with_its_message(architecture, tmp_path):
    began = time.monotonic()
    failed = start(architecture, tmp_path / "log.jsonl", "--steps", 3, ranks=2, callback="Fail")
    assert failed.returncode != 0 and time.monotonic() - began < 200
    of_the_rank, summary = failed.stderr.split("ChildFailedError", 1)
    assert all("ValueError: this rank cannot read its rows" in part for part in (of_the_rank, summary))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1

"""The script on one process and on two: the same losses, adapters that load in one process, and a run that goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from benchmarks.backprop.grpo import tiny_tokenizer
from benchmarks.models import tiny_llama_config
from unsloth_puzzles.fsdp2.train import load, rows_of

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("train_on_cpu.py")
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    """A folder with the configuration and the tokenizer of a tiny Llama."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny"), tiny_tokenizer()
    tiny_llama_config(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(architecture: Path, log: Path, *flags: str, launcher: tuple[str, ...] = ()) -> list[dict]:
    """The lines of the log of a run of three steps, of two rows of 20 tokens."""
    settings = ["--model", architecture, "--layers", 2, "--rows", 2, "--length", 20, "--no-compile", "--log-file", log]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *map(str, settings), *flags],
        env=environment, cwd=log.parent, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def one(architecture, tmp_path_factory):
    return run(architecture, tmp_path_factory.mktemp("one") / "log.jsonl", "--steps", "3")


@pytest.fixture(scope="module")
def two(architecture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    flags = ("--steps", "3", "--output", str(folder / "out"))
    return folder, run(architecture, folder / "log.jsonl", *flags, launcher=TWO)


def test_two_ranks_have_the_losses_and_norms_of_one(one, two):
    assert [line["step"] for line in two[1]] == [1, 2, 3]
    for ours, theirs in zip(two[1], one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert theirs["grad_norm"] > 0.01 and len(ours["peak_gib"]) == 2


def test_saved_adapters_load_in_one_process(two, architecture):
    saved = two[0] / "out"
    weights = load_file(saved / "adapter_model.safetensors")
    assert len(weights) == 28 and all(value.dtype == torch.float32 for value in weights.values())
    base = load(str(architecture), torch.device("cpu"), torch.float32, layers=2)
    model = PeftModel.from_pretrained(base, saved)
    loaded = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    assert len(loaded) == 28
    for name, value in loaded.items():
        assert torch.equal(value, weights[name.replace(".default", "")])
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_resumed_run_has_the_losses_of_one_that_went_on(kind, architecture, tmp_path):
    flags = ("--state-dict", kind, "--save-steps", "2", "--output", str(tmp_path / "out"))
    whole = run(architecture, tmp_path / "whole.jsonl", "--steps", "4", *flags, launcher=TWO)
    resume = ("--steps", "4", "--resume", str(tmp_path / "out" / "checkpoint-2"))
    rest = run(architecture, tmp_path / "rest.jsonl", *flags, *resume, launcher=TWO)
    assert [(line["step"], line["loss"]) for line in rest] == [(line["step"], line["loss"]) for line in whole[2:]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [("--offload",), ("--no-checkpointing",), ("--no-reshard",), ("--shard-embeddings",), ("--accumulate", "2")],
)
def test_flags_do_not_change_the_losses(flags, architecture, tmp_path):
    common = flags if flags[0] == "--accumulate" else ()
    one = run(architecture, tmp_path / "one.jsonl", "--steps", "3", *common)
    two = run(architecture, tmp_path / "two.jsonl", "--steps", "3", *flags, launcher=TWO)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], abs=1e-5)


def test_rows_have_the_length_and_no_token_twice(architecture):
    tokenizer = tiny_tokenizer()
    rows = rows_of(tokenizer, 50)["input_ids"]
    assert {len(row) for row in rows} == {50}
    with pytest.raises(ValueError, match="length must be at most"):
        rows_of(tokenizer, 10**8)

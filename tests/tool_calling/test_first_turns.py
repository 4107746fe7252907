"""The engine's first turns are held against transformers', and a difference is found."""

import pytest
import torch

from benchmarks import smollm2
from benchmarks.tool_calling import first_turns
from benchmarks.tool_calling.data import Question, all_tools
from benchmarks.tool_calling.engine import EngineReply
from benchmarks.tool_calling.evaluate import MAX_NEW_TOKENS
from benchmarks.tool_calling.scripted import Scripted
from tests.tool_calling.functions import tokenizer
from unsloth_puzzles.tool_calling.conversation import run_conversations
from unsloth_puzzles.tool_calling.replies import Call
from unsloth_puzzles.tool_calling.tokens import ChatEncoder

ADD = ("add", {"a": 12, "b": 30})
WRITTEN = '<tool_call>\n{"name": "add", "arguments": {"a": 12, "b": 30}}\n</tool_call>'
QUESTIONS = [Question("one call", f"Question {n}", ("add", "power"), ((ADD,),)) for n in range(6)]
QUESTIONS += [Question("needs none", "Question 6", ("add", "power"))]  # of one length, so asked in order
REPLIES = [*[WRITTEN] * 3, "No.", WRITTEN.replace("12", '"12"'), WRITTEN.replace("12", "13"), WRITTEN]


@pytest.fixture(scope="module")
def conversations():
    model = Scripted(*[f"{reply}<|im_end|>" for reply in REPLIES])
    boxes = [all_tools().subset(question.offered) for question in QUESTIONS]
    messages = [question.messages for question in QUESTIONS]
    return run_conversations(model, model.tokenizer, messages, boxes, max_turns=1)


def test_questions_are_those_whose_calls_ran(conversations):
    assert first_turns.askable(QUESTIONS, conversations) == [0, 1, 2, 5]
    assert first_turns.askable(QUESTIONS, conversations, 2) == [0, 2]  # spread
    assert first_turns.askable(QUESTIONS, conversations, 1) == [0]


@pytest.mark.parametrize(
    "given, more_tokens, failing",
    [
        ({"a": 12, "b": 30}, 0, ["equal calls, question 4"]),  # transformers says 13
        ({"a": 12.0, "b": 30}, 0, [f"equal calls, question {n}" for n in (1, 2, 3, 4)]),
        ({"a": 12, "b": 30}, 1, ["prompts have equally many tokens", "equal calls, question 4"]),
    ],
)
def test_a_difference_is_found(given, more_tokens, failing, conversations, monkeypatch):
    encoder, seen = ChatEncoder(tokenizer()), []

    def ask(path, requests):
        seen.extend(requests)
        tokens = [len(encoder.prompt(each["messages"], all_tools().subset(["add", "power"]))) for each in requests]
        return [EngineReply("", (Call("add", given),), n + more_tokens) for n in tokens]

    monkeypatch.setattr(first_turns, "ask", ask)
    turns = first_turns.first_turns("model.gguf", tokenizer(), QUESTIONS, conversations)
    assert [each["messages"][1]["content"] for each in seen] == [f"Question {n}" for n in (0, 1, 2, 5)]
    assert {each["max_tokens"] for each in seen} == {MAX_NEW_TOKENS}
    assert [name for name, good in first_turns.checks(turns, 4).items() if not good] == failing
    assert not first_turns.checks(turns)["8 questions that transformers calls a tool for"]
    assert f"| one call | Question 0 | add(a={given['a']}, b=30) |" in first_turns.table(turns)


def test_nothing_to_ask_has_not_passed(conversations):
    turns = first_turns.first_turns("model.gguf", tokenizer(), QUESTIONS[6:], conversations[6:])
    assert turns == [] and not all(first_turns.checks(turns).values())


@pytest.mark.slow
def test_an_exported_model_calls_as_in_transformers(smollm2_folder, tmp_path):
    from unsloth_puzzles.gguf.export import export_gguf

    pytest.importorskip("xllamacpp")
    model, tokens, _ = smollm2.load(smollm2_folder, device="cpu", dtype=torch.float32, four_bit=False, hub=False)
    text = f"Repeat this text and nothing else:\n{WRITTEN}"  # no training needed for that
    question = Question("one call", text, ("add",), ((ADD,),))
    boxes = [all_tools().subset(["add"])]
    done = run_conversations(model, tokens, [question.messages], boxes, max_turns=1, max_new_tokens=48)
    path, _ = export_gguf(model, tokens, tmp_path, "f16", progress=False)
    turns = first_turns.first_turns(path, tokens, [question], done)
    assert all(first_turns.checks(turns, 1).values()) and turns[0].engines == (Call(*ADD),)

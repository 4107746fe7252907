"""Labels are what the assistant says, whatever the template, the padding and the images; bad rows are refused."""

import copy
import pickle

import pytest
import torch
from tokenizers.processors import ByteLevel, TemplateProcessing

from benchmarks.vision.chat import picture, template
from benchmarks.vision.checks import AFTER, BATCHES, ONE, SHORT, TEXT, TURNS, TWO, assistant, row, user
from tests.vision.models import EVERY, family, fresh
from unsloth_puzzles.vision.collator import IGNORE_INDEX, VisionCollator
from unsloth_puzzles.vision.processing import image_token_ids

# As LLaVA 1.5's own: an answer follows a space, which the marks leave out.
MARKED_WORDS = (
    "{% for m in messages %}{{ m.role.upper() }}: "
    "{% for b in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for b in m.content | selectattr('type', 'equalto', 'text') %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ b.text }} {% endgeneration %}{% else %}{{ b.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MARKED_LINES = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %} {% generation %}{{ m.content[-1].text }}"
    "{% endgeneration %}{% else %}{{ m.content[-1].text }}{% endif %}\n{% endfor %}"
)
ROWS = [ONE, TEXT, TWO, SHORT, AFTER, TURNS]
SAID = [
    "A function of two arguments.<|im_end|>",
    "A template for objects, which has attributes and methods.<|im_end|>",
    "They differ.<|im_end|>",
    "No.<|im_end|>",
    "Yes.<|im_end|>",
    "Good day.<|im_end|>I see.<|im_end|>",
]


def _said(processor, batch) -> list[str]:
    return [processor.tokenizer.decode(labels[labels != IGNORE_INDEX]) for labels in batch["labels"]]


def _same(one: dict, other: dict) -> bool:
    return {*one} == {*other} and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_what_the_assistant_says(name, side):
    processor, _ = family(name)
    batch = VisionCollator(processor, padding_side=side)(ROWS)
    assert _said(processor, batch) == SAID
    learnt = batch["labels"] != IGNORE_INDEX
    assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])


@pytest.mark.parametrize("name", EVERY)
def test_without_marks_in_the_template_labels_are_the_same(name):
    processor, _ = fresh(name)
    rows = [*ROWS, row(assistant("Good day."), user(None, "What is this?"), assistant("I see."), images=[(56, 56)])]
    marked = VisionCollator(processor)(rows)
    assert _said(processor, marked) == [*SAID, SAID[-1]]
    processor.chat_template = processor.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert _same(VisionCollator(processor)(rows), marked)


@pytest.mark.parametrize("name", EVERY)
def test_all_text_is_labelled_and_no_image(name):
    processor, _ = family(name)
    batch = VisionCollator(processor, assistant_only=False)(ROWS)
    ids, labels = batch["input_ids"], batch["labels"]
    placeholders = torch.isin(ids, torch.tensor(image_token_ids(processor)))
    assert placeholders.any(1).tolist() == [bool(one["images"]) for one in ROWS]
    assert not torch.isin(labels, torch.tensor(image_token_ids(processor))).any()
    ignored = (labels == IGNORE_INDEX) & batch["attention_mask"].bool()
    assert not ignored[[1, 3]].any(), "all of a text is learnt"
    kept = [processor.tokenizer.decode(one[one != IGNORE_INDEX]) for one in labels]
    assert all(text in kept[2] for text in ("user", "Compare:", "please", "They differ."))
    for token in ("[IMG_BREAK]", "[IMG_END]", "<fake_token_around_image>", "<end_of_image>", "<global-img>"):
        assert not any(token in text for text in kept)


def test_end_of_sequence_that_also_pads_is_a_label():
    processor, _ = fresh("qwen2_vl")
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    batch = VisionCollator(processor)(ROWS)
    assert _said(processor, batch) == SAID
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()


def test_offsets_without_spaces():
    """Llama's tokenizer reports where a token lies without its spaces."""
    processor, _ = fresh("mllama")
    processor.chat_template = processor.chat_template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n ")
    rows = [ONE, row(user("How far?"), assistant(" 3  km  ")), TURNS]
    expected = VisionCollator(processor)(rows)
    processor.tokenizer.backend_tokenizer.post_processor = ByteLevel(add_prefix_space=False, trim_offsets=True)
    start = processor.tokenizer(" Yes", return_offsets_mapping=True)["offset_mapping"][0][0]
    assert start == 1, "otherwise the test shows nothing"
    assert _same(VisionCollator(processor)(rows), expected)
    assert _said(processor, expected)[1] == " 3  km  <|im_end|>"


@pytest.mark.parametrize("chat_template", [MARKED_WORDS, MARKED_LINES])
@pytest.mark.parametrize("answer", ["a template", "yes", "A", "4 objects", "No, it is not.", "(b)", ""])
def test_tokens_that_join_an_answer_with_whitespace_are_labels(answer, chat_template):
    processor, _ = fresh("llava")
    processor.chat_template = chat_template
    turns = [user("Is it red?"), assistant(answer), user("Why?"), assistant("objects have methods.")]
    expected = processor.tokenizer.apply_chat_template(
        turns, chat_template=chat_template, return_assistant_tokens_mask=True, return_dict=True
    )
    labels = VisionCollator(processor)([row(*turns)])["labels"][0]
    if answer:  # transformers takes the token before an empty answer for its first
        assert (labels != IGNORE_INDEX).long().tolist() == expected["assistant_masks"]
    said = processor.tokenizer.decode(labels[labels != IGNORE_INDEX])
    assert said.split() == [*answer.split(), "objects", "have", "methods."]


@pytest.mark.parametrize(
    "answer, said", [("a template", " a template "), ("yes", " yes "), ("A", " A "), ("4 objects", "4 objects ")]
)
def test_tokens_that_join_an_answer_with_whitespace_are_labels_beside_images(answer, said):
    processor, _ = fresh("llava")
    processor.chat_template = MARKED_WORDS
    rows = [row(user("What is this?", None), assistant(answer), images=[(56, 56)]), TEXT]
    assert _said(processor, VisionCollator(processor)(rows))[0] == said


def test_beginning_of_sequence_is_neither_missing_nor_doubled():
    processor, _ = fresh("llava")
    bos = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    in_template = VisionCollator(processor)([ONE, TEXT])
    processor.chat_template = template("<image>")
    by_tokenizer = VisionCollator(processor)([ONE, TEXT])
    assert _same(in_template, by_tokenizer) and (by_tokenizer["input_ids"] == bos).sum() == 2


@pytest.mark.parametrize("name", ["qwen2_vl", "mllama", "gemma3", "smolvlm"])
def test_where_images_stand_does_not_matter(name):
    processor, _ = family(name)
    collate = VisionCollator(processor)
    image = ONE["images"][0]
    inline = copy.deepcopy(ONE["messages"])
    inline[0]["content"][0]["image"] = image
    arrow = [{**block, "text": block.get("text"), "image": None} for block in ONE["messages"][0]["content"]]
    others = [
        {"messages": ONE["messages"], "image": image},
        {"messages": inline, "images": []},
        {"messages": [{"role": "user", "content": arrow}, ONE["messages"][1]], "images": [image]},
    ]
    expected = collate([ONE, TEXT])
    for other in others:
        assert _same(collate([other, TEXT]), expected)
    for text in ({**TEXT, "images": None}, {"messages": TEXT["messages"]}, {**TEXT, "image": None}):
        assert _same(collate([ONE, text]), expected)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_images_of_other_modes(name, mode):
    processor, model = family(name)
    converted = {**ONE, "images": [picture(56, 56).convert(mode)]}
    batch = VisionCollator(processor)([converted, TEXT])
    assert model(**batch).loss.isfinite()


def test_content_may_be_a_string_and_rows_stay_as_they_are():
    processor, _ = family("qwen3_vl")
    rows = copy.deepcopy(ROWS)
    collate = pickle.loads(pickle.dumps(VisionCollator(processor)))  # as workers of a DataLoader get it
    batch = collate(rows)
    assert [one["messages"] for one in rows] == [one["messages"] for one in ROWS]
    strings = {"messages": [{"role": "user", "content": "What is a class?"}, TEXT["messages"][1]]}
    assert _same(collate([*ROWS[:1], strings, *ROWS[2:]]), batch)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", EVERY)
def test_text_beyond_max_length_is_cut_off(name, side):
    processor, model = family(name)
    whole = VisionCollator(processor)([ONE, TEXT])
    length = int(whole["attention_mask"][0].sum()) - 3
    short = VisionCollator(processor, max_length=length, padding_side=side)([ONE, TEXT])
    assert short["input_ids"].shape[1] <= length and model(**short).loss.isfinite()
    kept = [short["input_ids"][place][short["attention_mask"][place].bool()] for place in (0, 1)]
    assert torch.equal(kept[0], whole["input_ids"][0, :length])
    assert torch.equal(kept[1], whole["input_ids"][1][whole["attention_mask"][1].bool()][:length])


def test_a_row_without_labels_is_no_error_beside_others():
    batch = VisionCollator(family("qwen2_vl")[0])([row(user("Hello")), *BATCHES["mixed"]])
    assert (batch["labels"][0] == IGNORE_INDEX).all() and (batch["labels"][1:] != IGNORE_INDEX).any(1).all()

"""What the collator cannot do right it refuses, and says what to do instead."""

import pytest

from benchmarks.vision.chat import picture
from benchmarks.vision.checks import AFTER, ONE, TEXT, assistant, row, user
from tests.vision.models import EVERY, family, fresh
from unsloth_puzzles.vision.collator import VisionCollator


@pytest.mark.parametrize("name", EVERY)
def test_max_length_that_cuts_images_is_refused(name):
    processor, _ = family(name)
    with pytest.raises(
        ValueError, match=r"max_length must leave all image tokens in, got 8, .* of row 1 off; it takes"
    ):
        VisionCollator(processor, max_length=8)([TEXT, AFTER])


def _without(key: str):
    processor, _ = fresh("qwen2_vl")
    holder = processor if key == "chat_template" else processor.tokenizer
    setattr(holder, key, None)
    return processor


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda: (_without("chat_template"),), "processor must have a chat template, got none; set "),
        (lambda: (_without("pad_token"),), "processor must have a tokenizer with a padding token, got none"),
        (lambda: (family("llava")[0].tokenizer,), "processor must be one of Qwen2VLProcessor, .* got "),
        (lambda: (family("llava")[0], True, 0), "max_length must be a positive integer or None, got 0"),
        (lambda: (family("llava")[0], True, True), "max_length must be a positive integer or None, got True"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisionCollator(*arguments())


def test_a_side_that_is_none_is_refused():
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right', got 'both'"):
        VisionCollator(family("llava")[0], padding_side="both")


MISSING = {**ONE, "images": []}
MORE = {**TEXT, "images": [picture(8, 8)]}
LITERAL = row(user("What does <|image_pad|> mean?"), assistant("An image."))
FILM = row(user("What does <|video_pad|> mean?"), assistant("A video."))
VIDEO = {"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}, assistant("Yes.")]}
TWICE = {**ONE, "image": ONE["images"][0]}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "rows must not be empty, got none"),
        ([TEXT, MISSING], r"images of row 1 must be as many as the placeholders '<\|image_pad\|>' .*\(1\), got 0"),
        ([MORE], r"images of row 0 must be as many as the placeholders .*\(0\), got 1"),
        ([LITERAL], r"images of row 0 must be as many as the placeholders .*\(1\), got 0"),
        ([TEXT, FILM], r"row 1 must have no video, got its placeholder '<\|video_pad\|>' in the rendered messages"),
        ([VIDEO], "row 0 must have blocks of type 'text' and 'image' only, got .*video"),
        ([{**TEXT, "chat_template_kwargs": {"a": 1}}], r"row 0 must have no chat_template_kwargs, .*, got {'a': 1}"),
        ([TWICE], "row 0 must have its images in one place"),
        ([{**ONE, "images": ONE["images"][0]}], "images of row 0 must be a list, got Image; use 'image' for one"),
        ([{**ONE, "images": [None]}], "images of row 0 must be images, got None among them"),
        ([row(user("Hello")), {"messages": [user("Hi"), "Hello"]}], "messages of row 1 must be dicts .*, got 'Hello'"),
        (
            [{"messages": [{"role": "user", "content": {"type": "text", "text": "Hi"}}]}],
            "content of row 0 must be text or a list of blocks .*, got {'type'",
        ),
        ([{"messages": [{"role": "user", "content": ["Hi"]}]}], "content of row 0 must be text or a list of blocks .*"),
        (
            [{"messages": [{"role": "user", "content": 3}]}],
            "content of row 0 must be text or a list of blocks .*, got 3",
        ),
        ([{"text": "Hello"}], r"row 0 must have a list of 'messages', got \['text'\]"),
        ([{"messages": []}], r"row 0 must have a list of 'messages', got \['messages'\]"),
        ([row(user("Hello"))], "rows must have a token to learn, got none in the whole batch"),
    ],
)
def test_bad_rows_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        VisionCollator(family("qwen2_vl")[0])(rows)

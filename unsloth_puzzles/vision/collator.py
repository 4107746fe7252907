"""A data collator for vision-language models whose batches mix rows with images and rows without.

    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=processor,
                         data_collator=VisionCollator(processor))

With `transformers.Trainer`, set `remove_unused_columns=False`. Mllama also needs `patch_mllama`.
"""

from collections.abc import Mapping, Sequence

import torch

from unsloth_puzzles.vision.conversation import read
from unsloth_puzzles.vision.processing import add_cross_attention_mask, check_processor, image_token_ids, process
from unsloth_puzzles.vision.template import template_of

IGNORE_INDEX = -100


class VisionCollator:
    """Collate rows of messages, each with any number of images, into a batch with labels.

    A row is {"messages": [...], "images": [...]}. "images" may be missing, None or []. The messages may hold the images
    instead. An image is a Pillow image, a NumPy array, a PyTorch tensor, a path, or a file's bytes (see
    `images.decode`). Only these images reach the vision tower: a row of text adds none, and a batch of text has no
    `pixel_values`. The losses of a row do not depend on the other rows of the batch.

    Padding is identified by the attention mask. An end-of-sequence token can therefore be a label, even if it is also
    the padding token. Expanded placeholder tokens are never labels.

    Args:
        processor: The processor of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Mllama, Pixtral, LLaVA, Gemma 3 or SmolVLM.
        assistant_only: Whether only the assistant's turns have labels, up to the end of each turn; otherwise all text
            has. The chat template's {% generation %} marks show the turns, of which they must leave out none. Without
            marks, the collator renders the conversation up to each turn.
        max_length: Maximum number of tokens in a row; longer rows are truncated. None means no limit.
        padding_side: "right" or "left".

    Raises:
        ValueError: `processor` is of another family, or lacks a chat template, a fast tokenizer or a padding token;
            `max_length` or `padding_side` is invalid.
    """

    def __init__(self, processor, assistant_only: bool = True, max_length: int | None = None, *, padding_side="right"):
        check_processor(processor)
        template_of(processor)  # refuses a processor without one
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1 or max_length is True):
            raise ValueError(f"max_length must be a positive integer or None, got {max_length!r}")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        self.processor, self.assistant_only = processor, assistant_only
        self.max_length, self.padding_side = max_length, padding_side

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            rows: Rows of the data set. They are not modified.

        Returns:
            "input_ids", "attention_mask" and "labels" [rows, length] int64, and the other inputs of the family's model,
            such as "pixel_values".

        Raises:
            ValueError: A row has another form, its images and placeholders differ in number, `max_length` cuts off
                image tokens, or no token of the batch is a label.
        """
        if not rows:
            raise ValueError("rows must not be empty, got none")
        conversations = [
            read(row, f"row {index}", self.processor, self.assistant_only) for index, row in enumerate(rows)
        ]
        texts, images = [one.text for one in conversations], [one.images for one in conversations]
        batch, replaced = process(self.processor, texts, images)
        offsets = batch.pop("offset_mapping")  # [rows, length, 2]
        is_image = torch.isin(batch["input_ids"], torch.tensor(image_token_ids(self.processor)))  # [rows, length]
        is_label = torch.zeros_like(is_image)
        for row, conversation in enumerate(conversations):
            for span in conversation.spans:
                is_label[row] |= _of_span(offsets[row], conversation.text, span, replaced[row])
            for one in replaced[row]:
                is_image[row] |= _touches(offsets[row], *one["new_span"])
        used = batch["attention_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~(is_label & used & ~is_image), IGNORE_INDEX)
        if self.max_length is not None:
            self._truncate(batch, is_image & used)
        if not batch["labels"][:, 1:].ne(IGNORE_INDEX).any():
            raise ValueError(
                "rows must have a token to learn, got none in the whole batch; "
                "let an assistant speak in them, raise max_length, or use assistant_only=False"
            )
        if self.padding_side == "left":
            _pad_left(batch)
        add_cross_attention_mask(self.processor, batch)
        return batch

    def _truncate(self, batch: dict[str, torch.Tensor], is_image: torch.Tensor) -> None:
        """Truncate the rows to `max_length` tokens, and refuse to cut off image tokens."""
        cut = is_image[:, self.max_length :].any(1).nonzero().flatten().tolist()
        if cut:
            needed = [int(is_image[row].nonzero().max()) + 1 for row in cut]
            raise ValueError(
                f"max_length must leave all image tokens in, got {self.max_length}, which cuts those of row {cut[0]} "
                f"off; it takes {needed[0]} at least, or smaller images"
            )
        for name in _per_token(batch):
            batch[name] = batch[name][:, : self.max_length]


def _shifted(position: int, replaced: list[dict]) -> int:
    """Map a position in the rendered text to the text with expanded placeholders."""
    for one in reversed(replaced):
        if one["span"][1] <= position:
            return position + one["new_span"][1] - one["span"][1]
    return position


def _of_span(offsets: torch.Tensor, text: str, span: tuple[int, int], replaced: list[dict]) -> torch.Tensor:
    """Select the tokens that show characters of a span of the rendered text, and beside them whitespace at most.

    A tokenizer may join whitespace before or after the span with a word in it, as in " a". Some tokenizers leave the
    spaces of a token out of its offsets.
    """
    start, end = span
    lowest, highest = len(text[:start].rstrip()), len(text) - len(text[end:].lstrip())
    start, end, lowest, highest = (_shifted(position, replaced) for position in (start, end, lowest, highest))
    first, last = offsets.unbind(-1)
    return (start < end) & (first >= lowest) & (first < end) & (last > start) & (last <= highest)


def _touches(offsets: torch.Tensor, start: int, end: int) -> torch.Tensor:
    first, last = offsets.unbind(-1)
    return (first < end) & (last > start)


def _per_token(batch: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors with one value per token, such as "mm_token_type_ids"."""
    shape = batch["input_ids"].shape
    return [name for name in batch if isinstance(batch[name], torch.Tensor) and batch[name].shape == shape]


def _pad_left(batch: dict[str, torch.Tensor]) -> None:
    length = batch["input_ids"].shape[1]
    shift = length - batch["attention_mask"].sum(1, keepdim=True)  # [rows, 1]
    index = (torch.arange(length) - shift) % length
    for name in _per_token(batch):
        batch[name] = batch[name].gather(1, index)

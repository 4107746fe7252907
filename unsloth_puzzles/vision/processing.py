"""Tokens and pixels of a mixed batch, by the processor of a model family.

Processors differ in how they take the images of several rows: as one flat list, or as one list per row. Mllama's
refuses images if a row has none. The functions here pass the images of the rows that have some, and no blank image.
"""

import torch

FLAT = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor", "PixtralProcessor", "LlavaProcessor")
NESTED = ("Gemma3Processor", "SmolVLMProcessor")
MLLAMA = ("MllamaProcessor",)


def check_processor(processor) -> None:
    """Raise a ValueError unless the processor is of a family known here, with a fast tokenizer and a padding token."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or _family(processor) is None:
        raise ValueError(
            f"processor must be one of {', '.join((*FLAT, *NESTED, *MLLAMA))}, got {type(processor).__name__}"
        )
    if not tokenizer.is_fast:
        raise ValueError(f"processor must have a fast tokenizer, got {type(tokenizer).__name__}")
    if tokenizer.pad_token_id is None:
        raise ValueError("processor must have a tokenizer with a padding token, got none; set tokenizer.pad_token")


def process(processor, texts: list[str], images: list[list]) -> tuple[dict[str, torch.Tensor], list[list[dict]]]:
    """Tokenise the texts with their placeholders expanded, and prepare the images.

    Args:
        processor: A processor that `check_processor` accepts.
        texts: One rendered conversation per row.
        images: The images of each row; a row may have none.

    Returns:
        The batch, padded on the right: "input_ids" and "attention_mask" [rows, length], "offset_mapping"
        [rows, length, 2] in characters of the expanded texts, and the other inputs of the family's model. Then, for
        each row, the replacements of its placeholders, as {"span", "new_span"} in characters before and after.
    """
    bos = processor.tokenizer.bos_token
    options = {"padding": True, "padding_side": "right", "return_tensors": "pt", "return_offsets_mapping": True}
    if bos and all(text.startswith(bos) for text in texts):  # as in apply_chat_template: no second one
        options["add_special_tokens"] = False
    family = _family(processor)
    if family is MLLAMA:
        return _process_mllama(processor, texts, images, options)
    given = images if family is NESTED else [image for row in images for image in row]
    batch = processor(
        text=list(texts), images=given if any(images) else None, return_text_replacement_offsets=True, **options
    )
    replaced = batch.pop("text_replacement_offsets")
    return dict(batch), replaced or [[] for _ in texts]


def image_token_ids(processor) -> list[int]:
    """Ids of the tokens that stand for images and videos. They are never labels."""
    names = ("image_token_id", "video_token_id", "image_break_token_id", "image_end_token_id", "boi_token_id")
    found = {getattr(holder, name, None) for holder in (processor, processor.tokenizer) for name in names}
    found |= {*(getattr(processor, "image_token_ids", None) or ())}
    return sorted(token for token in found if isinstance(token, int))


def add_cross_attention_mask(processor, batch: dict[str, torch.Tensor]) -> None:
    """Add Mllama's "cross_attention_mask" [rows, length, images, tiles] to a batch whose tokens are in their places.

    A token sees the last image before it (or the last run of images), as in transformers' processor. The mask of a row
    of text is zero.
    """
    if "num_tiles" not in batch:
        return
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    num_tiles = batch.pop("num_tiles")
    spans = [get_cross_attention_token_mask(row, processor.image_token_id) for row in batch["input_ids"].tolist()]
    tiles, length = processor.image_processor.max_image_tiles, batch["input_ids"].shape[1]
    dense = convert_sparse_cross_attention_mask_to_dense(spans, num_tiles, tiles, length)
    batch["cross_attention_mask"] = torch.from_numpy(dense)


def _process_mllama(processor, texts, images, options) -> tuple[dict, list[list[dict]]]:
    """Mllama's images do not become tokens. `pixel_values` holds the images of the rows that have some, in order."""
    batch = dict(processor.tokenizer(texts, **options))
    if any(images):
        prepared = dict(processor.image_processor([row for row in images if row], return_tensors="pt"))
        tiles = iter(prepared.pop("num_tiles"))
        batch |= {**prepared, "num_tiles": [list(next(tiles)) if row else [] for row in images]}
    return batch, [[] for _ in texts]


def _family(processor) -> tuple[str, ...] | None:
    names = {cls.__name__ for cls in type(processor).__mro__}
    return next((family for family in (FLAT, NESTED, MLLAMA) if names & {*family}), None)

"""Show a tokenised conversation: a box a token, coloured where the model is trained on it."""

import html

from unsloth_puzzles.tool_calling.tokens import IGNORED

_STYLES = {
    (True, False): "background:#bfe3c0",  # trained
    (True, True): "background:#3c8d40;color:white",  # trained, a control token
    (False, False): "background:#eeeeee;color:#555555",
    (False, True): "background:#999999;color:white",
}


def tokens_html(tokenizer, example: dict[str, list[int]]) -> str:
    """HTML of the tokens: green where there is a label, grey elsewhere, dark where a token is a control token.

    Args:
        tokenizer: What made the ids.
        example: "input_ids" and "labels", as `tokenize_conversation` gives them.

    Raises:
        ValueError: The two differ in length.
    """
    ids, labels = example["input_ids"], example["labels"]
    if len(ids) != len(labels):
        raise ValueError(f"labels must be as many as the {len(ids)} input_ids, got {len(labels)}")
    controls = set(tokenizer.get_added_vocab().values())
    boxes = []
    for token, label in zip(ids, labels, strict=True):
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        style = _STYLES[label != IGNORED, token in controls]
        boxes.append(f'<span style="{style};margin:0 1px">{html.escape(text) or "&nbsp;"}</span>')
        boxes.append("<br>" if "\n" in text else "")
    return f'<div style="font-family:monospace;white-space:pre-wrap;line-height:1.6">{"".join(boxes)}</div>'

"""Token ids of conversations, with labels on what the model itself has to write.

    example = tokenize_conversation(tokenizer, messages, toolbox)
    example["labels"]       # the ids of the assistant's turns, each with its stop token; -100 elsewhere

Control tokens come from the template alone: a user or a tool that writes `<|im_start|>` gets the characters, not the
token. They are the special tokens and the added ones in brackets, as `<tool_call>`; other added tokens are words.

An assistant's turn is tokenised apart from what is before it, so training sees exactly the prompt that generation
begins with.
"""

import json
import re

from unsloth_puzzles.tool_calling.formats import ChatFormat, chat_format
from unsloth_puzzles.tool_calling.messages import check_nulls, checked_messages
from unsloth_puzzles.tool_calling.toolbox import ToolBox, check_toolbox

IGNORED = -100
_PRIVATE = range(0xE000, 0xF8FF)  # characters that Unicode gives no meaning


def tokenize_conversation(
    tokenizer,
    messages: list[dict],
    toolbox: ToolBox | None = None,
    *,
    format: str | ChatFormat = "qwen2.5",
    max_length: int | None = None,
) -> dict[str, list[int]]:
    """Tokenise a conversation for training.

    Args:
        tokenizer: A fast tokenizer of transformers that knows the control tokens of the format.
        messages: The conversation, see `checked_messages`. Arguments that hold a null must be JSON text: in a dict it
            may be an argument that `datasets` has filled in.
        toolbox: The tools on offer. None and an empty one are the same: the prompt then speaks of no tools.
        format: A chat format, or the name of one.
        max_length: In tokens. A longer conversation is refused, never cut: a cut one would end without its stop token.

    Returns:
        "input_ids", "attention_mask" and "labels", lists of one length. A label is the token's own id (models of
        transformers shift them) in the assistant's turns, their stop tokens included, and -100 elsewhere.

    Raises:
        TypeError: See `checked_messages`; `toolbox` is not a `ToolBox`.
        ValueError: See `checked_messages`; no assistant's turn, too many tokens, or a tokenizer that does not fit the
            format.
    """
    return ChatEncoder(tokenizer, format).conversation(messages, toolbox, max_length)


class ChatEncoder:
    """A tokenizer with a chat format, found to fit each other.

    Attributes:
        format: The `ChatFormat`.
        stop: The id of the token that ends a turn.
        stops: All ids at which generation ends: that one, the tokenizer's own, and Llama's end of a message.

    Raises:
        ValueError: The tokenizer is not a fast one, lacks a control token of the format, or tokenises a conversation in
            parts otherwise than as a whole.
    """

    def __init__(self, tokenizer, format: str | ChatFormat = "qwen2.5"):
        self.format = chat_format(format) if isinstance(format, str) else format
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"tokenizer must be a fast one of transformers, got {type(tokenizer).__name__}")
        self.tokenizer = tokenizer
        self._controls = dict(sorted(_controls(tokenizer).items(), key=lambda item: -len(item[0])))
        needed = {self.format.stop, *re.findall(r"<\|\w+\|>", self.format.header)}
        if missing := sorted(needed - set(self._controls)):
            raise ValueError(
                f"tokenizer must have the control tokens of {self.format.name}, got none for {', '.join(missing)}; "
                "choose another format, or add them and resize the model's embeddings"
            )
        self.stop = self._controls[self.format.stop]
        ends = (self.stop, tokenizer.eos_token_id, self._controls.get("<|eom_id|>"))
        self.stops = list(dict.fromkeys(token for token in ends if token is not None))
        self._split = re.compile("(" + "|".join(map(re.escape, self._controls)) + ")")
        self._check_parts()

    def prompt(self, messages: list[dict], toolbox: ToolBox | None = None) -> list[int]:
        """The ids from which the assistant's next turn is generated."""
        text, mark = self._render(messages, toolbox, True)
        if not text.endswith(self.format.header):
            raise ValueError(f"template of {self.format.name} must end a prompt with its header, got {text[-40:]!r}")
        return self._encode(text.removesuffix(self.format.header), mark) + self._encode(self.format.header, mark)

    def conversation(
        self, messages: list[dict], toolbox: ToolBox | None = None, max_length: int | None = None
    ) -> dict[str, list[int]]:
        """As `tokenize_conversation`."""
        text, mark = self._render(messages, toolbox, False)
        check_nulls(messages)
        before, *turns = text.split(self.format.header)
        spoken = sum(message["role"] == "assistant" for message in messages)
        if not spoken or len(turns) != spoken:
            raise ValueError(f"messages must have an assistant's turn, each after its header, got {len(turns)}")
        ids = self._encode(before, mark)
        labels = [IGNORED] * len(ids)
        for turn in turns:
            reply, stop, after = turn.partition(self.format.stop)
            if not stop:
                raise ValueError(f"each turn must end with {self.format.stop}, got {turn[-40:]!r}")
            header, own, rest = (self._encode(part, mark) for part in (self.format.header, reply + stop, after))
            ids += header + own + rest
            labels += [IGNORED] * len(header) + own + [IGNORED] * len(rest)
        if max_length is not None and len(ids) > max_length:
            raise ValueError(f"messages must have at most max_length = {max_length} tokens, got {len(ids)}")
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def decode(self, ids: list[int]) -> str:
        """The text of a reply, from its ids up to the first stop token."""
        end = next((n for n, token in enumerate(ids) if token in self.stops), len(ids))
        ids = ids[:end]
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _render(self, messages: list[dict], toolbox: ToolBox | None, prompt: bool) -> tuple[str, str]:
        """The text, where control tokens that came with the contents are marked; and the character that marks them."""
        if toolbox is not None:
            check_toolbox(toolbox)
        schemas = toolbox.schemas if toolbox is not None else []
        given = [checked_messages(messages, schemas, self.format), schemas]
        written = json.dumps(given, ensure_ascii=False) + self.format.template
        mark = next(chr(code) for code in _PRIVATE if chr(code) not in written)
        messages, schemas = self._marked(given, mark)
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=schemas or None,  # some templates speak of tools for an empty list
            chat_template=self.format.template,
            add_generation_prompt=prompt,
            tokenize=False,
            **self.format.variables,
        )
        return text, mark

    def _marked(self, value: object, mark: str) -> object:
        if isinstance(value, str):
            numbers = list(self._controls)
            return self._split.sub(lambda found: f"{mark}{numbers.index(found[0])}{mark}", value)
        if isinstance(value, dict):
            return {self._marked(key, mark): self._marked(one, mark) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._marked(one, mark) for one in value]
        return value

    def _encode(self, text: str, mark: str) -> list[int]:
        ids = []
        for part in self._split.split(text):
            if part in self._controls:
                ids.append(self._controls[part])
                continue
            for piece in self._without_controls(part, mark):
                ids += self._encode_plain(piece)
        return ids

    def _without_controls(self, text: str, mark: str) -> list[str]:
        """The text with its marks written out, cut within each, so that no piece holds a control token."""
        numbers, pieces = list(self._controls), [""]
        for n, part in enumerate(text.split(mark)):
            literal = part if n % 2 == 0 else numbers[int(part)]
            if n % 2:
                pieces[-1] += literal[:1]
                pieces.append("")
                literal = literal[1:]
            pieces[-1] += literal
        return [piece for piece in pieces if piece]

    def _encode_plain(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if found := set(ids) & set(self._controls.values()):
            raise ValueError(f"tokenizer must not make control tokens of text, got {found} for {text!r:.60}")
        return ids

    def _check_parts(self) -> None:
        """Tokenising in parts must equal the whole, which it does not if a tokenizer adds a space at each start."""
        example = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 3 plus 4?"},
            {"role": "assistant", "content": "It is 7."},
        ]
        text, _ = self._render(example, None, False)
        whole = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.conversation(example)["input_ids"] != whole:
            raise ValueError(f"tokenizer must tokenise {text!r} in parts as it does the whole, got other ids")


def _controls(tokenizer) -> dict[str, int]:
    """The control tokens of a tokenizer and their ids: added tokens but for those that are words of texts."""
    added = ((number, str(token), token.special) for number, token in tokenizer.added_tokens_decoder.items())
    return {text: number for number, text, special in added if special or re.fullmatch(r"<.+>|\[.+\]", text)}

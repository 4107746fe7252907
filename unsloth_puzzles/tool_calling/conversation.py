"""The loop of a tool-calling model: generate, call what is asked for, show the results, until it answers.

    done = run_conversation(model, tokenizer, [{"role": "user", "content": "What is 3 plus 4?"}], toolbox)
    done.answer          # "It is 7."
    done.calls           # [(Call(name='add', arguments={'a': 3, 'b': 4}), Result(name='add', content='7', ...))]

Only functions of the toolbox run. What goes wrong in a call is a message to the model, which may try again.
"""

import dataclasses
from collections.abc import Sequence

import torch

from unsloth_puzzles.tool_calling.formats import ChatFormat
from unsloth_puzzles.tool_calling.messages import check_dicts
from unsloth_puzzles.tool_calling.replies import Call
from unsloth_puzzles.tool_calling.tokens import ChatEncoder
from unsloth_puzzles.tool_calling.toolbox import Result, ToolBox, check_toolbox, failure


@dataclasses.dataclass
class Conversation:
    """A conversation and how it ended.

    Attributes:
        messages: All of them, the given ones first.
        turns: The calls of each turn with their results; a turn whose call could not be read has (None, its error).
        stopped: "answer", "max_turns" (the model still calls tools), "max_new_tokens" (the last reply was cut) or
            "max_length" (the next prompt does not fit the model's positions); "" while it goes on.
    """

    messages: list[dict]
    turns: list[list[tuple[Call | None, Result]]] = dataclasses.field(default_factory=list)
    stopped: str = ""

    @property
    def calls(self) -> list[tuple[Call | None, Result]]:
        return [each for turn in self.turns for each in turn]

    @property
    def answer(self) -> str | None:
        """The final answer, or None if the model came to none."""
        return self.messages[-1]["content"] if self.stopped == "answer" else None


def run_conversation(
    model,
    tokenizer,
    messages: list[dict],
    toolbox: ToolBox,
    max_turns: int = 4,
    *,
    format: str | ChatFormat = "qwen2.5",
    max_new_tokens: int = 128,
) -> Conversation:
    """Let a model answer, with calls of tools as it asks for them.

    Decoding is greedy, whatever the model's `generation_config` says.

    Args:
        model: A causal LM of transformers, in evaluation mode during the call.
        tokenizer: Its fast tokenizer.
        messages: The conversation so far. The last message is a user's or a tool's.
        toolbox: The tools on offer, `ToolBox([])` for none.
        max_turns: Most replies of the model.
        format: A chat format or the name of one.
        max_new_tokens: Of one reply.

    Returns:
        The conversation. The given messages stay as they are.

    Raises:
        TypeError: See `checked_messages`; `toolbox` is not a `ToolBox`.
        ValueError: See `checked_messages`; the last message is neither a user's nor a tool's; a limit below 1.
    """
    (done,) = run_conversations(
        model, tokenizer, [messages], [toolbox], max_turns, format=format, max_new_tokens=max_new_tokens
    )
    return done


def run_conversations(
    model,
    tokenizer,
    messages: Sequence[list[dict]],
    toolboxes: Sequence[ToolBox],
    max_turns: int = 4,
    *,
    format: str | ChatFormat = "qwen2.5",
    max_new_tokens: int = 128,
    batch_size: int = 16,
) -> list[Conversation]:
    """As `run_conversation`, for many conversations that are generated `batch_size` at a time.

    Args:
        model, tokenizer, max_turns, format, max_new_tokens: As there.
        messages: A conversation each.
        toolboxes: The tools of each.
        batch_size: Most sequences in one call of `generate`, sorted by length.

    Returns:
        One for each, in order.
    """
    for name, value in (("max_turns", max_turns), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if isinstance(toolboxes, ToolBox):
        raise TypeError("toolboxes must be a list of ToolBox, one for each conversation, got ToolBox")
    if len(messages) != len(toolboxes):
        raise ValueError(f"toolboxes must be one for each of {len(messages)} conversations, got {len(toolboxes)}")
    for toolbox in toolboxes:
        check_toolbox(toolbox)
    for each in messages:
        check_dicts(each)
        if not each or each[-1].get("role") not in ("user", "tool"):
            raise ValueError(f"messages must end with a user's or a tool's, got {each[-1:]!r:.80}")
    encoder = ChatEncoder(tokenizer, format)
    running = [Conversation(list(each)) for each in messages]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for _ in range(max_turns):
        prompts = {}
        for n, conversation in enumerate(running):
            if conversation.stopped:
                continue
            prompts[n] = encoder.prompt(conversation.messages, toolboxes[n])
            if longest is not None and len(prompts[n]) + max_new_tokens > longest:
                conversation.stopped = "max_length"
                del prompts[n]
        order = sorted(prompts, key=lambda n: len(prompts[n]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            replies = _generate(model, encoder, [prompts[n] for n in batch], max_new_tokens)
            for n, ids in zip(batch, replies, strict=True):
                _take_turn(running[n], encoder, ids, toolboxes[n])
    for conversation in running:
        conversation.stopped = conversation.stopped or "max_turns"
    return running


def _take_turn(conversation: Conversation, encoder: ChatEncoder, ids: list[int], toolbox: ToolBox) -> None:
    """Read a reply, make its calls, and append both to the conversation."""
    text = encoder.decode(ids)
    reply = encoder.format.read(text)
    if reply.error:
        result = failure("unknown", reply.error)
        conversation.turns.append([(None, result)])
        conversation.messages += [_assistant(text), _tool(result)]
    elif reply.calls:
        results = [(call, toolbox.call(*call)) for call in reply.calls]
        conversation.turns.append(results)
        conversation.messages.append(_assistant(reply.content, reply.calls))
        conversation.messages += [_tool(result) for _, result in results]
    else:
        conversation.messages.append(_assistant(reply.content))
        conversation.stopped = "answer" if {*encoder.stops} & {*ids} else "max_new_tokens"


def _assistant(content: str, calls: Sequence[Call] = ()) -> dict:
    message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [{"type": "function", "function": call._asdict()} for call in calls]
    return message


def _tool(result: Result) -> dict:
    return {"role": "tool", "name": result.name, "content": result.content}


@torch.no_grad()
def _generate(model, encoder: ChatEncoder, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The new ids of each prompt, greedily."""
    width = max(map(len, prompts))
    pad = encoder.tokenizer.pad_token_id
    pad = encoder.stop if pad is None else pad
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    settings = _defaults(model) | {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "repetition_penalty": 1.0,  # arguments repeat the question
        "use_cache": True,
        "eos_token_id": encoder.stops,
        "pad_token_id": pad,
    }
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        generated = model.generate(input_ids=ids, attention_mask=mask, **settings)
    finally:
        for module, mode in modes.items():  # some may have been in evaluation mode inside of a model in training
            module.training = mode
    return [row[width:].tolist() for row in generated]


def _defaults(model) -> dict:
    """Of all that the model's own generation config sets: a bias or a limit there would change the replies."""
    own = getattr(model, "generation_config", None)
    if own is None:
        return {}
    defaults = type(own)().to_dict()
    different = [key for key, value in own.to_dict().items() if value != defaults.get(key)]
    return {key: defaults.get(key) for key in different if key not in ("_from_model_config", "transformers_version")}

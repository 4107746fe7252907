"""A short run of GRPO with tools: TRL's loop of calls, this package's bounded tools, and the loss without logits.

    logged = train(model, tokenizer, steps=20)     # a fine-tuned model

TRL 1.16 offers every tool with every question, so there are four tools here, and the questions that need them.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Sequence

from benchmarks.tool_calling.data import Question, all_tools, expected_results, training_questions
from unsloth_puzzles.tool_calling.formats import chat_format
from unsloth_puzzles.tool_calling.toolbox import ToolBox

OFFERED = ("add", "subtract", "reverse_text", "find_price")


def bounded_functions(toolbox: ToolBox) -> list[Callable]:
    """The functions of a toolbox as TRL takes them: it calls them itself, and would do so unchecked and unbounded."""

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(**arguments):
            return toolbox.call(function.__name__, arguments).content

        return call

    return [wrap(function) for function in toolbox.functions]


def reward_calls(completions: Sequence[list[dict]], wanted: Sequence[str], **_) -> list[float]:
    """For each completion: 0.2 for a call, 0.5 for exactly the calls wanted, 0.3 for an answer with the results."""
    rewards = []
    for messages, text in zip(completions, wanted, strict=True):
        calls, results = json.loads(text)
        made = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
        exact = [[call["name"], call["arguments"]] for call in made] == calls
        last = messages[-1]
        answered = last["role"] == "assistant" and all(result in (last.get("content") or "") for result in results)
        rewards.append(0.2 * bool(made) + 0.5 * exact + 0.3 * (exact and answered))
    return rewards


def rows(count: int, seed: int = 0) -> list[dict]:
    """Prompts for GRPO with what is wanted, as JSON: `datasets` would fill each row's arguments up with None."""
    found, start = [], seed
    while len(found) < count:
        found += [q for q in training_questions(count, start) if q.kind == "one call" and _on_offer(q)]
        start += 1
    return [
        {"prompt": q.messages, "wanted": json.dumps([q.turns[0], expected_results(q)], ensure_ascii=False)}
        for q in found[:count]
    ]


def train(
    model,
    tokenizer,
    *,
    steps: int = 20,
    prompts: int = 4,
    samples: int = 4,
    learning_rate: float = 2e-5,
    max_completion_length: int = 256,
    seed: int = 0,
    **settings: object,
) -> list[dict]:
    """Train a PEFT model (or any) with GRPO.

    Args:
        model, tokenizer: A causal LM and its tokenizer, whose chat template becomes Qwen2.5's.
        steps: Of the optimizer.
        prompts: Different questions a step.
        samples: Conversations of each question.
        learning_rate: Constant.
        max_completion_length: Tokens of calls, results and answers together.
        seed: Of questions and samples.
        settings: More of `GRPOConfig`.

    Returns:
        What TRL logged, a dict a step: "reward", "loss", "tools/call_frequency" among others.
    """
    from datasets import Dataset
    from trl import GRPOConfig

    from unsloth_puzzles.backprop.grpo import MemoryEfficientGRPOTrainer

    tokenizer.chat_template = chat_format("qwen2.5").template
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=prompts * samples,
            num_generations=samples,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            max_completion_length=max_completion_length,
            max_tool_calling_iterations=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            seed=seed,
            **settings,
        )
        trainer = MemoryEfficientGRPOTrainer(
            model=model,
            reward_funcs=reward_calls,
            args=arguments,
            train_dataset=Dataset.from_list(rows(steps * prompts, seed)),
            processing_class=tokenizer,
            tools=bounded_functions(all_tools().subset(OFFERED)),
            compile=False,
        )
        trainer.train()
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def _on_offer(question: Question) -> bool:
    return all(name in OFFERED for name, _ in question.turns[0])

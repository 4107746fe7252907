"""QLoRA on conversations with tools, and what it changed, by one command.

python -m benchmarks.tool_calling.train --folder model --output tool_calling.json       # a GPU: minutes
python -m benchmarks.tool_calling.train --model Qwen/Qwen2.5-0.5B-Instruct --seeds 3
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.smollm2 import load
from benchmarks.tool_calling.data import all_tools, test_questions, training_conversations
from benchmarks.tool_calling.evaluate import evaluate, table
from benchmarks.tool_calling.merged import merged
from unsloth_puzzles.tool_calling.formats import ChatFormat
from unsloth_puzzles.tool_calling.tokens import IGNORED, ChatEncoder

STEPS, BATCH_SIZE, LEARNING_RATE = 200, 16, 1e-3


def fine_tune(
    model,
    tokenizer,
    *,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    format: str | ChatFormat = "qwen2.5",
    rank: int = 16,
):
    """Train LoRA adapters on all linear layers of `model` (in 4 bits or not) with transformers' Trainer.

    Args:
        model, tokenizer: As `load` gives them.
        steps: Of the optimizer, each on `batch_size` conversations that no other step sees.
        batch_size: Conversations a step.
        learning_rate: At the end of the warm-up; then it falls in a line to 0.
        seed: Of data, order and adapters.
        format: A chat format or its name.
        rank: Of the adapters.

    Returns:
        The PEFT model, and the losses as a list of (step, loss).
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments, set_seed

    from benchmarks.progress import Progress
    from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss

    set_seed(seed)
    encoder = ChatEncoder(tokenizer, format)
    rows = [
        encoder.conversation(messages, all_tools().subset(offered))
        for messages, offered in training_conversations(steps * batch_size, seed, encoder.format.calls_per_turn)
    ]
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    device = model.device.type
    dtype = next((module.compute_dtype for module in model.modules() if hasattr(module, "compute_dtype")), model.dtype)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=max(1, steps // 15),
            lr_scheduler_type="linear",
            weight_decay=0.0,
            fp16=device == "cuda" and dtype == torch.float16,
            bf16=device == "cuda" and dtype == torch.bfloat16,
            logging_steps=max(1, steps // 20),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=device == "cpu",
            dataloader_pin_memory=device == "cuda",
            seed=seed,
        )
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
        progress = [Progress("training")]
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=progress)
        trainer.remove_callback(PrinterCallback)
        with use_memory_efficient_loss(trainer):  # a batch's logits would take gigabytes on a T4
            trainer.train()
    return model, [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def main(arguments: argparse.Namespace) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, arguments.dtype or ("float16" if device == "cuda" else "float32"))
    questions = test_questions()
    runs = []
    for seed in range(arguments.seeds):
        model, tokenizer, source = _load(arguments, device, dtype)
        start = time.perf_counter()
        options = {"format": arguments.format, "batch_size": arguments.eval_batch}
        before, _ = evaluate(merged(model), tokenizer, questions, **options)
        evaluated = time.perf_counter()
        model, losses = fine_tune(
            model, tokenizer, steps=arguments.steps, batch_size=arguments.batch, seed=seed, format=arguments.format,
            learning_rate=arguments.lr,
        )  # fmt: skip
        trained = time.perf_counter()
        after, done = evaluate(merged(model), tokenizer, questions, **options)
        ended = time.perf_counter()
        print(f"{source}, seed {seed}\n{table({'before': before, 'after': after})}", flush=True)
        if arguments.adapters:
            model.save_pretrained(f"{arguments.adapters}-{seed}")
        runs.append(
            {
                "source": source, "seed": seed, "losses": losses,
                "seconds": {"before": evaluated - start, "training": trained - evaluated, "after": ended - trained},
                "before": {n: [*s, *s.interval] for n, s in before.items()},
                "after": {n: [*s, *s.interval] for n, s in after.items()},
                "conversations": [one.messages[2:] for one in done],
            }
        )  # fmt: skip
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    return {"runs": runs}


def _load(arguments: argparse.Namespace, device: str, dtype: torch.dtype):
    if not arguments.model:
        return load(arguments.folder, device=device, dtype=dtype, four_bit=not arguments.sixteen)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.models import nf4_config

    quantisation = None if arguments.sixteen else nf4_config(dtype)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=dtype, device_map={"": device}, quantization_config=quantisation
    )
    return model, AutoTokenizer.from_pretrained(arguments.model), f"real weights, {arguments.model}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a name on the hub or a folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--folder", default="model", help="of SmolLM2's GGUF file")
    parser.add_argument("--format", default="qwen2.5")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH_SIZE)
    parser.add_argument("--eval-batch", type=int, default=130)
    parser.add_argument("--lr", type=float, default=LEARNING_RATE)
    parser.add_argument("--dtype", help="float16, bfloat16 or float32")
    parser.add_argument("--sixteen", action="store_true", help="not in 4 bits")
    parser.add_argument("--adapters", help="where to save the adapters")
    parser.add_argument("--output", help="a JSON file")
    main(parser.parse_args())

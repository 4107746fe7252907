"""QLoRA on conversations with tools.

model, losses = fine_tune(model, tokenizer)
"""

import contextlib
import tempfile

import torch

from benchmarks.tool_calling.data import all_tools, training_conversations
from unsloth_puzzles.compiled.lora import scale_low_rank
from unsloth_puzzles.nf4 import patch_linear4bit
from unsloth_puzzles.tool_calling.formats import ChatFormat
from unsloth_puzzles.tool_calling.tokens import IGNORED, ChatEncoder

STEPS, BATCH_SIZE, LEARNING_RATE = 400, 16, 1e-3
ON_A_T4 = {"steps": 200, "batch_size": 8}
QUESTIONS = 4  # of a conversation


def fine_tune(
    model,
    tokenizer,
    *,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    questions: int = QUESTIONS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    format: str | ChatFormat = "qwen2.5",
    rank: int = 16,
):
    """Train LoRA adapters on all linear layers of `model` (in 4 bits or not).

    Embedding and norms keep the dtype of `model`. PEFT's `prepare_model_for_kbit_training` would cast them to float32,
    and with them all hidden states: at its peak a batch of 16 conversations of one question then allocates 13.6 GiB
    instead of 10.3.

    Args:
        model, tokenizer: As `load` gives them.
        steps: Of the optimizer, each on `batch_size` conversations that no other step sees.
        batch_size: Conversations a step.
        questions: Of a conversation. They have the same tools on offer, whose descriptions are most of its tokens.
        learning_rate: At the end of the warm-up; then it falls in a line to 0.
        seed: Of data, order and adapters.
        format: A chat format or its name.
        rank: Of the adapters.

    Returns:
        The PEFT model, and the losses as a list of (step, loss).
    """
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, TrainingArguments, set_seed

    from benchmarks.lean_trainer import LeanTrainer
    from benchmarks.progress import Progress, at_work
    from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss

    set_seed(seed)
    encoder = ChatEncoder(tokenizer, format)
    with at_work("tokens of the conversations"):
        drawn = training_conversations(steps * batch_size, seed, encoder.format.calls_per_turn, questions)
        rows = [encoder.conversation(messages, all_tools().subset(offered)) for messages, offered in drawn]
    model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    device = model.device.type
    dtype = next((module.compute_dtype for module in model.modules() if hasattr(module, "compute_dtype")), model.dtype)
    four_bit = device == "cuda" and getattr(model, "is_loaded_in_4bit", False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=max(1, steps // 15),
            lr_scheduler_type="linear",
            weight_decay=0.0,
            train_sampling_strategy="group_by_length",  # a fifth of a batch would be padding
            fp16=device == "cuda" and dtype == torch.float16,
            bf16=device == "cuda" and dtype == torch.bfloat16,
            logging_steps=max(1, steps // 20),
            logging_nan_inf_filter=False,  # it would wait for the GPU at each step
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
        trainer = LeanTrainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=progress)
        trainer.remove_callback(PrinterCallback)
        with contextlib.ExitStack() as patches:
            # A batch's logits would take gigabytes on a T4. Of its rows, four in five have no label.
            patches.enter_context(use_memory_efficient_loss(trainer, skip_ignored=True))
            if four_bit:
                patches.enter_context(patch_linear4bit(model))
                patches.callback(scale_low_rank(model, eager_rounding=True))  # fewer passes over a layer's output
            trainer.train()
    return model, [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]

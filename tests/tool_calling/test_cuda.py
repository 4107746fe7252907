"""On a GPU: QLoRA in 16 bits, and processes for tools beside a CUDA context."""

import math

import pytest
import torch

from benchmarks.models import random_nf4_llama, tiny_llama_config
from benchmarks.tool_calling.data import test_questions
from benchmarks.tool_calling.evaluate import evaluate
from benchmarks.tool_calling.train import fine_tune
from tests.tool_calling.compact import COMPACT
from tests.tool_calling.functions import add, misbehave, tokenizer
from unsloth_puzzles.tool_calling.toolbox import ToolBox

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_qlora_trains_and_generates(dtype):
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("the GPU has no bf16 instructions")
    config = tiny_llama_config(len(tokenizer()))
    config.max_position_embeddings = 8192
    model = random_nf4_llama(config, "cuda", dtype)
    model, losses = fine_tune(model, tokenizer(), steps=20, batch_size=4, learning_rate=2e-2, format=COMPACT)
    assert all(math.isfinite(loss) for _, loss in losses) and losses[-1][1] < losses[0][1]
    questions = test_questions(counts={"one call": 4, "needs none": 4})
    report, done = evaluate(model, tokenizer(), questions, format=COMPACT, batch_size=8)
    assert len(done) == 8 and report["abstention"].count == 4


def test_tools_run_beside_a_cuda_context():
    kept = torch.ones(8, device="cuda")
    box = ToolBox([add, misbehave], seconds=20)
    assert box.call("add", {"a": 3, "b": 4}).content == "7"
    assert "must need at most 1024 MiB of memory" in box.call("misbehave", {"how": "memory"}).content
    assert kept.sum().item() == 8

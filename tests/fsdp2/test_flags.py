"""The command line refuses what would have no effect; a single process sees one GPU."""

import os

import pytest
import torch

from unsloth_puzzles.fsdp2.flags import parse
from unsloth_puzzles.fsdp2.ranks import use_one_gpu

OF_FSDP2 = (["--offload"], ["--no-reshard"], ["--shard-embeddings"], ["--state-dict", "SHARDED_STATE_DICT"])


@pytest.mark.parametrize("flags", OF_FSDP2, ids=[flags[0] for flags in OF_FSDP2])
def test_flags_of_fsdp2_need_torchrun(flags, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        parse(["--model", "m", *flags])
    assert f"argument {flags[0].replace('--no-', '--')}: it needs torchrun" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parse(["--model", "m", *flags]) != parse(["--model", "m"])


@pytest.mark.parametrize("world, flags", [(None, []), ("2", ["--no-compile"])])
def test_bitsandbytes_kernel_is_refused_where_ours_would_run(world, flags, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parse(["--model", "m", "--dequantize", "bitsandbytes", "--no-compile"]).dequantize == "bitsandbytes"
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--dequantize", "bitsandbytes", *flags])
    assert "argument --dequantize: bitsandbytes needs --no-compile, and no torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("given, seen", [(None, "0"), ("3,1", "3"), ("2", "2"), ("", "")])
def test_one_process_sees_the_first_gpu(given, seen, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    use_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_a_process_that_uses_several_gpus_already_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"^CUDA_VISIBLE_DEVICES must name one GPU, got 2 in use already"):
        use_one_gpu()

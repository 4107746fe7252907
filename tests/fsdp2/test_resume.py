"""A run of the script goes on from a checkpoint: in as many ranks, in more, in fewer, and after it was killed."""

import pytest

from tests.fsdp2.script import lines_of, losses, run, start

pytestmark = pytest.mark.slow  # one of them, from two ranks to one, is in test_train.py
KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
STEPS, SAVED = 4, 2


def flags_of(kind: str, out) -> tuple:
    return "--steps", STEPS, "--state-dict", kind, "--save-steps", SAVED, "--output", out


def check_resumed(architecture, tmp_path, kind: str, before: int, after: int, rows: int = 2) -> None:
    flags = *flags_of(kind, tmp_path / "out"), "--rows", rows
    whole = run(architecture, tmp_path / "whole.jsonl", *flags, ranks=before)
    resume = ("--resume", tmp_path / "out" / f"checkpoint-{SAVED}")
    rest = run(architecture, tmp_path / "rest.jsonl", *flags, *resume, ranks=after)
    assert [line["step"] for line in rest] == [3, 4]
    if before == after:
        assert losses(rest) == losses(whole[SAVED:])
    for ours, theirs in zip(rest, whole[SAVED:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert len(ours["peak_gib"]) == after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (2, 2)])
def test_a_run_goes_on(kind, before, after, architecture, tmp_path):
    check_resumed(architecture, tmp_path, kind, before, after)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_has_the_losses_of_one_that_was_not(kind, architecture, tmp_path):
    whole = run(architecture, tmp_path / "whole.jsonl", *flags_of(kind, tmp_path / "whole"), ranks=2)
    flags = flags_of(kind, tmp_path / "killed")
    killed = start(architecture, tmp_path / "killed.jsonl", *flags, ranks=2, callback="Kill")
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    assert losses(lines_of(tmp_path / "killed.jsonl")) == losses(whole[:3])
    resume = ("--resume", tmp_path / "killed" / f"checkpoint-{SAVED}")
    rest = run(architecture, tmp_path / "rest.jsonl", *flags, *resume, ranks=2)
    assert losses(rest) == losses(whole[SAVED:])


def test_a_checkpoint_of_fsdp2_is_refused_without_torchrun(architecture, tmp_path):
    flags = flags_of(KINDS[0], tmp_path / "out")
    run(architecture, tmp_path / "log.jsonl", *flags, ranks=1)
    resume = ("--resume", tmp_path / "out" / f"checkpoint-{SAVED}")
    refused = start(architecture, tmp_path / "rest.jsonl", *flags, *resume)
    assert refused.returncode != 0 and "only supported when using PyTorch FSDP" in refused.stderr

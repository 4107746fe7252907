"""The account of a section of the notebook, and the prediction for a T4."""

import pytest

from unsloth_puzzles.bench import memory, section, t4


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(section, "_open", None)
    monkeypatch.setattr(section, "_finished", {})


def test_t4_seconds_is_the_slowest_of_bytes_flops_and_instructions():
    assert t4.t4_seconds(bytes=640e9) == 2.0
    assert t4.t4_seconds(bytes=640e9, flops=65e12 * 3) == 3.0
    assert t4.t4_seconds(bytes=640e9, flops=8.1e12 * 5, flops_rate=t4.FP32_FLOPS) == 5.0
    assert t4.t4_seconds(instructions=2 * t4.THREAD_INSTRUCTIONS) == 2.0
    with pytest.raises(ValueError, match="flops must be a number that is not negative, got -1"):
        t4.t4_seconds(flops=-1)
    with pytest.raises(ValueError, match="bytes must be a number that is not negative, got nan"):
        t4.t4_seconds(bytes=float("nan"))


def test_finish_prints_the_account_with_a_labelled_prediction(capsys, monkeypatch):
    monkeypatch.setattr(memory, "highest_since_restart", lambda: 3 * 2**29)
    section.start("A. NF4")
    section.work(bytes=320e9)
    section.work(bytes=320e9, flops=2 * 65e12)
    done = section.finish()
    assert (done.bytes, done.flops, done.t4_seconds, done.peak_bytes) == (640e9, 130e12, 1.0 + 2.0, 3 * 2**29)
    printed = capsys.readouterr().out
    assert "[A. NF4]" in printed and "GPU peak of this process: 1.50 GiB" in printed
    assert "lower bound on a T4: 3.0 s (predicted for a T4 from its datasheet, not measured)" in printed


def test_finish_without_gpu_or_work_says_so(capsys, monkeypatch):
    monkeypatch.setattr(memory, "highest_since_restart", lambda: None)
    section.start("Set-up")
    section.finish()
    printed = capsys.readouterr().out
    assert "not measured (no GPU)\n" in printed and "predicted" not in printed


def test_summary_has_a_line_per_section_of_its_last_run():
    section.start("one")
    section.work(bytes=320e9)
    section.start("two")  # finishes "one"
    section.finish()
    section.start("one")
    section.work(bytes=640e9)
    section.finish()
    lines = section.summary().splitlines()
    assert "GPU peak, this process" in lines[0]
    assert len(lines) == 4 and "predicted for a T4 from its datasheet, not measured" in lines[0]
    assert lines[2].startswith("| one |") and lines[2].endswith("| 2.0 s |")
    assert lines[3].startswith("| two |")


def test_start_forgets_the_peak_of_earlier_sections(monkeypatch):
    monkeypatch.setattr(memory, "_highest", 10**12)
    section.start("next")
    assert memory._highest == 0


def test_work_outside_a_section_is_forgotten_and_finish_is_refused():
    section.work(bytes=1)
    with pytest.raises(RuntimeError, match="start\\(title\\) must be called before finish"):
        section.finish()
    section.start("after")
    assert section.finish().bytes == 0

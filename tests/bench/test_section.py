import pytest

from unsloth_puzzles.bench import memory, section, t4


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(section, "_open", None)
    monkeypatch.setattr(section, "_finished", {})


def test_prediction_is_the_slowest_of_bytes_flops_and_instructions():
    assert t4.t4_seconds(bytes=640e9) == 2.0
    assert t4.t4_seconds(bytes=640e9, flops=65e12 * 3) == 3.0
    assert t4.t4_seconds(bytes=640e9, flops=8.1e12 * 5, flops_rate=t4.FP32_FLOPS) == 5.0
    assert t4.t4_seconds(instructions=2 * t4.THREAD_INSTRUCTIONS) == 2.0
    with pytest.raises(ValueError, match="flops: got -1"):
        t4.t4_seconds(flops=-1)
    with pytest.raises(ValueError, match="bytes: got nan"):
        t4.t4_seconds(bytes=float("nan"))


def test_a_section_prints_its_account_and_labels_the_prediction(capsys, monkeypatch):
    monkeypatch.setattr(memory, "highest_since_restart", lambda: 3 * 2**29)
    section.start("A. NF4")
    section.work(bytes=320e9)
    section.work(bytes=320e9, flops=2 * 65e12)
    done = section.finish()
    assert (done.bytes, done.flops, done.t4_seconds, done.peak_bytes) == (640e9, 130e12, 1.0 + 2.0, 3 * 2**29)
    printed = capsys.readouterr().out
    assert "[A. NF4]" in printed and "GPU peak 1.50 GiB" in printed
    assert "3.00 s (predicted for a T4 from its datasheet, not measured)" in printed


def test_without_gpu_and_without_work_nothing_is_claimed(capsys, monkeypatch):
    monkeypatch.setattr(memory, "highest_since_restart", lambda: None)
    section.start("Set-up")
    section.finish()
    printed = capsys.readouterr().out
    assert "not measured (no GPU)" in printed and "no work counted" in printed


def test_summary_has_a_line_a_section_and_the_last_run_counts():
    section.start("one")
    section.work(bytes=320e9)
    section.start("two")  # finishes "one"
    section.finish()
    section.start("one")
    section.work(bytes=640e9)
    section.finish()
    lines = section.summary().splitlines()
    assert len(lines) == 4 and "predicted for a T4 from its datasheet, not measured" in lines[0]
    assert lines[2].startswith("| one |") and lines[2].endswith("| 2.00 s |")
    assert lines[3].startswith("| two |")


def test_a_peak_of_an_earlier_section_is_forgotten(monkeypatch):
    monkeypatch.setattr(memory, "_highest", 10**12)
    section.start("next")
    assert memory._highest == 0


def test_work_outside_a_section_is_forgotten_and_finish_needs_one():
    section.work(bytes=1)
    with pytest.raises(RuntimeError, match="no section is open"):
        section.finish()
    section.start("after")
    assert section.finish().bytes == 0

"""The account of a section of the notebook, and the least time of a T4."""

import pytest

from unsloth_puzzles.bench import memory, section, t4


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(section, "_open", None)
    monkeypatch.setattr(section, "_finished", {})


def test_t4_seconds_is_the_slower_of_bytes_and_instructions():
    assert t4.t4_seconds(bytes=640e9) == 2.0
    assert t4.t4_seconds(bytes=640e9, instructions=3 * t4.THREAD_INSTRUCTIONS) == 3.0
    assert t4.t4_seconds(instructions=2 * t4.THREAD_INSTRUCTIONS) == 2.0
    with pytest.raises(ValueError, match="instructions must be a number that is not negative, got -1"):
        t4.t4_seconds(instructions=-1)
    with pytest.raises(ValueError, match="bytes must be a number that is not negative, got nan"):
        t4.t4_seconds(bytes=float("nan"))


def test_finish_prints_time_and_peak(capsys, monkeypatch):
    monkeypatch.setattr(memory, "highest_since_restart", lambda: 3 * 2**29)
    section.start("A. NF4")
    assert section.finish().peak_bytes == 3 * 2**29
    printed = capsys.readouterr().out
    assert printed.startswith("[A. NF4] ") and printed.endswith(" s, GPU peak of this process: 1.50 GiB\n")


def test_finish_without_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setattr(memory, "highest_since_restart", lambda: None)
    section.start("Set-up")
    section.finish()
    assert "not measured (no GPU)\n" in capsys.readouterr().out


def test_summary_has_a_line_per_section_of_its_last_run():
    section.start("one")
    section.start("two")  # finishes "one"
    section.finish()
    section.start("one")
    last = section.finish()
    lines = section.summary().splitlines()
    assert lines[0] == "| section | time | GPU peak, this process |"
    assert len(lines) == 4 and lines[3].startswith("| two |")
    assert lines[2].startswith(f"| one | {last.seconds:.1f} s |")


def test_start_forgets_the_peak_of_earlier_sections(monkeypatch):
    monkeypatch.setattr(memory, "_highest", 10**12)
    section.start("next")
    assert memory._highest == 0


def test_finish_without_an_open_section_is_refused():
    with pytest.raises(RuntimeError, match="start\\(title\\) must be called before finish"):
        section.finish()

"""Labelled docstrings: enough of each package, none twice, none that names its package, no file on both sides."""

import re
from collections import Counter

import pytest

from benchmarks.classification.docstrings import MIN_FILES, MIN_TEXTS, docstrings

WORDS = [first + second for first in ("al", "be", "ga", "de") for second in ("pha", "ta", "mma", "lta", "psi")]


def _package(folder, name, files, texts, phrase="concerns {name} and {name}.inner or Base{name}Error"):
    """`texts` functions over `files` files, each with a docstring of its own."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    sources = [[] for _ in range(files)]
    for number in range(texts):
        words = f"{WORDS[number % 20]} {WORDS[number // 20 % 20]} {name[::-1]} words"
        sources[number % files].append(f'def f{number}():\n    """{words} {phrase.format(name=name)}."""\n')
    for number, source in enumerate(sources):
        (folder / name / f"file{number}.py").write_text("\n".join(source))


@pytest.fixture
def folder(tmp_path):
    _package(tmp_path, "apples", 6, 120)
    _package(tmp_path, "pears", 5, 90)
    _package(tmp_path, "re", 4, 80, "knows {name} and more relatively")
    _package(tmp_path, "few_texts", 9, MIN_TEXTS - 1)
    _package(tmp_path, "few_files", MIN_FILES - 1, 100)
    return tmp_path


def test_packages_that_are_large_enough(folder):
    data = docstrings(folder)
    assert data.labels == ["apples", "pears", "re"]
    assert Counter(one.label for one in [*data.train, *data.test]) == {0: 120, 1: 90, 2: 80}
    assert "| apples | 5 | 100 | 1 | 20 |" in data.counts() or "| apples | 4 | 80 | 2 | 40 |" in data.counts()


def test_no_text_names_a_package(folder):
    data = docstrings(folder)
    for one in (*data.train, *data.test):
        assert not re.search(r"apples|pears|few_texts|few_files|\bre\b", one.text), one.text
    assert any("relatively" in one.text for one in data.train)


def test_no_file_and_no_text_is_on_both_sides(folder):
    for seed in range(3):
        data = docstrings(folder, seed=seed)
        for part in ("file", "text"):
            assert not {getattr(one, part) for one in data.train} & {getattr(one, part) for one in data.test}
        held = Counter(one.label for one in data.test)
        assert all(0.1 <= held[label] / size <= 0.4 for label, size in enumerate((120, 90, 80)))


def test_duplicates_are_dropped(folder):
    """Once in a package is once; in two packages it says nothing about either."""
    for number, name in enumerate(("apples", "apples", "pears")):
        text = '"""A text that two of the packages have."""\n'
        (folder / name / f"same{number}.py").write_text(text)
        (folder / "apples" / f"own{number}.py").write_text('"""Words that one package has several times."""\n')
    data = docstrings(folder)
    texts = [one.text for one in (*data.train, *data.test)]
    assert "A text that two of the packages have." not in texts
    assert texts.count("Words that one package has several times.") == 1


def test_broken_files_and_tests_are_passed_over(folder):
    (folder / "apples" / "broken.py").write_text('"""A text of five words."""\ndef')
    (folder / "apples" / "tests").mkdir()
    (folder / "apples" / "tests" / "test_it.py").write_text('"""A text of five words."""\n')
    data = docstrings(folder)
    assert len([one for one in (*data.train, *data.test) if one.label == 0]) == 120


def test_a_seed_decides_and_most_caps(folder):
    assert docstrings(folder, seed=1) == docstrings(folder, seed=1) != docstrings(folder, seed=2)
    capped = docstrings(folder, most=7)
    assert Counter(one.label for one in capped.train) == {0: 7, 1: 7, 2: 7}
    assert len(capped.test) == len(docstrings(folder).test)


def test_bad_arguments_are_refused(folder, tmp_path):
    for share in (0, 1):
        with pytest.raises(ValueError, match=r"^test_share must be a number above 0 and below 1, got"):
            docstrings(folder, test_share=share)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^folder must hold at least two packages with 80 docstrings, got \[\]"):
        docstrings(tmp_path / "empty")


@pytest.mark.slow
def test_the_standard_library():
    data = docstrings()
    assert len(data.labels) >= 8 and {"asyncio", "email", "unittest", "xml"} <= {*data.labels}
    assert len(data.train) > 1500 and len(data.test) > 400

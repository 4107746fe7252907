"""Code that differs in a name or a byte is other code."""

from pathlib import Path

from unsloth_puzzles.bench.source_hash import source_hash


def test_the_hash_knows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.py").write_text("1")
    hashes = {source_hash(folder=tmp_path)}
    (tmp_path / "part" / "a.py").write_text("2")
    hashes.add(source_hash(folder=tmp_path))
    (tmp_path / "part" / "a.py").rename(tmp_path / "part" / "b.py")
    hashes.add(source_hash(folder=tmp_path))
    assert len(hashes) == 3

"""Measurements as JSON: the one form in which every published figure is kept.

    {"hardware": {...}, "versions": {...}, "date": "YYYY-MM-DD",
     "records": [{"metric", "case", "value", "unit", "low", "high", "baselines"}]}

`value` is always ours; what others reach in the same run goes into `baselines`, {name: value}, in the same unit.
`low` and `high` are the 10th and 90th percentile, or null.
"""

import dataclasses
import datetime
import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path

from unsloth_puzzles.bench.hardware import Hardware, probe, versions

FILE_KEYS = ("hardware", "versions", "date", "records")
RECORD_KEYS = ("metric", "case", "value", "unit", "low", "high", "baselines")


class Measurements:
    """The measurements of one run on one machine, bound for `path`.

    `hardware` is what the run's `probe()` returned; without it the machine is probed, its ceilings unmeasured.
    """

    def __init__(self, path: str | os.PathLike, hardware: Hardware | None = None):
        self.path = Path(path)
        self.hardware = dataclasses.asdict(hardware or probe(measure=False))
        self.versions = versions()
        self.date = datetime.date.today().isoformat()
        self.records: list[dict] = []

    def add(
        self,
        metric: str,
        case: str,
        value: float,
        unit: str,
        low: float | None = None,
        high: float | None = None,
        baselines: Mapping[str, float] | None = None,
    ) -> None:
        """Add one figure. Raises ValueError for NaN, infinity, a second (metric, case), or low above high."""
        for name, text in (("metric", metric), ("case", case), ("unit", unit)):
            if not isinstance(text, str) or not text:
                raise TypeError(f"{name}: got {text!r}, need a text that is not empty")
        if self.find(metric, case):
            raise ValueError(f"metric, case: got {(metric, case)} a second time, need each pair once")
        low = None if low is None else _number("low", low)
        high = None if high is None else _number("high", high)
        if low is not None and high is not None and low > high:
            raise ValueError(f"low: got {low}, need at most high, {high}")
        compared = {name: _number(f"baselines[{name!r}]", other) for name, other in (baselines or {}).items()}
        fields = (metric, case, _number("value", value), unit, low, high, compared)
        self.records.append(dict(zip(RECORD_KEYS, fields, strict=True)))

    def find(self, metric: str, case: str | None = None) -> list[dict]:
        """The records of `metric`, all cases or one; an empty list if there is none."""
        return [found for found in self.records if found["metric"] == metric and case in (None, found["case"])]

    def save(self) -> Path:
        """Write the file, all of it or nothing, and return its path."""
        content = {key: getattr(self, key) for key in FILE_KEYS}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f"{self.path.name}.{os.getpid()}.unfinished")
        try:
            unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)
        return self.path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Measurements":
        """Read a file and check it as `add` would; ValueError for missing or unknown keys."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        _need_keys(str(path), content, FILE_KEYS)
        loaded = cls.__new__(cls)
        loaded.path = Path(path)
        loaded.hardware, loaded.versions, loaded.records = content["hardware"], content["versions"], []
        loaded.date = datetime.date.fromisoformat(content["date"]).isoformat()
        for number, found in enumerate(content["records"]):
            _need_keys(f"{path}, record {number}", found, RECORD_KEYS)
            loaded.add(**found)
        return loaded


def _number(name: str, value: object) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {value!r}, need a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}, need a finite number")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _need_keys(where: str, content: object, keys: tuple[str, ...]) -> None:
    if not isinstance(content, dict) or set(content) != set(keys):
        found = sorted(content) if isinstance(content, dict) else content
        raise ValueError(f"{where}: got keys {found!r}, need exactly {sorted(keys)}")

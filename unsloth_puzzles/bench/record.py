"""Measurements as JSON, one record a figure.

    {"hardware": {...}, "versions": {...}, "date": "YYYY-MM-DD", "digest": "...",
     "records": [{"metric", "case", "value", "unit", "low", "high", "baselines"}]}

`value` is always ours; what others reach in the same run goes into `baselines`, {name: value}, in the same unit.
`low` and `high` are the 10th and 90th percentile, or null. `digest` is the package's `code_digest`.
"""

import dataclasses
import datetime
import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path

from unsloth_puzzles.bench.code_digest import code_digest, package_files
from unsloth_puzzles.bench.hardware import Hardware, probe, versions

PROVENANCE = ("hardware", "versions", "date", "digest")
FILE_KEYS = (*PROVENANCE, "records")
RECORD_KEYS = ("metric", "case", "value", "unit", "low", "high", "baselines")


def provenance(hardware: Hardware | None = None) -> dict[str, object]:
    """Where and with what a record is made: the head of a file of measurements.

    Args:
        hardware: What `probe()` returned. By default the machine is probed, without measuring its ceilings.

    Returns:
        "hardware" (the fields of `Hardware`), "versions" of the main packages, "date" of today in ISO format, and
        "digest" of the package's code.
    """
    here = (dataclasses.asdict(hardware or probe(measure=False)), versions(), datetime.date.today().isoformat())
    return dict(zip(PROVENANCE, (*here, code_digest(package_files())), strict=True))


def write_json(path: str | os.PathLike, content: object) -> Path:
    """Write `content` to `path`, all of the file or nothing, and return the path.

    Args:
        path: The file. Its folder is made where it does not exist.
        content: What `json` can write.

    Raises:
        ValueError: `content` holds NaN or infinity, which JSON does not know.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


class Measurements:
    """The measurements of one run on one machine, bound for `path`.

    Args:
        path: The JSON file that `save` writes.
        hardware: What the run's `probe()` returned. By default the machine is probed, its ceilings unmeasured.
    """

    def __init__(self, path: str | os.PathLike, hardware: Hardware | None = None):
        self.path = Path(path)
        self.hardware, self.versions, self.date, self.digest = provenance(hardware).values()
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
        """Add one figure.

        Args:
            metric: What was measured.
            case: Of which shape, dtype or setting. Each pair of metric and case is added once.
            value: Ours.
            unit: Of all numbers of this record.
            low: The 10th percentile.
            high: The 90th percentile.
            baselines: What others reach in the same run, by name.

        Raises:
            TypeError: A text is no text or empty, a number is no number, or `baselines` is no mapping.
            ValueError: A number is NaN or infinite, `low` is above `high`, or the pair was added before.
        """
        for name, text in (("metric", metric), ("case", case), ("unit", unit)):
            if not isinstance(text, str) or not text:
                raise TypeError(f"{name} must be a text that is not empty, got {text!r}")
        if self.find(metric, case):
            raise ValueError(f"metric and case must be a new pair, got {(metric, case)} a second time")
        if not isinstance(baselines, Mapping | None):
            raise TypeError(f"baselines must be a mapping of names to numbers, got {baselines!r}")
        low = None if low is None else _number("low", low)
        high = None if high is None else _number("high", high)
        if low is not None and high is not None and low > high:
            raise ValueError(f"low must be at most high, {high}, got {low}")
        compared = {name: _number(f"baselines[{name!r}]", other) for name, other in (baselines or {}).items()}
        fields = (metric, case, _number("value", value), unit, low, high, compared)
        self.records.append(dict(zip(RECORD_KEYS, fields, strict=True)))

    def find(self, metric: str, case: str | None = None) -> list[dict]:
        """The records of `metric`, all cases or one; an empty list if there is none."""
        return [found for found in self.records if found["metric"] == metric and case in (None, found["case"])]

    def save(self) -> Path:
        """Write the file, all of it or nothing, and return its path."""
        return write_json(self.path, {key: getattr(self, key) for key in FILE_KEYS})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Measurements":
        """Read a file and check it as `add` does.

        Raises:
            TypeError, ValueError: It is no JSON, a key is missing or unknown, the hardware has no name or device, the
                date or the records are none, or `add` would refuse a record.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} must be JSON, got {error}") from None
        _need_keys(str(path), content, FILE_KEYS)
        hardware, date, records = content["hardware"], content["date"], content["records"]
        if not isinstance(hardware, dict) or not all(isinstance(hardware.get(key), str) for key in ("name", "device")):
            raise ValueError(f"hardware in {path} must have a name and a device, got {hardware!r}")
        if not isinstance(date, str) or not isinstance(records, list):
            raise ValueError(f"date and records in {path} must be a text and a list, got {date!r} and {records!r}")
        loaded = cls.__new__(cls)
        loaded.path, loaded.records = Path(path), []
        loaded.hardware, loaded.versions, loaded.digest = (content[key] for key in ("hardware", "versions", "digest"))
        loaded.date = datetime.date.fromisoformat(date).isoformat()
        for number, found in enumerate(records):
            _need_keys(f"record {number} of {path}", found, RECORD_KEYS)
            loaded.add(**found)
        return loaded


def _number(name: str, value: object) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _need_keys(where: str, content: object, keys: tuple[str, ...]) -> None:
    if not isinstance(content, dict) or set(content) != set(keys):
        found = sorted(content) if isinstance(content, dict) else content
        raise ValueError(f"{where} must have exactly the keys {sorted(keys)}, got {found!r}")

"""README.md and RESULTS.md from their templates and resources/: no measured value in them is typed in.

python -m tools.build_readme           write both
python -m tools.build_readme --check   exit 1 when one of them is not what the measurements give
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import jinja2
import nbformat
import pandas

from benchmarks.fsdp2.prediction import LENGTH, ROWS, predicted_table
from benchmarks.fsdp2.sweeps import CURVE
from tools.address import NOTEBOOK, badges
from tools.build_notebook import ROOT
from tools.matrix_table import matrix_table
from tools.measured_tables import amount, file_tables, gpu_tests, machine, points_table, provenance
from tools.qlora_sweep import sweep_tables
from tools.readme_claims import NOT_MEASURED, claims_table, minutes_table
from tools.readme_contents import FIGURES, PLACES, SWEPT, TABLES
from tools.release import STAMP, TESTS, said_of_tests
from tools.t4.report import predicted, total_prediction
from unsloth_puzzles.bench import scorecard
from unsloth_puzzles.bench.challenges import FILES, TITLES
from unsloth_puzzles.bench.markdown import table

# README's figures, with the file of the run that drew each. A figure of sweeps has hardware and date in its title: the
# sweeps may have been measured again since it was drawn.
SHOWN = {"a_nf4_bandwidth": "a_nf4.json", "e_backprop_frontier": None}
IN_TITLE = "The title has hardware, date and weights."


def pages(resources: Path = ROOT / "resources") -> dict[str, str]:
    """The text of each page by its file name, for what lies in `resources`; what has no measurement says so."""
    measurements = resources / "measurements"
    released = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    of = released.metadata[STAMP]
    readme = _filled(
        "readme_template.md",
        badges=badges(),
        points=points_sentence(scorecard.score(measurements)),
        claims=claims_table(measurements),
        figures="\n\n".join(shown_figure(resources, name, source) for name, source in SHOWN.items()),
        minutes=minutes_table(measurements, released, of),
        of=of,
        on_t4=scorecard.is_gpu(of["hardware"], "T4"),
        tests=said_of_tests(of.get(TESTS)),
        unsloth=by_case(measurements / "a_nf4_sweeps.json", "harness_speedup_beside_unsloth"),
        liger=by_case(measurements / "e_backprop.json", "time_over_liger_at_its_chunk_size"),
        rehearsed=rehearsal_errors(measurements / "rehearsal.json"),
        with_matrix=of_which_code(measurements / "matrix.json", of["digest"]),
    )
    results_page = _filled(
        "results_template.md",
        score=points_table(scorecard.score(measurements)),
        release=release(of),
        results=results(resources, of["digest"]),
        predicted=predicted_table(),
        on_two=on_two_gpus(measurements / "b_fsdp2_sweeps.json"),
        rehearsal=rehearsal(measurements / "rehearsal.json", of["digest"]),
    )
    return {"README.md": readme, "RESULTS.md": results_page}


def _filled(template: str, **content: object) -> str:
    text = (ROOT / "tools" / template).read_text(encoding="utf-8")
    page = jinja2.Template(text, undefined=jinja2.StrictUndefined, keep_trailing_newline=True).render(**content)
    return "".join(_wrapped(line) for line in page.splitlines(keepends=True))


def _wrapped(line: str) -> str:
    """A line of prose as lines of at most 120 characters; rows of tables, badges and figures as they are."""
    if len(line) <= 121 or line.startswith(("|", "![", "[![")):
        return line
    indent = "  " if line.startswith(("- ", "  ")) else ""
    return textwrap.fill(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) + "\n"


def shown_figure(resources: Path, name: str, source: str | None) -> str:
    """A figure of README and its caption, with hardware and date of the measurement file `source`."""
    drawn = resources / f"{name}.png"
    measured = resources / "measurements" / source if source else drawn
    if not (drawn.exists() and measured.exists()):
        return f"{FIGURES[name]}: {NOT_MEASURED}."
    where = f"{machine(json.loads(measured.read_text(encoding='utf-8')))}, random weights." if source else IN_TITLE
    return f"{_image(drawn, resources)}\n\n{FIGURES[name]}. {where}"


def points_sentence(rows: list[scorecard.Row]) -> str:
    """The points of all challenges and of each, and how many another GPU earned than the puzzle names."""
    if not any(row.hardware for row in rows):
        return f"Their points: {NOT_MEASURED}."
    earned = scorecard.totals(rows)
    points, possible = earned.pop("all")
    each = ", ".join(f"{challenge} {of_it}" for challenge, (of_it, _) in earned.items())
    said = f"By its own scorecard the published run earned {points} of {possible} points ({each})."
    elsewhere = sum(row.points for row in rows if scorecard.NOT_ON in row.verdict)
    return said + (f" {elsewhere} points ask for a T4 and were earned on another GPU." if elsewhere else "")


def by_case(path: Path, metric: str) -> str:
    """All values of a metric in a file of measurements with their cases and the hardware, a part of a sentence."""
    head = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"records": []}
    found = [one for one in head["records"] if one["metric"] == metric]
    shown = [f"{amount(one['value'], one['unit'])} ({one['case'].removeprefix('all, ')})" for one in found]
    return f"{', '.join(shown)}, {machine(head)}" if shown else NOT_MEASURED


def on_two_gpus(path: Path) -> str:
    """A sentence about what the sweeps of two GPUs measured of that which `predicted_table` predicts or assumes."""
    swept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"records": []}
    values = {(one["metric"], one["case"]): one["value"] for one in swept["records"]}
    bandwidth = values.get(("gather_bytes_per_s", "all-gather of a layer's size"))
    scaling = values.get(("scaling", f"compiled, {ROWS} rows a GPU"))
    few = values.get(("scaling", "compiled, 1 rows a GPU"))
    if None in (bandwidth, scaling, few):
        return f"On two GPUs: {NOT_MEASURED}."
    what = f"{CURVE['layers']} layers of Llama 3.1 8B's shapes, {ROWS} x {LENGTH} tokens, compiled"
    return (
        f"Two GPUs ({machine(swept)}, {what}) reached "
        f"{amount(scaling, 'x')} and received {amount(bandwidth / 1e9, 'GB/s')} in an all-gather. The notebook's own "
        f"measurement, of fewer layers, is in the tables of challenge B. With few tokens the prediction fails: "
        f"1 x {LENGTH} tokens reached {amount(few, 'x')}."
    )


def release(of: dict) -> str:
    """Of which code the committed notebook is, from its stamp."""
    lines = [
        f"The committed notebook was executed on {of['date']} on an {of['hardware']}, at commit `{of['commit'][:10]}`.",
        *([said_of_tests(of[TESTS])] if TESTS in of else []),
        "`python -m tools.release` says how far the code has moved since.",
        "Points follow today's rubric, and the records and checks of that run: what it did not measure earns nothing.",
    ]
    return "\n".join(lines)


def results(resources: Path, release_digest: str | None = None) -> str:
    """A heading, figures and tables for each challenge, then the GPU tests and the releases of the libraries.

    Args:
        resources: The folder.
        release_digest: Of the committed notebook. Sweeps that ran with other code say so.
    """
    parts = []
    for challenge, file in FILES.items():
        path = resources / "measurements" / file
        parts.append(f"### {challenge}. {TITLES[challenge]}")
        parts += [_image(figure, resources) for figure in _figures(path.stem, resources)]
        if not path.exists():
            parts.append("Not measured yet.")
        else:
            measured = json.loads(path.read_text(encoding="utf-8"))
            parts.append(provenance(measured))
            parts += file_tables(measured, TABLES.get(file, ()))
        parts += _swept(resources / "measurements", file, release_digest)
        if challenge == "C":
            parts += sweep_tables(resources / "measurements" / "c_compile_sweeps.json")
    measurements = resources / "measurements"
    parts += ["### Tests on a GPU", gpu_tests(measurements / "gpu_tests.json")]
    return "\n\n".join([*parts, "### Releases of the libraries", matrix_table(measurements / "matrix.json")])


def _swept(measurements: Path, file: str, release_digest: str | None) -> list[str]:
    """Return the records that sweeps kept beside `file`, each with its own provenance."""
    parts = []
    for name, tables in SWEPT.get(file, {}).items():
        path = measurements / name
        if not path.exists():
            parts.append(f"Sweeps in `{name}`: not measured yet.")
            continue
        measured = json.loads(path.read_text(encoding="utf-8"))
        same = release_digest in (None, measured["digest"])
        code = "" if same else ", with other code than the committed notebook's"
        parts.append(f"Sweeps in `{name}`, a run of their own{code}: {provenance(measured)}")
        parts += file_tables(measured, tables)
    return parts


def of_which_code(path: Path, digest: str) -> str:
    """A phrase that says if the tests in all environments ran with other code than that of `digest`; or nothing."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = all(one["tests"]["digest"] == digest for one in kept.values() if "tests" in one)
    return "" if same else ", some with other code"


def rehearsal_errors(path: Path) -> str:
    """How many errors the rehearsal of a T4 listed in which sections, a sentence."""
    sections = json.loads(path.read_text(encoding="utf-8"))["sections"] if path.exists() else {}
    if not sections:
        return "None is kept."
    counts = [f"{name} {len(section['errors'])}" for name, section in sections.items() if section["errors"]]
    return f"It lists errors in sections: {', '.join(counts)}." if counts else "It lists no error."


def rehearsal(path: Path, release_digest: str) -> str:
    """Tabulate the findings of the rehearsal of a T4, a row a section; it says so where there was none.

    Args:
        path: What `tools.t4` wrote.
        release_digest: Of the committed notebook. Sections that ran with other code are named.
    """
    if not path.exists():
        return "No rehearsal of a T4 is kept."
    kept = json.loads(path.read_text(encoding="utf-8"))
    sections = kept["sections"]
    rows = [
        {
            "section": name,
            "wall time here": f"{section['wall_seconds']:.0f} s",
            "predicted for a T4, aim": _beside_aim(section, kept["budget_seconds"][name]),
            "points": f"{section['points']} of {section['possible']}",
            "Triton kernels seen, failed, too large": (
                f"{section['kernels_seen']}, {section['kernels_failed']}, {section['kernels_over_shared_memory']}"
            ),
            "GPU memory": f"{section['gpu_peak_gib']:.1f} GiB",
            "RAM": f"{section['ram_peak_gb']:.1f} GB",
            "errors": "; ".join(section["errors"]) or "none",
        }
        for name, section in sections.items()
    ]
    others = [name for name, section in sections.items() if section.get("digest") != release_digest]
    together = predicted(total_prediction(sections.values()))
    against = [section.get("against_colab", {}) for section in sections.values()]
    differ = sorted({name for versions in against for name, one in versions.items() if not one["same"]})
    curves = sections.get("E", {}).get("figures", {})
    said = [
        f"A T4 was rehearsed on an {kept['hardware']['name']}, {kept['date']}: predictions, no measurements of a T4.",
        f"Together {together or 'not known'}, without installation and downloads.",
        f"Not run with the code of the committed notebook: {', '.join(others) or 'none'}.",
        f"Packages in other versions than Colab's: {', '.join(differ) or 'none'}.",
    ]
    parts = [" ".join(said), table(pandas.DataFrame(rows))]
    if curves:
        parts.append(table(pandas.DataFrame([_curve(*one) for one in curves.items()])))
    return "\n\n".join(parts)


def _curve(name: str, value: float) -> dict[str, str]:
    """A row for a figure of E, whose name is a metric and its case."""
    metric, _, case = name.partition(", ")
    return {
        "training curves of E, ours and the standard loss": dict(TABLES["e_backprop.json"])[metric],
        "case": case,
        "value": f"{value:.1e}",
    }


def _beside_aim(section: dict, aim: float) -> str:
    if not (shown := predicted(section)):
        return "not known"
    return f"{shown}, {aim} s" + (" (not reached)" if section["predicted_t4_seconds"] > aim else "")


def _figures(stem: str, resources: Path) -> list[Path]:
    """The figures that belong to a measurement file, by the beginnings of their paths."""
    places = (f"{stem}_", f"{stem}/", *PLACES.get(stem, ()))
    figures = sorted(resources.glob("**/*.png"))
    return [figure for figure in figures if figure.relative_to(resources).as_posix().startswith(places)]


def _image(figure: Path, resources: Path) -> str:
    shown = FIGURES.get(figure.stem, figure.stem.replace("_", " "))
    return f"![{shown}]({figure.relative_to(resources.parent).as_posix()})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write README.md and RESULTS.md from templates and measurements.")
    parser.add_argument("--check", action="store_true", help="compare with the files, write nothing")
    options = parser.parse_args(arguments)
    differs = False
    for name, made in pages().items():
        path = ROOT / name
        if not options.check:
            path.write_text(made, encoding="utf-8")
            print(f"{path}: written")
        elif path.exists() and path.read_text(encoding="utf-8") == made:
            print(f"{name} is what the measurements give.")
        else:
            print(f"{name} differs: run python -m tools.build_readme")
            differs = True
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())

"""README.md from tools/readme_template.md and resources/: no figure in it is typed in.

python -m tools.build_readme           write it
python -m tools.build_readme --check   exit 1 when README.md is not what the measurements give
"""

import argparse
import json
import sys
from pathlib import Path

import jinja2
import nbformat
import pandas

from tools.address import NOTEBOOK, badges
from tools.build_notebook import ROOT
from tools.measured_tables import gpu_tests, metric_table, points_table, provenance
from tools.readme_contents import FIGURES, FOLDERS, SWEPT, TABLES
from tools.release import STAMP, TESTS, said_of_tests
from unsloth_puzzles.bench import scorecard
from unsloth_puzzles.bench.challenges import FILES, TITLES
from unsloth_puzzles.bench.markdown import table


def readme(resources: Path = ROOT / "resources") -> str:
    """The README's text for what lies in `resources`; what has no measurement says so."""
    template = (ROOT / "tools" / "readme_template.md").read_text(encoding="utf-8")
    measurements = resources / "measurements"
    of = nbformat.read(ROOT / NOTEBOOK, as_version=4).metadata[STAMP]
    page = jinja2.Template(template, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return page.render(
        badges=badges(),
        score=points_table(scorecard.score(measurements)),
        release=release(of),
        results=results(resources),
        rehearsal=rehearsal(measurements / "rehearsal.json", of["digest"]),
    )


def release(of: dict) -> str:
    """Of which code the committed notebook is, from its stamp."""
    lines = [
        f"The committed notebook was executed on {of['date']} on an {of['hardware']}, at commit `{of['commit'][:10]}`.",
        *([said_of_tests(of[TESTS])] if TESTS in of else []),
        "`python -m tools.release` says how far the code has moved since.",
        "Points are counted by today's criteria: what that run did not measure earns nothing.",
    ]
    return "\n".join(lines)


def results(resources: Path) -> str:
    """A heading, tables and figures for each challenge, then the GPU tests."""
    parts = []
    for challenge, file in FILES.items():
        path = resources / "measurements" / file
        parts.append(f"### {challenge}. {TITLES[challenge]}")
        if not path.exists():
            parts.append("Not measured yet.")
            continue
        measured = json.loads(path.read_text(encoding="utf-8"))
        parts.append(provenance(measured))
        parts += [metric_table(measured["records"], metric, caption) for metric, caption in TABLES.get(file, ())]
        parts += _swept(resources / "measurements", *SWEPT[file]) if file in SWEPT else []
        parts += [_image(figure, resources) for figure in _figures(path.stem, resources)]
    return "\n\n".join([*parts, "### Tests on a GPU", gpu_tests(resources / "measurements" / "gpu_tests.json")])


def _swept(measurements: Path, file: str, tables: tuple[tuple[str, str], ...]) -> list[str]:
    """What `make sweeps` kept in `file`, with its own provenance."""
    path = measurements / file
    if not path.exists():
        return ["By `make sweeps`: not measured yet."]
    measured = json.loads(path.read_text(encoding="utf-8"))
    head = f"By `make sweeps`, a run of its own: {provenance(measured)}"
    return [head, *(metric_table(measured["records"], metric, caption) for metric, caption in tables)]


def rehearsal(path: Path, release_digest: str) -> str:
    """What the rehearsal of a T4 found, a row a section; it says so where there was none.

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
            "predicted for a T4, aim": _beside_aim(section.get("predicted_t4_seconds"), kept["budget_seconds"][name]),
            "points": f"{section['points']} of {section['possible']}",
            "Triton kernels seen, failed, too large": (
                f"{section['kernels_seen']}, {section['kernels_failed']}, {section['kernels_over_shared_memory']}"
            ),
            "GPU memory": f"{section['gpu_peak_gib']:.1f} GiB",
            "RAM": f"{section['ram_peak_gb']:.1f} GB",
        }
        for name, section in sections.items()
    ]
    others = [name for name, section in sections.items() if section.get("digest") != release_digest]
    predicted = sum(section.get("predicted_t4_seconds") or 0 for section in sections.values())
    against = [section.get("against_colab", {}) for section in sections.values()]
    differ = sorted({name for versions in against for name, one in versions.items() if not one["same"]})
    curves = sections.get("E", {}).get("figures", {})
    said = [
        f"A T4 was rehearsed on an {kept['hardware']['name']}, {kept['date']}: predictions, no measurements of a T4.",
        f"Together {predicted:.0f} s, without installation and downloads.",
        f"Not run with the code of the committed notebook: {', '.join(others) or 'none'}.",
        f"Packages in other versions than Colab's: {', '.join(differ) or 'none'}.",
    ]
    if curves:
        said.append(f"E's curves there: {'; '.join(f'{name}: {value:.1e}' for name, value in curves.items())}.")
    return f"{' '.join(said)}\n\n{table(pandas.DataFrame(rows))}"


def _beside_aim(predicted: float | None, aim: float) -> str:
    if predicted is None:
        return "not known"
    return f"{predicted:.0f} s, {aim} s" + (" (not reached)" if predicted > aim else "")


def _figures(stem: str, resources: Path) -> list[Path]:
    """The figures that belong to a measurement file, by the beginnings of their paths."""
    places = (f"{stem}_", f"{stem}/", *FOLDERS.get(stem, ()))
    figures = sorted(resources.glob("**/*.png"))
    return [figure for figure in figures if figure.relative_to(resources).as_posix().startswith(places)]


def _image(figure: Path, resources: Path) -> str:
    shown = FIGURES.get(figure.stem, figure.stem.replace("_", " "))
    return f"![{shown}]({figure.relative_to(resources.parent).as_posix()})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write README.md from its template and the measurements.")
    parser.add_argument("--check", action="store_true", help="compare with README.md, write nothing")
    options = parser.parse_args(arguments)
    path, made = ROOT / "README.md", readme()
    if not options.check:
        path.write_text(made, encoding="utf-8")
        print(f"{path}: written")
        return 0
    same = path.exists() and path.read_text(encoding="utf-8") == made
    print("README.md is what the measurements give." if same else "README.md differs: run python -m tools.build_readme")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

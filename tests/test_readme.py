"""README.md: two pages, their claims taken from the measurements, their examples run, their links not broken."""

import ast
import builtins
import json
import re
import symtable
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import transformers
from nbformat.v4 import new_code_cell, new_notebook, new_output

from benchmarks.fsdp2.prediction import predicted_table
from benchmarks.tool_calling.byte_tokenizer import byte_tokenizer
from benchmarks.vision.families import FAMILIES
from tools import build_readme
from tools.build_notebook import ROOT
from tools.build_readme import (
    by_case,
    of_which_code,
    on_two_gpus,
    pages,
    points_sentence,
    rehearsal_errors,
    shown_figure,
)
from tools.outputs import run_seconds
from tools.readme_claims import CLAIMS, NOT_MEASURED, claims_table, minutes_table
from unsloth_puzzles.bench.scorecard import NOT_ON, Row

PAGES = ("README.md", "RESULTS.md", "docs/usage.md")
STAMP = {"hardware": "NVIDIA Test", "date": "2026-11-22", "digest": "of the run"}
# What the example that defines a name must have done.
CHECKS = {
    "y": lambda names: names["y"].shape == (4, 1024),
    "head": lambda names: names["hidden_states"].grad.norm() > 0 and names["head"].weight.grad.norm() > 0,
    "out": lambda names: names["out"].shape == names["query"].shape,
    "implementation": lambda names: names["model"].config._attn_implementation == "unsloth_puzzles_sdpa",
    "trainer": lambda names: names["trainer"].state.global_step == 1,
    "text_model": lambda names: names["text_model"].name == "model-q8_0.gguf" and names["projector"] is None,
    "load_trained": lambda names: not names["model"].training and Path("out/classifier.json").is_file(),
    "toolbox": lambda names: (
        names["toolbox"].call("weekday", {"date": "2026-11-29"}).content == "Sunday"
        and names["done"].stopped
        and _learned(names).endswith("It is 7.<|im_end|>")
    ),
}


def _examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def _usage_examples() -> list:
    """By heading. The compiled one takes minutes of a CPU."""
    sections = (ROOT / "docs/usage.md").read_text(encoding="utf-8").split("\n## ")[1:]
    return [
        pytest.param(example, id=section.splitlines()[0], marks=[pytest.mark.slow] * ("compile_qlora" in example))
        for section in sections
        for example in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama and its tokenizer."""
    folder = str(tmp_path_factory.mktemp("usage") / "tiny")
    tokenizer = byte_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_committed_page_is_what_the_measurements_give(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == pages()[name]


def test_readme_has_two_pages_eight_claims_two_figures_and_three_examples() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 150
    assert len(re.findall(r"^\| [A-E]\. ", page, flags=re.MULTILINE)) == len(CLAIMS) == 8
    assert len(re.findall(r"^!\[", page, flags=re.MULTILINE)) == 2
    assert page.count("```python") == 3
    assert page.split("## Limits")[1].split("- ")[1].startswith("**No T4 ran this.**")


@pytest.mark.parametrize("name", PAGES)
def test_prose_has_at_most_120_characters_a_line(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith(("|", "![", "[!["))]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    page = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file
        assert target.exists(), link
        heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads], link


def test_claims_name_metrics_and_baselines_that_are_recorded() -> None:
    """A wrong name would leave a claim "not measured", or a baseline out, for ever."""
    folders = (ROOT / "notebook", ROOT / "benchmarks", ROOT / "resources/measurements")
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".json")]
    known = "".join(path.read_text(encoding="utf-8") for path in paths)
    for claim in CLAIMS:
        for name in (*claim.metrics, *claim.beside):
            assert f'"{name}"' in known, name


def test_claim_shows_values_baselines_hardware_and_weights(tmp_path: Path) -> None:
    _measure(
        tmp_path, "c_compile.json",
        ("peak_gib", "with checkpointing, 2 x 1024, float16", 1.25, "GiB", {"eager": 9.5}),
        ("peak_gib", "without checkpointing, 2 x 1024, float16", 2.5, "GiB", {"eager": 10.0}),
        ("step_ms", "with checkpointing, 2 x 1024, float16", 170.0, "ms", {"eager": 340.0}),
        ("step_ms", "without checkpointing, 2 x 1024, float16", 135.5, "ms", {}),
        ("gpu_busy_ms", "without checkpointing, 2 x 1024, float16", 120.0, "ms", {"eager": 200.0}),
    )  # fmt: skip
    row = _claims(tmp_path)["C"]
    assert row.startswith("| C. A compiled QLoRA step")
    assert (
        "(without checkpointing, 2 x 1024, float16) | 2.5 GiB, 136 ms, 120 ms | eager 10 GiB, 200 ms | NVIDIA Test"
        in row
    )
    assert row.endswith("| NVIDIA Test, 2026-11-22 | random |")


def test_claim_with_a_missing_metric_is_not_measured(tmp_path: Path) -> None:
    _measure(tmp_path, "c_compile.json", ("peak_gib", "without checkpointing, tiny", 2.5, "GiB", {"eager": 10.0}))
    rows = _claims(tmp_path)
    assert len(rows) == 5  # a challenge each
    assert all(row.endswith(f"| {NOT_MEASURED} | - | - | - |") for row in rows.values())


@pytest.mark.parametrize("kind, shown", [("real", "real"), ("4 layers, random", "4 layers, random")])
def test_claim_of_challenge_b_fills_itself_and_tells_its_weights(tmp_path: Path, kind: str, shown: str) -> None:
    case = "the script, two GPUs"
    _measure(
        tmp_path, "b_fsdp2.json",
        ("loss_difference", "FSDP2 against one GPU", 1e-6, "loss", {}),
        ("steps_trained", f"2 x NVIDIA Test, NCCL, {kind} weights", 60, "steps", {}),
        ("loss_difference", case, 0.0021, "loss", {"one GPU, regrouped": 0.0018}),
        ("scaling", case, 0.5, "x", {}),
        ("scaling", "4 layers of 8B, 4 x 2048 a GPU", 1.86, "x", {}),
    )  # fmt: skip
    first, second = (row for row in claims_table(tmp_path).splitlines() if row.startswith("| B."))
    assert first.endswith(
        f"| 0.0021 nats | one GPU, rows in another order 0.0018 nats | NVIDIA Test, 2026-11-22 | {shown} |"
    )
    assert second.endswith("(4 layers of 8B, 4 x 2048 a GPU) | 1.86x | - | NVIDIA Test, 2026-11-22 | random |")


_OF_KINDS = (("", 0.9), (", one call", 0.95), (", held-out tool", 0.8))


def test_claim_of_challenge_d_fills_itself(tmp_path: Path) -> None:
    others = {"majority": 0.02, "naive Bayes": 0.5, "TF-IDF logistic regression": 0.61}
    _measure(tmp_path, "d_issues.json", ("macro_f1", "docstrings, SmolLM2-135M in NF4", 0.7, "fraction", others))
    classifier, tools = (line for line in claims_table(tmp_path).splitlines() if line.startswith("| D."))
    assert "| 0.7 | majority 0.02; naive Bayes 0.5; TF-IDF logistic regression 0.61 | NVIDIA Test" in classifier
    assert classifier.endswith("| real |") and "| not measured |" in tools
    kinds = [("tool_calling", f"exact call{of}", share, "fraction", {"before": 0.0}) for of, share in _OF_KINDS]
    _measure(tmp_path, "d_issues.json", *kinds)
    assert "share answered by exact calls | 0.9 | before 0 | NVIDIA Test" in _claims(tmp_path)["D"]


def test_rehearsal_of_a_claim_says_so(tmp_path: Path) -> None:
    of_head = ("head only", 0.5, "GiB", {"TRL": 0.6}), ("head only", 20.0, "ms", {"TRL": 21.0})
    records = [(metric, *one) for metric, one in zip(("grpo_peak_gib", "grpo_ms"), of_head, strict=True)]
    _measure(tmp_path, "e_backprop.json", *records, rehearsal=True)
    assert "| NVIDIA Test held to a T4's limits (a rehearsal), 2026-11-22 |" in _claims(tmp_path)["E"]


def test_minutes_are_predicted_for_a_t4_and_measured_for_the_gpu_of_the_run(tmp_path: Path) -> None:
    digest = STAMP["digest"]
    section = {"predicted_t4_seconds": 300, "digest": digest}
    _rehearse(tmp_path, A=section, C={**section, "predicted_t4_seconds_at_least": 200})
    t4, cpu, large = minutes_table(tmp_path, _executed(), STAMP).splitlines()[2:]
    assert t4 == "| a T4 | 8 to 10 (predicted) | a rehearsal on NVIDIA Other, 2026-11-20; sections A, C |"
    assert cpu == "| a CPU | not measured | - |"
    assert large == "| a large GPU | 6 | the published run on NVIDIA Test, 2026-11-22; sections A, E |"


def test_sections_rehearsed_with_earlier_code_are_named(tmp_path: Path) -> None:
    section = {"predicted_t4_seconds": 300, "digest": STAMP["digest"]}
    _rehearse(tmp_path, A=section, C={**section, "digest": "another"})
    t4 = minutes_table(tmp_path, _executed(), STAMP).splitlines()[2]
    where = "a rehearsal on NVIDIA Other, 2026-11-20; sections A, C; C with other code than the published"
    assert t4 == f"| a T4 | 10 (predicted) | {where} |"


def test_tests_of_other_code_say_so(tmp_path: Path) -> None:
    path, ours = tmp_path / "matrix.json", {"tests": {"digest": "ours"}, "kernels": {"digest": "another"}}
    assert of_which_code(path, "ours") == ""
    path.write_text(json.dumps({"oldest": ours, "newest": {"kernels": {"digest": "ours"}}}))
    assert of_which_code(path, "ours") == ""
    path.write_text(json.dumps({"oldest": ours, "newest": {"tests": {"digest": "another"}}}))
    assert of_which_code(path, "ours") == ", some with other code"


def test_errors_of_the_rehearsal_are_counted(tmp_path: Path) -> None:
    assert rehearsal_errors(tmp_path / "rehearsal.json") == "None is kept."
    _rehearse(tmp_path, A={"errors": []}, C={"errors": []})
    assert rehearsal_errors(tmp_path / "rehearsal.json") == "It lists no error."
    _rehearse(tmp_path, A={"errors": []}, C={"errors": ["a", "b"]}, D={"errors": ["c"]})
    assert rehearsal_errors(tmp_path / "rehearsal.json") == "It lists errors in sections: C 2, D 1."


@pytest.mark.parametrize(
    "same, shown", [(True, "5 | {}"), (False, "not measured | {}; with other code than the published")]
)
def test_minutes_of_a_run_on_a_cpu(tmp_path: Path, same: bool, shown: str) -> None:
    kept = {"date": "2026-11-20", "cores": 2, "seconds": 290.0, "sections": "A, B", "digest": STAMP["digest"]}
    (tmp_path / "cpu_run.json").write_text(json.dumps(kept if same else {**kept, "digest": "another"}))
    cpu = minutes_table(tmp_path, _executed(), STAMP).splitlines()[3]
    where = "a run on 2 cores of a CPU, 2026-11-20; sections A, B"
    assert cpu == f"| a CPU | {shown.format(where)} |"


def test_minutes_of_a_run_on_a_t4_are_not_those_of_a_large_gpu(tmp_path: Path) -> None:
    t4, _, large = minutes_table(tmp_path, _executed(), {**STAMP, "hardware": "Tesla T4"}).splitlines()[2:]
    assert t4 == "| a T4 | 6 | the published run on Tesla T4, 2026-11-22; sections A, E |"
    assert large == "| a large GPU | not measured | - |"
    t4 = minutes_table(tmp_path, _executed(), {**STAMP, "hardware": "NVIDIA T400 4GB"}).splitlines()[2]
    assert "the published run" not in t4


def test_minutes_that_nobody_knows_are_not_measured(tmp_path: Path) -> None:
    for sections in ({}, {"A": {"predicted_t4_seconds": 200}, "C": {"predicted_t4_seconds": None}}):
        _rehearse(tmp_path, **sections)
        shown = minutes_table(tmp_path, new_notebook(), STAMP)
        assert shown.count(f"| {NOT_MEASURED} | - |") == 3 and not re.search(r"\| \d", shown)


def test_committed_notebook_tells_its_seconds() -> None:
    seconds, sections = run_seconds(nbformat.read(ROOT / build_readme.NOTEBOOK, as_version=4))
    assert seconds > 60 and sections.startswith("A")


def test_figure_has_hardware_and_date_or_is_not_measured(tmp_path: Path) -> None:
    name = "a_nf4_bandwidth"
    assert shown_figure(tmp_path, name, "a_nf4.json").endswith(f": {NOT_MEASURED}.")
    (tmp_path / f"{name}.png").write_bytes(b"")
    assert shown_figure(tmp_path, name, "a_nf4.json").endswith(f": {NOT_MEASURED}.")
    (tmp_path / "measurements").mkdir()
    _measure(tmp_path / "measurements", "a_nf4.json")
    assert shown_figure(tmp_path, name, "a_nf4.json").endswith(". NVIDIA Test, 2026-11-22, random weights.")


def test_a_comparison_in_a_sentence_has_its_case_and_hardware(tmp_path: Path) -> None:
    path, metric = tmp_path / "a_nf4_sweeps.json", "harness_speedup_beside_unsloth"
    assert by_case(path, metric) == NOT_MEASURED
    _measure(tmp_path, path.name, (metric, "all, against Unsloth 1", 1.25, "x", {}), ("another", "all", 2.0, "x", {}))
    assert by_case(path, metric) == "1.25x (against Unsloth 1), NVIDIA Test, 2026-11-22"


def test_what_two_gpus_reached_stands_beside_the_prediction(tmp_path: Path) -> None:
    path = tmp_path / "b_fsdp2_sweeps.json"
    assert on_two_gpus(path) == f"On two GPUs: {NOT_MEASURED}."
    bandwidth = ("gather_bytes_per_s", "all-gather of a layer's size", 165e9, "bytes/s", {})
    _measure(tmp_path, path.name, bandwidth)
    assert on_two_gpus(path) == f"On two GPUs: {NOT_MEASURED}."
    others = [
        ("scaling", f"{kind}, {rows} rows a GPU", 0.8, "x", {}) for kind, rows in (("uncompiled", 4), ("compiled", 1))
    ]
    _measure(tmp_path, path.name, bandwidth, *others, ("scaling", "compiled, 4 rows a GPU", 1.87, "x", {}))
    shown = on_two_gpus(path)
    assert "NVIDIA Test, 2026-11-22" in shown and "reached 1.87x and received 165 GB/s in an all-gather." in shown
    assert shown.endswith("1 x 2048 tokens reached 0.80x.")


def test_points_are_those_of_the_scorecard_and_say_which_gpu_is_missing() -> None:
    row = Row("A", "fast", 5, "", "met", 3, "NVIDIA Test")
    elsewhere = replace(row, challenge="E", verdict=f"met, {NOT_ON} T4", points=2)
    rows = [replace(row, challenge=challenge) for challenge in "ABCD"] + [elsewhere]
    said = points_sentence(rows)
    assert "earned 14 of 25 points (A 3, B 3, C 3, D 3, E 2). 2 points ask for a T4" in said
    assert points_sentence([replace(row, verdict="met") for row in rows]).endswith("E 2).")
    assert points_sentence([replace(row, hardware="") for row in rows]) == f"Their points: {NOT_MEASURED}."


def test_pages_without_any_measurement_hold_no_value(tmp_path: Path) -> None:
    made = pages(tmp_path)
    assert "Not measured yet." in made["RESULTS.md"] and made["README.md"].count(f"| {NOT_MEASURED} |") >= len(CLAIMS)
    for page in made.values():
        measured = page.replace(predicted_table(), "")  # which no measurement changes
        assert "<!--" not in page and not re.search(r"\d\.\d\dx|\d (GiB|ms|us|tokens/s)", measured)


def test_check_finds_a_page_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"README.md": "one\n", "RESULTS.md": "two\n"}
    monkeypatch.setattr(build_readme, "ROOT", tmp_path)
    monkeypatch.setattr(build_readme, "pages", lambda: made)
    assert build_readme.main(["--check"]) == 1
    assert build_readme.main([]) == 0
    assert {name: (tmp_path / name).read_text() for name in made} == made
    assert build_readme.main(["--check"]) == 0
    for name in made:
        (tmp_path / name).write_text(made[name] + " ", encoding="utf-8")
        assert build_readme.main(["--check"]) == 1
        (tmp_path / name).write_text(made[name], encoding="utf-8")


def test_readme_examples_run() -> None:
    """The first as it stands, on the CPU; of those that need a real model, imports and names only."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("trl")
    weight, fsdp2, trainers = _examples("README.md")
    names: dict = {}
    exec(weight.replace('"cuda"', '"cpu"'), names)
    assert names["weight"].shape == (1024, 512) and str(names["weight"].dtype) == "torch.float16"
    for example in (fsdp2, trainers):
        imports = [node for node in ast.parse(example).body if isinstance(node, ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "imports", "exec"), names)
    for name in (
        "use_memory_efficient_loss", "MemoryEfficientGRPOTrainer", "compile_qlora", "pack_nf4", "fsdp2_arguments",
        "prepare_trainer", "save_adapters",
    ):  # fmt: skip
        assert callable(names[name])


@pytest.mark.parametrize("example", _usage_examples())
def test_usage_example_runs(example: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with tiny models in the place of those that an example names or leaves to its user."""
    for library in ("bitsandbytes", "trl", "torchvision", "gguf"):
        pytest.importorskip(library)
    names = _yours(example, checkpoint)
    monkeypatch.chdir(tmp_path)
    example = re.sub(r"unsloth/Llama-3.2-1B(-bnb-4bit)?", checkpoint, example)
    exec(_one_step(example).replace('"cuda"', '"cpu"'), names)
    for name in CHECKS.keys() & names.keys():
        assert CHECKS[name](names), name


@pytest.mark.parametrize("example", _usage_examples())
def test_usage_example_says_what_it_does_not_define(example: str) -> None:
    comments = " ".join(re.findall(r"^# ([^:]*):", example, flags=re.MULTILINE))
    assert _undefined(example) <= {*re.findall(r"\w+", comments)}


def test_vision_rows_train_under_a_plain_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a `Dataset` and as a list, with `remove_unused_columns=False`. SFTTrainer refuses a list."""
    pytest.importorskip("trl")
    pytest.importorskip("torchvision")
    (example,) = (one for one in _examples("docs/usage.md") if "VisionCollator" in one)
    names = _yours(example, "")
    monkeypatch.chdir(tmp_path)
    exec(_one_step(example), names)
    model, collator = names["model"], names["trainer"].data_collator
    for rows in (names["rows"], list(names["rows"])):
        arguments = transformers.TrainingArguments("out", use_cpu=True, max_steps=1, remove_unused_columns=False)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collator)
        assert trainer.train().global_step == 1
    with pytest.raises(TypeError):
        names["SFTTrainer"](model, names["trainer"].args, train_dataset=rows, data_collator=collator)


def _undefined(example: str) -> set[str]:
    """The names that an example reads and does not define."""
    module = symtable.symtable(example, "example", "exec")
    tables = [module, *module.get_children()]
    read = {one.get_name() for table in tables for one in table.get_symbols() if one.is_global() or table is module}
    defined = {one.get_name() for one in module.get_symbols() if one.is_assigned() or one.is_imported()}
    return read - defined - set(dir(builtins))


def _yours(example: str, checkpoint: str) -> dict:
    """Tiny models and rows for the names that an example leaves to its user."""
    wanted = _undefined(example)
    given: dict = {}
    if "VisionCollator" in example:
        given["processor"], given["model"] = FAMILIES["qwen2_vl"]()
    elif "model" in wanted:
        given["model"] = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        given["tokenizer"] = given["processor"] = byte_tokenizer()
    if "compile_qlora" in example:
        from peft import LoraConfig, get_peft_model

        quantised = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantised)
        given["model"] = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        given["data"] = [{"input_ids": [*range(24)], "labels": [*range(24)]}] * 8
    return {name: given[name] for name in wanted}


def _one_step(example: str) -> str:
    """The example with trainers that make one step on the CPU."""
    settings = "use_cpu=True, bf16=False, max_steps=1, report_to=[]"
    return re.sub(r'(TrainingArguments|SFTConfig)\("out"', rf'\1("out", {settings}', example)


def _learned(names: dict) -> str:
    """The tokens with labels, as text."""
    return names["tokenizer"].decode([label for label in names["example"]["labels"] if label >= 0])


def _measure(folder: Path, file: str, *records: tuple, rehearsal: bool = False) -> None:
    keys = ("metric", "case", "value", "unit", "baselines")
    head = {"hardware": {"name": "NVIDIA Test", "rehearsal": rehearsal}, "date": "2026-11-22"}
    written = [dict(zip(keys, record, strict=True)) for record in records]
    (folder / file).write_text(json.dumps({**head, "records": written}))


def _claims(folder: Path) -> dict[str, str]:
    """The row of each challenge, of B, D and E the last."""
    return {line[2]: line for line in claims_table(folder).splitlines()[2:]}


def _rehearse(folder: Path, **sections: dict) -> None:
    kept = {"hardware": {"name": "NVIDIA Other"}, "date": "2026-11-20", "sections": sections}
    (folder / "rehearsal.json").write_text(json.dumps(kept))


def _executed() -> nbformat.NotebookNode:
    """A notebook that reports 359.6 s: set-up, A and E."""
    lines = ("| Set-up | 3.5 s | 2 GiB | - |", "| A. NF4 | 65.9 s | 9 GiB | - |", "| E. Loss | 290.2 s | 3 GiB | - |")
    shown = new_output("stream", text="\n".join(lines) + "\n")
    quoted = new_output("stream", text="| C. Not of the report | 999.0 s | 2 GiB | - |\n")
    report = new_code_cell("section.summary()", outputs=[shown], metadata={"tags": ["report"]})
    return new_notebook(cells=[new_code_cell("1", outputs=[quoted]), report])

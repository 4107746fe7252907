"""Each feature of FSDP2, on QLoRA of a small Llama: what it does, and losses and norms of two ranks beside one process.

    python -m benchmarks.fsdp2.features OUT                                       one process
    torchrun --nproc_per_node 2 -m benchmarks.fsdp2.features OUT                  two

Every process draws the same weights, adapters and rows; a rank takes its share of the rows. The layers of the one
process are bitsandbytes' own.
"""

import contextlib
import math
import sys
from collections.abc import Callable

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from benchmarks.fsdp2 import formula, ranks
from benchmarks.fsdp2.ranks import RANK, WORLD
from benchmarks.fsdp2.watch import Watch
from benchmarks.models import random_nf4_llama, tiny_llama_config
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss
from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.bench.record import write_json
from unsloth_puzzles.device import capability
from unsloth_puzzles.fsdp2 import linear
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.shard import shard_qlora

STEPS, ROWS, LENGTH, VOCABULARY, CHUNK = 3, 4, 17, 256, 16
OVERFLOWING = 1  # the step of "GradScaler" in which one rank's gradients hold an infinity
FEATURES = {  # by name: options of `train`
    "per-parameter sharding": {},
    "gathered weights kept after the forward": {"reshard_after_forward": False},
    "CPU offload": {"offload": True},
    "activation checkpointing": {"checkpointing": True},
    "embedding and head sharded": {"shard_embeddings": True},
    "chunked loss, replicated head": {"chunked": True},
    "chunked loss, sharded head": {"chunked": True, "shard_embeddings": True},
    "layers captured one by one": {"compiled": True},
    "fused AdamW": {"fused": True},
    "accumulation without communication": {"accumulation": 2},
    "GradScaler, an infinity on one rank": {"scaler": True},
    "mixed precision": {"mixed": True},
    "DoRA": {"dora": True},
    "all together, not compiled": {
        "offload": True, "checkpointing": True, "shard_embeddings": True, "chunked": True, "accumulation": 2
    },
}  # fmt: skip
PLAIN, SCALER, MIXED = "per-parameter sharding", "GradScaler, an infinity on one rank", "mixed precision"
DORA = "DoRA"
REGROUPED = "mixed precision, rows summed in another order"
ALONE = {  # what one process runs; a feature that has no run of its own there must not change PLAIN's losses
    PLAIN: {}, SCALER: {"scaler": True}, MIXED: {"mixed": True}, REGROUPED: {"mixed": True, "accumulation": 2},
    DORA: {"dora": True},
}  # fmt: skip
LINEAR = 14  # 4-bit layers of the model
LARGEST_DIFFERENCE = 1e-5  # of a loss, float32: two halves of a batch are summed in another order than the whole
LARGEST_NORM_DIFFERENCE = 1e-4  # relative, of the gradients' norm


def qlora(
    checkpointing: bool = False, dtype: torch.dtype = torch.float32, dora: bool = False, rank: int = 4
) -> torch.nn.Module:
    """A tiny Llama in NF4 and `dtype` on this rank's device, with float32 adapters whose B is not zero, in training."""
    device = ranks.device()
    torch.manual_seed(11)
    model = random_nf4_llama(tiny_llama_config(VOCABULARY), device, dtype)
    model.config.use_cache = False
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora)
    model = get_peft_model(model, config)
    for layer in model.base_model.model.model.layers[::2] if dora else ():  # PEFT's DoRA has a path for dropout
        for module in layer.modules():
            if isinstance(module, LoraLayer):
                module.lora_dropout["default"] = torch.nn.Tanh()
    generator = torch.Generator().manual_seed(12)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(device) * 0.1
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def train(
    *,
    checkpointing: bool = False,
    chunked: bool = False,
    compiled: bool = False,
    accumulation: int = 1,
    fused: bool = False,
    scaler: bool = False,
    mixed: bool = False,
    dora: bool = False,
    rows: int = ROWS,
    rank: int = 4,
    **sharding: bool,
) -> dict[str, object]:
    """Train STEPS steps of `rows` rows, in one process without FSDP2, in several with it.

    Args:
        checkpointing: Compute activations again in the backward.
        chunked: Compute the loss by `use_memory_efficient_loss`.
        compiled: Capture each decoder layer's forward without a graph break, inside FSDP2's hooks; Inductor, which
            takes minutes, is left to `steps`.
        accumulation: Micro-batches of a step; several ranks communicate gradients after the last one only.
        fused: Use AdamW's fused kernel.
        scaler: Use a GradScaler, and put an infinity into the last rank's gradients in step OVERFLOWING.
        mixed: Compute in 16 bits (bfloat16, float16 below sm_80); reduce gradients in float32.
        dora: Train DoRA adapters.
        rows: Of a step, over all ranks.
        rank: Of the adapters.
        sharding: Options of `shard_qlora`.

    Returns:
        "device"; "losses" over all rows and "norms" of the gradients, by step; "scales" of the scaler; "magnitudes", of
        DoRA's the gradients of the first step; "plain_layers", how many layers are bitsandbytes' own. Of several ranks
        also, of this rank,

        - "share" of the 4-bit bytes, "trained" elements, and "split", of the trained tensors, that it holds;
          "embeddings_split", whether embedding and head are sharded; "shards_on" and "states_on", kinds of devices of
          shards and AdamW's states;
        - "changed", bytes that a layer saw changed, and "compared", its layers;
        - by micro-batch "gathered" (all-gathers), "scattered" (reduce-scatters), "forwards" of the first layer;
        - "computed" and "reduced", the dtypes of adapters in that layer and of gradients when they were reduced;
        - "logit_rows", the most that one product made in the last step; "updates", operators of the optimizer;
          "captures" and "graph_breaks". Hooks would break captured layers: there "compared" is 0, "logit_rows" None.
    """
    dtype = _half() if mixed else None
    model, watch = qlora(checkpointing, dtype or torch.float32, dora, rank), Watch()
    with contextlib.ExitStack() as stack:
        if WORLD > 1:
            pack_nf4(model)
            watch.streams(model)
        if chunked:
            stack.enter_context(use_memory_efficient_loss(model, chunk_size=CHUNK))
        counts = stack.enter_context(count_compilations())
        if compiled:
            for layer in model.get_base_model().model.layers:
                layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True, dynamic=False)
        if WORLD > 1:
            shard_qlora(model, ranks.mesh(), param_dtype=dtype, **sharding)
            watch.layers(model, bytes=not compiled)
        found = _steps(model, watch, rows, accumulation, fused, scaler, dtype, products=not compiled)
    found["plain_layers"] = sum(type(module) is Linear4bit for module in model.modules())
    return found | {"captures": len(counts.captures), "graph_breaks": sum(counts.graph_breaks.values())}


def _steps(
    model, watch, rows: int, accumulation: int, fused: bool, scaler: bool, dtype: torch.dtype | None, products: bool
) -> dict:
    device = ranks.device()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=fused)
    scale = torch.amp.GradScaler(device.type, init_scale=8.0, growth_interval=100, enabled=scaler)
    losses, norms, scales, magnitudes = [], [], [], []
    for step in range(STEPS):
        ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(step))
        own, total = ids.chunk(WORLD)[RANK], 0.0
        for number, batch in enumerate(own.to(device).chunk(accumulation), 1):
            if WORLD > 1:
                model.set_requires_gradient_sync(number == accumulation)
            with watch.micro_batch(), torch.autocast(device.type, dtype, enabled=dtype is not None):
                with watch.products(VOCABULARY) if products and step == STEPS - 1 else contextlib.nullcontext():
                    loss = model(input_ids=batch, labels=batch).loss / accumulation
                scale.scale(loss).backward()
            total += loss.detach().float()
        if scaler and step == OVERFLOWING and RANK == WORLD - 1:
            gradient = trained[0].grad
            (gradient.to_local() if WORLD > 1 else gradient).view(-1)[0] = math.inf
        scale.unscale_(optimizer)
        if step == 0:
            magnitudes = [ranks.gathered(one.grad) for one in trained if one.ndim == 1]
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
        with watch.update():
            scale.step(optimizer)
        scale.update()
        optimizer.zero_grad()
        losses.append(ranks.average(total))
        norms.append(ranks.whole(norm).item())
        scales.append(scale.get_scale())
    norms = [norm if math.isfinite(norm) else None for norm in norms]  # JSON has no infinity
    found = {"device": device.type, "losses": losses, "norms": norms, "scales": scales, "magnitudes": magnitudes}
    return found | watch.found(model, optimizer)


def _half() -> torch.dtype:
    has_bf16 = not torch.cuda.is_available() or capability() >= 80
    return torch.bfloat16 if has_bf16 else torch.float16


def verdict(two: dict[str, dict], one: dict[str, dict]) -> tuple[list[dict], dict[str, bool]]:
    """A row for each feature, and the checks.

    Args:
        two: What `main` has written of two ranks.
        one: The same of one process.

    Returns:
        Rows with "feature", the largest "loss" and "norm" difference, what is "allowed" of each, the "share" of the
        4-bit bytes that a rank holds, and what was "seen"; whether each check holds, by name.
    """
    rows, checks = [], {}
    for name in FEATURES:
        found, (loss, norm), most = two[name], differences(name, two, one), allowed(name, one)
        checks[f"{name}: losses and norms"] = loss <= most[0] and norm <= most[1]
        checks[f"{name}: gradients"] = min(norm for norm in found["norms"] if norm is not None) > 0
        checks[f"{name}: half of the 4-bit bytes"] = found["share"] == 1 / 2
        if found["compared"]:  # hooks that compare would break the captured layers
            checks[f"{name}: bytes"] = found["compared"] == LINEAR and found["changed"] == 0
        effect, good = seen(name, two, one)
        if good is not None:  # else this machine cannot show it
            checks[f"{name}: seen"] = good
        row = {"feature": name, "loss": loss, "norm": norm, "allowed": most, "share": found["share"], "seen": effect}
        rows.append(row)
    checks["the run without a feature shows none"] = unseen(two, one)
    checks["the one process has bitsandbytes' own layers"] = one[PLAIN]["plain_layers"] == LINEAR
    checks["gradients are reduced in float32"] = all(found["reduced"] == ["torch.float32"] for found in two.values())
    compared = sum(found["compared"] == LINEAR for found in two.values())
    checks["bytes were compared in every run but the compiled one"] = compared == len(two) - 1
    return rows, checks


def differences(name: str, two: dict[str, dict], one: dict[str, dict]) -> tuple[float, float]:
    """Of the losses, absolute, and of the gradients' norms, relative, over the steps; infinite where a run is not.

    Args:
        name: Of the feature.
        two: What `main` has written of several ranks.
        one: The same of one process.
    """
    ours, alone = two[name], one[name if name in ALONE else PLAIN]
    return _apart(ours, alone)


def allowed(name: str, one: dict[str, dict]) -> tuple[float, float]:
    """The largest `differences` that may be: in 16 bits twice those of one process that sums its rows in two orders.

    Twice, for the ranks sum in a third order: it differs from the first by no more than from the second, and the second
    from the first, together.
    """
    if name != MIXED:
        return LARGEST_DIFFERENCE, LARGEST_NORM_DIFFERENCE
    loss, norm = _apart(one[MIXED], one[REGROUPED])
    return 2 * loss, 2 * norm


def seen(name: str, two: dict[str, dict], one: dict[str, dict]) -> tuple[str, bool | None]:
    """Describe what a feature did, and whether that is what it is for; None where this machine cannot show it.

    Args:
        name: Of the feature.
        two: What `main` has written of several ranks.
        one: The same of one process.
    """
    found, plain = two[name], two[PLAIN]
    if name == PLAIN:
        return f"{found['split']:.0%} of the trained tensors are sharded", found["split"] == 1
    effects = [EFFECTS[option](found, plain, one) for option in FEATURES[name]]
    goods = [good for _, good in effects]
    return "; ".join(text for text, _ in effects), None if set(goods) == {None} else False not in goods


def unseen(two: dict[str, dict], one: dict[str, dict]) -> bool:
    """Whether the run without any feature shows no effect of one: else `seen` would prove nothing."""
    return not any(effect(two[PLAIN], two[PLAIN], one)[1] for effect in EFFECTS.values())


def _kept(found: dict, plain: dict, one: dict) -> tuple[str, bool]:
    ours, theirs = found["gathered"][0], plain["gathered"][0]
    return f"{ours} all-gathers a step; {theirs} without it", ours < theirs


def _offloaded(found: dict, plain: dict, one: dict) -> tuple[str, bool | None]:
    if found["device"] == "cpu":
        return "no other device here", None
    places = found["shards_on"] + found["states_on"]
    return f"shards on {found['shards_on'][0]}, AdamW's states on {found['states_on'][0]}", set(places) == {"cpu"}


def _checkpointed(found: dict, plain: dict, one: dict) -> tuple[str, bool]:
    return f"{found['forwards'][0]} forwards of a layer", set(found["forwards"]) == {2}


def _embeddings(found: dict, plain: dict, one: dict) -> tuple[str, bool]:
    return f"embedding and head {'sharded' if found['embeddings_split'] else 'whole'}", found["embeddings_split"]


def _chunked(found: dict, plain: dict, one: dict) -> tuple[str, bool]:
    rows = found["logit_rows"]
    return f"{rows} rows of logits at most; {plain['logit_rows']} without it", 0 < rows <= CHUNK < plain["logit_rows"]


def _captured(found: dict, plain: dict, one: dict) -> tuple[str, bool]:
    captures, breaks = found["captures"], found["graph_breaks"]
    return f"{captures} captured graphs, {breaks} graph breaks", captures > 0 and breaks == 0


def _fused(found: dict, plain: dict, one: dict) -> tuple[str, bool]:
    used = "aten._fused_adamw_" in found["updates"]
    return f"{'aten._fused_adamw_ has' if used else 'plain operators have'} written", used


def _accumulated(found: dict, plain: dict, one: dict) -> tuple[str, bool]:
    first, last = found["scattered"][:-1:2], found["scattered"][1::2]
    good = len(found["scattered"]) == 2 * STEPS and set(first) == {0} and min(last) > 0
    return f"{', '.join(map(str, found['scattered'][:2]))} reduce-scatters by micro-batch", good


def _skipped(found: dict, plain: dict, one: dict) -> tuple[str, bool]:
    scales = found["scales"]
    good = found["norms"][OVERFLOWING] is None and scales[OVERFLOWING] == scales[OVERFLOWING - 1] / 2
    return f"scale {', '.join(f'{scale:g}' for scale in scales)} on the rank without the infinity", good


def _mixed(found: dict, plain: dict, one: dict) -> tuple[str, bool]:
    computed, reduced = (", ".join(found[key]).replace("torch.", "") for key in ("computed", "reduced"))
    good = computed in ("bfloat16", "float16") and reduced == "float32"
    return f"adapters in {computed}, gradients reduced in {reduced}", good


def _magnitudes(found: dict, plain: dict, one: dict) -> tuple[str, bool]:
    ours, theirs = found["magnitudes"], one[DORA]["magnitudes"]
    if len(ours) != len(theirs):
        return f"{len(ours)} magnitudes", False
    apart = max(math.dist(a, b) / math.hypot(*b) for a, b in zip(ours, theirs, strict=True))
    return f"gradients of {len(ours)} magnitudes differ by {apart:.1e}", apart <= LARGEST_NORM_DIFFERENCE


EFFECTS: dict[str, Callable[[dict, dict, dict], tuple[str, bool | None]]] = {  # by option of `train`
    "reshard_after_forward": _kept, "offload": _offloaded, "checkpointing": _checkpointed, "chunked": _chunked,
    "shard_embeddings": _embeddings, "compiled": _captured, "fused": _fused, "accumulation": _accumulated,
    "scaler": _skipped, "mixed": _mixed, "dora": _magnitudes,
}  # fmt: skip


def _apart(a: dict, b: dict) -> tuple[float, float]:
    losses = (abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True))
    norms = (_relative(x, y) for x, y in zip(a["norms"], b["norms"], strict=True))
    return max(losses), max(norms)


def _relative(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b) / b


def main(out: str, *names: str) -> None:
    """Train with the features of these names, or with all; one process makes the runs of ALONE."""
    ranks.start()
    found = {}
    for name, options in (ALONE if WORLD == 1 else FEATURES).items():
        if WORLD > 1 and names and name not in names:
            continue
        if not torch.cuda.is_available():  # Triton's interpreter takes seconds a step
            linear._OPS = torch.ops.unsloth_puzzles if name == PLAIN else formula.OPERATORS
        found[name] = train(**options)
        if RANK == 0:
            write_json(out, found)
    if RANK == 0:
        print(f"{len(found)} runs of {STEPS} steps ended", flush=True)
    ranks.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])

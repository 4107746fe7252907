"""Every backend of attention against float64, and how often flex attention is compiled for lengths, windows, documents.

    for name, found in check_backends("cuda", torch.float16).items(): ...
    found = check_flex("cuda", torch.float16)

Forward and, on a GPU, backward. A backend's error may be no larger than that of the formula computed in float32 on the
same inputs plus two roundings of its dtype, since kernels round the probabilities and the output, too. A rounding is
at most half of the dtype's epsilon, so two roundings are one epsilon of the norm. Gradients of query and key may have
four roundings more of the term that a softmax subtracts, which cancels where a query sees few keys.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from benchmarks.models import SEED
from unsloth_puzzles.attention import BACKENDS, attention
from unsloth_puzzles.bench.compilations import Counts, count_compilations
from unsloth_puzzles.device import capability

REQUESTS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 100},
    "packed": {"documents": True},
    "packed with a window": {"documents": True, "window": 50},
    "soft cap": {"soft_cap": 2.0},
}
REFUSED = {"soft cap": ("flash", "xformers", "sdpa")}  # requests, and the backends that cannot do them
WINDOWS = (None, 64, 1000)
LENGTHS = 50


@dataclass
class Checked:
    """One backend. `checks`: {name: whether it holds}. `beside_sdpa`: its errors as multiples of SDPA's, a list a
    request. `missing`: why it cannot run here, or None."""

    checks: dict[str, bool] = field(default_factory=dict)
    beside_sdpa: list[list[float]] = field(default_factory=list)
    missing: str | None = None


@dataclass
class FlexChecked:
    """`checks`: by "static", "dynamic", "windows" and "packed", {name: whether it holds}; "static" has the first three
    calls of "dynamic". `counts`: what was compiled. `lengths`: those of the sequences, in turn."""

    checks: dict[str, dict[str, bool]]
    counts: Counts
    lengths: list[int]


class Inputs:
    """Random queries, keys, values and document ids on `device` in `dtype`, the same ones for a seed."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = SEED):
        self.device, self.dtype, self.generator = device, dtype, torch.Generator().manual_seed(seed)

    def draw(self, length: int, heads: int = 4, kv_heads: int = 2, size: int = 2, width: int = 64):
        """([query, key, value], documents): (size, heads, length, width) each, and (size, length) integers."""
        data = [torch.randn(size, n, length, width, generator=self.generator) for n in (heads, kv_heads, kv_heads)]
        documents = (torch.rand(size, length, generator=self.generator) < 8 / length).cumsum(-1)
        return [tensor.to(self.device, self.dtype) for tensor in data], documents.to(self.device)


def check_backends(device: str, dtype: torch.dtype, lengths: Iterable[int]) -> dict[str, Checked]:
    """Each request on each backend at each of `lengths`; what a backend cannot do it must refuse by name.

    On a GPU below sm_80 flash attention must be refused by name, which is its one check there.
    """
    found = {}
    for backend, one in BACKENDS.items():
        found[backend] = checked = Checked(missing=one.missing(torch.device(device)))
        if checked.missing:
            if backend == "flash" and 0 < capability(device) < 80:
                checked.checks["refused by name below sm_80"] = _refuses(device, dtype)
            continue
        inputs = Inputs(device, dtype)
        for name, request in REQUESTS.items():
            for length in lengths:
                data, documents = inputs.draw(length)
                asked = {**request, **({"documents": documents} if "documents" in request else {})}
                if backend in REFUSED.get(name, ()):
                    checked.checks[f"{name}: refused by name"] = _refuses_request(data, backend, asked)
                    continue
                beside = None if "soft_cap" in asked or backend == "sdpa" else checked.beside_sdpa
                checked.checks[f"{name}, length {length}"] = close(data, backend, asked, beside)
    return found


def check_flex(device: str, dtype: torch.dtype) -> FlexChecked:
    """Flex attention over 52 lengths from 1 to 4096 (five short ones on a CPU), windows and packing varied as well.

    Afterwards three additional lengths with another window must not compile anything: `fail_on_recompile` would raise.
    """
    inputs, checks = Inputs(device, dtype), {"static": {}, "dynamic": {}, "windows": {}, "packed": {}}
    drawn = torch.randint(2, 4096, (LENGTHS,), generator=inputs.generator).tolist()
    lengths = [1, 4096, *drawn] if capability(device) else [1, 300, 40, 129, 64]

    def step(length: int, window: int | None, packed: bool, kinds: list[str]) -> None:
        data, documents = inputs.draw(length)
        asked = {"window": window, **({"documents": documents} if packed else {})}
        good = close(data, "flex", asked)
        for kind in kinds:
            shown = f"window {window}" if window else "no window"
            checks[kind][f"length {length}, {shown}, {'packed' if packed else 'one document'}"] = good

    torch._dynamo.reset()
    with count_compilations() as counts:
        for number, length in enumerate(lengths):
            window, packed = WINDOWS[number % 3], number % 2 == 0
            kinds = ["dynamic"] + ["windows"] * (window is not None) + ["packed"] * packed + ["static"] * (number < 3)
            step(length, window, packed, kinds)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (3, 111, 333):
            step(length, 17, True, ["dynamic", "windows", "packed"])
    return FlexChecked(checks, counts, lengths)


def close(data: list[torch.Tensor], backend: str, asked: dict, beside_sdpa: list | None = None) -> bool:
    """Whether output and gradients are as near to float64's as the module says. A NaN is not.

    The list `beside_sdpa` gets the errors as multiples of SDPA's on the same data.
    """
    dtype = data[0].dtype
    exact = _output_and_gradients([t.double() for t in data], "dense", asked, dtype)
    terms = _second_terms(data, asked, exact[0]) if data[0].is_cuda else [0]
    found, formula = (_errors(data, name, asked, exact) for name in (backend, "dense"))
    if beside_sdpa is not None:
        theirs = _errors(data, "sdpa", asked, exact)
        beside_sdpa.append([off / other for off, other in zip(found, theirs, strict=True)])
    eps = torch.finfo(dtype).eps  # two roundings
    allowed = [eps * (true.norm().item() + 2 * term) for true, term in zip(exact, terms, strict=True)]
    return all(off <= plain + more + 1e-6 for off, plain, more in zip(found, formula, allowed, strict=True))


def _refuses(device: str, dtype: torch.dtype) -> bool:
    data, _ = Inputs(device, dtype).draw(16)
    try:
        attention(*data, backend="flash")
    except (RuntimeError, ValueError) as refusal:
        return "must be one that runs here, got 'flash'" in str(refusal)
    return False


def _refuses_request(data: list[torch.Tensor], backend: str, asked: dict) -> bool:
    try:
        attention(*data, backend=backend, **asked)
    except ValueError as refusal:
        return f"{backend} cannot do" in str(refusal)
    return False


def _output_and_gradients(data, backend: str, asked: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    on_gpu = data[0].is_cuda
    data = [tensor.detach().requires_grad_(on_gpu) for tensor in data]
    out = attention(*data, backend=backend, **asked)
    return [out.detach(), *(torch.autograd.grad(out, data, _slope(out, dtype)) if on_gpu else ())]


def _slope(out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The upstream gradient: values that `dtype` holds, in the dtype of `out`."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(SEED)).to(dtype).to(out)


def _second_terms(data, asked: dict, out: torch.Tensor) -> list[float]:
    """Norms of what a softmax subtracts in the gradients of query and key: P times the sums of dO * O over a head.

    Kernels round O before they sum. Where the gradient cancels, with a single key all of it, that rounding remains.
    """
    dtype = data[0].dtype
    query, key, value = (tensor.double() for tensor in data)
    value.requires_grad_()
    sums = (_slope(out, dtype) * out).norm(dim=-1, keepdim=True) / query.shape[-1] ** 0.5
    of_query = sums * attention(query, key, key, backend="dense", **asked)
    of_key = torch.autograd.grad(attention(query, key, value, backend="dense", **asked), value, sums * query)[0]
    return [0, of_query.norm().item(), of_key.norm().item(), 0]


def _errors(data, backend: str, asked: dict, exact: list[torch.Tensor]) -> list[float]:
    """Norms of what output and gradients differ from float64's by."""
    found = _output_and_gradients(data, backend, asked, data[0].dtype)
    return [(tensor.double() - true).norm().item() for tensor, true in zip(found, exact, strict=True)]

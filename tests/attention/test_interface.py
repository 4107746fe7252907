"""Every backend that runs here gives what was asked for, or refuses by name; none answers with another mask."""

import math

import pytest
import torch

from tests.attention.conftest import draw, draw_documents, make_batch, sees
from unsloth_puzzles.attention import BACKENDS, attention, backend_table, prepare
from unsloth_puzzles.attention.backend import FEATURES
from unsloth_puzzles.attention.interface import choose
from unsloth_puzzles.attention.pattern import Pattern

REQUESTS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 9},
    "packed": {"documents": True},
    "packed, bidirectional": {"documents": True, "causal": False},
    "packed with a window": {"documents": True, "window": 5},
    "scale": {"scale": 0.4},
    "soft cap": {"soft_cap": 1.5, "scale": 0.4},
    "everything": {"documents": True, "window": 5, "soft_cap": 1.5, "scale": 0.4},
}
REFUSED = {name: ("soft cap", "everything") for name in ("flash", "xformers", "sdpa")} | {"flex": (), "dense": ()}
HERE = ("flex", "sdpa", "dense")


def by_definition(query, key, value, *, causal=True, window=None, documents=None, soft_cap=None, scale=None):
    """In float64, one head and one row at a time."""
    size, heads, q_length, width = query.shape
    pattern = Pattern(causal, window, soft_cap)
    mask = sees(pattern, make_batch(key.shape[2], q_length, documents=documents, size=size))
    rows = []
    for b in range(size):
        for h in range(heads):
            k, v = (t[b, h // (heads // t.shape[1])].double() for t in (key, value))
            scores = query[b, h].double() @ k.T * (1 / math.sqrt(width) if scale is None else scale)
            scores = scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)
            rows.append(scores.masked_fill(~mask[b], -math.inf).softmax(-1) @ v)
    return torch.stack(rows).view(size, heads, q_length, value.shape[-1])


def request(name, length):
    asked = dict(REQUESTS[name])
    if asked.get("documents"):
        asked["documents"] = draw_documents(length, 0.15)
    return asked


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("length, q_length", [(1, 1), (8, 8), (40, 40), (33, 1), (33, 12)])
def test_forward_equals_the_definition(name, backend, length, q_length):
    data = draw(length, q_length)
    asked = request(name, length)
    if name in REFUSED[backend]:
        with pytest.raises(ValueError, match=rf"^backend must be .*\(.*dense\), got '{backend}': {backend} cannot do "):
            attention(*data, backend=backend, **asked)
        return
    found, exact = attention(*data, backend=backend, **asked), by_definition(*data, **asked)
    assert found.shape == exact.shape and found.dtype == torch.float32
    assert (found - exact).norm() <= 5e-7 * exact.norm()


@pytest.mark.parametrize(
    "name, backend",
    [(name, backend) for name in REQUESTS for backend in ("sdpa", "dense") if name not in REFUSED[backend]],
)
def test_gradients_equal_those_of_the_definition(name, backend):
    length, asked = 23, request(name, 23)
    data = [t.requires_grad_() for t in draw(length, dtype=torch.float64)]
    slope = draw(length, seed=3, dtype=torch.float64)[0]
    found = torch.autograd.grad(attention(*data, backend=backend, **asked), data, slope)
    for one, other in zip(found, torch.autograd.grad(by_definition(*data, **asked), data, slope), strict=True):
        assert (one - other).norm() <= 1e-12 * other.norm()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", ["causal", "window", "packed, bidirectional"])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (9, 3)])
@pytest.mark.parametrize("head_size, value_size", [(24, 16), (16, 24), (20, 20), (96, 72)])
def test_sizes_of_heads(head_size, value_size, heads, kv_heads, name, backend):
    """Also no powers of two, and values of another size, as with latent attention."""
    query, key, _ = draw(17, heads=heads, kv_heads=kv_heads, head_size=head_size)
    value = draw(17, heads=heads, kv_heads=kv_heads, head_size=value_size, seed=1)[2]
    asked = request(name, 17)
    exact = by_definition(query, key, value, **asked)
    found = attention(query, key, value, backend=backend, **asked)
    assert found.shape == (2, heads, 17, value_size)
    assert (found - exact).norm() <= 5e-7 * exact.norm()


@pytest.mark.parametrize("backend", HERE)
def test_cross_attention(backend):
    """More queries than keys, or fewer, if each query sees all keys."""
    query, key, value = draw(9)
    exact = by_definition(query, key, value, causal=False)
    found = attention(query[:, :, :4], key, value, causal=False, backend=backend)
    assert (found - exact[:, :, :4]).norm() <= 5e-7 * found.norm()
    longer = torch.cat([query, query], dim=2)
    if backend == "flex":
        with pytest.raises(
            ValueError, match=r"^backend must be .*\(sdpa, dense\), got 'flex': flex cannot do 18 queries for 9 keys"
        ):
            attention(longer, key, value, causal=False, backend=backend)
        return
    found = attention(longer, key, value, causal=False, backend=backend)
    assert (found - torch.cat([exact, exact], dim=2)).norm() <= 5e-7 * found.double().norm()


def test_flex_refuses_gradients_on_a_cpu():
    query, key, value = draw(20)
    with pytest.raises(
        ValueError, match=r"^backend must be .*\(sdpa, dense\), got 'flex': flex cannot do gradients on a CPU$"
    ):
        attention(query.requires_grad_(), key, value, backend="flex")
    with torch.no_grad():
        attention(query, key, value, backend="flex")


EMPTY = {"rows": (0, 9, 9), "queries": (2, 0, 9), "queries and keys": (2, 0, 0), "all": (0, 0, 0)}


@pytest.mark.parametrize("asked", [{}, {"causal": False}, {"window": 3}, {"soft_cap": 1.5}], ids=str)
@pytest.mark.parametrize("size, q_length, kv_length", EMPTY.values(), ids=EMPTY)
def test_nothing_to_attend_gives_an_empty_result(size, q_length, kv_length, asked):
    """Flex and the kernels for packed sequences fail there, so that another backend is taken."""
    query, key, value = torch.ones(size, 4, q_length, 16), *torch.ones(2, size, 2, kv_length, 16)
    for backend in ("auto", "dense", "sdpa"):
        if backend != "sdpa" or "soft_cap" not in asked:
            found = attention(query, key, value, backend=backend, **asked)
            assert found.shape == query.shape and found.dtype == torch.float32
    got = f"flex cannot do an empty batch, got {size} rows, {q_length} queries and {kv_length} keys$"
    with pytest.raises(ValueError, match=rf"^backend must be .*dense\), got 'flex': {got}"):
        attention(query, key, value, backend="flex", **asked)
    batch = make_batch(9, size=0, dtype=torch.float16, device=torch.device("cuda"))
    refused = {name for name, one in BACKENDS.items() if "empty" in (one.refuses(Pattern(), batch) or "")}
    assert refused == {"flash", "flex", "xformers"}


def test_queries_without_keys_give_zeros():
    query, key, value = torch.ones(2, 4, 9, 16), *torch.ones(2, 2, 2, 0, 16)
    for backend in ("auto", "dense", "sdpa"):
        found = attention(query, key, value, causal=False, backend=backend)
        assert torch.equal(found, torch.zeros(2, 4, 9, 16))


@pytest.mark.parametrize("backend", ("auto", *HERE))
@pytest.mark.parametrize("heads, kv_heads, head_size", [(4, 0, 16), (0, 2, 16), (4, 2, 0)])
def test_no_heads_and_heads_of_size_0_are_refused(heads, kv_heads, head_size, backend):
    """PyTorch's SDPA without heads ends the process on a CPU (torch 2.11)."""
    query, key, value = torch.ones(2, heads, 9, head_size), *torch.ones(2, 2, kv_heads, 9, head_size)
    got = f"got {heads} and {kv_heads} heads of size {head_size}$"
    with pytest.raises(ValueError, match=f"^query and key must have heads of size 1 or more, {got}"):
        attention(query, key, value, backend=backend)


@pytest.mark.parametrize("backend", ("auto", *HERE))
@pytest.mark.parametrize(
    "asked", [{}, {"causal": False}, {"window": 3}, {"documents": True}, {"soft_cap": 1.5}], ids=str
)
@pytest.mark.parametrize("scale", [0, -0.7])
def test_scales_of_0_and_less(scale, asked, backend):
    """PyTorch masks with -inf and multiplies then, which is NaN or inf."""
    data, asked = draw(11), dict(asked)
    if asked.get("documents"):
        asked["documents"] = draw_documents(11, 0.3)
    if backend == "sdpa" and "soft_cap" in asked:
        return
    found = attention(*data, scale=scale, backend=backend, **asked)
    exact = by_definition(*data, scale=scale, **asked)
    assert (found - exact).norm() <= 5e-7 * exact.norm()


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_gradients_at_scales_of_0_and_less(scale):
    data = [one.requires_grad_() for one in draw(11)]
    found = torch.autograd.grad(attention(*data, scale=scale).square().sum(), data)
    exact = torch.autograd.grad(by_definition(*data, scale=scale).square().sum(), data)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() <= 2e-6 * other.norm()


def test_numbers_that_are_not_finite_are_refused():
    for scale in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"^scale must be a finite number or None, got {scale}$"):
            attention(*draw(6), scale=scale)
    for soft_cap in (math.inf, math.nan, 0.0):
        with pytest.raises(ValueError, match=f"^soft_cap must be a finite number above 0 or None, got {soft_cap}$"):
            attention(*draw(6), soft_cap=soft_cap)


def test_automatic_choice_is_the_first_backend_that_can():
    chosen = {
        name: choose(Pattern(a.get("causal", True), a.get("window"), a.get("soft_cap")), make_batch(9)).name
        for name, a in REQUESTS.items()
    }
    assert chosen["causal"] == chosen["window"] == "sdpa" and chosen["soft cap"] == "flex"
    assert choose(Pattern(soft_cap=2.0), make_batch(9, gradients=True)).name == "dense"
    with pytest.raises(ValueError, match=r"^backend must be .*: xformers cannot be compiled without a graph break"):
        prepare(Pattern(), make_batch(9, dtype=torch.float16), "xformers", fullgraph=True)


def test_features_match_what_each_backend_accepts():
    """A column at a time: what it claims is what it refuses or not. What it does not refuse it gives, as other tests
    show: here those above, on a GPU all backends'."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    documents = draw_documents(8, 0.3)
    asks = {
        "window": (Pattern(window=3), {"device": gpu}),
        "documents": (Pattern(), {"documents": documents, "device": gpu}),
        "soft cap": (Pattern(soft_cap=1.0), {"device": gpu}),
        "cache": (Pattern(), {"q_length": 2, "device": gpu}),
        "value heads": (Pattern(), {"value_head_size": 24, "device": gpu}),
        "float32": (Pattern(), {"dtype": torch.float32, "device": gpu}),
        "without a GPU": (Pattern(), {"device": cpu}),
        "gradients on a CPU": (Pattern(), {"device": cpu, "gradients": True}),
    }
    assert {*asks, "fullgraph"} == set(FEATURES)
    everything = set(FEATURES)
    assert {name: everything - backend.features for name, backend in BACKENDS.items()} == {
        "flash": {"soft cap", "cache", "value heads", "float32", "without a GPU", "gradients on a CPU"},
        "flex": {"gradients on a CPU"},
        "xformers": {"soft cap", "cache", "value heads", "without a GPU", "gradients on a CPU", "fullgraph"},
        "sdpa": {"soft cap"},
        "dense": set(),
    }
    for backend in BACKENDS.values():
        for feature, (pattern, options) in asks.items():
            batch = make_batch(8, **{"dtype": torch.float16, **options})
            needs = {feature} | ({"without a GPU"} if batch.device == cpu else set())
            assert (backend.refuses(pattern, batch) is None) == (needs <= backend.features), (backend.name, feature)
    lines = backend_table("cpu").splitlines()
    assert len(lines) == 2 + len(BACKENDS) and all(line.count("|") == lines[0].count("|") for line in lines)
    assert "it needs a CUDA GPU from sm_80 on" in lines[2]


@pytest.mark.parametrize(
    "argument, change",
    [
        ("query", lambda q, k, v: (q[0], k, v)),
        ("key", lambda q, k, v: (q, k.double(), v)),
        ("key", lambda q, k, v: (q, k[:1], v[:1])),
        ("value", lambda q, k, v: (q, k, v[:, :, 1:])),
        ("query", lambda q, k, v: (q[:, :3], k, v)),
        ("query", lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:])),
    ],
)
def test_mismatched_tensors_are_refused_by_name(argument, change):
    with pytest.raises(ValueError, match=f"^{argument} must "):
        attention(*change(*draw(6)))


LAYOUT = r"the layout is \(batch, heads, length, head size\)$"


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((6, 6, 2), {}, r"query must have at most as many positions as key \(2\) unless each sees all keys, got 4; "),
        ((6, 1, 2), {"causal": False}, r"query must have a multiple of the 6 key heads, got 1 heads; "),
        (
            (6, 6, 4),
            {"documents": torch.zeros(2, 6, dtype=torch.int64)},
            r"documents must have shape \(batch, keys\) \(2, 4\), got \(2, 6\); for query, key and value ",
        ),
    ],
)
def test_refusals_name_the_layout(shape, options, message):
    """Given [batch, length, heads, head size], the layout of flash attention's own functions."""
    length, q_length, kv_heads = shape
    given = (tensor.transpose(1, 2) for tensor in draw(length, q_length, kv_heads=kv_heads))
    with pytest.raises(ValueError, match=rf"^{message}{LAYOUT}"):
        attention(*given, **options)


@pytest.mark.parametrize(
    "documents", [torch.zeros(6, dtype=torch.int64), [[0] * 6] * 2, 1], ids=["flat", "list", "int"]
)
def test_documents_of_wrong_shape_or_type_are_refused(documents):
    with pytest.raises(ValueError, match=r"^documents must be a tensor \(batch, keys\) of integers, got "):
        attention(*draw(6), documents=documents)


def test_unknown_and_missing_backends_are_refused():
    with pytest.raises(ValueError, match=r"^backend must be 'auto' or one of 'flash', .*, got 'fast'$"):
        attention(*draw(6), backend="fast")
    with pytest.raises(
        ValueError, match=r"^backend must be .*\(flex, sdpa, dense\), got 'flash': flash cannot do float32$"
    ):
        attention(*draw(6), backend="flash")
    with pytest.raises(ValueError, match=r"^backend must be .*: flash cannot do a CPU"):
        attention(*draw(6, dtype=torch.bfloat16), backend="flash")


@pytest.mark.parametrize("share", [None, 0.2, 0.5])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 5}, {"window": 1}, {"window": 100}], ids=str)
@pytest.mark.parametrize("length", [1, 9, 40])
def test_xformers_gets_the_requested_mask(length, options, share):
    """Its own dense form of the mask object; the rows of a batch lie end to end in it."""
    pytest.importorskip("xformers")
    documents = None if share is None else draw_documents(length, share)
    batch, pattern = make_batch(length, documents=documents, dtype=torch.float16), Pattern(**options)
    given = BACKENDS["xformers"].prepare(pattern, batch).materialize((1, 1, 2 * length, 2 * length))[0, 0]
    assert torch.equal(given == 0, torch.block_diag(*sees(pattern, batch).int()).bool())

"""On a GPU: every backend against float64, forward and backward; no NaN at any length; compiled once by Inductor."""

import pytest
import torch
import torch.nn.functional as F

from tests.attention.conftest import draw, draw_documents, make_batch
from tests.attention.test_interface import REFUSED, REQUESTS, request
from unsloth_puzzles.attention import BACKENDS, attention
from unsloth_puzzles.attention.pattern import Pattern, dense_mask
from unsloth_puzzles.bench.compilations import count_compilations

pytestmark = pytest.mark.gpu
KERNELS = ("flash", "flex", "xformers", "sdpa")
LENGTHS = (1, 2, 7, 8, 63, 64, 65, 127, 128, 129, 200, 511, 512, 777, 1000, 1025)


def run(data, slope, backend, asked):
    return run_function(lambda *data: attention(*data, backend=backend, **asked), data, slope)


def run_function(function, data, slope):
    data = [t.detach().requires_grad_() for t in data]
    out = function(*data)
    return [out.detach(), *torch.autograd.grad(out, data, slope.to(out.dtype))]


def pytorchs(data, slope, asked):
    """PyTorch's own attention, given the mask in full."""
    pattern = Pattern(asked.get("causal", True), asked.get("window"))
    heads, length = data[0].shape[1:3]
    mask = dense_mask(pattern, make_batch(length, documents=asked.get("documents"), device=data[0].device))

    def function(query, key, value):
        key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=asked.get("scale"))

    return run_function(function, data, slope)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", REQUESTS)
def test_error_is_at_most_that_of_the_formula_in_the_same_dtype(name, backend, dtype):
    """Relative norms against float64."""
    if reason := BACKENDS[backend].missing(torch.device("cuda")):
        pytest.skip(f"{backend}: {reason}")
    for length in (64, 200, 777):
        data = [t.cuda() for t in draw(length, head_size=64, dtype=dtype)]
        asked = {k: v.cuda() if k == "documents" else v for k, v in request(name, length).items()}
        if name in REFUSED[backend] or (backend == "flash" and dtype == torch.float32):
            with pytest.raises(ValueError, match=rf"^backend must be .*: {backend} cannot do"):
                attention(*data, backend=backend, **asked)
            return
        slope = draw(length, head_size=64, seed=5, dtype=torch.float64)[0].cuda()
        exact = run([t.double() for t in data], slope, "dense", asked)
        found, references = run(data, slope, backend, asked), [run(data, slope, "dense", asked)]
        # In float32, which the formula sums more exactly, PyTorch's kernel is what the others are held against.
        if dtype == torch.float32 and "soft_cap" not in asked:
            references.append(pytorchs(data, slope, asked))
        for i, what in enumerate(("output", "dQ", "dK", "dV")):
            off, *allowed = ((r[i].double() - exact[i]).norm() / exact[i].norm() for r in (found, *references))
            # The formula computes in float32 and rounds once; kernels round the probabilities to the dtype as well.
            assert off <= max(allowed) + 2 * torch.finfo(dtype).eps, (what, length, off.item(), allowed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("head_size, value_size", [(24, 16), (16, 24), (192, 128), (96, 96)])
def test_value_head_size_that_differs_from_the_query(head_size, value_size, backend, dtype):
    """As with latent attention; no sizes that are powers of two alone."""
    if reason := BACKENDS[backend].missing(torch.device("cuda")):
        pytest.skip(f"{backend}: {reason}")
    for asked in ({}, {"window": 50}, {"documents": draw_documents(200, 0.02).cuda()}):
        query, key, _ = (t.cuda() for t in draw(200, head_size=head_size, dtype=dtype))
        value = draw(200, head_size=value_size, seed=1, dtype=dtype)[2].cuda()
        slope = draw(200, head_size=value_size, seed=5, dtype=torch.float64)[0].cuda()
        data = (query, key, value)
        differ = head_size != value_size
        if backend in ("flash", "xformers") and (differ or (backend == "flash" and dtype == torch.float32)):
            with pytest.raises(ValueError, match=rf"^backend must be .*: {backend} cannot do"):
                attention(*data, backend=backend, **asked)
            return
        exact = run([t.double() for t in data], slope, "dense", asked)
        found, plain = run(data, slope, backend, asked), pytorchs(data, slope, asked)
        for mine, other, right in zip(found, plain, exact, strict=True):
            allowed = (other.double() - right).norm() + 2 * torch.finfo(dtype).eps * right.norm()
            assert (mine.double() - right).norm() <= allowed


@pytest.mark.parametrize("backend", KERNELS)
def test_kv_cache_is_attended_to_or_refused(backend):
    """Fewer queries than keys."""
    if reason := BACKENDS[backend].missing(torch.device("cuda")):
        pytest.skip(f"{backend}: {reason}")
    query, key, value = (t.cuda() for t in draw(200, head_size=64, dtype=torch.bfloat16))
    for rows in (1, 5, 150):
        data = query[:, :, -rows:], key, value
        if backend in ("flash", "xformers"):
            with pytest.raises(ValueError, match=rf"^backend must be .*: {backend} cannot do"):
                attention(*data, backend=backend)
            continue
        exact = attention(*(t.double() for t in data), backend="dense")
        off = (attention(*data, backend=backend).double() - exact).norm() / exact.norm()
        assert off <= 4 * torch.finfo(torch.bfloat16).eps, rows


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_flex_gives_no_nan_at_any_length(soft_cap):
    """With a soft cap, too: PyTorch's own issue 153799 is about lengths that are no multiple of 128."""
    for length in LENGTHS:
        for packed in (False, True):
            documents = draw_documents(length, 0.02).cuda() if packed else None
            data = [t.cuda() for t in draw(length, head_size=64, dtype=torch.bfloat16)]
            asked = {"soft_cap": soft_cap, "documents": documents, "window": 100}
            found = run(data, torch.ones_like(data[0]), "flex", asked)
            exact = run([t.double() for t in data], torch.ones_like(data[0]), "dense", asked)
            for one, true in zip(found, exact, strict=True):
                assert one.isfinite().all(), (length, packed)
                assert (one.double() - true).norm() <= 0.02 * true.norm() + 1e-6


def test_two_graphs_for_fifty_lengths():
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 4096, *torch.randint(2, 4096, (50,), generator=generator).tolist()]

    def step(length, window, packed):
        documents = draw_documents(length, 0.005).cuda() if packed else None
        data = [t.cuda().requires_grad_() for t in draw(length, head_size=64, dtype=torch.bfloat16)]
        out = attention(*data, backend="flex", window=window, documents=documents)
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), data))

    with count_compilations() as counts:
        for n, length in enumerate(lengths):
            step(length, (None, 64, 1000)[n % 3], n % 2 == 0)
    assert counts.graphs <= 2 and counts.graph_breaks == {}, counts.table()
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (3, 1111, 3333):
            step(length, 17, True)

"""The byte stream: its parts for any shape, block size and number of ranks, and which operators exist on it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.fsdp2.models import layer
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.stream import ByteStream, Layout, stream_of

LAYOUTS = st.builds(
    Layout,
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.sampled_from((32, 64, 128, 4096)),
    st.sampled_from((None, 1, 256)),
    st.integers(1, 4),
)


def random_stream(words: int = 64, seed: int = 0) -> ByteStream:
    """All byte patterns, NaN of float16 and bfloat16 among them."""
    generator = torch.Generator().manual_seed(seed)
    return ByteStream(torch.randint(-(2**15), 2**15, (words,), generator=generator, dtype=torch.int16))


@given(LAYOUTS)
def test_parts_hold_every_byte_and_lie_apart(layout):
    stream = torch.zeros(layout.size, dtype=torch.uint8)
    parts = [part for part in layout.split(stream) if part is not None]
    numel = math.prod(layout.shape)
    assert parts[0].numel() == (numel + 1) // 2 and parts[1].numel() == -(-numel // layout.blocksize)
    for number, part in enumerate(parts, start=1):
        assert (part.data_ptr() - stream.data_ptr()) % 16 == 0
        part.reshape(-1).view(torch.uint8).fill_(number)
    sizes = [part.numel() * part.element_size() for part in parts]
    assert torch.bincount(stream, minlength=4).tolist()[1 : len(sizes) + 1] == sizes


@given(LAYOUTS)
def test_ranks_get_equal_shares_of_whole_words(layout):
    assert layout.size % (16 * layout.world_size) == 0
    stream = torch.arange(layout.size, dtype=torch.int64).remainder(256).to(torch.uint8)
    shares = ByteStream(stream.view(torch.int16)).chunk(layout.world_size)
    assert len(shares) == layout.world_size and {len(share) for share in shares} == {layout.size // 2 // len(shares)}
    assert torch.equal(stream_of(torch.cat(shares)), stream)


@pytest.mark.parametrize(
    "move",
    [
        torch.Tensor.clone,
        torch.Tensor.detach,
        torch.Tensor.cpu,
        lambda stream: stream.view(4, -1).view(-1),
        lambda stream: torch.cat([stream[:10], stream[10:]]),
        lambda stream: torch.cat(stream.split(7)),
        lambda stream: stream.new_zeros(stream.shape).copy_(stream),
        lambda stream: torch.empty_like(stream).copy_(stream),
        lambda stream: torch.nn.Parameter(stream, requires_grad=False).data,
    ],
)
def test_moves_keep_every_byte(move):
    stream = random_stream(65536)
    assert torch.equal(stream_of(move(stream)), stream_of(stream))


@pytest.mark.parametrize(
    "operator",
    [
        lambda stream: torch.add(stream, 1),
        lambda stream: torch.mul(stream, 2.0),
        lambda stream: stream.float(),
        lambda stream: stream.to(torch.bfloat16),
        lambda stream: stream.sum(),
        lambda stream: stream.mul_(2),
        lambda stream: stream.fill_(0),
        lambda stream: torch.nn.functional.linear(stream, stream),
        lambda stream: torch._foreach_copy_([stream], [stream.clone()]),
        lambda stream: torch.nn.init.normal_(stream),
        lambda stream: stream.copy_(torch.full(stream.shape, 1.5)),
        lambda stream: stream.copy_(torch.zeros(stream.shape, dtype=torch.int16)),
        lambda stream: torch.empty(stream.shape).copy_(stream),
        lambda stream: torch.cat([stream, torch.zeros(4)]),
        lambda stream: torch.cat([torch.zeros(4, dtype=torch.uint8), stream]),
        lambda stream: torch.equal(stream, torch.zeros(stream.shape)),
    ],
)
def test_operators_on_numbers_are_refused(operator):
    stream = random_stream()
    before = stream_of(stream).clone()
    with pytest.raises(TypeError, match=r"must (move bytes|be that) of the packed weight"):
        operator(stream)
    assert torch.equal(stream_of(stream), before)


def test_gathered_tensor_shares_the_bytes_of_the_collective():
    stream = random_stream()
    (share,), metadata = stream.fsdp_pre_all_gather(None, stream.shape, stream.stride(), None, None)
    assert share.dtype == torch.uint8 and share.data_ptr() == stream._words.data_ptr() and metadata is None
    gathered, inner = stream.fsdp_post_all_gather((share,), None, torch.float16)
    assert type(gathered) is torch.Tensor and inner == (share,)
    assert torch.equal(stream_of(gathered), stream_of(stream)) and gathered.data_ptr() == share.data_ptr()
    assert stream.fsdp_post_all_gather((share,), None, torch.float16, out=gathered) is None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_fsdp2_gathers_bytes_and_casts_none(dtype, mesh):
    """Without the hooks it would gather float16, which its copies change on a GPU and its policy casts."""
    model = torch.nn.Sequential(layer())
    pack_nf4(model, 1)
    before = stream_of(model[0].weight).clone()
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    model.unshard()
    (parameter,) = model._get_fsdp_state()._fsdp_param_group.fsdp_params
    assert [gathered.dtype for gathered in parameter.all_gather_outputs] == [torch.uint8]
    assert torch.equal(stream_of(model[0].weight.data), before)


def test_words_must_be_int16():
    with pytest.raises(TypeError, match=r"words must be torch\.int16, got torch\.uint8"):
        ByteStream(torch.zeros(16, dtype=torch.uint8))

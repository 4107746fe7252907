"""On a GPU: every path gives the bits of bitsandbytes' own kernels, and of the float32 formula."""

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

from tests.nf4.guarded import guarded_launch
from tests.nf4.reference import STORAGE, Weight, around_smallest_normal, assert_same_bits, reference
from unsloth_puzzles.nf4 import build, dequantize_nf4, launch
from unsloth_puzzles.nf4.asm import LOOK_UPS
from unsloth_puzzles.nf4.build import PLAIN, Config
from unsloth_puzzles.nf4.launch import prepare
from unsloth_puzzles.nf4.state import BLOCKSIZES, nf4_weight

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CONFIGS = {
    "asm": Config(),
    **{f"asm {look_up}": Config(lookup=look_up) for look_up in LOOK_UPS},
    "asm, one warp": Config(words=32, unroll=1, num_warps=1),
    "asm, two words a thread": Config(words=256, unroll=1, num_warps=4),
    "asm, no hint": Config(evict=""),
    "plain": PLAIN,
    **{f"plain {lookup}": PLAIN._replace(lookup=lookup) for lookup in ("load", "gather", "select")},
    "plain, four words a thread": PLAIN._replace(words=512, unroll=1, num_warps=4),
}
NUMELS = (1, 2, 63, 64, 8 * 8192, 3 * 8192 + 77, 1823 * 781)


def assert_exact(weight: Weight, config: Config, **shifts) -> None:
    packed, state = weight.make("cuda")
    actual = guarded_launch(packed, state, config, **shifts)
    expected = dequantize_4bit(packed, state).view(state.shape)
    torch.cuda.synchronize()
    assert torch.equal(actual, expected)
    assert_same_bits(actual, expected)
    assert_same_bits(actual, reference(packed, state).view(state.shape))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_path_at_every_length(name, dtype):
    for numel in NUMELS:
        assert_exact(Weight(shape=(numel,), dtype=dtype, seed=numel), CONFIGS[name])


@pytest.mark.parametrize("name", ["asm", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_absmax_that_is_not_nested(name, dtype):
    for numel in NUMELS:
        assert_exact(Weight(shape=(numel,), dtype=dtype, nested=False, seed=numel), CONFIGS[name])


@pytest.mark.parametrize("name", ["asm", "plain"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("nested", [True, False])
def test_block_sizes(name, blocksize, nested):
    for shape in ((512, 1024), (1823, 781)):
        assert_exact(Weight(shape=shape, blocksize=blocksize, nested=nested, dtype=torch.bfloat16), CONFIGS[name])


@pytest.mark.parametrize("name", ["asm", "plain"])
@pytest.mark.parametrize("shifts", [(1, 0), (0, 1), (3, 5), (8, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pointers_off_alignment(name, shifts, dtype):
    for numel in (8192, 3 * 8192 + 77):
        weight = Weight(shape=(numel,), dtype=dtype)
        assert_exact(weight, CONFIGS[name], out_shift=shifts[0], packed_shift=shifts[1])


@pytest.mark.parametrize("name", ["asm", "asm prmt", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [3e-38, 1e-40, 1e-45, 1e-7, 6e4, 3e38])
def test_tiny_subnormal_and_huge_absmax(name, dtype, scale):
    for shape in ((16384,), (16384 + 77,)):
        assert_exact(Weight(shape, dtype, blocksize=32, nested=False, scale=scale), CONFIGS[name])


@pytest.mark.parametrize("name", ["asm", "plain"])
@pytest.mark.parametrize("offset", [0.0, 2.0**-126, -(2.0**-130), 1e-3, 1e4])
@pytest.mark.parametrize("scale", [5e-38, 1e-40, 0.02])
def test_second_level_near_zero_and_large_offsets(name, offset, scale):
    weight = Weight(shape=(16384 + 77,), dtype=torch.float32, blocksize=32, scale=scale, offset=offset)
    assert_exact(weight, CONFIGS[name])


@pytest.mark.parametrize("name", ["asm", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_around_the_smallest_normal_number(name, dtype):
    packed, state = around_smallest_normal(dtype, "cuda")
    actual = guarded_launch(packed, state, CONFIGS[name])
    assert_same_bits(actual, dequantize_4bit(packed, state))
    assert_same_bits(actual, reference(packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("look_up", LOOK_UPS)
def test_the_t4s_assembly(look_up, dtype, monkeypatch):
    """The text for sm_75 on whatever GPU this is: software rounding of bfloat16, no packed conversions."""
    constexprs, built = build.constexprs, []

    def for_sm_75(config, dtype, blocksize, blocksize2, sm, **where):
        built.append(constexprs(config, dtype, blocksize, blocksize2, 75, **where))
        return built[-1]

    monkeypatch.setattr(build, "constexprs", for_sm_75)
    monkeypatch.setattr(launch, "_handles", {})
    for numel in (8 * 8192, 3 * 8192 + 77):
        assert_exact(Weight(shape=(numel,), dtype=dtype), Config(lookup=look_up))
        assert_exact(
            Weight(shape=(numel,), dtype=dtype, blocksize=32, nested=False, scale=3e38), Config(lookup=look_up)
        )
    assert built and all("x2.f32" not in each["ASM"] and each["SOFTWARE_BF16"] for each in built)


def test_contraction_changes_weights():
    """The one Config that is not exact; if it were, the tests above could not see a contracted kernel."""
    packed, state = Weight(shape=(1 << 22,), dtype=torch.float32).make("cuda")
    expected = dequantize_4bit(packed, state)
    mismatched = {
        fused: int((guarded_launch(packed, state, PLAIN._replace(fp_fusion=fused)) != expected).sum())
        for fused in (True, False)
    }
    assert mismatched[True] > 0 and mismatched[False] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", STORAGE)
def test_bits_equal_bitsandbytes_for_its_own_weights(dtype, nested, storage):
    weight = torch.randn(1024, 512, device="cuda", dtype=dtype)
    packed, state = quantize_4bit(weight, compress_statistics=nested, quant_type="nf4", quant_storage=storage)
    expected = dequantize_4bit(packed, state)
    assert torch.equal(dequantize_nf4(packed, state), expected)
    assert torch.equal(dequantize_nf4(packed.t(), state), expected.t())
    out = torch.full_like(expected, float("nan"))
    assert dequantize_nf4(packed, state, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_in_one_graph(mode):
    packed, state = quantize_4bit(torch.randn(512, 256, device="cuda", dtype=torch.bfloat16), quant_type="nf4")
    compiled = torch.compile(lambda packed: dequantize_nf4(packed, state), fullgraph=True, mode=mode)
    for _ in range(3):  # the graph of "reduce-overhead" is recorded and replayed in later calls
        assert torch.equal(compiled(packed), dequantize_4bit(packed, state))


def test_more_than_2_31_weights():
    """bitsandbytes counts in 32 bits: compared by slices that end at boundaries of both levels of blocks."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    level = 64 * 256  # weights of one second-level block
    numel = 2**31 + 5 * level + 77
    packed = torch.randint(0, 256, (-(-numel // 2), 1), dtype=torch.uint8, device="cuda")
    _, state = Weight(shape=(8, 64), dtype=torch.float16).make("cuda")
    blocks = -(-numel // 64)
    state.absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda")
    state.state2.absmax = torch.rand(-(-blocks // 256), device="cuda") * 0.02
    state.shape = torch.Size((numel,))
    out = torch.full((numel,), float("nan"), dtype=torch.float16, device="cuda")
    prepare(nf4_weight(packed, state), out).run(out)
    step = 2**28 // level * level
    for start in range(0, numel, step):
        end = min(start + step, numel)
        second = QuantState(
            state.state2.absmax[start // level :], code=state.state2.code, blocksize=256, dtype=torch.float32
        )
        absmax, shape = state.absmax[start // 64 : -(-end // 64)], torch.Size((end - start,))
        piece = QuantState(absmax, shape, state.code, 64, "nf4", torch.float16, state.offset, second)
        assert torch.equal(out[start:end], dequantize_4bit(packed[start // 2 : -(-end // 2)], piece)), start

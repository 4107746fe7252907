"""The types of tensors, and that a file's bytes mean the weights."""

import builtins

import gguf
import numpy as np
import pytest
import torch

from unsloth_puzzles.gguf.quantization import QUANTIZATIONS, Type, checked_quantization, encode, fitting, text_type

# Largest error, in units of the largest value: half a step of the type, and for blocks with a minimum a little more.
ERRORS = {
    Type.F32: 0, Type.F16: 2**-11, Type.BF16: 2**-8, Type.Q8_0: 1 / 250, Type.Q5_1: 1 / 30, Type.Q5_0: 1 / 15,
    Type.Q4_1: 1 / 14, Type.Q4_0: 1 / 7, Type.Q6_K: 1 / 30, Type.Q5_K: 1 / 15, Type.Q4_K: 1 / 7,
}  # fmt: skip


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.name)
def test_stored_rows_are_the_rows_within_the_types_step(kind):
    torch.manual_seed(0)
    rows = torch.randn(6, 512)
    data = encode(rows, kind, "x")
    if kind in (Type.Q4_K, Type.Q5_K, Type.Q6_K):
        import libgguf

        found = libgguf.dequantize_rows(data, int(kind), 512)
    else:
        found = gguf.quants.dequantize(data, kind)
    error = np.abs(found - rows.numpy()).max() / rows.abs().max().item()
    assert found.shape == (6, 512) and error <= ERRORS[kind]
    assert (error > 0) == (kind != Type.F32)


@pytest.mark.parametrize(
    "wanted, columns, found",
    [
        (Type.Q4_K, 512, Type.Q4_K), (Type.Q4_K, 576, Type.Q5_0), (Type.Q5_K, 576, Type.Q5_1),
        (Type.Q6_K, 576, Type.Q8_0), (Type.Q6_K, 80, Type.F16), (Type.Q8_0, 80, Type.F16), (Type.F32, 7, Type.F32),
    ],
)  # fmt: skip
def test_rows_that_blocks_do_not_divide_fall_back(wanted, columns, found):
    assert fitting(wanted, columns) == found


def test_k_quants_with_m_give_more_bits_to_what_matters():
    def of(name, tied=False):
        return text_type("q4_k_m", name, 512, 16, tied)

    better = {n for n in range(16) if of(f"blk.{n}.ffn_down.weight") == Type.Q6_K}
    assert better == {0, 1, 4, 7, 10, 13, 14, 15} == {n for n in range(16) if of(f"blk.{n}.attn_v.weight") == Type.Q6_K}
    assert of("blk.0.attn_q.weight") == of("token_embd.weight") == Type.Q4_K
    assert of("output.weight") == of("token_embd.weight", tied=True) == Type.Q6_K
    assert {text_type("q8_0", name, 512, 16, True) for name in ("output.weight", "blk.0.ffn_down.weight")} == {
        Type.Q8_0
    }


def test_values_beyond_the_type_are_refused():
    rows = torch.full((1, 256), 1e5)
    for kind in set(ERRORS) - {Type.F32, Type.BF16}:
        with pytest.raises(ValueError, match=r"quantization must hold the values of x, .* got .*; take bf16 or f32"):
            encode(rows, kind, "x")
    assert encode(rows, Type.F32, "x").max() == np.float32(1e5)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"quantization must be one of f32, .* got 'q3_k'"):
        checked_quantization("q3_k")
    with pytest.raises(ValueError, match=r"projector must be one of f32, f16, got 'q4_0'"):
        checked_quantization("q4_0", ("f32", "f16"), "projector")


def test_k_quants_without_their_package_are_refused_by_name(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "libgguf":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for name, (kind, _, _) in QUANTIZATIONS.items():
        if "_k" in name:
            with pytest.raises(ImportError, match=rf"without the package libgguf, got '{name}'"):
                checked_quantization(name)
        else:
            checked_quantization(name)
            assert kind in ERRORS


@pytest.mark.parametrize("name", ["q8_0", "Q8_0", "BF16", "F32"])
def test_names_are_taken_in_any_case(name):
    assert checked_quantization(name) == name.lower()

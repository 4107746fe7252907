"""llama.cpp answers what transformers answers. It runs in a process of its own, since a bad file may abort it."""

import copy

import pytest
import torch
from tokenizers import AddedToken

from benchmarks.gguf.engine import Answer, ask
from benchmarks.gguf.models import EXPRESSIONS, FAMILIES, LLAMA3_ROPE, tiny, tokenizer
from benchmarks.gguf.proof import SQUARE, beside, deviations, emulate, merging_errors, prove, qlora, requests, train
from benchmarks.gguf.reference import answer, distance
from unsloth_puzzles.bench.child import ChildError
from unsloth_puzzles.gguf.export import export_gguf

pytestmark = pytest.mark.slow
ERROR = 2e-3  # of log-probabilities
EXACT = 3e-4  # the same where all deviations of the engine are known, and emulated
TEXT = "It's 12345 o'clock;  the CLASS of 7 objects\n\n isn't  self.x[10] + déjà vu — 漢字 🙂\ttab"


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_adapter_answers_as_in_transformers(family, options, tmp_path):
    proof = prove(family, tmp_path, **options)
    assert [(one.adapter, one.image) for one in proof.answers] == [
        (side, image) for side in ("on", "off") for image in ([False] if family == "llama" else [False, True])
    ]
    for one in proof.answers:
        assert one.within(EXACT if one.image else 1e-5)
        if not one.deviations:
            assert (one.equal, one.error) == (one.emulated_equal, one.emulated_error)
    assert proof.moved > 20 * ERROR


def test_the_default_types_of_a_vision_family(tmp_path):
    proof = prove("qwen2_vl", tmp_path, tokens=8, quantization="q8_0", projector="f16")
    assert all(1e-3 < one.emulated_error < 0.2 for one in proof.answers)


def test_merging_by_peft_rounds_again(tmp_path):
    model, processor = qlora("llama", tmp_path)
    train(model, processor, "llama", 2)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    ours, pefts = merging_errors(model)
    assert ours < 1e-6 and pefts > 0.1
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_deviations_by_family():
    assert not deviations("llama", image=True) and not deviations("qwen3_vl", image=False)
    assert [len(deviations(family, image=True)) for family in FAMILIES] == [0, 3, 2, 3, 3, 2]
    assert [len(deviations(family, image=False)) for family in FAMILIES] == [0, 0, 0, 1, 1, 0]


def test_errors_count_until_tokens_part():
    ours = Answer(3, [1, 2, 3], [-1.0, -2.0, -3.0], "")
    assert beside(ours, ours) == (True, 0.0)
    assert beside(ours, Answer(3, [1, 9, 3], [-1.5, -9.0, -3.0], "")) == (False, 0.5)
    assert beside(ours, Answer(3, [9, 2, 3], [-1.25, -9.0, -3.0], "")) == (False, 0.25)
    assert beside(ours, ours._replace(prompt_tokens=4)) == (False, 0.0)


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_an_answer_is_compared_by_one_forward_pass(family):
    model, processor = tiny(family)
    for asked in requests(family):
        alone = answer(model, processor, asked, 6)
        assert distance(alone, answer(model, processor, asked, alone.tokens)) == (True, pytest.approx(0, abs=1e-6))
        other = [*alone.tokens[:3], alone.tokens[3] ^ 1, *alone.tokens[4:]]
        found = answer(model, processor, asked, other)
        assert found.tokens[:4] == alone.tokens[:4] and found.prompt_tokens == alone.prompt_tokens
        assert found.log_probs[:4] == pytest.approx(alone.log_probs[:4], abs=1e-6)
        assert beside(alone._replace(tokens=other), found)[0] is False


def test_class_token_of_clip_is_the_engines_deviation(tmp_path):
    """The file is right: without an image it answers alike, and with one as transformers with the token put last."""
    model, processor = tiny("llava_clip")
    text, image = requests("llava_clip")
    without, with_image = ask(*export_gguf(model, processor, tmp_path, "f32", "f32"), [text, image], tokens=8)
    assert distance(without, answer(model, processor, text, 8))[1] < 1e-5
    assert distance(with_image, answer(model, processor, image, 8))[1] > 0.05
    emulate(model, "llava_clip")
    assert distance(with_image, answer(model, processor, image, 8)) == (True, pytest.approx(0, abs=ERROR))


def test_epsilon_of_qwen2vl_is_the_engines_deviation(tmp_path):
    model, processor = tiny("qwen2_5_vl", rms_norm_eps=1e-5)
    asked = requests("qwen2_5_vl")
    found = ask(*export_gguf(model, processor, tmp_path, "f32", "f32"), asked, tokens=8)
    before = max(distance(one, answer(model, processor, ours, 8))[1] for one, ours in zip(found, asked, strict=True))
    emulate(model, "qwen2_5_vl")
    after = [distance(one, answer(model, processor, ours, 8)) for one, ours in zip(found, asked, strict=True)]
    assert before > 5 * ERROR and all(equal and error < ERROR for equal, error in after)
    assert after[0][1] < 1e-5  # without an image there is no GELU


CAUSES = {"llava_clip": "class token", "llava_siglip": "pixels", "qwen2_vl": "RMS", "qwen2_5_vl": "RMS"}


@pytest.mark.parametrize("family", CAUSES)
def test_one_deviation_causes_the_error_without_emulation(family, tmp_path):
    """The emulation of all others leaves most of the error. The emulation of all but another one does not."""
    model, processor = qlora(family, tmp_path)
    train(model, processor, family, 8)
    asked = requests(family)
    theirs = ask(*export_gguf(model, processor, tmp_path, "f32", "f32", progress=False), asked, tokens=8)

    def error(emulated):
        other = copy.deepcopy(model)
        for one in emulated:
            one.apply(other.get_base_model())
        return max(beside(one, answer(other, processor, ours, 8))[1] for one, ours in zip(theirs, asked, strict=True))

    every, plain = deviations(family, image=True), error(())
    left = {one.what: error([other for other in every if other is not one]) for one in every}
    (cause,) = (what for what in left if what.startswith(CAUSES[family]))
    assert plain > 1e-3 and left.pop(cause) > 0.5 * plain
    assert all(one < 0.5 * plain for one in left.values())


@pytest.mark.parametrize(
    "text",
    [
        {"rope_parameters": LLAMA3_ROPE}, {"attention_bias": True}, {"tie_word_embeddings": False}, {"head_dim": 32},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, {"mlp_bias": True},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_llama(text, tmp_path):
    model, made = tiny("llama", **text)
    asked = {"prompt": TEXT}
    (found,) = ask(*export_gguf(model, made, tmp_path, "f32"), [asked], tokens=8)
    equal, error = distance(found, answer(model, made, asked, 8))
    assert equal and error < 1e-5


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_other_text_models(kind, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    made = tokenizer("qwen2")
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    common = {"num_key_value_heads": 2, "sliding_window": None, "initializer_range": 0.1, "eos_token_id": None}
    config = AutoConfig.for_model(kind, vocab_size=len(made), **small, **common)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        model.lm_head.weight[:256] = 0  # bytes: an engine holds back what is no character yet
    asked = {"text": "What is this?"}
    (found,) = ask(*export_gguf(model, made, tmp_path, "f32"), [asked], tokens=8)
    equal, error = distance(found, answer(model, made, asked, 8))
    assert equal and error < 1e-4


@pytest.mark.parametrize("pre", EXPRESSIONS)
def test_engine_splits_text_as_the_tokenizer_does(pre, tmp_path):
    model, _ = tiny("llama")
    made = tokenizer(pre)
    model.resize_token_embeddings(len(made) + 3, mean_resizing=False)
    asked = [{"prompt": TEXT}, {"prompt": TEXT[::-1]}]
    found = ask(*export_gguf(model, made, tmp_path, "f32"), asked, tokens=2)
    for one, ours in zip(found, asked, strict=True):
        equal, error = distance(one, answer(model, made, ours, 2))
        assert equal and error < 1e-5


@pytest.mark.parametrize("content, normalized", [("qzq", True), ("qzq", False), ("x<|im_end|>y", False)])
def test_engine_finds_added_tokens_where_the_tokenizer_does(content, normalized, tmp_path):
    model, _ = tiny("llama")
    made = tokenizer("smollm")
    made.add_tokens([AddedToken(content, special=False, normalized=normalized)])
    model.resize_token_embeddings(len(made), mean_resizing=False)
    prompt = f"a{content}b {content} <|im_end|>"
    (found,) = ask(*export_gguf(model, made, tmp_path, "f32"), [{"prompt": prompt}], tokens=1)
    assert found.prompt_tokens == len(made(prompt)["input_ids"])


@pytest.mark.parametrize("quantization, bound", [("f16", 5e-3), ("q8_0", 0.1), ("q4_k_m", 1.0), ("q5_0", 1.0)])
def test_error_of_quantised_files(quantization, bound, tmp_path):
    """The engine computes with what is in the file: its distance to float32 is that of the type."""
    model, made = tiny("llama", hidden_size=256, head_dim=64, intermediate_size=512)
    asked = {"prompt": TEXT}
    (found,) = ask(*export_gguf(model, made, tmp_path, quantization), [asked], tokens=1)
    _, error = distance(found, answer(model, made, asked, 1))
    assert 0 < error < bound


def test_engine_aborts_alone_on_a_broken_file(tmp_path):
    model, made = tiny("llama")
    path, _ = export_gguf(model, made, tmp_path, "f32")
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(ChildError):
        ask(path, None, [{"text": "?"}], tokens=1)


def test_square_images_are_not_resized():
    model, _ = tiny("llava_clip")
    assert (model.config.vision_config.image_size,) * 2 == SQUARE


def test_round_trip_of_smollm2(smollm2_folder, tmp_path):
    from benchmarks.gguf.round_trip import add_adapters, round_trip
    from benchmarks.smollm2 import load

    model, made, _ = load(smollm2_folder, device="cpu", dtype=torch.float32, hub=False)
    found = round_trip(add_adapters(model), made, tmp_path, steps=6, quantizations=("f32", "q8_0", "q4_k_m"))
    assert found["f32"].equal and found["f32"].error < ERROR and found["f32"].ended
    errors = [found[name].mean_error for name in ("f32", "q8_0", "q4_k_m")]
    assert errors[0] < ERROR and 10 * errors[0] < errors[1] < errors[2] < 1
    assert found["f32"].size > found["q8_0"].size > found["q4_k_m"].size
    assert found["moved"] > 0.1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_each_token_of_the_file_ends_an_answer(place, tmp_path):
    model, made = tiny("llama")
    asked = [{"prompt": "hello"}]
    whole = ask(*export_gguf(model, made, tmp_path, "f32", progress=False), asked, tokens=12)[0].tokens
    last = whole[-1]
    stops = [made.convert_tokens_to_ids("<|im_start|>"), made.convert_tokens_to_ids("q"), made.eos_token_id]
    stops[place] = last
    if place == 2:
        made.eos_token = made.convert_ids_to_tokens(last)
    model.generation_config.eos_token_id = stops
    found = ask(*export_gguf(model, made, tmp_path, "f32", progress=False), asked, tokens=12, stop=True)[0].tokens
    assert found == whole[: whole.index(last) + 1]

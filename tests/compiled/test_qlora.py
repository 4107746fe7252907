"""A tiny model that bitsandbytes has quantised, compiled: few graphs, the same losses and gradients, and all undone."""

import warnings

import pytest
import torch
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, get_peft_model_state_dict, prepare_model_for_kbit_training
from peft.tuners.lora.bnb import Linear4bit
from transformers import masking_utils

from tests.compiled.models import BACKENDS, compiled_by, nf4_llama, with_adapters
from tests.compiled.training_step import LENGTHS, assert_same, batch, make_model, step
from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.compiled import variants
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.nf4 import patch_linear4bit


@pytest.fixture(scope="module")
def run():
    """Everything that one compiled model is asked, beside the same model before."""
    torch._dynamo.reset()
    model, found = make_model(), {}
    prompt = {"input_ids": batch(7)["input_ids"], "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with patch_linear4bit(model):
        found["plain"] = [step(model, length) for length in LENGTHS]
        found["plain evaluation"] = model.eval()(**batch(12)).loss.detach()
        found["plain text"] = model.generate(**prompt)
        model.train()
    found["keys"] = list(get_peft_model_state_dict(model))
    found["classes"] = [type(module) for module in model.modules()]
    found["before"] = model.get_base_model().config._attn_implementation
    with count_compilations() as found["counts"]:
        compiled = compile_qlora(model)
        found["steps"] = [step(model, length) for length in LENGTHS]
    found["calls"] = compiled.loss.calls
    with torch.compiler.set_stance("fail_on_recompile"):
        found["unseen"] = step(model, 33)
    found["evaluation"] = model.eval()(**batch(12)).loss.detach()
    found["text"] = model.generate(**prompt)
    model.train()
    found["compiled keys"] = list(get_peft_model_state_dict(model))
    compiled.undo()
    compiled.undo()
    with patch_linear4bit(model):
        found["unseen, plain"] = step(model, 33)
    yield model, found
    torch._dynamo.reset()


def test_losses_and_gradients_match_uncompiled_model(run):
    _, found = run
    for one, other in zip(found["steps"], found["plain"], strict=True):
        assert_same(one, other)
    assert found["calls"] == len(LENGTHS)


def test_four_graphs_serve_all_lengths(run):
    """The first layer, whose input wants no gradient; the others; the norm; the loss."""
    counts = run[1]["counts"]
    assert counts.graph_breaks == {}
    names = [one.name for one in counts.captures]
    assert names[:3] == ["LlamaDecoderLayer_first", "LlamaDecoderLayer", "norm"] and len(names) == counts.graphs == 4
    assert all(one.reason is None for one in counts.captures)
    # The loss and its gradient are one function, without a backward.
    assert [(one.forward, one.backward) for one in counts.captures] == [(1, 1), (1, 1), (1, 1), (1, 0)]
    assert counts.compilations == 7


def test_new_length_compiles_nothing(run):
    _, found = run
    assert_same(found["unseen"], found["unseen, plain"])


def test_evaluation_and_generation(run):
    _, found = run
    assert (found["evaluation"] - found["plain evaluation"]).abs() <= 2e-6 * found["plain evaluation"].abs()
    assert torch.equal(found["text"], found["plain text"])


def test_undo_restores_the_model(run):
    model, found = run
    base = model.get_base_model()
    assert base.config._attn_implementation == found["before"]
    assert found["compiled keys"] == found["keys"] == list(get_peft_model_state_dict(model))
    assert [type(module) for module in model.modules()] == found["classes"]
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(hasattr(type(module), "bitsandbytes_class") for module in model.modules())
    assert {type(p) for p in model.parameters() if hasattr(p, "quant_state")} == {Params4bit}
    assert {type(module) for module in model.modules() if hasattr(module, "lora_A")} == {Linear4bit}
    assert model(**batch(12)).logits.shape == (2, 12, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing_matches_uncompiled_model(backend):
    model = make_model(use_reentrant=False)
    kind = type(model.get_base_model().model.layers[0])
    with patch_linear4bit(model):
        expected = [step(model, length) for length in LENGTHS[:2]]
    with compiled_by(backend) as options, count_compilations() as counts, compile_qlora(model, **options):
        for length, plain in zip(LENGTHS[:2], expected, strict=True):
            assert_same(step(model, length), plain)
    assert counts.graph_breaks == {} and counts.compilations <= 6, counts.table()
    assert {type(layer) for layer in model.get_base_model().model.layers} == {kind}


@pytest.mark.parametrize("backend", BACKENDS)
def test_switching_autocast_recompiles_nothing(backend):
    """Adapters are not shared without autocast, where they compute in float32 under a model in bfloat16."""
    model, given = with_adapters(nf4_llama(dtype=torch.bfloat16)), batch(16)
    with (
        compiled_by(backend) as options,
        compile_qlora(model, **options),
        count_compilations() as counts,
        torch.no_grad(),
    ):
        for autocast in (False, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(**given)
    assert counts.graph_breaks == {} and not any(one.reason for one in counts.captures), counts.table()


def test_training_call_with_kv_cache_warns_and_is_not_compiled():
    model = make_model()
    with compile_qlora(model):
        with pytest.warns(UserWarning, match=r"^use_cache: a call with a KV cache is not compiled"):
            loss = model(**batch(7), use_cache=True).loss
        loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.generate(batch(7)["input_ids"], max_new_tokens=2, do_sample=False, pad_token_id=0)


def test_only_given_position_ids_are_searched_for_documents(monkeypatch):
    """transformers also searches the ones that it made itself, and on a GPU waits for the result."""
    searched, search = [], masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: searched.append(ids) or search(ids))
    model, given = make_model(), batch(16)
    packed = {**given, "position_ids": torch.cat([torch.arange(6), torch.arange(10)]).expand(2, -1)}
    real = torch.arange(16) >= torch.tensor([[0], [5]])
    padded = {**given, "attention_mask": real.long(), "labels": given["labels"].masked_fill(~real.roll(1, 1), -100)}
    of_embeddings = {"inputs_embeds": model.get_input_embeddings()(given["input_ids"]), "labels": given["labels"]}
    every = (given, of_embeddings, packed, padded)
    with torch.no_grad():
        with patch_linear4bit(model):
            expected = [model(**inputs).loss for inputs in every]
        with compile_qlora(model), torch.compiler.set_stance("force_eager"):
            found = []
            for inputs in every:
                searched.clear()
                found.append(model(**inputs).loss)
                assert len(searched) == ("position_ids" in inputs)
            assert torch.equal(found[0], model.get_base_model()(given["input_ids"], labels=given["labels"]).loss)
        model(**given)
    assert len(searched) == 1  # after undo, by transformers
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert len({round(loss.item(), 4) for loss in found}) == 3  # documents and padding are not ignored


def test_call_without_inputs_raises_transformers_error():
    model = make_model()
    with compile_qlora(model), pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def test_document_lengths_are_checked_and_dropped():
    model, given = make_model(), batch(16)
    packed = {**given, "position_ids": torch.cat([torch.arange(6), torch.arange(10)]).expand(2, -1)}
    lengths = {"cu_seq_lens_q": torch.tensor([0, 6, 16, 22, 32], dtype=torch.int32), "max_length_q": 10}
    with torch.no_grad(), compile_qlora(model), torch.compiler.set_stance("force_eager"):
        assert torch.equal(model(**packed, **lengths).loss, model(**packed).loss)
        with pytest.raises(ValueError, match=r"^cu_seq_lens_q must come with position_ids"):
            model(**given, **lengths)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_norms_and_residuals_under_autocast(backend):
    """As PEFT prepares 4-bit models: a product of an adapter is in autocast's dtype there, the activation is not."""
    model = with_adapters(prepare_model_for_kbit_training(nf4_llama(), use_gradient_checkpointing=False))
    assert next(model.get_base_model().model.norm.parameters()).dtype == torch.float32

    def mixed():
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, 24)

    with patch_linear4bit(model):
        exact, plain = step(model, 24), mixed()
    with compiled_by(backend) as options, compile_qlora(model, **options):
        found = mixed()
    assert (found[1] - exact[1]).norm() <= 1.2 * (plain[1] - exact[1]).norm()
    assert abs(found[0] - exact[0]) <= torch.finfo(torch.bfloat16).eps / 2 * exact[0]


def test_peft_recognizes_packed_weights():
    """By the name of their class: to count and to merge."""
    model = make_model()
    counted = model.get_nb_trainable_parameters()
    with torch.compiler.set_stance("force_eager"), compile_qlora(model):
        assert model.get_nb_trainable_parameters() == counted
        before = model(**batch(9)).loss
        model.merge_adapter()
        assert (model(**batch(9)).loss - before).abs() <= 0.01 * before  # weights are quantised again
        model.unmerge_adapter()


def test_compile_key_includes_adapters(monkeypatch):
    """Dynamo allows eight versions of one; a ninth would be an error."""
    monkeypatch.setattr(variants, "with_own_code", lambda forward, name: made.append(name) or forward)
    made, model = [], with_adapters(nf4_llama(layers=3), rank_pattern={"layers.1.self_attn.q_proj": 7})
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), compile_qlora(model):
        for adapter in ("default", "other", "default"):
            model.set_adapter(adapter)
            model(**batch(9))
        with model.disable_adapter():
            model(**batch(9))
    layers = [name for name in made if name.startswith("LlamaDecoderLayer")]
    assert len(layers) == 4  # two ranks under the first, the other, none


def test_four_dimensional_mask_is_refused():
    model = make_model()
    with compile_qlora(model), pytest.raises(ValueError, match=r"^attention_mask must be 2-D .* got Tensor"):
        model(**batch(9), attention_mask=torch.zeros(2, 1, 9, 9))


@pytest.mark.parametrize("unload", ["merge_and_unload", "unload"])
def test_model_without_its_adapters_runs_inside_the_context(unload):
    """What an export of a merged model does before the context ends."""
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(3))
    expected = getattr(make_model().eval(), unload)()(input_ids=ids, use_cache=False).logits
    model = make_model().eval()
    with compiled_by("aot_eager") as options, compile_qlora(model, **options), torch.no_grad():
        base = getattr(model, unload)()
        assert (base(input_ids=ids, use_cache=False).logits - expected).abs().max() <= 1e-4
        assert base.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (2, 12)

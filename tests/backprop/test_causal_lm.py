"""The probe: what a model does between backbone and loss is found out by running it, or it is refused by name."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
)

from benchmarks.models import tiny_llama_config
from unsloth_puzzles.backprop.probe import logit_transform
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss

VOCABULARY = 64
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": VOCABULARY}


def ragged():
    """Rows of 12, 8 and 5 tokens, labels left in at the padding."""
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([12, 8, 5])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def llama_that(**methods):
    """A Llama whose class has these methods."""
    torch.manual_seed(0)
    return type("Llama", (LlamaForCausalLM,), methods)(tiny_llama_config(VOCABULARY)).train()


def changed(change):
    """A forward that exchanges what `change(output, labels)` gives by name."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = LlamaForCausalLM.forward(self, input_ids, labels=labels, **kwargs)
        for name, value in change(output, labels).items():
            output[name] = value
        return output

    return forward


def test_a_model_that_counts_by_its_attention_mask_is_refused():
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, d_model=16
    )
    text = Qwen2Config(**SIZES, intermediate_size=48, num_key_value_heads=2)
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=63)
    ).train()
    inputs = ragged()
    logits = model(**inputs).logits[:, :-1]
    everywhere = F.cross_entropy(logits.transpose(1, 2), inputs["labels"][:, 1:])
    assert (model(**inputs).loss - everywhere).abs() > 1e-3  # so we would be wrong
    with pytest.raises(ValueError, match=r"must have the cross entropy.* from Qwen2AudioForConditionalGeneration"):
        use_memory_efficient_loss(model)


def test_a_term_added_to_the_loss_is_refused():
    sizes = {"intermediate_size": 48, "num_key_value_heads": 2, "attn_layer_indices": [0], "mamba_d_head": 16}
    sizes |= {"mamba_n_heads": 4, "mamba_d_state": 4, "mamba_chunk_size": 8, "pad_token_id": 0}
    torch.manual_seed(0)
    for coefficient in (1e-5, 0.0):
        model = BambaForCausalLM(BambaConfig(**SIZES, **sizes, z_loss_coefficient=coefficient)).train()
        if coefficient:
            with pytest.raises(ValueError, match=r"must have the cross entropy of its logits.* from BambaForCausalLM"):
                use_memory_efficient_loss(model)
        else:
            own = model(**ragged()).loss
            with use_memory_efficient_loss(model):
                assert torch.allclose(model(**ragged()).loss, own, rtol=1e-6)


def mean_whatever_is_asked_for(output, labels):
    return {"loss": F.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:])}


@pytest.mark.parametrize(
    "change, given",
    [
        (lambda output, labels: {"loss": output.loss * 1.00001}, "for padded rows, got"),
        (mean_whatever_is_asked_for, "for padded rows and num_items_in_batch, ignore_index, shift_labels, got"),
        (lambda output, labels: {"logits": output.logits * 1.0001}, "must do no more between backbone"),
        (lambda output, labels: {"logits": 60 * torch.tanh(output.logits / 60)}, "must do no more between backbone"),
    ],
    ids=["factor of the loss", "options ignored", "factor of the logits", "cap"],
)
def test_small_deviations_are_refused(change, given):
    with pytest.raises(ValueError, match=given):
        logit_transform(llama_that(forward=changed(change)))
    assert logit_transform(llama_that()) is None


def test_a_cap_that_the_config_names_but_the_model_does_not_apply_is_seen_through():
    """The logits of fresh weights are so small that a cap of 30 changes them by less than rounding to bfloat16."""
    model = llama_that().to(torch.bfloat16)
    model.config.final_logit_softcapping = 30.0
    assert logit_transform(model) is None


def test_two_calls_of_the_head_are_refused():
    def forward(self, *arguments, **kwargs):
        self.lm_head(self.lm_head.weight)
        return LlamaForCausalLM.forward(self, *arguments, **kwargs)

    with pytest.raises(ValueError, match="must call its output embeddings once in a forward, got 2 times"):
        logit_transform(llama_that(forward=forward))


def test_a_model_that_needs_more_than_tokens_is_refused_with_the_reason():
    def forward(self, input_ids=None, **kwargs):
        raise TypeError("pixel_values are required")

    with pytest.raises(ValueError, match=r"must run with input_ids, .*: pixel_values are required"):
        logit_transform(llama_that(forward=forward))


def test_a_forward_that_calls_a_part_of_its_base_model():
    """OPT calls `model.decoder`, whose output `model` passes on."""
    torch.manual_seed(0)
    sizes = {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0, "max_position_embeddings": 64}
    model = OPTForCausalLM(OPTConfig(**SIZES, **sizes)).train()
    own = model(**ragged()).loss
    with use_memory_efficient_loss(model) as patch:
        assert torch.allclose(model(**ragged()).loss, own, rtol=1e-6)
        assert patch.calls == 1


def test_images_reach_the_backbone():
    """The probe sends text; a call with images has their hidden states in place of the image tokens."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = Qwen2Config(**SIZES, intermediate_size=48, num_key_value_heads=2)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=63)
    ).train()
    inputs = ragged()
    inputs["input_ids"] = inputs["input_ids"].clamp(max=62)
    inputs["input_ids"][:, 1:5] = 63  # an image has four patches
    inputs["labels"] = inputs["input_ids"].where(inputs["input_ids"] != 63, -100)
    images = torch.randn(3, 3, 16, 16)
    own, without = (model(**inputs, pixel_values=pixels).loss for pixels in (images, torch.zeros_like(images)))
    assert (own - without).abs() > 1e-5  # so the test can tell
    with use_memory_efficient_loss(model):
        assert torch.allclose(model(**inputs, pixel_values=images).loss, own, rtol=1e-6)


def test_the_probe_does_not_depend_on_the_default_device():
    model = LlamaForCausalLM(tiny_llama_config(VOCABULARY))
    with torch.device("meta"):
        transform = logit_transform(model)
    assert transform == logit_transform(model)


def test_the_probe_leaves_no_trace():
    model = llama_that().eval()
    state, buffers = torch.get_rng_state(), {name: value.clone() for name, value in model.named_buffers()}
    logit_transform(model)
    assert torch.equal(torch.get_rng_state(), state) and not any(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())

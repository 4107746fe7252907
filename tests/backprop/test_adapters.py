"""The loss hook with every kind of PEFT's adapters, on the head where the kind can be: the model's own loss."""

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.models import tiny_llama_config
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss

VOCABULARY = 64
# Options beside the head as the target; adapters whose fresh weights do nothing are drawn at random.
ON_THE_HEAD = {
    "lora": (peft.LoraConfig, {"r": 4, "init_lora_weights": False}),
    "lora with dropout": (peft.LoraConfig, {"r": 4, "lora_dropout": 0.3, "init_lora_weights": False}),
    "lora with bias": (peft.LoraConfig, {"r": 4, "lora_bias": True, "init_lora_weights": False}),
    "dora": (peft.LoraConfig, {"r": 4, "use_dora": True, "init_lora_weights": False}),
    "adalora": (peft.AdaLoraConfig, {"total_step": 10}),
    "loha": (peft.LoHaConfig, {"init_weights": False}),
    "lokr": (peft.LoKrConfig, {"init_weights": False}),
    "ia3 of outputs": (peft.IA3Config, {"feedforward_modules": [], "init_ia3_weights": False}),
    "ia3 of inputs": (peft.IA3Config, {"feedforward_modules": ["lm_head"], "init_ia3_weights": False}),
    "oft": (peft.OFTConfig, {"oft_block_size": 8, "init_weights": False}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 8, "init_weights": False}),
    "vera": (peft.VeraConfig, {"r": 4}),
    "vb-lora": (peft.VBLoRAConfig, {"r": 4, "num_vectors": 8, "vector_length": 8}),
    "fourier": (peft.FourierFTConfig, {"n_frequency": 16}),
    "hra": (peft.HRAConfig, {"init_weights": False}),
    "miss": (peft.MissConfig, {"r": 8, "init_weights": False}),
    "randlora": (peft.RandLoraConfig, {"r": 4}),
    "shira": (peft.ShiraConfig, {"r": 4}),
    "c3a": (peft.C3AConfig, {"block_size": 8}),
    "road": (peft.RoadConfig, {}),
}
ELSEWHERE = {
    "activated lora": (
        peft.LoraConfig,
        {"r": 4, "target_modules": ["q_proj"], "alora_invocation_tokens": [5], "init_lora_weights": False},
    ),
    "norms": (peft.LNTuningConfig, {}),
    "prompt": (peft.PromptTuningConfig, {"num_virtual_tokens": 3}),
    "prefix": (peft.PrefixTuningConfig, {"num_virtual_tokens": 3}),
    "prompt encoder": (peft.PromptEncoderConfig, {"num_virtual_tokens": 3, "encoder_hidden_size": 16}),
    "tokens": (peft.TrainableTokensConfig, {"token_indices": [2, 3], "target_modules": ["embed_tokens"]}),
}


def step(model):
    """Loss and gradients, with the same dropout each time."""
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(12) < torch.tensor([12, 8, 5])[:, None]).long()
    torch.manual_seed(2)
    model.zero_grad()
    loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True], ids=["a head of its own", "tied"])
@pytest.mark.parametrize("name", [*ON_THE_HEAD, *ELSEWHERE])
def test_loss_and_gradients_are_the_models_own(name, tied):
    kind, options = (ON_THE_HEAD | ELSEWHERE)[name]
    target = {"target_modules": ["lm_head"]} if name in ON_THE_HEAD else {}
    torch.manual_seed(0)
    config = tiny_llama_config(VOCABULARY)
    config.tie_word_embeddings = tied
    model = peft.get_peft_model(LlamaForCausalLM(config), kind(task_type="CAUSAL_LM", **target, **options)).train()
    own_loss, own = step(model)
    with use_memory_efficient_loss(model) as patch:  # in one chunk, for dropout of the head draws chunk by chunk
        loss, found = step(model)
        assert patch.calls == 1
    assert (loss - own_loss).abs() <= 1e-6 * own_loss.abs()
    assert found.keys() == own.keys() and own
    rounding = 4 * torch.finfo(torch.float32).eps * max(gradient.norm() for gradient in own.values())
    for name, gradient in own.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + rounding, name


def test_adapters_that_keep_the_models_own_forward_are_refused():
    model = LlamaForCausalLM(tiny_llama_config(VOCABULARY))
    adapter = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
    adapted = peft.get_peft_model(model, adapter)
    with pytest.raises(ValueError, match="must be patched before it is wrapped, got an adapter AdaptionPromptModel"):
        use_memory_efficient_loss(adapted)


def test_activated_lora_on_the_head_is_refused():
    options = {"target_modules": ["lm_head", "q_proj"], "alora_invocation_tokens": [5]}
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(LlamaForCausalLM(tiny_llama_config(VOCABULARY)), adapter)
    with pytest.raises(
        ValueError, match=r"^model must have no activated LoRA .* on its output embeddings, got adapter 'd"
    ):
        use_memory_efficient_loss(adapted)

"""The loss hook over the causal LMs of transformers: its model's own loss and gradients, or refused by name."""

import pytest
import torch

from tests.backprop import zoo
from unsloth_puzzles.backprop import grpo
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss

_FOLLOWED = """
afmoe apertus arcee aria_text axk1 axk2 bamba bert-generation biogpt bitnet bloom codegen cohere cohere2 cohere2_moe
ctrl cwm deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon
falcon_h1 falcon_mamba flex_olmo fuyu gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe glm4_moe_lite
glm_moe_dsa gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite granitemoe granitemoehybrid
granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hyperclovax jais2 jamba jetmoe lfm2 llama mamba mamba2
mimo_v2_flash minimax minimax_m2 ministral ministral3 mistral mixtral moshi mpt nanochat nemotron nemotron_h olmo olmo2
olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text
qwen3_moe qwen3_next rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm youtu
"""
_MORE_THAN_A_HEAD = """
bert big_bird camembert data2vec-text electra ernie inkling_text megatron-bert minicpm3 modernbert-decoder
recurrent_gemma rembert roberta roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl
"""
FOLLOWED = _FOLLOWED.split()
REFUSED = {
    **dict.fromkeys(_MORE_THAN_A_HEAD.split(), "must do no more between backbone, head and loss than"),
    **dict.fromkeys(("blenderbot-small", "xlnet"), "must have the cross entropy of its logits"),
    "llama4_text": "a head on its backbone, got Llama4ForCausalLM",
}
# One of each way to be different: caps, scales, experts, states instead of attention, parts called, biases.
SAMPLE = ["bamba", "cohere", "deepseek_v3", "gemma2", "gpt2", "granite", "llama", "mamba2", "opt", "phi", "qwen3_moe"]
CASES = ["plain", "padded", "packed", "num_items_in_batch", "frozen head", "tied head"]


def inputs_of(case):
    """Rows of 12, 8 and 5 tokens, or all three in one; with labels at the padding, and a prompt without."""
    lengths = torch.tensor([12, 8, 5])
    ids = torch.randint(3, zoo.VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :3] = -100
    given = {"input_ids": ids, "labels": labels, "use_cache": False}
    if case == "packed":
        packed = {"input_ids": ids.view(1, -1)[:, :25], "labels": labels.view(1, -1)[:, :25], "use_cache": False}
        return packed | {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}
    if case != "plain":
        given["attention_mask"] = (torch.arange(12) < lengths[:, None]).long()
    if case == "num_items_in_batch":
        given["num_items_in_batch"] = torch.tensor(50)
    return given


def step(model, inputs):
    torch.manual_seed(0)  # dropout
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(model_type, case):
    model = zoo.make(model_type, **({"tie_word_embeddings": True} if case == "tied head" else {}))
    if case == "frozen head":
        model.get_output_embeddings().requires_grad_(False)
    if case == "tied head" and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        pytest.skip("the model does not tie its head")
    inputs = inputs_of(case)
    try:
        own_loss, own = step(model, inputs)
    except (TypeError, ValueError):
        if case != "packed":
            raise
        pytest.skip("the model takes no position_ids")
    with use_memory_efficient_loss(model, chunk_size=7) as patch:
        loss, found = step(model, inputs)
        assert patch.calls == 1
    assert (loss - own_loss).abs() <= 2e-6 * own_loss.abs()
    assert found.keys() == own.keys()
    largest = max(gradient.norm() for gradient in own.values())
    rounding = 4 * torch.finfo(torch.float32).eps * largest  # is what gradients have that cancel to little
    for name, gradient in own.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + rounding, name


def check_scores(model_type):
    """GRPO's log-probabilities and entropies, of padded rows at a temperature, are those of the model's own logits."""
    model, inputs = zoo.make(model_type).eval(), inputs_of("padded")
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1].double() / 0.7
        own = logits.log_softmax(-1)
        options = {"chunk_size": 7, "compile": False, "accumulate_dtype": None, "keep_logits": 0}
        grpo._install(model, 0.7, True, options)
        found = model(**inputs, labels=labels, fused_lm_head=True)
    counts = labels[:, 1:] != -100
    log_probs = own.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1) * counts
    entropies = -(own.exp() * own).sum(-1) * counts
    # Both are differences of numbers as large as the logits, each rounded to float32.
    rounding = 4 * torch.finfo(torch.float32).eps * logits.abs().max() * counts.sum().sqrt()
    for mine, right in ((found.log_probs, log_probs), (found.entropy, entropies)):
        assert (mine - right).norm() <= rounding < 1e-2 * log_probs.norm()


@pytest.mark.parametrize("model_type", SAMPLE)
@pytest.mark.parametrize("case", CASES)
def test_a_sample_is_followed(model_type, case):
    check(model_type, case)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_is_followed_by_grpo(model_type):
    check_scores(model_type)


@pytest.mark.parametrize("model_type", ["bert", "blenderbot-small", "llama4_text", "recurrent_gemma"])
def test_a_sample_is_refused_by_name(model_type):
    with pytest.raises((TypeError, ValueError), match=REFUSED[model_type]):
        use_memory_efficient_loss(zoo.make(model_type))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model_type", FOLLOWED)
def test_followed(model_type, case):
    check(model_type, case)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FOLLOWED)
def test_followed_by_grpo(model_type):
    check_scores(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_name(model_type):
    with pytest.raises((TypeError, ValueError), match=REFUSED[model_type]):
        use_memory_efficient_loss(zoo.make(model_type))

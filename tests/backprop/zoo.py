"""Causal language models of transformers in miniature, by model type: two or three layers of random weights."""

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 64
# What the configs of the families call their sizes: each model gets those that its config has.
_SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions mamba_d_ssm",
    48: "intermediate_size ffn_dim n_inner d_ff",
    32: "hidden_size n_embd d_model dim word_embed_proj_dim embedding_size lru_width conv_dim block_dim block_ff_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size attention_window_size sliding_window dim_model_base "
    "mamba_d_head",
    8: "head_dim kv_channels q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_chunk_size "
    "chunk_size hidden_size_per_layer_input linear_key_head_dim linear_value_head_dim",
    4: "num_attention_heads n_head n_heads num_heads num_experts num_local_experts n_routed_experts moe_num_experts "
    "rotary_dim mamba_d_state mamba_n_heads state_size time_step_rank laurel_rank",
    2: "num_hidden_layers n_layer n_layers num_layers num_key_value_heads num_experts_per_tok moe_k moe_topk "
    "mamba_expand linear_num_key_heads linear_num_value_heads eos_token_id",
    1: "n_group topk_group first_k_dense_replace mamba_n_groups n_groups bos_token_id",
    0: "pad_token_id num_kv_shared_layers",
}
_NAMED = {name: size for size, names in _SIZES.items() for name in names.split()}
_OWN = {
    "mamba": {"num_heads": 8, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
}


def make(model_type: str, **changes: object) -> PreTrainedModel:
    """A model of this type in train mode, float32; its random weights are always the same.

    They are large enough that logits differ, and a forgotten cap or scale shows.
    """
    known = AutoConfig.for_model(model_type).to_dict()
    sizes = {name: size for name, size in _NAMED.items() if name in known} | _OWN.get(model_type, {})
    if "kv_lora_rank" in known and "num_key_value_heads" in known:  # one latent vector has the keys of all heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    config = AutoConfig.for_model(model_type, **sizes, **changes)
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    torch.manual_seed(0)
    model = kind(config).train()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=0.5)
    return model

"""One pico configuration for each family, with every setting that depends on the layers in use.

Built with transformers' own classes; two variants of a family are two entries. Eight layers, so
that each pattern shows twice; heads of 32, the smallest that vLLM serves on a CPU.
"""

from collections.abc import Callable
from typing import Any

from transformers import (
    Cohere2Config,
    DeepseekV2Config,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    Llama4Config,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3VLConfig,
    SmolLM3Config,
    Starcoder2Config,
)

NUM_LAYERS = 8
VOCAB_SIZE = 288
SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"

_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Without head_dim, which some classes derive.
_PLAIN: dict[str, Any] = {
    **_TOKENS,
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
_SHAPE: dict[str, Any] = {**_PLAIN, "head_dim": 32}
_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_WINDOW: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 5,
}
_QWEN_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [5],
}
_DEEPSEEK: dict[str, Any] = {
    **_PLAIN,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
}


def llama() -> PreTrainedConfig:
    return LlamaConfig(**_SHAPE, tie_word_embeddings=False)


def llama_tied() -> PreTrainedConfig:
    """As Llama 3.2: tied, with its rope."""
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    return LlamaConfig(**_SHAPE, tie_word_embeddings=True, rope_parameters=rope)


def mistral() -> PreTrainedConfig:
    return MistralConfig(**_SHAPE, sliding_window=6)


def mixtral() -> PreTrainedConfig:
    return MixtralConfig(**_PLAIN, **_LOCAL_EXPERTS, sliding_window=6)


def qwen2() -> PreTrainedConfig:
    return Qwen2Config(**_PLAIN, tie_word_embeddings=True)


def qwen2_windows() -> PreTrainedConfig:
    """Windows from the sixth layer on; no released model has them."""
    return Qwen2Config(**_PLAIN, **_QWEN_WINDOW, tie_word_embeddings=True)


def qwen2_moe() -> PreTrainedConfig:
    """Every other layer sparse, one of them dense by name."""
    return Qwen2MoeConfig(**_PLAIN, **_QWEN_EXPERTS, shared_expert_intermediate_size=16)


def qwen2_moe_windows() -> PreTrainedConfig:
    """Windows in every other layer too."""
    return Qwen2MoeConfig(
        **_PLAIN, **_QWEN_WINDOW, **_QWEN_EXPERTS, shared_expert_intermediate_size=16
    )


def qwen3() -> PreTrainedConfig:
    return Qwen3Config(**_SHAPE)


def qwen3_windows() -> PreTrainedConfig:
    return Qwen3Config(**_SHAPE, **_QWEN_WINDOW)


def qwen3_moe() -> PreTrainedConfig:
    return Qwen3MoeConfig(**_SHAPE, **_QWEN_EXPERTS)


def qwen3_next() -> PreTrainedConfig:
    """Three linear layers, then one with attention, twice; every other layer sparse."""
    return Qwen3NextConfig(
        **_SHAPE,
        **_QWEN_EXPERTS,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )


def gemma() -> PreTrainedConfig:
    return GemmaConfig(**_SHAPE)


def gemma2() -> PreTrainedConfig:
    return Gemma2Config(**_SHAPE, sliding_window=6, query_pre_attn_scalar=32)


def gemma3_text() -> Gemma3TextConfig:
    # Read by the class and no field of it.
    pattern: dict[str, Any] = {"sliding_window_pattern": 3}
    return Gemma3TextConfig(**_SHAPE, **pattern, sliding_window=6, query_pre_attn_scalar=32)


def gemma3n_text() -> PreTrainedConfig:
    """The last two of eight layers read the keys and values of layers 4 and 5."""
    return Gemma3nTextConfig(
        **{**_SHAPE, "intermediate_size": [48, 48, 32, 32, 48, 48, 32, 32]},
        layer_types=[SLIDING, SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
        sliding_window=6,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB_SIZE,
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0],
    )


def phi3() -> PreTrainedConfig:
    """Phi-4 shapes: grouped heads, part of each rotated, a window."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return Phi3Config(**_PLAIN, rope_parameters=rope, sliding_window=6)


def phi() -> PreTrainedConfig:
    return PhiConfig(**_PLAIN)


def opt() -> PreTrainedConfig:
    return OPTConfig(
        **_TOKENS, vocab_size=VOCAB_SIZE, hidden_size=64, ffn_dim=48, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=64,
    )  # fmt: skip


def opt_projected() -> PreTrainedConfig:
    """As OPT-350m: narrow embeddings, norms behind the branches."""
    return OPTConfig(
        **_TOKENS, vocab_size=VOCAB_SIZE, hidden_size=64, ffn_dim=48, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=32,
        do_layer_norm_before=False,
    )  # fmt: skip


def gpt2() -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=64, n_layer=NUM_LAYERS, n_head=2, n_positions=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def gpt2_scaled_by_depth() -> PreTrainedConfig:
    """Divides its scores by the layer's number: refused."""
    return GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=64, n_layer=NUM_LAYERS, n_head=2, n_positions=64,
        bos_token_id=1, eos_token_id=2, scale_attn_by_inverse_layer_idx=True,
    )  # fmt: skip


def gpt_neox() -> PreTrainedConfig:
    shape = {name: value for name, value in _PLAIN.items() if name != "num_key_value_heads"}
    return GPTNeoXConfig(**shape)


def gpt_neox_sequential() -> PreTrainedConfig:
    shape = {name: value for name, value in _PLAIN.items() if name != "num_key_value_heads"}
    return GPTNeoXConfig(**shape, use_parallel_residual=False)


def gptj() -> PreTrainedConfig:
    return GPTJConfig(
        vocab_size=VOCAB_SIZE, n_embd=64, n_layer=NUM_LAYERS, n_head=2, n_positions=64,
        rotary_dim=16, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def falcon() -> PreTrainedConfig:
    """As Falcon-40B: a norm for each branch, grouped heads."""
    return FalconConfig(
        **_TOKENS, vocab_size=VOCAB_SIZE, hidden_size=128, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True,
        max_position_embeddings=64,
    )  # fmt: skip


def falcon_old() -> PreTrainedConfig:
    """As Falcon-RW: alibi, one branch after the other."""
    return FalconConfig(
        **_TOKENS, vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2, multi_query=False, parallel_attn=False, alibi=True, bias=True,
        max_position_embeddings=64,
    )  # fmt: skip


def starcoder2() -> PreTrainedConfig:
    return Starcoder2Config(**_PLAIN, sliding_window=6)


def olmo2() -> PreTrainedConfig:
    return Olmo2Config(**_PLAIN)


def olmo3() -> PreTrainedConfig:
    return Olmo3Config(**_PLAIN, sliding_window=6)


def granite() -> PreTrainedConfig:
    return GraniteConfig(
        **_PLAIN, residual_multiplier=0.22, embedding_multiplier=12.0, logits_scaling=8.0,
        attention_multiplier=0.125,
    )  # fmt: skip


def granitemoe() -> PreTrainedConfig:
    return GraniteMoeConfig(**_PLAIN, **_LOCAL_EXPERTS, residual_multiplier=0.22)


def cohere2() -> PreTrainedConfig:
    pattern: dict[str, Any] = {"sliding_window_pattern": 3}
    return Cohere2Config(**_PLAIN, **pattern, sliding_window=6)


def smollm3() -> PreTrainedConfig:
    """Every third layer without rope and with a window."""
    return SmolLM3Config(
        **_PLAIN, use_sliding_window=True, sliding_window=6, no_rope_layer_interval=3
    )


def glm4() -> PreTrainedConfig:
    return Glm4Config(**_SHAPE)


def gpt_oss() -> PreTrainedConfig:
    return GptOssConfig(**_SHAPE, **_LOCAL_EXPERTS, sliding_window=6)


def deepseek_v2() -> PreTrainedConfig:
    return DeepseekV2Config(**_DEEPSEEK, topk_method="group_limited_greedy")


def deepseek_v3() -> PreTrainedConfig:
    """As on the Hub: one next-token layer announced, which transformers does not build."""
    drafts: dict[str, Any] = {"num_nextn_predict_layers": 1}
    return DeepseekV3Config(**_DEEPSEEK, **drafts)


def _llama4_text() -> dict[str, Any]:
    """Experts in every other layer, no rope in every fourth."""
    return {
        **_SHAPE,
        "num_local_experts": 4,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 6,
    }


def llama4_text() -> PreTrainedConfig:
    return Llama4TextConfig(**_llama4_text())


def llama4() -> PreTrainedConfig:
    vision = {**_VISION, "vision_output_dim": 16, "projector_input_dim": 16}
    vision |= {"projector_output_dim": 16, "intermediate_size": 64}
    return Llama4Config(text_config=_llama4_text(), vision_config=vision, image_token_index=280)


def gemma3() -> PreTrainedConfig:
    return Gemma3Config(
        text_config=gemma3_text(), vision_config=_VISION, mm_tokens_per_image=4,
        image_token_index=280, boi_token_index=281, eoi_token_index=282,
    )  # fmt: skip


def _mrope() -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 8]}


def qwen2_5_vl() -> PreTrainedConfig:
    return Qwen2_5_VLConfig(
        text_config={**_PLAIN, **_QWEN_WINDOW, "rope_parameters": _mrope()},
        vision_config={**_QWEN_VISION, "fullatt_block_indexes": [1]},
        image_token_id=280, video_token_id=281, vision_start_token_id=282,
        vision_end_token_id=283,
    )  # fmt: skip


def qwen3_vl() -> PreTrainedConfig:
    """Two layers of the tower are injected behind decoder layers 0 and 1."""
    return Qwen3VLConfig(
        text_config={**_SHAPE, "rope_parameters": {**_mrope(), "mrope_interleaved": True}},
        vision_config={
            **_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2],
        },
        image_token_id=280, video_token_id=281, vision_start_token_id=282,
        vision_end_token_id=283,
    )  # fmt: skip


def llava() -> PreTrainedConfig:
    return LlavaConfig(
        text_config={**_SHAPE, "model_type": "llama"},
        vision_config={**_VISION, "model_type": "clip_vision_model"},
        image_token_index=280,
        image_seq_length=4,
    )


def mistral3() -> PreTrainedConfig:
    return Mistral3Config(
        text_config={**_SHAPE, "model_type": "mistral", "sliding_window": None},
        vision_config={**_VISION, "model_type": "pixtral", "head_dim": 8},
        image_token_index=280,
    )


_TEXT = (
    llama, llama_tied, mistral, mixtral, qwen2, qwen2_windows, qwen2_moe, qwen2_moe_windows, qwen3,
    qwen3_windows, qwen3_moe, qwen3_next, gemma, gemma2, gemma3_text, gemma3n_text, phi3, phi, opt,
    opt_projected, gpt2, gpt2_scaled_by_depth, gpt_neox, gpt_neox_sequential, gptj, falcon,
    falcon_old, starcoder2, olmo2, olmo3, granite, granitemoe, cohere2, smollm3, glm4, gpt_oss,
    deepseek_v2, deepseek_v3, llama4_text,
)  # fmt: skip
_MULTIMODAL = (llama4, gemma3, qwen2_5_vl, qwen3_vl, llava, mistral3)
PICO_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    build.__name__: build for build in (*_TEXT, *_MULTIMODAL)
}
MULTIMODAL = frozenset(build.__name__ for build in _MULTIMODAL)
# They cannot be cut, and say why.
REFUSED = frozenset({"gemma3n_text", "gpt2_scaled_by_depth"})

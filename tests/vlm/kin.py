"""Subclasses of families, and families that share most of another's config."""

import dataclasses

from . import gemma, muse, qwen
from .family import Family

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}


def kin(family: Family, name: str, text: dict, vision: dict | None = None, **more):
    """Return a family whose config is another's with these values changed."""
    config = family.config | {"model_type": name}
    config["text_config"] = config["text_config"] | text
    config["vision_config"] = config["vision_config"] | (vision or {})
    config |= more.pop("config", {})
    return dataclasses.replace(family, name=name, config=config, **more)


MOE3_5 = kin(qwen.QWEN3_5, "qwen3_5_moe", EXPERTS, {"model_type": "qwen3_5_moe"})
MOE3 = kin(
    qwen.QWEN3,
    "qwen3_vl_moe",
    EXPERTS | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    {"model_type": "qwen3_vl_moe"},
)
QWEN4 = kin(
    qwen.QWEN3_5,
    "qwen4_exp",
    EXPERTS
    | {
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 64,
        "heads_per_ngram": 4,
        "eos_token_id": 3,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 32,
        "indexer_budget": 512,
    },
    {"model_type": "qwen4_exp"},
    boosts={"self_attn.o_proj": 6, "ple.value_proj": 0.1, "merger": 2},
    note="the first layer reads n-grams of ids",
)
INDIC = kin(qwen.QWEN3_5, "indic_ocr", {})
PACKED = "model.layers.0.mlp.down_proj"
PRISM = kin(
    qwen.QWEN3_5,
    "prism_hadamard_qwen35",
    {"intermediate_size": 128},
    boosts={"o_proj": 3, "down_proj.scales": 0.2, "down_proj.biases": 0.2},
    config={
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": PACKED, "embedding": False, "dtype": "float16", "block": 0}
        ],
    },
)
SOFT = {
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "model_patch_size": 8,
    "max_soft_tokens": 30,
}
UNIFIED = kin(
    gemma.GEMMA4_LARGE,
    "gemma4_unified",
    {"model_type": "gemma4_unified_text", "attention_k_eq_v": False},
    {
        "model_type": "gemma4_unified_vision",
        "model_patch_size": 8,
        "mm_embed_dim": 64,
        "mm_posemb_size": 64,
        "output_proj_dims": 64,
        "num_soft_tokens": 30,
    },
    files={
        "processor_config.json": {
            "image_processor": SOFT,
            "video_processor": SOFT | {"max_soft_tokens": 70},
            "feature_extractor": {"feature_size": 32},
        }
    },
    code=muse.OWN_SIZES.format(kind="gemma4_unified"),
)
K25 = kin(
    muse.KIMI,
    "kimi_k25",
    {},
    {
        "patch_size": 4,
        "init_pos_emb_time": 1,
        "text_hidden_size": 64,
        "vt_hidden_size": 32,
        "vt_num_hidden_layers": 2,
        "vt_num_attention_heads": 2,
        "vt_intermediate_size": 48,
    },
    files={"preprocessor_config.json": {"media_proc_cfg": {"patch_size": 4}}},
    rows=qwen.QWEN2.rows,
    size=(48, 40),
)
FAMILIES = (MOE3_5, MOE3, QWEN4, INDIC, PRISM, UNIFIED, K25)

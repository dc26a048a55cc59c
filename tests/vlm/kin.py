"""Subclasses of families, and families that share most of another's config."""

import dataclasses

from . import gemma, mistral, qwen
from .family import Family

# mlx-vlm finds processors by `model_type`; this one it leaves to transformers.
BORROWED = """\
from mlx_vlm.models.base import install_auto_processor_patch
from mlx_vlm.models.{kind} import *
from mlx_vlm.models.{processor} import {name}

from mlx_vlm.prompt_utils import MODEL_CONFIG

install_auto_processor_patch("{kind}", {name})
MODEL_CONFIG["{kind}"] = MODEL_CONFIG["mistral3"]
"""
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
)
INDIC = kin(qwen.QWEN3_5, "indic_ocr", {})
PACKED = "model.layers.0.mlp.down_proj"
PRISM = kin(
    qwen.QWEN3_5,
    "prism_hadamard_qwen35",
    {"intermediate_size": 128},
    config={
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": PACKED, "embedding": False, "dtype": "float16", "block": 0}
        ],
    },
)
LARGE3 = kin(
    mistral.MISTRAL3,
    "mistral_large3",
    {
        "model_type": "mistral_large3",
        "moe_intermediate_size": 48,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    config={"image_token_id": mistral.MISTRAL3.image_token_id},
    code=BORROWED.format(kind="mistral_large3", processor="mistral3.processing_mistral3", name="Mistral3Processor"),
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
    files={"processor_config.json": {"image_processor": SOFT, "video_processor": SOFT}},
)
FAMILIES = (MOE3_5, MOE3, QWEN4, INDIC, PRISM, LARGE3, UNIFIED)

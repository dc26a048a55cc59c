"""InternVL, Kimi-VL, LFM2-VL and Muse: pictures of any size, one position per token."""

import dataclasses

from .family import Family, special
from .llava import TEXT
from .qwen import MERGE, PATCH, SIDE
from .tiled import INTERN
from .tokens import chat_template

# mlx-vlm makes an image processor of fixed size where a family exports one.
OWN_SIZES = """\
from mlx_vlm.models import {kind} as stock

vars(stock).pop("ImageProcessor", None)
globals().update({{k: v for k, v in vars(stock).items() if k[:2] != "__"}})
"""
HEADS = {"head_dim": 16, "max_position_embeddings": 4096}
INTERNVL = dataclasses.replace(
    INTERN,
    name="internvl",
    config=INTERN.config
    | {
        "model_type": "internvl",
        "image_token_id": INTERN.image_token_id,
        "text_config": TEXT | HEADS | {"model_type": "qwen3", "rope_theta": 1e4},
        "vision_config": INTERN.config["vision_config"]
        | {"model_type": "internvl_vision", "layer_scale_init_value": 1.0},
    },
    files={"processor_config.json": {"image_seq_length": 16}},
)
MLA = {
    "model_type": "deepseek_v3",
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
PAD = ("<|media_pad|>",)


def _any_size(name: str, specials, text, vision, files, **more) -> Family:
    picture, side = more.pop("picture", specials[0]), more.pop("side", SIDE)
    return Family(
        name=name,
        config={
            "model_type": name,
            "text_config": TEXT | text,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": PATCH,
            }
            | vision,
        }
        | more.pop("config", {}),
        files=files,
        specials=specials,
        image_token_id=special(specials, picture),
        rows=lambda width, height: (width // side) * (height // side),
        template=chat_template(picture),
        **more,
    )


MOON = {
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 2,
    "init_pos_emb_height": 16,
    "init_pos_emb_width": 16,
    "merge_kernel_size": [MERGE, MERGE],
    "patch_size": 14,
}
KIMI = _any_size(
    "kimi_vl",
    PAD,
    MLA,
    MOON,
    {},
    config={"media_placeholder_token_id": special(PAD, PAD[0])},
    side=28,
    size=(6 * 28, 5 * 28),
    note="its processor has patches of 14 pixels whatever the config says",
)
MUSE = ("<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>")
LAYERS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "layer_rope_theta": [1e4, 0],
    "sliding_window": 512,
    "head_dim": 16,
    "final_logit_softcapping": 20.0,
    "output_multiplier": 0.5,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}
POSITIONS = {"pos_emb_height": 8, "pos_emb_width": 8, "merge_size": MERGE}
GLIMMER = _any_size(
    "muse_glimmer",
    MUSE,
    LAYERS | {"model_type": "muse_glimmer_text"},
    POSITIONS | {"layer_types": ["window_attention", "full_attention"]},
    {"processor_config.json": {"image_processor": {"patch_size": PATCH}}},
    config={
        "image_token_id": special(MUSE, MUSE[0]),
        "video_token_id": special(MUSE, MUSE[3]),
        "out_hidden_size": 32 * MERGE**2,
        "projector_hidden_size": 64,
    },
)
# Muse Spark's layers are Metal kernels: here those of Muse Glimmer read the prompt.
NO_METAL = """\
from mlx_vlm.models import muse_spark
from mlx_vlm.models.muse_spark import *
from mlx_vlm.models.muse_glimmer import LanguageModel
from mlx_vlm.models.muse_glimmer import TextConfig as Glimmer
from mlx_vlm.models.muse_spark.config import (
    AudioConfig, ModelConfig, TextConfig, VisionConfig
)


class Model(muse_spark.Model):
    def __init__(self, config):
        super().__init__(config)
        text = config.text_config
        names = Glimmer.__dataclass_fields__.keys() & vars(text).keys()
        sizes = {name: getattr(text, name) for name in names - {"model_type"}}
        self.language_model = LanguageModel(Glimmer(**sizes, intermediate_size=96))
        inner = self.language_model.model
        object.__setattr__(
            inner, "embed", lambda ids: inner.embed_norm(inner.embed_tokens(ids))
        )

    def sanitize(self, weights):
        return weights
"""
SPARK = _any_size(
    "muse_spark",
    MUSE,
    LAYERS
    | {
        "model_type": "muse_spark_text",
        "post_norm_eps": 1e-6,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_hidden_size": 32,
        "moe_intermediate_size": 48,
    },
    POSITIONS
    | {
        "layer_types": ["window_attention", "full_attention"],
        "rope_parameters": {"rope_theta": 1e4},
    },
    {"processor_config.json": {"image_processor": {"patch_size": PATCH}}},
    config={
        "image_token_id": special(MUSE, MUSE[0]),
        "video_token_id": special(MUSE, MUSE[3]),
        "audio_token_id": 10**6,
        "audio_config": {
            "patch_sizes": [2, 2],
            "hidden_sizes": [8, 8],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "out_hidden_size": 64,
        },
    },
    code=NO_METAL,
    note="the language model of Muse Glimmer in the place of its own",
)
LFM = ("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
LFM2 = _any_size(
    "lfm2_vl",
    LFM,
    {
        "model_type": "lfm2",
        "tie_word_embeddings": True,
        "block_dim": 64,
        "conv_dim": 64,
        "conv_dim_out": 64,
        "block_ff_dim": 96,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["full_attention", "conv"],
        "rope_theta": 1e4,
    },
    {"model_type": "siglip2_vision_model", "num_patches": 64},
    {
        "preprocessor_config.json": {
            "encoder_patch_size": PATCH,
            "tile_size": 16 * SIDE,
            "min_image_tokens": 1,
            "max_image_tokens": 64,
            "max_num_patches": 256,
        }
    },
    config={
        "image_token_id": special(LFM, LFM[0]),
        "encoder_patch_size": PATCH,
        "projector_hidden_size": 64,
    },
    named={
        "image_token": LFM[0],
        "image_start_token": LFM[1],
        "image_end_token": LFM[2],
        "image_thumbnail": LFM[3],
    },
    tied=True,
)
IDEFICS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>")
IDEFICS2 = _any_size(
    "idefics2",
    IDEFICS,
    {"model_type": "mistral"},
    {"model_type": "idefics2", "image_size": 8 * SIDE},
    {
        "preprocessor_config.json": {
            "image_processor_type": "Idefics2ImageProcessor",
            "size": {"longest_edge": 8 * SIDE, "shortest_edge": 2 * SIDE},
            "do_image_splitting": False,
        },
        "processor_config.json": {"image_seq_len": 16},
    },
    config={
        "image_token_id": special(IDEFICS, IDEFICS[0]),
        "perceiver_config": {
            "model_type": "idefics2_perceiver",
            "num_key_value_heads": 2,
            "resampler_depth": 1,
            "resampler_head_dim": 16,
            "resampler_n_heads": 4,
            "resampler_n_latents": 16,
        },
    },
    boosts={"connector": 1.5},
)
IDEFICS2 = dataclasses.replace(IDEFICS2, rows=lambda width, height: 16)
MOLMO = (
    "<im_patch>",
    "<im_start>",
    "<im_end>",
    "<im_col>",
    "<low_res_im_start>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
    "<|image|>",
)
MOLMO2 = Family(
    name="molmo2",
    config={
        "model_type": "molmo2",
        "image_patch_id": special(MOLMO, MOLMO[0]),
        "image_start_token_id": special(MOLMO, MOLMO[1]),
        "image_end_token_id": special(MOLMO, MOLMO[2]),
        "image_col_id": special(MOLMO, MOLMO[3]),
        "low_res_image_start_token_id": special(MOLMO, MOLMO[4]),
        "image_low_res_id": special(MOLMO, MOLMO[5]),
        "frame_start_token_id": special(MOLMO, MOLMO[6]),
        "frame_end_token_id": special(MOLMO, MOLMO[7]),
        "text_config": TEXT
        | HEADS
        | {"model_type": "molmo2_text", "additional_vocab_size": 4, "rope_theta": 1e4},
        "vision_config": {
            "vit_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "image_patch_size": PATCH,
                "image_num_pos": 64,
                "image_default_input_size": [32, 32],
            },
            "adapter_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "text_hidden_size": 64,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "vit_layers": [-1, -2],
            },
        },
    },
    files={
        "preprocessor_config.json": {
            "size": {"height": 32, "width": 32},
            "patch_size": PATCH,
            "overlap_margins": [1, 1],
            "max_crops": 2,
        }
    },
    specials=MOLMO,
    image_token_id=special(MOLMO, MOLMO[0]),
    rows=lambda width, height: 44,  # of the size that tests have
    template=chat_template(MOLMO[8]),
    code=OWN_SIZES.format(kind="molmo2"),
)
FAMILIES = (INTERNVL, KIMI, GLIMMER, SPARK, LFM2, IDEFICS2, MOLMO2)

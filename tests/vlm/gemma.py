"""Gemma 3, 3n and 4, and PaliGemma."""

from .family import Family, special
from .tokens import chat_template

PICTURE, START, STOP = SPECIALS = (
    "<image_soft_token>",
    "<start_of_image>",
    "<end_of_image>",
)
NAMED = {"image_token": PICTURE, "boi_token": START, "eoi_token": STOP}
PATCH, GRID = 8, 6
SIDE = PATCH * GRID
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "sliding_window_pattern": 2,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
PROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
GEMMA3 = Family(
    name="gemma3",
    config={
        "model_type": "gemma3",
        "hidden_size": 64,
        "image_token_index": special(SPECIALS, PICTURE),
        "text_config": TEXT
        | {
            "model_type": "gemma3_text",
            "query_pre_attn_scalar": 16,
            "mm_tokens_per_image": GRID**2,
        },
        "vision_config": SIGLIP | {"image_size": 2 * SIDE},
    },
    files={
        "preprocessor_config.json": PROCESSOR
        | {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": 2 * SIDE, "width": 2 * SIDE},
        },
        "processor_config.json": {"image_seq_length": GRID**2},
    },
    specials=SPECIALS,
    named=NAMED,
    image_token_id=special(SPECIALS, PICTURE),
    rows=lambda width, height: GRID**2,
    template=chat_template(START),
    tied=True,
    boosts={"post_": 3},
    note="the projector averages 2 x 2 patches; the first layer has a sliding window",
)
PALI = Family(
    name="paligemma",
    config={
        "model_type": "paligemma",
        "hidden_size": 64,
        "image_token_index": special(("<image>",), "<image>"),
        "text_config": TEXT | {"model_type": "gemma"},
        "vision_config": SIGLIP | {"projection_dim": 64},
    },
    files={"preprocessor_config.json": PROCESSOR | {"image_seq_length": GRID**2}},
    specials=("<image>",),
    named={"image_token": "<image>"},
    image_token_id=special(("<image>",), "<image>"),
    rows=lambda width, height: GRID**2,
    tied=True,
    note="every token of the prompt sees every other; no chat",
)
SOUND = ("<audio_soft_token>", "<start_of_audio>", "<end_of_audio>")
SPECIALS_3N = (*SPECIALS, *SOUND)
SMALL_TOWER = """\
import mlx.nn as nn
from mlx_vlm.models import gemma3n
from mlx_vlm.models.gemma3n import (
    AudioConfig, AudioModel, LanguageModel, ModelConfig, TextConfig, VisionConfig
)


class Tower(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.patch_size
        self.conv = nn.Conv2d(3, config.hidden_size, size, size)

    def __call__(self, pixels, output_hidden_states=None):
        return self.conv(pixels.transpose(0, 2, 3, 1))


class Model(gemma3n.Model):
    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = Tower(config.vision_config)
"""
GEMMA3N = Family(
    name="gemma3n",
    config={
        "model_type": "gemma3n",
        "hidden_size": 64,
        "image_token_id": special(SPECIALS_3N, PICTURE),
        "image_token_index": special(SPECIALS_3N, PICTURE),
        "audio_token_id": special(SPECIALS_3N, SOUND[0]),
        "vision_soft_tokens_per_image": GRID**2,
        "text_config": TEXT
        | {
            "model_type": "gemma3n_text",
            "num_hidden_layers": 4,
            "intermediate_size": [96] * 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "laurel_rank": 8,
            "hidden_size_per_layer_input": 8,
        },
        "vision_config": {"hidden_size": 32, "patch_size": PATCH, "vocab_size": 8},
        "audio_config": {
            "hidden_size": 32,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [4, 4],
            "vocab_size": 8,
        },
    },
    files={
        "preprocessor_config.json": PROCESSOR,
        "processor_config.json": {"image_seq_length": GRID**2, "audio_seq_length": 4},
    },
    specials=SPECIALS_3N,
    named=NAMED
    | {"audio_token": SOUND[0], "boa_token": SOUND[1], "eoa_token": SOUND[2]},
    image_token_id=special(SPECIALS_3N, PICTURE),
    rows=lambda width, height: GRID**2,
    template=chat_template(PICTURE),
    tied=True,
    boosts={"post_": 3},
    code=SMALL_TOWER,
    note="per-layer inputs; stock sizes of the tower are fixed, so that model.py has"
    " one convolution",
)
SPECIALS_4 = (*SPECIALS, "<|video|>")


def _gemma4(name: str, text: dict, note: str) -> Family:
    return Family(
        name=name,
        config={
            "model_type": "gemma4",
            "hidden_size": 64,
            "image_token_id": special(SPECIALS_4, PICTURE),
            "video_token_id": special(SPECIALS_4, "<|video|>"),
            "audio_token_id": 10**6,
            "audio_config": None,
            "text_config": TEXT
            | {"model_type": "gemma4_text", "global_head_dim": 16}
            | text,
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": PATCH // 2,
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
            },
        },
        files={
            "processor_config.json": {
                "image_processor": {
                    "patch_size": PATCH // 2,
                    "pooling_kernel_size": 2,
                    "max_soft_tokens": 30,
                },
                "feature_extractor": {"feature_size": 32},
                "video_processor": {
                    "patch_size": PATCH // 2,
                    "pooling_kernel_size": 2,
                    "max_soft_tokens": 70,
                },
            }
        },
        specials=SPECIALS_4,
        named=NAMED | {"video_token": "<|video|>"},
        image_token_id=special(SPECIALS_4, PICTURE),
        rows=lambda width, height: 30,
        template=chat_template(PICTURE, "<|video|>"),
        tied=True,
        boosts={"post_": 3},
        video=True,
        note=note + "; `rows` is right for pictures of 6 : 5",
    )


GEMMA4 = _gemma4(
    "gemma4",
    {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
    },
    "as small ones: per-layer inputs, layers that share keys and values",
)
GEMMA4_LARGE = _gemma4(
    "gemma4_large",
    {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
    },
    "as large ones: tokens of a picture see each other, by mm_token_type_ids",
)
FAMILIES = (GEMMA3, PALI, GEMMA3N, GEMMA4, GEMMA4_LARGE)

"""Qwen: rotary positions in three dimensions, any size of picture, videos."""

from .family import Family, special
from .tokens import chat_template

START, STOP, PICTURE, FILM = SPECIALS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PATCH, MERGE = 4, 2
SIDE = PATCH * MERGE  # pixels along a visual token
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
ROPE = {"type": "mrope", "mrope_section": [2, 3, 3]}
IDS = {
    "image_token_id": special(SPECIALS, PICTURE),
    "video_token_id": special(SPECIALS, FILM),
    "vision_start_token_id": special(SPECIALS, START),
    "vision_end_token_id": special(SPECIALS, STOP),
}
VISION = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
PROCESSOR = {
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
    "min_pixels": SIDE**2,
    "max_pixels": 64 * SIDE**2,
    "min_frames": 2,
}


def _family(name: str, config: dict, note: str = "", **more) -> Family:
    return Family(
        name=name,
        config={"model_type": name, **IDS, **config},
        files={
            "preprocessor_config.json": PROCESSOR,
            "video_preprocessor_config.json": PROCESSOR,
        },
        specials=SPECIALS,
        image_token_id=IDS["image_token_id"],
        rows=lambda width, height: (width // SIDE) * (height // SIDE),
        template=chat_template(START + PICTURE + STOP, START + FILM + STOP),
        mrope=True,
        video=True,
        note=note,
        **more,
    )


QWEN2 = _family(
    "qwen2_vl",
    TEXT
    | {
        "rope_scaling": ROPE,
        "vision_config": VISION | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    },
)
QWEN2_5 = _family(
    "qwen2_5_vl",
    TEXT
    | {
        "rope_scaling": ROPE,
        "vision_config": VISION
        | {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "window_size": 2 * SIDE,
            "fullatt_block_indexes": [1],
        },
    },
    "the first layer of the tower attends in windows of 2 x 2 visual tokens",
)
POSITIONS = {"num_position_embeddings": 144, "hidden_size": 32, "out_hidden_size": 64}
QWEN3 = _family(
    "qwen3_vl",
    {
        "text_config": TEXT
        | {
            "model_type": "qwen3_vl_text",
            "num_hidden_layers": 4,
            "head_dim": 16,
            "rope_theta": 1e6,
            "max_position_embeddings": 4096,
            "rope_scaling": ROPE,
        },
        "vision_config": VISION
        | POSITIONS
        | {"intermediate_size": 48, "deepstack_visual_indexes": [0, 1]},
    },
    "deepstack: the first two layers add features of the tower's two blocks",
)
QWEN3_5 = _family(
    "qwen3_5",
    {
        "text_config": TEXT
        | {
            "model_type": "qwen3_5_text",
            "full_attention_interval": 2,
            "head_dim": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "type": "default",
                "mrope_section": [2, 1, 1],
                "rope_theta": 1e5,
                "partial_rotary_factor": 0.25,
            },
        },
        "vision_config": VISION
        | POSITIONS
        | {"model_type": "qwen3_5", "intermediate_size": 48},
    },
    "the first layer has linear attention, the second one softmax",
    boosts={"self_attn.o_proj": 3},
)
FAMILIES = (QWEN2, QWEN2_5, QWEN3, QWEN3_5)

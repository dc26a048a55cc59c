"""GLM-4V, GLM-OCR, PaddleOCR-VL and dots.ocr: towers that take grids, as Qwen's."""

from .family import Family, special
from .qwen import MERGE, PATCH, SIDE, TEXT
from .tokens import chat_template

PICTURE, FILM, START, STOP = SPECIALS = (
    "<|image|>",
    "<|video|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
)
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH,
    "image_size": 8 * SIDE,
    "out_hidden_size": 64,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
}
PROCESSOR = {
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": SIDE**2, "longest_edge": 2 * 64 * SIDE**2},
    "min_pixels": SIDE**2,
    "max_pixels": 64 * SIDE**2,
}
SECTIONS = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3]}


def _family(name, text, vision=None, specials=SPECIALS, **more) -> Family:
    picture = specials[0]
    config = {
        "model_type": name,
        "image_token_id": special(specials, picture),
        "video_token_id": special(specials, specials[1]),
        "text_config": TEXT | {"model_type": f"{name}_text"} | text,
        "vision_config": VISION | {"model_type": f"{name}_vision"} | (vision or {}),
    }
    return Family(
        name=name,
        config=config | more.pop("config", {}),
        files={"preprocessor_config.json": PROCESSOR | more.pop("processor", {})},
        specials=specials,
        named={"image_token": picture, "video_token": specials[1]},
        image_token_id=special(specials, picture),
        rows=lambda width, height: (width // SIDE) * (height // SIDE),
        template=chat_template(picture),
        **more,
    )


GLM = {
    "partial_rotary_factor": 0.5,
    "rope_theta": 1e4,
    "rope_scaling": SECTIONS | {"mrope_section": [1, 1, 2]},
    "attention_bias": True,
    "max_position_embeddings": 4096,
}
GLM4V = _family("glm4v", GLM, mrope=True)
GLM4V_MOE = _family(
    "glm4v_moe",
    GLM
    | {
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "n_group": 1,
        "head_dim": 16,
        "topk_group": 1,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "routed_scaling_factor": 1.0,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "rope_parameters": SECTIONS
        | {"rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
    },
    mrope=True,
)
OCR = _family(
    "glm_ocr",
    {
        "head_dim": 16,
        "rope_parameters": SECTIONS | {"partial_rotary_factor": 1.0, "rope_theta": 1e4},
    },
    mrope=True,
)
PADDLE_TEXT = TEXT | {
    "hidden_size": 1024,  # which the projector has, whatever the config says
    "head_dim": 16,
    "use_bias": False,
    "rope_theta": 1e4,
    "rope_scaling": SECTIONS,
    "max_position_embeddings": 4096,
}
PADDLE_TOKENS = ("<|IMAGE_PLACEHOLDER|>", *SPECIALS[1:])
PADDLE = _family(
    "paddleocr_vl",
    {},
    {
        "model_type": "paddleocr_vl",
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 6 * SIDE,
    },
    PADDLE_TOKENS,
    processor={"temporal_patch_size": 1},
    config=PADDLE_TEXT,
    mrope=True,
)
OWN_IDS = """\
from mlx_vlm.models.dots_ocr.dots_ocr import *
from mlx_vlm.models.dots_ocr.config import ModelConfig, TextConfig, VisionConfig
from mlx_vlm.models.dots_ocr.processing_dots_ocr import DotsVLProcessor
from mlx_vlm.models.base import install_auto_processor_patch


class Processor(DotsVLProcessor):
    @classmethod
    def from_pretrained(cls, *args, **named):
        made = super().from_pretrained(*args, **named)
        made.image_token_id = made.tokenizer.convert_tokens_to_ids(made.image_token)
        made.image_ids = [made.image_token_id]
        return made


install_auto_processor_patch("dots_ocr", Processor)
"""
DOTS = _family(
    "dots_ocr",
    {"rope_theta": 1e4, "max_position_embeddings": 4096},
    {
        "model_type": "dots_vit",
        "embed_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "temporal_patch_size": 1,
        "hidden_size": 64,
    },
    ("<|imgpad|>", "<|video_pad|>"),
    processor={
        "image_processor_type": "Qwen2VLImageProcessor",
        "temporal_patch_size": 1,
    },
    code=OWN_IDS,
    note="its processor has the ids of the large vocabulary; model.py gives it these",
)
FAMILIES = (GLM4V, GLM4V_MOE, OCR, PADDLE, DOTS)

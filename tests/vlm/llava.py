"""LLaVA and its relatives: a tower, a projector, Llama or Qwen2."""

from .family import Family, special
from .tokens import chat_template

PICTURE, FILM = "<image>", "<video>"
PATCH, GRID = 8, 4
SIDE = PATCH * GRID  # pixels along a picture or a tile of one
TEXT = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
VISION = {
    "model_type": "clip_vision_model",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
}
GRIDS = {"image_grid_pinpoints": [[SIDE * h, SIDE * w] for h in (1, 2) for w in (1, 2)]}
TILES = {
    "size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    **GRIDS,
}
SPLIT = {
    "patch_size": PATCH,
    "image_token": PICTURE,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,  # the tower's class token, which is dropped
}
MENDED = """\
from mlx_vlm.models.base import install_auto_processor_patch
from mlx_vlm.models.llava import (
    LanguageModel, Model, ModelConfig, TextConfig, VisionConfig, VisionModel
)
from mlx_vlm.models.llava.processing_llava import LlavaProcessor


class Processor(LlavaProcessor):
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        made = super().from_pretrained(*args, **kwargs)
        plain = made.image_processor.preprocess
        made.image_processor.preprocess = lambda images, padding=None: plain(images)
        return made


install_auto_processor_patch("llava", Processor)
"""


def tiles(width: int, height: int) -> int:
    """Return the rows of the whole image and its tiles, with newline tokens."""
    across, down = (GRID * (n // SIDE) for n in (width, height))
    return GRID**2 + down * (across + 1)


LLAVA = Family(
    name="llava",
    config={
        "model_type": "llava",
        "image_token_index": special((PICTURE,), PICTURE),
        "text_config": TEXT,
        "vision_config": VISION,
    },
    files={"preprocessor_config.json": CLIP, "processor_config.json": SPLIT},
    specials=(PICTURE,),
    image_token_id=special((PICTURE,), PICTURE),
    rows=lambda width, height: GRID**2,
    size=(SIDE, SIDE),
    template=chat_template(PICTURE),
    code=MENDED,
    note="mlx-vlm 0.7.10 gives the image processor `padding`, which transformers"
    " 5.24 refuses; model.py mends that",
)
NEXT = Family(
    name="llava_next",
    config=LLAVA.config | GRIDS | {"model_type": "llava_next"},
    files={
        "preprocessor_config.json": CLIP
        | GRIDS
        | {"image_processor_type": "LlavaNextImageProcessor"},
        "processor_config.json": SPLIT,
    },
    specials=(PICTURE,),
    image_token_id=special((PICTURE,), PICTURE),
    rows=lambda width, height: 2 * GRID**2 * (1 + width * height // SIDE**2),
    placeholders=tiles,
    size=(SIDE, SIDE),
    template=chat_template(PICTURE),
    note="the model puts as many newline rows as picture rows, whatever the number"
    " of placeholders",
)
ONEVISION = Family(
    name="llava_onevision",
    config={
        "model_type": "llava_onevision",
        "image_token_index": special((PICTURE, FILM), PICTURE),
        "video_token_index": special((PICTURE, FILM), FILM),
        **GRIDS,
        "vision_aspect_ratio": "anyres_max_9",
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
    },
    files={
        "preprocessor_config.json": TILES
        | {"image_processor_type": "LlavaOnevisionImageProcessor"},
        "processor_config.json": {
            "num_image_tokens": GRID**2,
            "image_token": PICTURE,
            "video_token": FILM,
            "vision_feature_select_strategy": "full",
        },
        "video_preprocessor_config.json": {"size": TILES["size"]},
    },
    specials=(PICTURE, FILM),
    image_token_id=special((PICTURE, FILM), PICTURE),
    rows=tiles,
    size=(2 * SIDE, SIDE),
    template=chat_template(PICTURE, FILM),
    video=True,
)
SMALL_TOWER = """\
from mlx_vlm.models import fastvlm
from mlx_vlm.models.fastvlm import LanguageModel, Model, ModelConfig, TextConfig
from mlx_vlm.models.fastvlm import VisionModel


class VisionConfig(fastvlm.VisionConfig):
    layers = [1, 1, 1, 1, 1]
    embed_dims = [8, 16, 32, 32, 32]
    mlp_ratios = [2, 2, 2, 2, 2]
"""
STRIDE = 64  # pixels along a visual token
FAST = Family(
    name="fastvlm",
    config=TEXT
    | {
        "model_type": "llava_qwen2",
        "mm_hidden_size": 64,
        "mm_projector_type": "mlp2x_gelu",
        "vision_config": {"model_type": "llava_qwen2", "image_size": 4 * STRIDE},
    },
    files={
        "preprocessor_config.json": {
            "size": {"shortest_edge": 4 * STRIDE},
            "crop_size": {"height": 4 * STRIDE, "width": 4 * STRIDE},
        }
    },
    specials=(),
    image_token_id=-200,
    rows=lambda width, height: 16,
    placeholders=lambda width, height: 1,
    size=(96, 80),
    template=chat_template(),
    code=SMALL_TOWER,
    boosts={"patch_embed": 4, ".proj.": 2},
    note="one id becomes 16 rows; stock sizes of the tower are fixed, so that model.py"
    " has smaller ones",
)
FAMILIES = (LLAVA, NEXT, ONEVISION, FAST)

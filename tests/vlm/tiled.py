"""Pictures in square tiles, each with the same number of tokens, text between them."""

from .family import Family, special
from .llava import TEXT, VISION
from .tokens import chat_template

PATCH, SHUFFLE, GRID = 4, 2, 4
SIDE = PATCH * SHUFFLE * GRID  # pixels along a tile
PICTURE = "<image>"
IDEFICS = (
    PICTURE,
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
TOWER = VISION | {"image_size": SIDE, "patch_size": PATCH}


def _idefics_rows(width: int, height: int) -> int:
    """Return the rows of two tiles along the longer side, and of the whole image."""
    down, across = (-(-2 * n // max(width, height)) for n in (height, width))
    return GRID**2 * (down * across + 1)


def _idefics(name: str, processor: str, tower: str) -> Family:
    return Family(
        name=name,
        config={
            "model_type": name,
            "image_token_id": special(IDEFICS, PICTURE),
            "scale_factor": SHUFFLE,
            "text_config": TEXT,
            "vision_config": TOWER | {"model_type": tower},
        },
        files={
            "preprocessor_config.json": {
                "image_processor_type": processor,
                "size": {"longest_edge": 2 * SIDE},
                "max_image_size": {"longest_edge": SIDE},
                "do_image_splitting": True,
            },
            "processor_config.json": {"image_seq_len": GRID**2},
        },
        specials=IDEFICS,
        image_token_id=special(IDEFICS, PICTURE),
        rows=_idefics_rows,
        size=(2 * SIDE, SIDE),
        template=chat_template(PICTURE),
    )


IDEFICS3 = _idefics("idefics3", "Idefics3ImageProcessor", "idefics3_vision")
SMOL = _idefics("smolvlm", "SmolVLMImageProcessor", "smolvlm_vision")

CONTEXT = ("<img>", "</img>", "<IMG_CONTEXT>")
INTERN = Family(
    name="internvl_chat",
    config={
        "model_type": "internvl_chat",
        "image_token_index": special(CONTEXT, "<IMG_CONTEXT>"),
        "downsample_ratio": 1 / SHUFFLE,
        "max_dynamic_patch": 4,
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": TOWER | {"model_type": "intern_vit_6b"},
    },
    files={},
    specials=CONTEXT,
    image_token_id=special(CONTEXT, "<IMG_CONTEXT>"),
    rows=lambda width, height: GRID**2 * (width * height // SIDE**2 + 1),
    size=(2 * SIDE, SIDE),
    note="`rows` is right for 2 to 4 tiles; one alone has no second, smaller picture",
)
FAMILIES = (IDEFICS3, SMOL, INTERN)

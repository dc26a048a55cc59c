"""Pixtral and Mistral 3: pictures of any size, with a token after each line."""

from .family import Family, special
from .llava import TEXT
from .tokens import chat_template

PICTURE, BREAK, STOP = SPECIALS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
SIDE = 8  # pixels along a visual token


def _family(name: str, patch: int, note: str) -> Family:
    return Family(
        name=name,
        config={
            "model_type": name,
            "image_token_index": special(SPECIALS, PICTURE),
            "spatial_merge_size": SIDE // patch,
            "text_config": TEXT
            | {
                "model_type": "mistral",
                "head_dim": 16,
                "rope_theta": 1e6,
                "max_position_embeddings": 4096,
            },
            "vision_config": {
                "model_type": "pixtral",
                "num_hidden_layers": 2,
                "hidden_size": 32,
                "head_dim": 16,
                "intermediate_size": 48,
                "num_attention_heads": 2,
                "image_size": 8 * SIDE,
                "patch_size": patch,
            },
        },
        files={
            "preprocessor_config.json": {
                "size": {"longest_edge": 8 * SIDE},
                "patch_size": {"height": SIDE, "width": SIDE},
            },
            "processor_config.json": {
                "patch_size": patch,
                "spatial_merge_size": SIDE // patch,
                "image_token": PICTURE,
                "image_break_token": BREAK,
                "image_end_token": STOP,
            },
        },
        specials=SPECIALS,
        image_token_id=special(SPECIALS, PICTURE),
        rows=lambda width, height: -(-width // SIDE) * -(-height // SIDE),
        template=chat_template(PICTURE),
        note=note,
    )


PIXTRAL = _family("pixtral", SIDE, "")
MISTRAL3 = _family("mistral3", SIDE // 2, "the projector merges 2 x 2 patches")
FAMILIES = (PIXTRAL, MISTRAL3)

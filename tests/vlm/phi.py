"""Phi-3 vision: negative ids where a picture is, 313 rows at least."""

from .family import Family
from .tokens import chat_template

SMALL_TOWER = """\
import mlx.nn as nn
from mlx_vlm.models import phi3_v
from mlx_vlm.models.phi3_v import ModelConfig, TextConfig, VisionConfig


class Same(nn.Module):
    def __call__(self, x, mask=None):
        return x


class Model(phi3_v.Model):
    def __init__(self, config):
        super().__init__(config)
        tower = self.model.vision_embed_tokens.img_processor.vision_model
        tower.encoder.layers = [Same()]
"""
PHI3 = Family(
    name="phi3_v",
    config={
        "model_type": "phi3_v",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    files={"preprocessor_config.json": {"num_crops": 1, "num_img_tokens": 144}},
    specials=(),
    image_token_id=None,
    rows=lambda width, height: 2 * 12 * (12 + 1) + 1,
    template=chat_template(),
    code=SMALL_TOWER,
    note="ids of picture n are -n; `language_model` is the model itself; the tower, of"
    " fixed size, is without its 24 layers in model.py",
)
FAMILIES = (PHI3,)

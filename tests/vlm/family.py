"""Description and writer of one mlx-vlm family of tiny random checkpoints."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx_tokprune  # noqa: F401  # before MLX

import mlx.core as mx  # isort: skip

from . import tokens, weights  # isort: skip


@dataclass(frozen=True)
class Family:
    """Family of tiny checkpoints; `write` makes a folder for stock mlx-vlm."""

    name: str  # as in `mlx_vlm.models`, but for variants of one
    config: dict  # config.json, without the ids that all families have
    files: dict[str, dict]  # other files of the folder, by name
    specials: tuple[str, ...]  # tokens, besides the common ones
    image_token_id: int | None  # of a placeholder; None: negative, one per picture
    rows: Callable[[int, int], int]  # visual tokens, by width and height, if not scaled
    placeholders: Callable[[int, int], int] | None = None  # where not as many
    size: tuple[int, int] = (48, 40)  # width, height of a picture that fits
    named: dict[str, str] = field(default_factory=dict)  # attributes of the tokenizer
    template: str | None = None  # of a chat
    code: str | None = None  # model.py: small parts where stock sizes are fixed
    mrope: bool = False
    video: bool = False
    boosts: dict[str, float] = field(default_factory=dict)  # weights, by part of name
    tied: bool = False  # the head is the embedding
    note: str = ""

    def count(self, width: int, height: int) -> int:
        """Return the number of placeholder ids of an image of this size."""
        return (self.placeholders or self.rows)(width, height)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        size = len(tokens.vocabulary(self.specials))
        common = {
            "vocab_size": size,
            "eos_token_id": tokens.COMMON.index(tokens.END),
            "pad_token_id": tokens.COMMON.index(tokens.PAD),
        }
        config = common | self.config
        if "text_config" in config:
            text = {"vocab_size": size} | config["text_config"]
            if "hidden_size_per_layer_input" in text:
                text["vocab_size_per_layer_input"] = size
            config["text_config"] = text
        if self.code is not None:
            config["model_file"] = "model.py"
            (folder / "model.py").write_text(self.code)
        for name, content in {"config.json": config, **self.files}.items():
            (folder / name).write_text(json.dumps(content))
        tokens.write_tokenizer(folder, self.specials, self.named, self.template)
        silent = list(range(len(tokens.COMMON) + len(self.specials)))
        model = weights.build(config, folder)
        drawn = weights.draw(model, silent, self.tied, self.boosts)
        path = str(folder / "model.safetensors")
        mx.save_safetensors(path, drawn, {"format": "mlx"})


def special(specials: tuple[str, ...], token: str) -> int:
    return tokens.vocabulary(specials)[token]

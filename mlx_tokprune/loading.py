"""From a path or hub id to `(model, processor)`, whatever layout the folder has."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from .convert import fastvlm as layout
from .convert.checkpoint import Checkpoint, read_json
from .errors import InputError
from .hub import resolve
from .image import preprocess
from .models.fastvlm import FastVLM, ModelArgs
from .prompt import Prompt, place_pictures, tokenize


@dataclass(frozen=True)
class Processor:
    """Pictures and text to what the model takes; `tokenizer` is mlx-lm's wrapper."""

    tokenizer: object
    image_size: int
    image_token: str
    prefix: str
    suffix: str

    def pixels(self, images: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures -> (B, S, S, 3) float32 in [0, 1]."""
        return preprocess(images, self.image_size)

    def prompt(self, text: str, pictures: int) -> Prompt:
        """The user's text in the chat template, as token ids around the pictures."""
        text = place_pictures(text, pictures, self.image_token)
        chat = f"{self.prefix}{text}{self.suffix}"
        return tokenize(chat, self.image_token, self._encode)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def default_dtype() -> mx.Dtype | None:
    """float32 on MLX's CPU backend, whose half precision is slow; else as stored."""
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else None


def load(
    path_or_hf_repo: str | Path, dtype: mx.Dtype | None = None
) -> tuple[FastVLM, Processor]:
    """Load a FastVLM checkpoint, converted or original, from a folder or the hub.

    dtype: of float weights; `default_dtype()` when `None`. Raises `InputError` when
    the folder cannot be used.
    """
    checkpoint = Checkpoint.open(resolve(path_or_hf_repo))
    config = layout.read_config(checkpoint)
    model = FastVLM(ModelArgs.from_dict(config))
    weights = model.sanitize(layout.to_mlx_layout(checkpoint.load()))
    if config.get("quantization"):
        _quantize(model, config["quantization"], weights)
    dtype = dtype or default_dtype()
    if dtype is not None:
        weights = {k: _cast(v, dtype) for k, v in weights.items()}
    model.load_weights(list(weights.items()))
    model.eval()
    mx.eval(model.parameters())
    tokenizer = load_tokenizer(checkpoint.folder, config)
    _check_vocabulary(tokenizer, model.args.text["vocab_size"], checkpoint.folder)
    processor = Processor(
        tokenizer,
        model.image_size,
        model.image_token,
        model.prompt_prefix,
        model.prompt_suffix,
    )
    return model, processor


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _quantize(model: FastVLM, quantization: dict, weights: dict) -> None:
    def is_quantized(path: str, module: nn.Module) -> bool:
        return model.quant_predicate(path, module) and f"{path}.scales" in weights

    nn.quantize(
        model,
        group_size=quantization["group_size"],
        bits=quantization["bits"],
        mode=quantization.get("mode", "affine"),
        class_predicate=is_quantized,
    )


def load_tokenizer(folder: Path, config: dict):
    """mlx-lm's tokenizer of a folder, with every stop token that the folder names.

    Raises `InputError` when there is none.
    """
    from mlx_lm.tokenizer_utils import load as load_mlx_lm_tokenizer

    stops: set[int] = set()
    for source in (config, _optional_json(folder / "generation_config.json")):
        ids = source.get("eos_token_id") or []
        stops |= {ids} if isinstance(ids, int) else set(ids)
    # transformers warns that it has no model type `llava_qwen2`; it needs none.
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return load_mlx_lm_tokenizer(folder, eos_token_ids=stops)
    except Exception as error:  # tokenizers raises bare Exception on a bad file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder} has no usable tokenizer ({reason})") from None
    finally:
        log.setLevel(level)


def _check_vocabulary(tokenizer, size: int, folder: Path) -> None:
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= size:
        raise InputError(
            f"the tokenizer of {folder} has token id {highest}, but the model only "
            f"{size} embeddings"
        )


def _optional_json(path: Path) -> dict:
    return read_json(path) if path.exists() else {}

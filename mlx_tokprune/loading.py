"""From a path or hub id to `(model, processor)`, whatever layout the folder has."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from .actions import Bounds, bin_values, choose_statistics, read_bounds
from .convert.checkpoint import Checkpoint, read_json
from .convert.families import identify
from .errors import InputError
from .hub import resolve
from .image import preprocess, preprocess_content, preprocess_naive
from .models.fastvithd import TOTAL_STRIDE
from .models.fastvlm import FastVLM
from .models.openvla import OpenVLA
from .prompt import Prompt, action_prompt, place_pictures, tokenize

PADDINGS = ("keep", "skip")
_LARGEST = 4096  # px of an input, four times what FastVLM was trained on


@dataclass(frozen=True)
class Processor:
    """Pictures and text to what the model takes; `tokenizer` is mlx-lm's wrapper."""

    tokenizer: object
    image_size: int
    image_token: str
    prefix: str
    suffix: str
    padding: str = "keep"

    def at(self, image_size: int, padding: str | None = None) -> "Processor":
        """The same for another input size, or another way with padding.

        padding: `keep` pads pictures to a square, as the model was trained; `skip`
        leaves the padding out. Raises `InputError` for a size that cannot be encoded.
        """
        padding = padding or self.padding
        if padding not in PADDINGS:
            raise InputError(f"padding is {' or '.join(PADDINGS)}, not {padding!r}")
        if image_size < TOTAL_STRIDE or image_size % TOTAL_STRIDE:
            near = max(TOTAL_STRIDE, round(image_size / TOTAL_STRIDE) * TOTAL_STRIDE)
            raise InputError(
                f"cannot encode pictures of {image_size} px; expected a multiple of "
                f"{TOTAL_STRIDE}, such as {near}"
            )
        if image_size > _LARGEST:
            raise InputError(
                f"cannot encode pictures of {image_size} px; the most is {_LARGEST}"
            )
        return dataclasses.replace(self, image_size=image_size, padding=padding)

    def pixels(self, images: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures -> (B, S, S, 3) float32 in [0, 1], or (B, h, w, 3) if skipping.

        The longer side of a skipped picture is S.
        """
        if self.padding == "skip":
            return preprocess_content(images, self.image_size, TOTAL_STRIDE)
        return preprocess(images, self.image_size)

    def prompt(self, text: str, pictures: int) -> Prompt:
        """The user's text in the chat template, as token ids around the pictures."""
        text = place_pictures(text, pictures, self.image_token)
        chat = f"{self.prefix}{text}{self.suffix}"
        return tokenize(chat, self.image_token, self._encode)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


@dataclass(frozen=True)
class ActionProcessor:
    """Pictures, instructions and robot states to what a policy takes, and back.

    limit: the most tokens that an instruction's prompt may have. norm_stats: of each
    data set, by unnorm key. crop: share of the picture's area that is looked at.
    resample: how pictures are resized.
    """

    tokenizer: object
    image_size: int
    vocabulary: int
    bins: int
    empty_token_id: int
    limit: int
    norm_stats: dict
    rule: str = "bounds_q99"
    crop: float = 1.0
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def pixels(self, images: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures -> (B, S, S, 3) float32 in [0, 1], resized without padding."""
        return preprocess_naive(images, self.image_size, self.crop, self.resample)

    def prompt(self, instruction: str) -> tuple[int, tuple[int, ...]]:
        """The id that opens the sequence, and the ids that follow the pictures.

        Raises `InputError` for an empty instruction or one that does not fit.
        """
        text = action_prompt(instruction)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if ids[-1:] != [self.empty_token_id]:
            ids = [*ids, self.empty_token_id]
        if len(ids) > self.limit:
            raise InputError(
                f"the instruction is too long: with its prompt it has {len(ids)} "
                f"tokens, and the most is {self.limit}"
            )
        return self.tokenizer.bos_token_id, tuple(ids)

    def bounds(self, part: str, unnorm_key: str | None) -> Bounds:
        """The range of `action` or `proprio` in one data set."""
        statistics = choose_statistics(self.norm_stats, unnorm_key)
        return read_bounds(statistics, part, self.rule)

    def values(self, ids: np.ndarray) -> np.ndarray:
        """(..., A) action token ids -> values in [-1, 1]."""
        return bin_values(ids, self.vocabulary, self.bins)


def default_dtype() -> mx.Dtype | None:
    """float32 on MLX's CPU backend, whose half precision is slow; else as stored."""
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else None


def load(
    path_or_hf_repo: str | Path, dtype: mx.Dtype | None = None, lazy: bool = False
) -> tuple[FastVLM | OpenVLA, Processor | ActionProcessor]:
    """Load a checkpoint, converted or original, from a folder or the hub.

    dtype: of float weights; `default_dtype()` when `None`. lazy: leave weights on the
    disk until something needs them. A FastVLM comes with a `Processor`, an OpenVLA with
    an `ActionProcessor`. Raises `InputError` when the folder cannot be used.
    """
    family, checkpoint = identify(Checkpoint.open(resolve(path_or_hf_repo)))
    config = family.read_config(checkpoint)
    model = family.build(config, True)
    weights, dtype = family.to_mlx_layout(checkpoint.load()), dtype or default_dtype()
    if dtype is not None:  # before anything is folded, which costs precision
        weights = {k: _cast(v, dtype) for k, v in weights.items()}
    weights = model.sanitize(weights)
    if config.get("quantization"):
        _quantize(model, config["quantization"], weights)
    model.load_weights(list(weights.items()))
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
    tokenizer = load_tokenizer(checkpoint.folder, config)
    _check_vocabulary(tokenizer, model.args.text["vocab_size"], checkpoint.folder)
    if isinstance(model, OpenVLA):
        return model, _action_processor(model, tokenizer, config)
    processor = Processor(
        tokenizer,
        model.image_size,
        model.image_token,
        model.prompt_prefix,
        model.prompt_suffix,
    )
    return model, processor


def check(path_or_hf_repo: str | Path) -> None:
    """Raise `InputError` unless a checkpoint can be loaded, from its headers alone."""
    family, checkpoint = identify(Checkpoint.open(resolve(path_or_hf_repo)))
    family.read_config(checkpoint)


def _action_processor(model: OpenVLA, tokenizer, config: dict) -> ActionProcessor:
    args = model.args
    if tokenizer.bos_token_id is None:
        raise InputError(
            "the tokenizer has no token that opens a sequence; expected <s>"
        )
    return ActionProcessor(
        tokenizer,
        model.image_size,
        args.vocabulary,
        args.bins,
        args.empty_token_id,
        args.longest_prompt,
        config["norm_stats"],
        args.oft.rule if args.oft else "bounds_q99",
        args.oft.crop if args.oft else 1.0,
        Image.Resampling.LANCZOS if args.oft else Image.Resampling.BICUBIC,
    )


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _quantize(model: nn.Module, quantization: dict, weights: dict) -> None:
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
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(number) is int for number in ids):
            raise InputError(
                f"{folder} says eos_token_id {ids}; expected a token id or a list"
            )
        stops |= set(ids)
    # transformers warns that it has no model type `llava_qwen2`; it needs none.
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        # Else transformers asks on the terminal whether to run the checkpoint's code.
        safe = {"trust_remote_code": False}
        tokenizer = load_mlx_lm_tokenizer(folder, safe, eos_token_ids=stops)
    except Exception as error:  # tokenizers raises bare Exception on a bad file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder} has no usable tokenizer ({reason})") from None
    finally:
        log.setLevel(level)
    tokenizer.model_max_length = 1 << 30  # prompts that do not fit are refused here
    return tokenizer


def _check_vocabulary(tokenizer, size: int, folder: Path) -> None:
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= size:
        raise InputError(
            f"the tokenizer of {folder} has token id {highest}, but the model only "
            f"{size} embeddings"
        )


def _optional_json(path: Path) -> dict:
    return read_json(path) if path.exists() else {}

"""Load a checkpoint of any supported layout as `(model, processor)`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError, note
from ..files import check_name, read_json
from ..models.protocol import VisionModel
from ..processing.chunks import ChunkProcessor
from ..processing.fast import FastCode
from ..processing.image import RESIZES
from ..processing.processor import ActionProcessor, AnyProcessor, Processor
from ..pruners.scorers import signs_of
from ..runtime import end_streams_with_thread
from .adapter import add_adapter
from .carried import read_carried
from .opening import build, named_tensors, open_checkpoint
from .quantization import Quantization
from .shards import Checkpoint

if TYPE_CHECKING:  # imported late at run time: mlx-lm loads transformers
    from mlx_lm.tokenizer_utils import TokenizerWrapper

log = logging.getLogger(__name__)


def default_dtype() -> mx.Dtype | None:
    """Return float32 on MLX's CPU backend, else `None` (keep the stored type).

    Half precision is slow on the CPU.
    """
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else None


def _float_type(dtype: mx.Dtype | str | None) -> mx.Dtype | None:
    types = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
    chosen = types.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not any(chosen is one for one in types.values()):
        raise InputError(f"unknown dtype {dtype!r}; expected {' or '.join(types)}")
    return chosen


def load(
    path_or_hf_repo: str | Path,
    dtype: mx.Dtype | str | None = None,
    lazy: bool = False,
    adapter_path: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[VisionModel, AnyProcessor]:
    """Load a checkpoint in the MLX layout or in its original layout.

    Pruners stored in the checkpoint apply wherever the caller passes none.

    Args:
        path_or_hf_repo: `demo` or another embedded model, a folder, or a hub id.
        dtype: type of float weights, or its name; `default_dtype()` when `None`.
        lazy: keep most weights on disk until they are used.
        adapter_path: folder of a LoRA or DoRA adapter for the language model, in the
            format of mlx-lm, of mlx-vlm's trainer or of peft.
        settings: values that replace those of a policy's checkpoint, by the names of
            `checkpoints.policy_settings.SETTINGS`, such as `crop`.

    Returns:
        The model in evaluation mode and its processor: a `Processor` for a model that
        answers in text, an `ActionProcessor` for a policy, a `ChunkProcessor` for a
        policy that answers in FAST-coded action chunks.

    Raises:
        InputError: the folder cannot be used, or (unless lazy) a weight is not finite.
    """
    end_streams_with_thread()
    dtype = _float_type(dtype) or default_dtype()
    if adapter_path is not None:
        check_name(adapter_path)
    family, checkpoint, config = open_checkpoint(path_or_hf_repo, settings=settings)
    for text in checkpoint.notes:
        note(text)
    model = build(family, config, True)
    weights = family.to_mlx_layout(checkpoint.load())
    if dtype is not None:  # before `sanitize` folds layers, which needs the precision
        weights = {k: _cast(v, dtype) for k, v in weights.items()}
    packed = _quantize_layers(model, checkpoint.quantization)
    checkpoint.quantization.unpack(weights, packed, dtype)
    weights = model.sanitize(weights)
    model.load_weights(list(weights.items()))
    model.signs = signs_of(model)
    if adapter_path is not None:
        formats = checkpoint.quantization.formats
        add_adapter(model, Path(adapter_path), family.rename, formats)
    model.carried = read_carried(config, checkpoint.folder)
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
        check_finite(named_tensors(model), dtype)
    beside = family.beside(checkpoint)
    tokenizer = load_tokenizer(tokenizer_folder(checkpoint, beside), config)
    vocabulary = tokenizer.get_vocab()
    longest = max(map(len, vocabulary), default=1)
    if model.answers == "chunks":
        names = ("fast_tokenizer.json", "fast_processor_config.json")
        files = (beside.get(name, checkpoint.folder / name) for name in names)
        code = FastCode.read(*files)
        return model, _chunk_processor(model, tokenizer, config, longest, code)
    _check_vocabulary(vocabulary, model.args.text["vocab_size"], checkpoint.folder)
    make = _processor if model.answers == "text" else _action_processor
    return model, make(model, tokenizer, config, longest)


def tokenizer_folder(checkpoint: Checkpoint, beside: Mapping[str, Path]) -> Path:
    """Return the folder of a checkpoint's tokenizer; `beside` is `Family.beside`'s."""
    file = beside.get("tokenizer.json")
    return checkpoint.folder if file is None else file.parent


def check_finite(
    tensors: Mapping[str, mx.array], dtype: mx.Dtype | None = None
) -> None:
    """Raise `InputError` with the name of a tensor that has NaN or infinity.

    dtype: type that the caller chose, if any.
    """
    floats = [(n, a) for n, a in tensors.items() if mx.issubdtype(a.dtype, mx.floating)]
    sums = [mx.all(mx.isfinite(mx.sum(mx.abs(a)))) for _, a in floats]
    for (name, array), finite in zip(floats, sums, strict=True):
        # The sum can overflow although all numbers are finite: then check each number.
        if not finite.item() and not mx.all(mx.isfinite(array)).item():
            reason = "the checkpoint is damaged, or its training went wrong"
            if dtype is not None and dtype == mx.float16:
                reason = "float16 ends at 65504: expected dtype bfloat16 or float32"
            raise InputError(f"tensor {name} has numbers that are not finite; {reason}")


def _processor(
    model: Any, tokenizer: "TokenizerWrapper", _: Mapping, longest: int
) -> Processor:
    missing = set(filter(None, model.args.marks)) - tokenizer.get_vocab().keys()
    if missing:
        raise InputError(
            "config.json says mm_use_im_start_end true, but the tokenizer has no "
            f"{min(missing)}; expected both {' and '.join(model.args.marks)}"
        )
    return Processor(
        tokenizer,
        model.image_size,
        model.image_token,
        model.prompt_prefix,
        model.prompt_suffix,
        model.stride,
        model.args.context,
        longest=longest,
        crops=model.args.crops,
        marks=model.args.marks,
        opening=model.prompt_opening,
        turn=model.prompt_turn,
    )


def _action_processor(
    model: Any, tokenizer: "TokenizerWrapper", config: Mapping, longest: int
) -> ActionProcessor:
    args = model.args
    if tokenizer.bos_token_id is None:
        raise InputError(
            "the tokenizer has no token that begins a sequence; expected <s>"
        )
    return ActionProcessor(
        tokenizer,
        model.image_size,
        args.vocabulary,
        args.bins,
        args.empty_token_id,
        args.longest_prompt,
        config["norm_stats"],
        args.rule,
        args.images.crop,
        RESIZES[args.images.resize],
        longest,
        args.images.jpeg,
    )


def _chunk_processor(
    model: Any,
    tokenizer: "TokenizerWrapper",
    config: Mapping,
    longest: int,
    code: FastCode,
) -> ChunkProcessor:
    args = model.args
    if None in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        raise InputError("the tokenizer has no <bos> or no <eos>; expected both")
    return ChunkProcessor(
        tokenizer,
        model.image_size,
        code,
        config["norm_stats"],
        args.rules,
        args.horizon,
        args.action_dim,
        args.skipped,
        args.text["vocab_size"],
        args.longest_prompt,
        args.dialect,
        args.strict,
        longest,
    )


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _quantize_layers(model: Any, quantization: Quantization) -> set[str]:
    """Quantize the language model's layers that are packed; return their paths.

    All other packed matrices are unpacked when they are loaded: they are small, and
    pruners, training and Core ML read them as floats.
    """
    formats, packed = quantization.formats, set()

    def format_of(path: str, module: nn.Module) -> dict | bool:
        if path not in formats or not model.quant_predicate(path, module):
            return False
        packed.add(path)
        return formats[path]._asdict()

    nn.quantize(cast(nn.Module, model), class_predicate=format_of)
    return packed


def load_tokenizer(folder: Path, config: dict) -> "TokenizerWrapper":
    """Load mlx-lm's tokenizer of a folder, with all stop tokens.

    Stop tokens come from `config` and from the folder's generation_config.json. Raises
    `InputError` when the folder has no usable tokenizer.
    """
    from mlx_lm.tokenizer_utils import load as load_mlx_lm_tokenizer

    stops: set[int] = set()
    settings = folder / "generation_config.json"
    for source in (config, read_json(settings) if settings.exists() else {}):
        ids = source.get("eos_token_id") or []
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(number) is int for number in ids):
            raise InputError(
                f"{folder} has eos_token_id {ids}; expected a token id or a list"
            )
        stops |= set(ids)
    from transformers import PreTrainedConfig

    # An empty config, as a tokenizer needs none: transformers would build the model's
    # from config.json, and fails on settings of model types that it does not have. It
    # also warns about them.
    transformers_log = logging.getLogger("transformers")
    level = transformers_log.level
    transformers_log.setLevel(logging.ERROR)
    try:
        # Else transformers asks on the terminal whether to run the checkpoint's code.
        options = {"trust_remote_code": False, "config": PreTrainedConfig()}
        tokenizer = load_mlx_lm_tokenizer(folder, options, eos_token_ids=stops)
    except Exception as error:  # tokenizers raises bare Exception on a bad file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder} has no usable tokenizer ({reason})") from None
    finally:
        transformers_log.setLevel(level)
    # No warning from transformers: the processors refuse prompts that are too long.
    tokenizer.model_max_length = 1 << 30
    return tokenizer


def _check_vocabulary(vocabulary: dict, size: int, folder: Path) -> None:
    highest = max(vocabulary.values(), default=0)
    if highest >= size:
        raise InputError(
            f"the tokenizer of {folder} has token id {highest}, but the model has "
            f"only {size} embeddings"
        )

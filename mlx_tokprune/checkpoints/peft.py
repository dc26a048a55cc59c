"""Low-rank adapters in the format of Hugging Face's peft: settings and factors."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError
from ..files import read_json
from .quantization import FLOATS
from .shards import Tensor, read_header

FACTOR = re.compile(
    r"base_model\.model\.(.+)\.(lora_[AB]|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.weight)?"
)
# Settings that do not affect how factors are added; any other must be unset.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config"),
    *("megatron_config", "megatron_core", "peft_version", "qalora_group_size"),
    *("revision", "target_modules", "task_type"),
}
_READ = {"peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "use_rslora"}
PATTERNS = ("rank_pattern", "alpha_pattern")
# Values of `init_lora_weights` that leave the base model's weights unchanged; others,
# such as pissa, move a part of them into the factors before training.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftSettings:
    """Settings of factors; `ranks` and `alphas` are those of named layers."""

    rank: int
    alpha: float
    root: bool
    dora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def of(self, path: str) -> tuple[int, float]:
        """Return the rank of a layer's factors and the scale of their product.

        path: name of the layer in peft's base model; an entry can name its end.
        """
        rank, alpha = (
            next((v for n, v in table.items() if f".{path}".endswith(f".{n}")), default)
            for table, default in ((self.ranks, self.rank), (self.alphas, self.alpha))
        )
        return int(rank), alpha / (math.sqrt(rank) if self.root else rank)


def read_settings(folder: Path, more: tuple[str, ...] = ()) -> PeftSettings:
    """Read adapter_config.json of peft's LoRA.

    more: settings that the caller also follows: use_dora, rank_pattern, alpha_pattern.
    Raises `InputError` for a setting that is not followed.
    """
    path = folder / "adapter_config.json"
    if not path.exists():
        raise InputError(f"{folder} has no adapter_config.json; expected peft's folder")
    settings = read_json(path)

    def refuse(name: str, expected: str) -> NoReturn:
        raise InputError(
            f"{path} says {name} {settings.get(name)!r}; expected {expected}"
        )

    if settings.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA'")
    if settings.get("bias", "none") != "none":
        refuse("bias", "'none', the only supported value")
    for name in sorted(settings.keys() - _HARMLESS - _READ - set(more)):
        if settings[name]:
            refuse(name, "it unset, as it is not supported")
    start = settings.get("init_lora_weights")
    if not any(start is choice or start == choice for choice in _STARTS):
        refuse("init_lora_weights", "a start that leaves the base model unchanged")
    rank: Any = settings.get("r")
    alpha: Any = settings.get("lora_alpha")
    if not _is_rank(rank):
        refuse("r", "a whole number from 1 to 65535")
    if not _is_alpha(alpha):
        refuse("lora_alpha", "a number between 1e-6 and 1e6")
    flags: Any = [settings.get(name) or False for name in ("use_rslora", "use_dora")]
    for name, flag in zip(("use_rslora", "use_dora"), flags, strict=True):
        if type(flag) is not bool:
            refuse(name, "true or false")
    tables: Any = [settings.get(name) or {} for name in PATTERNS]
    plain = r"[\w.]+"
    for name, table, check in zip(PATTERNS, tables, (_is_rank, _is_alpha), strict=True):
        named = isinstance(table, dict) and all(re.fullmatch(plain, n) for n in table)
        if not named or not all(map(check, table.values())):
            refuse(name, "numbers by names of layers, not by regular expressions")
    return PeftSettings(rank, alpha, *flags, *tables)


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < 1 << 16


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 1e-6 < value < 1e6


def read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Return the file of an adapter's factors, and its header.

    Raises `InputError` for another file, or tensors that are no floats.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        files = sorted(path.name for path in folder.glob("adapter_model*"))
        raise InputError(
            f"{folder} has {files[0] if files else 'no weights'}; expected "
            "adapter_model.safetensors, as peft saves it"
        )
    header = read_header(file)
    for name, tensor in header.items():
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"tensor {name} of {file} has type {tensor.dtype}; expected "
                f"{', '.join(FLOATS)}"
            )
    return file, header


def pair(
    places: Mapping[tuple[str, str], str], file: Path
) -> dict[str, tuple[str, str]]:
    """Return the tensor names of the factors (A, B) by path.

    places: tensor names by (path, "lora_A" or "lora_B"). Raises `InputError` for a
    factor without the other one, or no factors.
    """
    factors = {}
    for path, part in places:
        other = "lora_B" if part == "lora_A" else "lora_A"
        if (path, other) not in places:
            raise InputError(
                f"{file} has {part} of {path} but no {other}; expected both"
            )
        factors[path] = (places[path, "lora_A"], places[path, "lora_B"])
    if not factors:
        raise InputError(f"{file} has no factors; expected lora_A and lora_B tensors")
    return factors

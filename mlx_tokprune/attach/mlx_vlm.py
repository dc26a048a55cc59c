"""Pruning in mlx-vlm's own `generate`, chat, batches and server: `attach`.

Three reversible hooks on the instances of a loaded model and its processor. Ids get
shorter as they leave the processor (`prompts`), embeddings get shorter as they leave
`get_input_embeddings`, and `get_rope_index` maps short ids to original positions.
mlx-vlm itself is not changed.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoints.hub import resolve
from ..errors import InputError, nearest
from ..pipeline import check_positions
from ..pruners import Pruner, list_pruners
from . import attention, mlx_lm, towers
from .families import FAMILIES, Family, Grids
from .hooks import Hooks, KeptTokens
from .look import PixelScan
from .pixels import Pixels, RepeatPruner, TemporalPruner, scales, split
from .prompts import SENT

_FIELDS = {  # of `InputEmbeddingsFeatures` in mlx-vlm 0.7.10
    *("inputs_embeds", "attention_mask_4d", "visual_pos_masks"),
    *("deepstack_visual_embeds", "per_layer_inputs", "cross_attention_states"),
    *("cross_attention_mask", "full_text_row_masked_out_mask"),
    *("decoder_inputs_embeds", "attention_mask", "position_ids", "pos_hw"),
    "rope_deltas",
}
AnyPruner = Pruner | TemporalPruner | RepeatPruner
Attachable = AnyPruner | Sequence[AnyPruner]


class Handle:
    """Attached pruner: `last` reports the kept tokens, `detach` removes the pruner."""

    def __init__(self, hooks: Hooks):
        self._hooks, self.undo = hooks, []

    @property
    def last(self) -> tuple[KeptTokens, ...]:
        """`KeptTokens` of each prompt with a picture in the last batch."""
        return self._hooks.last

    @property
    def positions(self) -> str:
        """Positions of kept tokens in this model, "original" or "contiguous"."""
        return self._hooks.kind

    @property
    def provides(self) -> tuple[str, ...]:
        """Extras of `Features` that methods can read in this model."""
        return provided_by(self._hooks.family)

    @property
    def grids(self) -> Callable[[Mapping, Any], Grids] | None:
        """Function (inputs, config) -> grid of each picture; `None` without grids."""
        return self._hooks.family.grids

    def total(self, inputs: Mapping) -> int:
        """Return N, the visual tokens of the first prompt of a processor's inputs."""
        family, ids = self._hooks.family, np.array(inputs["input_ids"])
        each = family.each(inputs) if family.each else 1
        return each * int(self._hooks.is_media(ids[0]).sum())

    def detach(self) -> None:
        """Restore the model and the processor."""
        while self.undo:
            self.undo.pop()()


def attach(
    model: Any,
    processor: Any,
    pruner: Attachable,
    positions: str | None = None,
) -> Handle | mlx_lm.Handle:
    """Prune the visual tokens of every prompt of a loaded mlx-vlm or mlx-lm model.

    pruner: a `Pruner` with a budget, of a method that needs only the tokens, the prompt
    and, in most families, the attention of the tower. It chooses at the language
    model's input, after the projector, among the tokens of all pictures of a prompt.
    For Qwen's models, in place of it or before it: a `TemporalPruner`, a `RepeatPruner`
    or both, whose counts follow from the pixels.
    positions: models with M-RoPE keep original positions; other models have contiguous
    ones by default, and "original" ones for one prompt at a time.
    Raises `InputError` for a family, a method or a version of mlx-vlm that is not
    supported.
    """
    if type(model).__module__.startswith("mlx_lm."):
        family = type(model).__module__.rpartition(".")[2]
        if family != "muse_spark" or positions == "original":
            raise InputError(
                f"models of {family!r} at {positions or 'contiguous'} positions cannot "
                "be pruned in mlx-lm; expected muse_spark at contiguous positions"
            )
        _, chosen, _ = check_known(family, pruner, positions)
        return mlx_lm.attach(model, processor, chosen)
    import_mlx_vlm()
    process = getattr(processor, "process", None)
    mark = vars(type(model)).get("_tokprune")
    if isinstance(mark, str):
        raise InputError(
            f"{mark} prunes by itself when it is loaded; to attach a pruner, load the "
            "checkpoint that it was written from"
        )
    if mark or hasattr(process, "_tokprune"):
        raise InputError(
            "a pruner is attached to this model or its processor; detach it first, and "
            "give each model a processor of its own"
        )
    family, chosen, pixels = check_known(name_of(type(model)), pruner, positions)
    _check_seams(model)
    scan = PixelScan(pixels, model.config, scales(processor)) if pixels else None
    tower_extras, watch = _of_tower(chosen), None
    if tower_extras and family.tower:
        watch = attention.Watch(model, family.tower, tower_extras)
    hooks = Hooks(model, chosen, family, positions, scan, watch)
    partial = pixels.repeats and towers.methods(model.vision_tower, hooks.source)
    handle = Handle(hooks)
    try:
        hooks.positions.attach(model.language_model, handle.undo)
        _hook_processor(processor, hooks, handle.undo)
        _hook_model(model, hooks, handle.undo)
        if partial:
            _swap(model.vision_tower, handle.undo, **partial)
        for module, named in watch.methods() if watch else ():
            _swap(module, handle.undo, **named)
    except BaseException:
        handle.detach()
        raise
    return handle


# Checks -----------------------------------------------------------------------------


def import_mlx_vlm() -> None:
    """Raise `InputError` where mlx-vlm is missing."""
    try:
        import mlx_vlm  # noqa: F401
    except ImportError:
        raise InputError(
            "mlx-vlm is not installed; pip install 'mlx-tokprune[mlx-vlm]'"
        ) from None


def load_mlx_vlm(name: str, adapter_path: str | None = None) -> tuple:
    """Load (model, processor) with mlx-vlm, from a folder or a hub id.

    Raises `InputError` with mlx-vlm's reason where it cannot load them.
    """
    import_mlx_vlm()
    from mlx_vlm.utils import load

    folder = str(resolve(name))
    try:
        return load(folder, adapter_path)
    except Exception as error:  # mlx-vlm raises exceptions of many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"mlx-vlm cannot load {folder} ({reason})") from None


def check_known(
    name: str, pruners: Attachable, positions: str | None = None
) -> tuple[Family, Pruner, Pixels]:
    """Return the family `name`, the token pruner and the pixel pruners.

    Raises `InputError` for a family that cannot be pruned, or not by these pruners or
    at these positions.
    """
    if positions is not None:
        check_positions(positions)
    if not isinstance(name, str) or name not in FAMILIES:
        working = [other for other, family in FAMILIES.items() if not family.why]
        raise InputError(
            f"models of {name!r} are not supported; expected one of "
            f"{', '.join(working)}.{nearest(str(name), working)}"
        )
    family = FAMILIES[name]
    if family.turns and positions == "contiguous":
        raise InputError(
            "positions 'contiguous' are not available in this model, whose M-RoPE "
            "positions stay original; leave out positions"
        )
    if family.why:
        raise InputError(f"models of {name!r} cannot be pruned: {family.why}")
    tokens, pixels = split(pruners)
    if pixels and not family.pixels:
        working = [other for other, family in FAMILIES.items() if family.pixels]
        raise InputError(
            f"models of {name!r} cannot be pruned by pixels; expected one of "
            f"{', '.join(working)}"
        )
    if len(tokens) > 1 or not (tokens or pixels):
        raise InputError(f"{len(tokens)} pruners of tokens; expected one")
    chosen = _at_prompt(tokens[0], family) if tokens else Pruner("none", at="prompt")
    if pixels.repeats and _of_tower(chosen):
        raise InputError(
            f"method {chosen.method!r} reads the tower's attention, which has no value "
            "for patches that were left out; choose a method that needs no attention, "
            "such as 'norm'"
        )
    if pixels and "grid" in chosen.needs:
        raise InputError(
            f"method {chosen.method!r} needs a whole grid, in which pruning by pixels "
            "leaves holes; choose a method that needs no grid, such as 'norm'"
        )
    return family, chosen, pixels


def name_of(model_class: type) -> str:
    """Return the family of a model, by the first base class that is one of mlx-vlm's.

    So a subclass is of the family of its base, if it is not one itself.
    """
    names = [
        kind.__module__.split(".")[2]
        for kind in model_class.__mro__
        if kind.__module__.startswith("mlx_vlm.models.")
    ]
    families = (name for name in names if name in FAMILIES)
    return next(families, names[0] if names else model_class.__module__)


def _at_prompt(pruner: Pruner, family: Family) -> Pruner:
    """Return the pruner at "prompt"; raise `InputError` if it cannot choose there."""
    if not isinstance(pruner, Pruner):
        raise InputError(
            f"{type(pruner).__name__} is not a pruner; expected a `Pruner`, a "
            "`TemporalPruner` or a `RepeatPruner`"
        )
    if pruner.has_own_count:
        raise InputError(
            f"method {pruner.method!r} decides itself how many visual tokens to keep, "
            "which mlx-vlm needs in advance; give a keep ratio or a number of tokens"
        )
    trained = getattr(pruner.scorer, "at", "prompt") != "prompt"
    if pruner.place == "layer" or trained:
        raise InputError(
            f"method {pruner.method!r} chooses at {pruner.at!r}; in mlx-vlm pruning is "
            "at 'prompt'"
        )
    provided = provided_by(family)
    missing = [name for name in pruner.needs if name not in provided]
    if missing:
        fitting = [
            name for name in list_pruners() if _fits(name, provided) and name != "none"
        ]
        raise InputError(
            f"method {pruner.method!r} needs {', '.join(missing)}, which this model in "
            f"mlx-vlm does not provide; choose one of {', '.join(fitting)}"
        )
    return dataclasses.replace(pruner, at="prompt")


def provided_by(family: Family) -> tuple[str, ...]:
    """Return the extras of `Features` that methods can read in a family."""
    grid = ("grid",) if family.grids else ()
    return ("text", *grid, *(attention.PROVIDES if family.tower else ()))


def _of_tower(pruner: Pruner) -> list[str]:
    """Return the extras that a pruner reads from the tower."""
    return [name for name in pruner.reads if name in attention.PROVIDES]


def _fits(method: str, provided: tuple[str, ...]) -> bool:
    """Return whether a method can choose at the prompt, from these extras."""
    from ..pruners import get_method

    entry = get_method(method)
    unfit = entry.place == "layer" or entry.counts == "own"
    return not unfit and all(name in provided for name in entry.needs)


def _check_seams(model: Any) -> None:
    """Raise `InputError` unless the hooked functions are those of mlx-vlm 0.7.10."""
    from mlx_vlm.models.base import InputEmbeddingsFeatures

    fields = {field.name for field in dataclasses.fields(InputEmbeddingsFeatures)}
    changes = [f"a field {name!r} of embeddings" for name in sorted(fields - _FIELDS)]
    takes = inspect.signature(model.get_input_embeddings).parameters.values()
    if not any(p.kind == p.VAR_KEYWORD for p in takes):
        changes.append("get_input_embeddings without keywords")
    if not hasattr(model, "language_model"):
        changes.append("a model without language_model")
    if not changes and not _calls_process():
        changes.append("a processor that is not called by `process`")
    if changes:
        from mlx_vlm.version import __version__

        raise InputError(
            f"mlx-vlm {__version__} has {changes[0]}, which is not supported; expected "
            "0.7.10, or another version with the same interface"
        )


def _calls_process() -> bool:
    """Return whether `prepare_inputs` calls `process` and passes lists on as lists.

    The hooks depend on both, and no version number tells them: a probe is prepared.
    """
    from mlx_vlm.utils import prepare_inputs
    from PIL import Image

    class Probe:
        # mlx-vlm passes the arguments that the signature names.
        def process(
            self,
            text: Any,
            images: Any = None,
            padding: bool = True,
            return_tensors: str | None = None,
        ) -> dict:
            return {"input_ids": mx.zeros((1, 1), mx.int32), SENT: ["here"]}

    try:
        inputs = prepare_inputs(
            Probe(), images=[Image.new("RGB", (1, 1))], prompts=["probe"]
        )
    except Exception:  # another version may raise any exception
        return False
    return inputs.get(SENT) == ["here"]


# Hooks into mlx-vlm -----------------------------------------------------------------


def _hook_processor(processor: Any, hooks: Hooks, undos: list) -> None:
    """Set `processor.process`, which mlx-vlm prefers to calling the processor."""
    before = {
        name: vars(processor).get(name) for name in ("process", "apc_key_dependencies")
    }
    original = getattr(processor, "process", processor)
    depends = getattr(processor, "apc_key_dependencies", tuple)

    def process(*args: Any, **named: Any) -> Mapping:
        return hooks.shortened(original(*args, **named))

    # mlx-vlm passes only the arguments that the signature names.
    process.__signature__ = inspect.signature(original)
    vars(process)["_tokprune"] = True  # marks the processor as attached

    def undo() -> None:
        for name, value in before.items():
            vars(processor).pop(name, None)
            if value is not None:
                setattr(processor, name, value)

    undos.append(undo)
    processor.process = process
    # mlx-vlm's prefix cache adds these to its keys: other pruners get other entries.
    processor.apc_key_dependencies = lambda: (*(depends() or ()), hooks.described)


def _hook_model(model: Any, hooks: Hooks, undos: list) -> None:
    """Override methods of the model and its language model."""
    kind, language = type(model), model.language_model

    # Embeds the full ids, which travel under `SENT`, and then drops rows: mlx-vlm sees
    # as many rows as short ids.
    @functools.wraps(kind.get_input_embeddings)
    def get_input_embeddings(self: nn.Module, *args: Any, **named: Any) -> Any:
        return hooks.embed(kind.get_input_embeddings, self, *args, **named)

    _swap(model, undos, get_input_embeddings=get_input_embeddings)
    if hooks.turns:
        language_kind = type(language)

        # mlx-vlm computes M-RoPE positions from ids and grids, which short ids do not
        # match: this returns those of the full prompt.
        @functools.wraps(language_kind.get_rope_index)
        def get_rope_index(
            self: nn.Module, *args: Any, **named: Any
        ) -> tuple[mx.array, mx.array]:
            base = language_kind.get_rope_index
            return hooks.rope_index(base, self, *args, **named)

        _swap(language, undos, get_rope_index=get_rope_index)
        if hooks.family.slices:

            @functools.wraps(language_kind.__call__)
            def call(
                self: nn.Module, inputs: mx.array, *args: Any, **named: Any
            ) -> Any:
                named |= _sliced(inputs.shape[1], named)
                return language_kind.__call__(self, inputs, *args, **named)

            _swap(language, undos, __call__=call)
    elif hooks.family.cold:
        # Where `get_rope_index` raises, mlx-vlm drops the chat's cache, reads the whole
        # prompt, and logs the reason.
        def refuse(self: nn.Module, *args: Any, **named: Any) -> NoReturn:
            raise InputError(f"{hooks.family.cold}, so the whole chat is read again")

        _swap(language, undos, get_rope_index=refuse, _position_ids=None)


def _sliced(length: int, named: Mapping) -> dict[str, mx.array]:
    """Return the positions of the `length` tokens behind a cache, if there are more."""
    positions, cache = named.get("position_ids"), named.get("cache")
    if positions is None or positions.shape[-1] <= length:
        return {}
    start = int(cache[0].offset) if cache and cache[0] is not None else 0
    return {"position_ids": positions[..., start : start + length]}


def _swap(instance: nn.Module, undos: list, **named: Any) -> None:
    """Give an instance a subclass of its class with attributes `named`.

    Python looks up `__call__` and other special methods in the class alone, and other
    instances of mlx-vlm's class must not change.
    """
    kind = type(instance)
    names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_tokprune": True}
    instance.__class__ = type(kind.__name__, (kind,), names | named)

    def undo() -> None:
        instance.__class__ = kind

    undos.append(undo)

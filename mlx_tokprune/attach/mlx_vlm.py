"""Pruning in mlx-vlm's own `generate`, chat, batches and server: `attach`.

Three reversible hooks on the instances of a loaded model and its processor: ids get
shorter as they leave the processor (`prompts`), embeddings as they leave
`get_input_embeddings`, and `get_rope_index` knows of it. mlx-vlm itself is not changed.
"""

import dataclasses
import functools
import inspect
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..checkpoints.hub import resolve
from ..errors import InputError, nearest
from ..pipeline import check_positions
from ..pruners import Pruner, list_pruners
from . import attention, towers
from .families import FAMILIES, Family
from .hooks import Hooks, Kept
from .look import PixelLook
from .pixels import Pixels, RepeatPruner, TemporalPruner, scales, split
from .prompts import SENT

_FIELDS = {  # of what `get_input_embeddings` gives
    *("inputs_embeds", "attention_mask_4d", "visual_pos_masks"),
    *("deepstack_visual_embeds", "per_layer_inputs", "cross_attention_states"),
    *("cross_attention_mask", "full_text_row_masked_out_mask"),
    *("decoder_inputs_embeds", "attention_mask", "position_ids", "pos_hw"),
    "rope_deltas",
}
Known = Pruner | TemporalPruner | RepeatPruner
Attachable = Known | Sequence[Known]


class Handle:
    """An attached pruner: `last` says what it kept, `detach` undoes it.

    last: a `Kept` for each prompt of the last batch with a picture. positions:
    "original" or "contiguous", as they are in this model.
    """

    def __init__(self, hooks: Hooks):
        self._hooks, self.undo = hooks, []

    @property
    def last(self) -> tuple[Kept, ...]:
        return self._hooks.last

    @property
    def positions(self) -> str:
        return self._hooks.kind

    @property
    def provides(self) -> tuple[str, ...]:
        """Extras of `Features` that a method can have here."""
        return provided_by(self._hooks.family)

    @property
    def grids(self):
        """(inputs, config) -> the grid of each picture, `None` where there is none."""
        return self._hooks.family.grids

    def total(self, inputs) -> int:
        """N, the visual tokens of the first prompt of a processor's inputs."""
        family, ids = self._hooks.family, np.array(inputs["input_ids"])
        each = family.each(inputs) if family.each else 1
        return each * int(self._hooks.is_media(ids[0]).sum())

    def detach(self) -> None:
        """Leave model and processor as they were."""
        while self.undo:
            self.undo.pop()()


def attach(
    model,
    processor,
    pruner: Attachable,
    positions: str | None = None,
) -> Handle:
    """Have a loaded mlx-vlm model prune the visual tokens of every prompt.

    pruner: a `Pruner` with a budget, of a method that needs nothing but the tokens, the
    prompt and, of most families, what the tower attends to. It chooses at the language
    model's input, after the projector, among the tokens of all pictures of a prompt.
    For Qwen's models instead of it or before it a `TemporalPruner`, a `RepeatPruner` or
    both, whose counts follow from the pixels.
    positions: models with M-RoPE keep original ones; others have contiguous ones by
    default, and "original" for one prompt at a time.
    Raises `InputError` for what is not known: a family, a method, a version of mlx-vlm
    whose seams are others.
    """
    import_mlx_vlm()
    process = getattr(processor, "process", None)
    mark = vars(type(model)).get("_tokprune")
    if isinstance(mark, str):
        raise InputError(
            f"{mark} prunes by itself when it is loaded; to attach a pruner, load the "
            "checkpoint that it was made of"
        )
    if mark or hasattr(process, "_tokprune"):
        raise InputError(
            "a pruner is attached to this model or its processor; detach it first, and "
            "give each model a processor of its own"
        )
    family, chosen, pixels = check_known(_name_of(model), pruner, positions)
    _check_seams(model)
    look = PixelLook(pixels, model.config, scales(processor)) if pixels else None
    seen, watch = _of_tower(chosen), None
    if seen and family.tower:
        watch = attention.Watch(model, family.tower, seen)
    hooks = Hooks(model, chosen, family, positions, look, watch)
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


# What is known ----------------------------------------------------------------------


def import_mlx_vlm() -> None:
    """Raise `InputError` where mlx-vlm is missing."""
    try:
        import mlx_vlm  # noqa: F401
    except ImportError:
        raise InputError(
            "mlx-vlm is not installed; pip install 'mlx-tokprune[mlx-vlm]'"
        ) from None


def load_mlx_vlm(name: str, adapter_path: str | None = None) -> tuple:
    """(model, processor) as mlx-vlm loads a folder or an id of the hub."""
    import_mlx_vlm()
    import mlx_vlm

    folder = str(resolve(name))
    try:
        return mlx_vlm.load(folder, adapter_path)
    except Exception as error:  # whatever mlx-vlm runs into
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"mlx-vlm cannot load {folder} ({reason})") from None


def check_known(
    name: str, pruners: Attachable, positions: str | None = None
) -> tuple[Family, Pruner, Pixels]:
    """What is known of a family by its name, its pruner of tokens, and of pixels."""
    if positions is not None:
        check_positions(positions)
    if not isinstance(name, str) or name not in FAMILIES:
        working = [known for known, family in FAMILIES.items() if not family.why]
        raise InputError(
            f"models of {name!r} are not known here; expected one of "
            f"{', '.join(working)}.{nearest(str(name), working)}"
        )
    family = FAMILIES[name]
    if family.turns and positions == "contiguous":
        raise InputError(
            "positions of this model say where in a picture a token is and stay "
            "original; leave out positions"
        )
    if family.why:
        raise InputError(f"models of {name!r} cannot be pruned: {family.why}")
    tokens, pixels = split(pruners)
    if pixels and not family.pixels:
        working = [known for known, other in FAMILIES.items() if other.pixels]
        raise InputError(
            f"which patches become a token of models of {name!r} is not known here; "
            f"pixels are looked at for {', '.join(working)}"
        )
    if len(tokens) > 1 or not (tokens or pixels):
        raise InputError(f"{len(tokens)} pruners of tokens; expected one")
    chosen = _at_prompt(tokens[0], family) if tokens else Pruner("none", at="prompt")
    if pixels.repeats and _of_tower(chosen):
        raise InputError(
            f"method {chosen.method!r} compares what a tower attends to, which sees no "
            "patches that were left out; choose one that needs no attention, such as "
            "'norm'"
        )
    if pixels and "grid" in chosen.needs:
        raise InputError(
            f"method {chosen.method!r} needs a whole grid, in which pruning by pixels "
            "leaves holes; choose one that needs none, such as 'norm'"
        )
    return family, chosen, pixels


def _name_of(model) -> str:
    """Its family in mlx-vlm; classes of a folder's own are made of those."""
    names = [
        kind.__module__.split(".")[2]
        for kind in type(model).__mro__
        if kind.__module__.startswith("mlx_vlm.models.")
    ]
    known = (name for name in names if name in FAMILIES)
    return next(known, names[0] if names else type(model).__module__)


def _at_prompt(pruner: Pruner, family: Family) -> Pruner:
    if not isinstance(pruner, Pruner):
        raise InputError(f"a pruner is a `Pruner`, not {type(pruner).__name__}")
    if pruner.has_own_count:
        raise InputError(
            f"method {pruner.method!r} decides itself how many visual tokens to keep, "
            "and mlx-vlm has to know before; give a keep ratio or a number of tokens"
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
            f"method {pruner.method!r} needs {', '.join(missing)}, which is not known "
            f"of this model in mlx-vlm; choose one of {', '.join(fitting)}"
        )
    return dataclasses.replace(pruner, at="prompt")


def provided_by(family: Family) -> tuple[str, ...]:
    """Extras of `Features` that a pruner can have."""
    grid = ("grid",) if family.grids else ()
    return ("text", *grid, *(attention.PROVIDES if family.tower else ()))


def _of_tower(pruner: Pruner) -> list[str]:
    return [name for name in pruner.reads if name in attention.PROVIDES]


def _fits(method: str, provided: tuple[str, ...]) -> bool:
    from ..pruners import get_method

    known = get_method(method)
    inside = known.place == "layer" or known.counts == "own"
    return not inside and all(name in provided for name in known.needs)


def _check_seams(model) -> None:
    """Raise `InputError` unless mlx-vlm is as it was when this was written."""
    from mlx_vlm.models.base import InputEmbeddingsFeatures

    fields = {field.name for field in dataclasses.fields(InputEmbeddingsFeatures)}
    wrong = [f"a field {name!r} of embeddings" for name in sorted(fields - _FIELDS)]
    takes = inspect.signature(model.get_input_embeddings).parameters.values()
    if not any(p.kind == p.VAR_KEYWORD for p in takes):
        wrong.append("get_input_embeddings without keywords")
    if not hasattr(model, "language_model"):
        wrong.append("a model without language_model")
    if not wrong and not _processor_is_asked():
        wrong.append("a processor that is asked otherwise than by `process`")
    if wrong:
        from mlx_vlm.version import __version__

        raise InputError(
            f"mlx-vlm {__version__} has {wrong[0]}, which is not known here; expected "
            "0.7.10, or another version with its seams"
        )


def _processor_is_asked() -> bool:
    """Whether `prepare_inputs` calls `process` and lets a list travel."""
    from mlx_vlm.utils import prepare_inputs
    from PIL import Image

    class Probe:
        def process(self, text, images=None, padding=True, return_tensors=None):
            return {"input_ids": mx.zeros((1, 1), mx.int32), SENT: ["here"]}

    try:
        found = prepare_inputs(
            Probe(), images=[Image.new("RGB", (1, 1))], prompts=["probe"]
        )
    except Exception:  # whatever another version runs into
        return False
    return found.get(SENT) == ["here"]


# Putting them on --------------------------------------------------------------------


def _hook_processor(processor, hooks: Hooks, undos: list) -> None:
    """`processor.process`, which mlx-vlm asks for."""
    before = {
        name: vars(processor).get(name) for name in ("process", "apc_key_dependencies")
    }
    original = getattr(processor, "process", processor)
    depends = getattr(processor, "apc_key_dependencies", tuple)

    def process(*args, **named):
        return hooks.shortened(original(*args, **named))

    process.__signature__ = inspect.signature(original)  # by which it passes arguments
    process._tokprune = True

    def undo() -> None:
        for name, value in before.items():
            vars(processor).pop(name, None)
            if value is not None:
                setattr(processor, name, value)

    undos.append(undo)
    processor.process = process
    processor.apc_key_dependencies = lambda: (*(depends() or ()), hooks.described)


def _hook_model(model, hooks: Hooks, undos: list) -> None:
    """Classes of the model and its language model."""
    kind, language = type(model), model.language_model

    @functools.wraps(kind.get_input_embeddings)
    def get_input_embeddings(self, *args, **named):
        return hooks.embed(kind.get_input_embeddings, self, *args, **named)

    _swap(model, undos, get_input_embeddings=get_input_embeddings)
    if hooks.turns:
        spoken = type(language)

        @functools.wraps(spoken.get_rope_index)
        def get_rope_index(self, *args, **named):
            return hooks.rope_index(spoken.get_rope_index, self, *args, **named)

        _swap(language, undos, get_rope_index=get_rope_index)
    elif hooks.family.cold:
        # What it cannot prime, mlx-vlm reads anew, and says so.
        def refuse(self, *args, **named):
            raise InputError(f"{hooks.family.cold}, so the whole chat is read again")

        _swap(language, undos, get_rope_index=refuse, _position_ids=None)


def _swap(instance, undos: list, **named) -> None:
    """Give an instance a class of its own with these."""
    kind = type(instance)
    names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_tokprune": True}
    instance.__class__ = type(kind.__name__, (kind,), names | named)

    def undo() -> None:
        instance.__class__ = kind

    undos.append(undo)

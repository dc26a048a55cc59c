"""Export of a model's pruned vision path as a Core ML package: `export_package`.

All functions come from one program, whose vision tower is traced, converted and
compressed once; `split` separates the functions. Tower, pruner and projector are traced
separately, so that the pruner's part keeps float32 where the rest is float16: in
float16, sums of squares overflow, and rounding changes the choice of tokens.
"""

import contextlib
import gc
import io
import logging
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoints.loading import check_finite
from ..errors import InputError, nearest
from ..features import Features, Selection, keep_rows
from ..files import new_folder
from ..models.protocol import VisionModel
from ..pipeline.planning import plan_for
from ..pruners import Pruner, get_method
from .capture import Graph, capture
from .describe import Function, describe, input_name, prompt_settings
from .lower import lower
from .split import output_name, split

if TYPE_CHECKING:  # coremltools is an extra
    from coremltools import target as AvailableTarget
    from coremltools.converters.mil.mil import Program, Var
    from coremltools.models import MLModel

TARGETS = {
    **{"iOS16": "iOS16", "iOS17": "iOS17", "iOS18": "iOS18", "iOS26": "iOS26"},
    **{"macOS13": "iOS16", "macOS14": "iOS17", "macOS15": "iOS18", "macOS26": "iOS26"},
}
_SHARING = ("iOS18", "iOS26")  # targets with several functions per package
PRECISIONS = ("float16", "float32")
_PALETTES = {"6bit": 6, "4bit": 4}
COMPRESSIONS = ("8bit", *_PALETTES)
UNPRUNED = "unpruned"
_LANGUAGE = "language_model"


@dataclass(frozen=True)
class ExportOptions:
    """Options of a package.

    Raises `InputError` for an unknown value.

    Attributes:
        projector: whether the package includes the projector.
        image: whether the input is an RGB image, or else a tensor (1, 3, S, S) in
            [0, 1].
        target: deployment target, a key of `TARGETS`.
        precision: type of computation, one of `PRECISIONS`; pruners always use float32.
        compress: weight compression, one of `COMPRESSIONS`, or `None`.
    """

    projector: bool = True
    image: bool = True
    target: str = "iOS18"
    precision: str = "float16"
    compress: str | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("deployment target", self.target, TARGETS),
            ("precision", self.precision, PRECISIONS),
            ("compression", self.compress, (None, *COMPRESSIONS)),
        ):
            if value not in choices:
                names = [choice for choice in choices if choice]
                raise InputError(
                    f"unknown {name} {value!r}; expected one of {', '.join(names)}."
                    + nearest(str(value), names)
                )
        if self.precision == "float32" and self.compress in _PALETTES:
            raise InputError(
                f"{self.compress} weights are palettes of float16 numbers; expected "
                "precision float16, or 8bit weights"
            )

    @property
    def shares(self) -> bool:
        """Support of several functions in one package by the target."""
        return TARGETS[self.target] in _SHARING


def load_coremltools() -> ModuleType:
    """Import coremltools, without its warnings; `InputError` when it is missing."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        import coremltools
    except ImportError:
        machine, hint = platform.machine(), "pip install 'mlx-tokprune[coreml]'"
        mac = sys.platform == "darwin"
        if sys.version_info >= (3, 14) or not (mac or machine == "x86_64"):
            hint = (
                f"no wheel for Python {platform.python_version()} on {machine}; "
                "expected Python 3.11 to 3.13 on macOS or on x86-64 Linux"
            )
        raise InputError(f"Core ML packages need coremltools; {hint}") from None
    return coremltools


def function_name(pruner: Pruner) -> str:
    """Return `keep_50` for half of the tokens, `tokens_32` for 32, or `unpruned`."""
    if pruner.keeps_all:
        return UNPRUNED
    if pruner.keep_tokens is not None:
        return f"tokens_{pruner.keep_tokens}"
    ratio = pruner.keep_ratio or 1  # own counts are refused
    return f"keep_{ratio * 100:g}".translate(str.maketrans(".-", "__"))


def export_package(
    model: VisionModel,
    pruners: Sequence[Pruner],
    output: str | Path,
    options: ExportOptions | None = None,
    source: str | Path | None = None,
    name: str | None = None,
    processor: Any = None,
) -> dict[Path, list[Function]]:
    """Write a model's pruned vision path as one or more Core ML packages.

    One pruner gives a package with one function, `main`. Several pruners give one
    package whose functions share the weights, with the function `unpruned` added; for
    targets before iOS18 they give one package per function.

    Args:
        model: model loaded in float32.
        pruners: pruners at the tower, with a fixed number of kept tokens.
        output: package to write, ends in .mlpackage; must not exist.
        options: options of the package; defaults when `None`.
        source: checkpoint folder, for its licence.
        name: model name in the package's description (default: the folder's name).
        processor: the model's, for the prompt in the package's metadata.

    Returns:
        The functions of each written package, by its path.

    Raises:
        InputError: model or pruner cannot be exported, or `output` exists.
    """
    options, output = options or ExportOptions(), Path(output)
    pruners = [pruners] if isinstance(pruners, Pruner) else list(pruners)
    if not pruners:
        raise InputError("no pruner was given; expected at least one, such as norm 0.5")
    if output.suffix != ".mlpackage":
        raise InputError(
            f"{output} is no name for a package; it must end in .mlpackage"
        )
    if len(pruners) > 1 and not any(pruner.keeps_all for pruner in pruners):
        pruners = [*pruners, Pruner("none")]
    _check(model, pruners)
    load_coremltools()
    # A lazily loaded language model stays on disk.
    mx.eval([array for _, array in _exported(model)])
    check_finite(dict(_exported(model)))
    separate, paths = len(pruners) > 1 and not options.shares, [output]
    if separate:
        stems = (f"{output.stem}-{function_name(pruner)}" for pruner in pruners)
        paths = [output.with_stem(stem) for stem in stems]
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(new_folder(path)) for path in paths]
        functions, package = _convert(model, pruners, options)
        groups = [[function] for function in functions] if separate else [functions]
        for folder, group in zip(folders, groups, strict=True):
            settings = prompt_settings(model, processor)
            _write(package, group, folder, options, source, name, settings)
    del package
    gc.collect()  # coremltools' programs have reference cycles
    return dict(zip(paths, groups, strict=True))


def _check(model: VisionModel, pruners: Sequence[Pruner]) -> None:
    if model.reads_prompt:
        raise InputError(
            "this policy's vision tower reads the instruction (FiLM), which a vision "
            "package does not have; expected a policy without it"
        )
    for pruner in pruners:
        if not pruner.keeps_all and pruner.place != "tower":
            reason = _place_problem(model, pruner)
            raise InputError(f"method {pruner.method!r} {reason}")
    for pruner in pruners:
        plan_for(model, pruner)
        if pruner.has_own_count:
            method = get_method(pruner.method)
            counting = [name for name in pruner.options if name in method.counting]
            setting = f"with a {counting[0]}" if counting else "without a budget"
            raise InputError(
                f"method {pruner.method!r} {setting} decides for each picture how many "
                "visual tokens to keep, and a package has fixed shapes; expected a "
                "keep ratio or a number of tokens"
            )
    names = [function_name(pruner) for pruner in pruners]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"function {name} was requested more than once; expected one pruner "
                "for each function"
            )
    for _, array in _exported(model):
        if array.dtype != mx.float32:
            raise InputError(
                f"the model's weights are {array.dtype}; load it with "
                "dtype=mx.float32 (precision is an option of the export)"
            )


def _place_problem(model: VisionModel, pruner: Pruner) -> str:
    """Return why a vision package cannot prune at the pruner's place."""
    if pruner.place == "layer":
        return (
            "prunes inside the language model, which a vision package does not hold; "
            "expected a pruner at the tower, such as 'attention'"
        )
    if any(name not in model.provides["tower"] for name in pruner.needs):
        return (
            "reads the prompt, which a vision package does not have; the nearest "
            "method that can be exported is 'attention'"
        )
    return (
        "prunes at the prompt, which comes after a vision package, but can prune at "
        "the tower; expected --at tower, in Python at='tower'"
    )


def _exported(model: Any) -> list[tuple[str, mx.array]]:
    """Return names and weights of all parts except the language model."""
    parts = {n: p for n, p in model.parameters().items() if n != _LANGUAGE}
    return cast(list[tuple[str, mx.array]], tree_flatten(parts))


def _write(
    package: "MLModel",
    functions: Sequence[Function],
    folder: Path,
    options: ExportOptions,
    source: str | Path | None,
    name: str | None,
    settings: dict[str, str],
) -> None:
    """Fill `folder` with the part of `package` that computes `functions`."""
    work = folder / "work.mlpackage"
    package.save(str(work))
    for part in work.iterdir():
        part.rename(folder / part.name)
    work.rmdir()
    for part in folder.rglob("*"):  # coremltools writes them for the owner only
        part.chmod(0o755 if part.is_dir() else 0o644)
    (file,) = folder.glob("Data/*/*.mlmodel")
    spec = load_coremltools().utils.load_spec(str(file))
    split(spec, functions)
    settings["precision"] = options.precision
    settings["compression"] = options.compress or "none"
    source = Path(source) if source else None
    describe(spec, functions, source, name, **settings)
    file.write_bytes(spec.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide coremltools' progress bars, which it also draws without a terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


# The program of all functions --------------------------------------------------------


def _trace(model: VisionModel, pruners: Sequence[Pruner]) -> tuple[Graph, Features]:
    """Return the tower's graph, and features of zeros in the shapes of its outputs."""
    needs, traced = dict.fromkeys(n for p in pruners for n in p.reads), []

    def encode(pixels: mx.array) -> list[mx.array]:
        # `capture` returns arrays only, so keep the `Features` with their names, too.
        traced.append(model.encode(pixels, tuple(needs)))
        return traced[0].arrays()

    graph = capture(encode, mx.zeros((1, model.image_size, model.image_size, 3)))
    blank = traced[0].each(lambda array: mx.zeros(array.shape, array.dtype))
    for pruner in pruners:
        if not pruner.keeps_all and pruner.count(blank.total) == blank.total:
            raise InputError(
                f"all {blank.total} visual tokens would be kept, which is no pruning; "
                "expected to keep fewer, or method 'none'"
            )
    return graph, blank


def _convert(
    model: VisionModel, pruners: Sequence[Pruner], options: ExportOptions
) -> "tuple[list[Function], MLModel]":
    """Return the functions, and one coremltools model with the outputs of all."""
    ct = load_coremltools()
    target = ct.target[TARGETS[options.target]]
    name, shape = input_name(options.image), (1, 3, *[model.image_size] * 2)
    program, functions = _build(model, pruners, options, {name: shape}, target)
    color = ct.colorlayout.RGB
    image = ct.ImageType(name, shape, scale=1 / 255, color_layout=color)
    with _quiet():
        package = ct.convert(
            program,
            source="milinternal",  # takes a MIL program, not a PyTorch model
            convert_to="mlprogram",
            inputs=[image] if options.image else None,
            minimum_deployment_target=target,
            compute_precision=_precision(ct, options),
            skip_model_load=True,  # else Core ML compiles the package on macOS
        )
        return functions, _compressed(package, options.compress)


def _build(
    model: VisionModel,
    pruners: Sequence[Pruner],
    options: ExportOptions,
    inputs: Mapping[str, tuple[int, ...]],
    target: "AvailableTarget",
) -> "tuple[Program, list[Function]]":
    """Return a MIL program with the outputs of all functions, and the functions.

    inputs: shapes by name.
    """
    from coremltools.converters.mil import Builder, mil

    mb: Any = Builder  # its operations are added when it is imported
    tower, blank = _trace(model, pruners)
    functions, outputs = [], []
    variables = {name: mb.placeholder(shape) for name, shape in inputs.items()}
    with mil.Function(variables, opset_version=target) as body:
        (image,) = body.inputs.values()
        pixels = mb.transpose(x=image, perm=[0, 2, 3, 1])
        arrays = lower("encode", tower, [pixels])
        encoded = dict(zip(("tokens", *blank.extras), arrays, strict=True))
        for pruner in pruners:
            added = _add_function(mb, model, pruner, options.projector, blank, encoded)
            functions.append(_function(model, pruner, options, blank, added[0].shape))
            outputs += added
        body.set_outputs(outputs)
    program = mil.Program()
    program.add_function("main", body)
    return program, functions


def _function(
    model: VisionModel,
    pruner: Pruner,
    options: ExportOptions,
    blank: Features,
    shape: tuple[int, ...],
) -> Function:
    """Return the description of a function whose features have `shape` (1, K, C)."""
    return Function(
        name=function_name(pruner),
        method=pruner.method,
        keep_ratio=pruner.keep_ratio,
        keep=shape[1],
        grid=blank.grid or (1, blank.total),
        channels=shape[2],
        image_size=model.image_size,
        projector=options.projector,
        image=options.image,
    )


def _add_function(
    mb: Any,
    model: VisionModel,
    pruner: Pruner,
    projector: bool,
    blank: Features,
    encoded: "dict[str, Var]",
) -> "list[Var]":
    """Prune and project the tower's outputs in the current MIL function.

    encoded: tokens and extras as MIL variables, by name. Returns the function's
    outputs, named by `output_name`.
    """

    def finish(tokens: mx.array, chosen: mx.array) -> list[mx.array]:
        tokens = tokens if pruner.keeps_all else keep_rows(tokens, chosen)
        return [model.project(tokens) if projector else tokens]

    function = function_name(pruner)
    (indices, *merging), is_computed = _choose(mb, pruner, blank, encoded)
    weights, dtype = (merging[0], mx.float32) if merging else (indices, mx.int32)
    graph = capture(finish, blank.tokens, mx.zeros(tuple(weights.shape), dtype))
    (result,) = lower(f"finish_{function}", graph, [encoded["tokens"], weights])
    numbers = {"kept_indices": indices}
    if merging:
        numbers["assignment"] = merging[1]
    if not is_computed:
        # Core ML does not guarantee outputs that are constants: add a computed zero.
        first = mb.slice_by_size(x=result, begin=[0, 0, 0], size=[1, 1, 1])
        zero = mb.cast(x=mb.greater(x=first, y=first), dtype="int32")
        zero = mb.reshape(x=zero, shape=[1, 1])
        numbers = {name: mb.add(x=var, y=zero) for name, var in numbers.items()}
    outputs = {"image_features": result} | numbers
    return [
        mb.identity(x=var, name=output_name(function, name))
        for name, var in outputs.items()
    ]


def _choose(
    mb: Any, pruner: Pruner, blank: Features, encoded: "dict[str, Var]"
) -> "tuple[list[Var], bool]":
    """Return the selection as MIL variables, and whether it depends on the image.

    The variables are those of `_arrays`. A selection that does not depend on the image,
    such as that of a fixed grid, becomes constants.
    """
    extras = {n: array for n, array in blank.extras.items() if n in pruner.reads}
    blank = replace(blank, extras=extras)

    def prune(tokens: mx.array, *arrays: mx.array) -> list[mx.array]:
        traced = dict(zip(extras, arrays, strict=True))
        return _arrays(pruner(replace(blank, tokens=tokens, extras=traced)))

    graph = capture(prune, *blank.arrays())
    if any(graph.reaches()):
        inputs = [encoded[name] for name in ("tokens", *extras)]
        return lower(f"prune_{function_name(pruner)}", graph, inputs), True
    constants = prune(*blank.arrays())
    return [mb.const(val=np.array(array)) for array in constants], False


def _arrays(selection: Selection) -> list[mx.array]:
    """Return a selection's indices, and for merging methods weights and assignment."""
    arrays = (selection.indices, selection.weights, selection.assignment())
    return [array for array in arrays if array is not None]


def _precision(ct: ModuleType, options: ExportOptions) -> Any:
    """Return coremltools' precision setting; operations of pruners keep float32."""
    if options.precision == "float32":
        return ct.precision.FLOAT32
    return ct.transform.FP16ComputePrecision(
        op_selector=lambda op: not op.name.startswith("prune_")
    )


def _compressed(package: "MLModel", compress: str | None) -> "MLModel":
    if compress is None:
        return package
    from coremltools.optimize import coreml as optimize

    if compress == "8bit":
        settings = optimize.OpLinearQuantizerConfig(mode="linear_symmetric")
        apply = optimize.linear_quantize_weights
    else:
        # coremltools clusters smaller arrays with scikit-learn, a dependency that would
        # save next to no bytes.
        settings = optimize.OpPalettizerConfig(
            mode="kmeans", nbits=_PALETTES[compress], weight_threshold=10_000
        )
        apply = optimize.palettize_weights
    # Weights that are all 0 have the scale 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        config = optimize.OptimizationConfig(global_config=settings)
        return cast("MLModel", apply(package, config))

"""A model's pruned vision path as a Core ML package: `export_package`.

All functions come from one program, whose vision tower is traced, converted and
compressed once; `split` cuts them apart. Tower, pruner and projector are traced
separately, so that the pruner's part can keep float32 where the rest has float16: sums
of squares would overflow, and rounding would change which tokens are kept.
"""

import contextlib
import gc
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoints.loading import check_finite
from ..errors import InputError, nearest
from ..features import Features, Selection, keep_rows
from ..files import new_folder
from ..pipeline.planning import plan_for
from ..pruners import Pruner, get_method
from .capture import Graph, capture
from .describe import Function, describe, input_name
from .lower import lower
from .split import output_name, split

TARGETS = {
    **{"iOS16": "iOS16", "iOS17": "iOS17", "iOS18": "iOS18", "iOS26": "iOS26"},
    **{"macOS13": "iOS16", "macOS14": "iOS17", "macOS15": "iOS18", "macOS26": "iOS26"},
}
_SHARING = ("iOS18", "iOS26")  # targets whose packages hold several functions
PRECISIONS = ("float16", "float32")
_PALETTES = {"6bit": 6, "4bit": 4}
COMPRESSIONS = ("8bit", *_PALETTES)
UNPRUNED = "unpruned"
_LANGUAGE = "language_model"


@dataclass(frozen=True)
class ExportOptions:
    """How a package is written.

    projector: whether the features go through it. image: whether the input is an RGB
    picture, or else numbers in [0, 1]. compress: the weights, as in `COMPRESSIONS`.
    Raises `InputError` on values that are not known.
    """

    projector: bool = True
    image: bool = True
    target: str = "iOS18"
    precision: str = "float16"
    compress: str | None = None

    def __post_init__(self):
        for name, value, known in (
            ("deployment target", self.target, TARGETS),
            ("precision", self.precision, PRECISIONS),
            ("compression", self.compress, (None, *COMPRESSIONS)),
        ):
            if value not in known:
                names = [choice for choice in known if choice]
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
        """Whether one package can hold several functions."""
        return TARGETS[self.target] in _SHARING


def load_coremltools():
    """The package, without its remarks; `InputError` says how to install it."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        import coremltools
    except ImportError:
        raise InputError(
            "Core ML packages need coremltools; install it with "
            "pip install 'mlx-tokprune[coreml]'"
        ) from None
    return coremltools


def function_name(pruner: Pruner) -> str:
    """`keep_50` for half of the tokens, `tokens_32` for so many, or `unpruned`."""
    if pruner.keeps_all:
        return UNPRUNED
    if pruner.keep_tokens is not None:
        return f"tokens_{pruner.keep_tokens}"
    return f"keep_{pruner.keep_ratio * 100:g}".translate(str.maketrans(".-", "__"))


def export_package(
    model,
    pruners: Sequence[Pruner],
    output: str | Path,
    options: ExportOptions | None = None,
    source: str | Path | None = None,
    name: str | None = None,
) -> dict[Path, list[Function]]:
    """Write `model`'s vision path to `output`; gives the functions of each package.

    One pruner gives a package with one function, `main`. Several give one package that
    shares their weights and also has `unpruned`, or a package each where the target
    does not allow that. The model must be loaded in float32. source: the checkpoint's
    folder, for its licence; name: what the package says the model is, by default that
    folder's. Raises `InputError` for what cannot be exported, or when `output` exists.
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
    # The language model may stay on the disk.
    mx.eval([array for _, array in _exported(model)])
    check_finite(dict(_exported(model)))
    apart, paths = len(pruners) > 1 and not options.shares, [output]
    if apart:
        stems = (f"{output.stem}-{function_name(pruner)}" for pruner in pruners)
        paths = [output.with_stem(stem) for stem in stems]
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(new_folder(path)) for path in paths]
        functions, package = _convert(model, pruners, options)
        groups = [[function] for function in functions] if apart else [functions]
        for folder, group in zip(folders, groups, strict=True):
            _write(package, group, folder, options, source, name)
    del package
    gc.collect()  # coremltools' programs hold each other
    return dict(zip(paths, groups, strict=True))


def _check(model, pruners: Sequence[Pruner]) -> None:
    if model.reads_prompt:
        raise InputError(
            "this policy's vision tower reads the instruction (FiLM), which a vision "
            "package does not see; expected a policy without it"
        )
    for pruner in pruners:
        if not pruner.keeps_all and pruner.place != "tower":
            reason = _why_not_there(model, pruner)
            raise InputError(f"method {pruner.method!r} {reason}")
    for pruner in pruners:
        plan_for(model, pruner)
        if pruner.has_own_count:
            known = get_method(pruner.method)
            counting = [name for name in pruner.options if name in known.counting]
            how = f"with a {counting[0]}" if counting else "without a budget"
            raise InputError(
                f"method {pruner.method!r} {how} decides for each picture how many "
                "visual tokens to keep, and a package has fixed shapes; expected a "
                "keep ratio or a number of tokens"
            )
    names = [function_name(pruner) for pruner in pruners]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"function {name} was asked for more than once")
    for _, array in _exported(model):
        if array.dtype != mx.float32:
            raise InputError(
                f"the model's weights are {array.dtype}; load it with "
                "dtype=mx.float32 (precision is an option of the export)"
            )


def _why_not_there(model, pruner: Pruner) -> str:
    """Why a vision package cannot prune at the prompt, or after a layer."""
    if pruner.place == "layer":
        return (
            "prunes inside the language model, which a vision package does not hold; "
            "expected a pruner at the tower, such as 'attention'"
        )
    if any(name not in model.provides["tower"] for name in pruner.needs):
        return (
            "looks at the prompt, which a vision package does not see; the nearest "
            "that can be exported is 'attention'"
        )
    return (
        "prunes at the prompt, which comes after a vision package, but can prune at "
        "the tower; say --at tower, in Python at='tower'"
    )


def _exported(model) -> list[tuple[str, mx.array]]:
    """Names and weights of all but the language model."""
    parts = {n: p for n, p in model.parameters().items() if n != _LANGUAGE}
    return tree_flatten(parts)


def _write(package, functions, folder: Path, options, source, name) -> None:
    """Fill `folder` with the part of `package` that computes `functions`."""
    work = folder / "work.mlpackage"
    package.save(str(work))
    for part in work.iterdir():
        part.rename(folder / part.name)
    work.rmdir()
    for part in folder.rglob("*"):  # coremltools leaves them private
        part.chmod(0o755 if part.is_dir() else 0o644)
    (file,) = folder.glob("Data/*/*.mlmodel")
    spec = load_coremltools().utils.load_spec(str(file))
    split(spec, functions)
    settings = {"precision": options.precision}
    settings["compression"] = options.compress or "none"
    source = Path(source) if source else None
    describe(spec, functions, source, name, **settings)
    file.write_bytes(spec.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """coremltools draws its progress bars wherever it runs."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


# The program of all functions --------------------------------------------------------


def _trace(model, pruners: Sequence[Pruner]) -> tuple[Graph, Features]:
    """The tower's graph, and features of zeros in the shapes of its outputs."""
    needs, traced = dict.fromkeys(n for p in pruners for n in p.reads), []

    def encode(pixels):
        traced.append(model.encode(pixels, tuple(needs)))
        return traced[0].arrays()

    graph = capture(encode, mx.zeros((1, model.image_size, model.image_size, 3)))
    blank = traced[0].each(lambda array: mx.zeros(array.shape, array.dtype))
    for pruner in pruners:
        if not pruner.keeps_all and pruner.count(blank.total) == blank.total:
            raise InputError(
                f"all {blank.total} visual tokens would stay, which is no pruning; "
                "expected to keep fewer, or method 'none'"
            )
    return graph, blank


def _convert(model, pruners: Sequence[Pruner], options: ExportOptions):
    """The functions, and one coremltools model that computes the outputs of all."""
    ct = load_coremltools()
    target = ct.target[TARGETS[options.target]]
    name, shape = input_name(options.image), (1, 3, *[model.image_size] * 2)
    program, functions = _build(model, pruners, options, {name: shape}, target)
    color = ct.colorlayout.RGB
    image = ct.ImageType(name, shape, scale=1 / 255, color_layout=color)
    with _quiet():
        package = ct.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            inputs=[image] if options.image else None,
            minimum_deployment_target=target,
            compute_precision=_precision(ct, options),
            skip_model_load=True,
        )
        return functions, _compressed(package, options.compress)


def _build(model, pruners: Sequence[Pruner], options: ExportOptions, inputs, target):
    """The MIL program that computes the outputs of all functions, and the functions."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil import mil

    tower, blank = _trace(model, pruners)
    functions, outputs = [], []
    inputs = {name: mb.placeholder(shape) for name, shape in inputs.items()}
    with mil.Function(inputs, opset_version=target) as body:
        (image,) = body.inputs.values()
        pixels = mb.transpose(x=image, perm=[0, 2, 3, 1])
        arrays = lower("encode", tower, [pixels])
        seen = dict(zip(("tokens", *blank.extras), arrays, strict=True))
        for pruner in pruners:
            made = _add_function(mb, model, pruner, options.projector, blank, seen)
            functions.append(_function(model, pruner, options, blank, made[0].shape))
            outputs += made
        body.set_outputs(outputs)
    program = mil.Program()
    program.add_function("main", body)
    return program, functions


def _function(model, pruner: Pruner, options, blank: Features, shape) -> Function:
    """The description of a function whose features have `shape`."""
    return Function(
        name=function_name(pruner),
        method=pruner.method,
        keep_ratio=pruner.keep_ratio,
        keep=shape[1],
        grid=blank.grid,
        channels=shape[2],
        image_size=model.image_size,
        projector=options.projector,
        image=options.image,
    )


def _add_function(
    mb, model, pruner: Pruner, projector: bool, blank: Features, seen: dict
) -> list:
    """Prune and project `seen` in the MIL function being built; returns the outputs."""

    def finish(tokens, chosen):
        tokens = tokens if pruner.keeps_all else keep_rows(tokens, chosen)
        return [model.project(tokens) if projector else tokens]

    function = function_name(pruner)
    (indices, *merging), is_computed = _choose(mb, pruner, blank, seen)
    weights, dtype = (merging[0], mx.float32) if merging else (indices, mx.int32)
    graph = capture(finish, blank.tokens, mx.zeros(tuple(weights.shape), dtype))
    (result,) = lower(f"finish_{function}", graph, [seen["tokens"], weights])
    numbers = {"kept_indices": indices}
    if merging:
        numbers["assignment"] = merging[1]
    if not is_computed:
        # Core ML promises nothing for outputs that are constants: add a computed zero.
        first = mb.slice_by_size(x=result, begin=[0, 0, 0], size=[1, 1, 1])
        zero = mb.cast(x=mb.greater(x=first, y=first), dtype="int32")
        zero = mb.reshape(x=zero, shape=[1, 1])
        numbers = {name: mb.add(x=var, y=zero) for name, var in numbers.items()}
    outputs = {"image_features": result} | numbers
    return [
        mb.identity(x=var, name=output_name(function, name))
        for name, var in outputs.items()
    ]


def _choose(mb, pruner: Pruner, blank: Features, seen: dict) -> tuple[list, bool]:
    """The choice as MIL variables (see `_arrays`), and whether `seen` decides it."""
    extras = {n: array for n, array in blank.extras.items() if n in pruner.reads}
    blank = replace(blank, extras=extras)

    def prune(tokens, *arrays):
        known = dict(zip(extras, arrays, strict=True))
        return _arrays(pruner(replace(blank, tokens=tokens, extras=known)))

    graph = capture(prune, *blank.arrays())
    if any(graph.reaches()):
        inputs = [seen[name] for name in ("tokens", *extras)]
        return lower(f"prune_{function_name(pruner)}", graph, inputs), True
    constants = prune(*blank.arrays())
    return [mb.const(val=np.array(array)) for array in constants], False


def _arrays(selection: Selection) -> list[mx.array]:
    """Indices, and for merging methods weights and assignment."""
    found = (selection.indices, selection.weights, selection.assignment())
    return [array for array in found if array is not None]


def _precision(ct, options: ExportOptions):
    if options.precision == "float32":
        return ct.precision.FLOAT32
    return ct.transform.FP16ComputePrecision(
        op_selector=lambda op: not op.name.startswith("prune_")
    )


def _compressed(package, compress: str | None):
    if compress is None:
        return package
    from coremltools.optimize import coreml as optimize

    if compress == "8bit":
        settings = optimize.OpLinearQuantizerConfig(mode="linear_symmetric")
        apply = optimize.linear_quantize_weights
    else:
        # coremltools clusters smaller arrays with scikit-learn, for next to nothing.
        settings = optimize.OpPalettizerConfig(
            mode="kmeans", nbits=_PALETTES[compress], weight_threshold=10_000
        )
        apply = optimize.palettize_weights
    with np.errstate(divide="ignore", invalid="ignore"):  # of weights that are all 0
        return apply(package, optimize.OptimizationConfig(global_config=settings))

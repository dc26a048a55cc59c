"""Methods by name: `register`, `get_method`, `list_pruners`.

A method is a pure function `(Features, *, keep, **options) -> Selection`. `keep` is a
Python int, so every shape is static; it is `None` only for methods with their own
count. A registered method works in every command. Methods of other packages are named
`package.module:function`, or come by the entry-point group `mlx_tokprune.pruners`.
"""

import contextlib
import functools
import importlib
import inspect
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError, nearest
from ..features import Selection
from .scorers import counts_itself, is_scorer

Place = Literal["tower", "prompt"] | int
Depths = tuple[float, ...]  # shares of a language model's depth, ascending
Options = Mapping[str, float | str]
PruneFunction = Callable[..., Selection]
# (options, whether a budget is given) -> None, or raises `InputError`
OptionCheck = Callable[[Options, bool], None]
GROUP = "mlx_tokprune.pruners"


@dataclass(frozen=True)
class Method:
    """A registered pruning method.

    needs: required extras of `Features`.
    wants: optional extras.
    seeded: whether it takes `seed`.
    at: default place: "tower" (before the projector), "prompt" (at the language
        model's input), a number of layers, or several places as shares of the language
        model's depth.
    counts: the source of the token count: "budget", "own" (the method's rule), or
        "either" (the budget if given, else the rule).
    counting: options that decide the count in place of a budget.
    check: validates the option values.
    prepare: function applied to tokens and text before the first layer computes
        `queries` and `text_keys`.
    fits: kept tokens of a (grid, budget), for methods that may keep fewer.
    """

    name: str
    function: PruneFunction
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    seeded: bool = False
    at: Place | Depths = "tower"
    counts: str = "budget"
    counting: tuple[str, ...] = ()
    check: OptionCheck | None = None
    prepare: Callable[[mx.array], mx.array] | None = None
    fits: Callable[[tuple[int, int], int], int] | None = None

    @property
    def place(self) -> str:
        """Kind of the place: `tower`, `prompt` or `layer`."""
        return self.at if isinstance(self.at, str) else "layer"

    @property
    def is_own(self) -> bool:
        """True for a method of this package."""
        return self.function.__module__.startswith("mlx_tokprune.")

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the method's options, without budget and seed."""
        parameters = inspect.signature(self.function).parameters
        return tuple(p for p in parameters if p not in ("features", "keep", "seed"))

    def words(self, option: str) -> tuple[str, ...]:
        """Return the words of an option with a `Literal` type, none for a number."""
        kind = inspect.signature(self.function).parameters[option].annotation
        return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]

    def counts_itself(self, options: Options) -> bool:
        """Return whether the method takes no budget with these options."""
        return self.counts == "own" or any(name in self.counting for name in options)

    def lacks_budget(self, options: Options) -> bool:
        """Return whether the method needs a budget with these options."""
        either = self.counts != "budget" or self.counts_itself(options)
        return not either and self.name != "none"

    @property
    def learned_count(self) -> bool:
        """True if a table has a row for the learned count besides those of budgets."""
        return self.counts == "either" and "scores" in self.needs

    @functools.cached_property
    def can_compile(self) -> bool:
        """True if a compiled call always chooses as the function does.

        MLX freezes the arrays that a function closes over when it compiles. A seeded
        method would compile once per seed.
        """
        function = self.function
        if self.seeded or not inspect.isfunction(function):
            return False
        variables = inspect.getclosurevars(function)
        closed = (*variables.nonlocals.values(), *variables.globals.values())
        return not any(isinstance(value, (mx.array, nn.Module)) for value in closed)


_METHODS: dict[str, Method] = {}
_NAMES: dict[str, str] = {}  # every name and alias -> name


def register(
    name: str, *, aliases: tuple[str, ...] = (), **fields
) -> Callable[[PruneFunction], PruneFunction]:
    """Register a pruning function under `name`; takes the fields of `Method`.

    Raises `ValueError` for a name that is already registered.
    """

    def add(function: PruneFunction) -> PruneFunction:
        for word in (name, *aliases):
            if word in _NAMES:
                raise ValueError(f"pruner name {word!r} is already registered")
        _METHODS[name] = Method(name, function, **fields)
        _NAMES.update({word: name for word in (name, *aliases)})
        return function

    return add


@contextlib.contextmanager
def temporary(name: str, **options) -> Iterator[Callable]:
    """Register a method inside a `with` block, with the arguments of `register`."""
    try:
        yield register(name, **options)
    finally:
        for word in [w for w, n in _NAMES.items() if n == name]:
            del _NAMES[word]
        _METHODS.pop(name, None)


def list_pruners(at: str | None = None) -> list[str]:
    """Return the method names (of one place), in the order of registration.

    at: "tower", "prompt" or "layer". Methods that need a scorer are left out.
    """
    _load_entry_points()
    return [
        m.name
        for m in _METHODS.values()
        if at in (None, m.place) and "scores" not in m.needs
    ]


def in_ranges(**ranges: tuple[float, float]) -> OptionCheck:
    """Return a check that each given option is within its (least, most)."""

    def check(options: Options, budget: bool) -> None:
        for name, (least, most) in ranges.items():
            value = options.get(name, least)
            if isinstance(value, str) or not least <= value <= most:
                raise InputError(
                    f"{name} {value} is out of range; expected {least:g} to {most:g}"
                )

    return check


def get_method(name: str) -> Method:
    """Return the method of a name, an alias, `package.module:function` or a scorer.

    The folder of a trained scorer means the method `learned`, or `threshold` if it
    also learned a count. Raises `InputError` that lists the registered methods.
    """
    if isinstance(name, str) and name not in _NAMES:
        if is_scorer(name):
            return _METHODS["threshold" if counts_itself(name) else "learned"]
        _load_entry_points()
        if ":" in name and name not in _NAMES:
            return _imported(name)
    if not isinstance(name, str) or name not in _NAMES:
        names = ", ".join(list_pruners())
        raise InputError(
            f"unknown pruning method {name!r}; known methods are {names}."
            + nearest(str(name), _NAMES)
        )
    return _METHODS[_NAMES[name]]


def is_registered(name: str) -> bool:
    """Return whether a name is registered, without importing a module for it."""
    _load_entry_points()
    return name in _NAMES


def _imported(path: str) -> Method:
    """Return the method of a function by its path; register it if it is new."""
    module, _, attribute = path.partition(":")
    if module.partition("@")[0] in _NAMES:
        raise InputError(
            f"method {path!r} has a budget or a place; expected a name, or "
            f"--prune {path}; expected package.module:function for a custom method"
        )
    if module.endswith(".py") or "/" in module:
        stem = module.rpartition("/")[2].removesuffix(".py")
        raise InputError(
            f"method {path!r} names a file; expected package.module:function, such as "
            f"{stem}:{attribute}, run in the folder of the file"
        )
    if "" not in sys.path:  # an installed command lacks the working folder
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a custom module may raise anything
        raise InputError(
            f"method {path!r} cannot be imported ({error}); expected "
            "package.module:function"
        ) from None
    for method in _METHODS.values():
        if method.function is function:
            return method
    if not _takes_features(function):
        raise InputError(
            f"method {path!r} is no pruner; expected package.module:function of "
            "(features, *, keep)"
        )
    register(path)(function)
    return _METHODS[path]


def _takes_features(function: Callable) -> bool:
    """Return whether a function takes the arguments of a method."""
    try:
        inspect.signature(function).bind(None, keep=1)
    except (TypeError, ValueError):
        return False
    return True


@functools.lru_cache(maxsize=1)
def _load_entry_points() -> None:
    """Import the entry points of installed packages, which register their methods."""
    for entry in metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # a foreign package may raise anything
            warnings.warn(
                f"methods of {entry.value} are left out: {error}", stacklevel=2
            )

"""Methods by name: `register`, `get_method`, `list_pruners`.

A method is a pure function `(Features, *, keep, **options) -> Selection`. `keep` is a
Python int, so every shape is static; only methods that choose a count of their own get
`None`. Registering one makes it known to every command. One of somebody else's comes by
`package.module:function`, or by the entry-point group `mlx_tokprune.pruners`.
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
# (options, whether there is a budget) -> None, or `InputError`
OptionCheck = Callable[[Options, bool], None]
GROUP = "mlx_tokprune.pruners"


@dataclass(frozen=True)
class Method:
    """A registered method: `needs` names the extras of `Features` that it reads.

    wants: extras that it also reads where there are any. at: where it runs unless a
    pruner says otherwise: "tower" (before the projector), "prompt" (at the language
    model's input), a number of layers, or several places as shares of the language
    model's depth. counts: who says how many tokens stay: the `budget`, the method's
    `own` rule, or the budget when there is one (`either`); counting: options that say
    it in place of a budget. check: of the values of its options. prepare: what is done
    to tokens and text before the first layer makes `queries` and `text_keys` of them.
    fits: how many really stay of a (grid, budget), where those are fewer.
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
        """`tower`, `prompt` or `layer`."""
        return self.at if isinstance(self.at, str) else "layer"

    @property
    def is_own(self) -> bool:
        """Whether it is one of this package's."""
        return self.function.__module__.startswith("mlx_tokprune.")

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that the method takes besides its budget."""
        parameters = inspect.signature(self.function).parameters
        return tuple(p for p in parameters if p not in ("features", "keep", "seed"))

    def words(self, option: str) -> tuple[str, ...]:
        """What an option can be, none for a number: those of its `Literal` type."""
        kind = inspect.signature(self.function).parameters[option].annotation
        return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or "").strip().partition("\n")[0]

    def counts_itself(self, options: Options) -> bool:
        """Whether the method, given these options, takes no budget."""
        return self.counts == "own" or any(name in self.counting for name in options)

    def lacks_budget(self, options: Options) -> bool:
        """Whether the method, given these options and no budget, cannot say a count."""
        either = self.counts != "budget" or self.counts_itself(options)
        return not either and self.name != "none"

    @property
    def learned_count(self) -> bool:
        """Whether tables have a row of its own count besides those of budgets."""
        return self.counts == "either" and "scores" in self.needs

    @functools.cached_property
    def can_compile(self) -> bool:
        """Whether a compiled call would go on choosing as the function does.

        MLX keeps the arrays that a function closes over as they were when it was
        compiled; a seeded one would be compiled for each seed.
        """
        function = self.function
        if self.seeded or not inspect.isfunction(function):
            return False
        found = inspect.getclosurevars(function)
        closed = (*found.nonlocals.values(), *found.globals.values())
        return not any(isinstance(value, (mx.array, nn.Module)) for value in closed)


_METHODS: dict[str, Method] = {}
_NAMES: dict[str, str] = {}  # every name and alias -> name


def register(
    name: str, *, aliases: tuple[str, ...] = (), **known
) -> Callable[[PruneFunction], PruneFunction]:
    """Register a pruner function under `name`; takes the fields of `Method`.

    Raises `ValueError` on a known name.
    """

    def add(function: PruneFunction) -> PruneFunction:
        for word in (name, *aliases):
            if word in _NAMES:
                raise ValueError(f"pruner name {word!r} is already registered")
        _METHODS[name] = Method(name, function, **known)
        _NAMES.update({word: name for word in (name, *aliases)})
        return function

    return add


@contextlib.contextmanager
def temporary(name: str, **options) -> Iterator[Callable]:
    """`register` for the length of a `with` block."""
    try:
        yield register(name, **options)
    finally:
        for word in [w for w, n in _NAMES.items() if n == name]:
            del _NAMES[word]
        _METHODS.pop(name, None)


def list_pruners(at: str | None = None) -> list[str]:
    """Names of the methods (of one place), in the order of registration.

    at: "tower", "prompt" or "layer". Methods that choose by a scorer are left out: they
    need one to be given.
    """
    _load_entry_points()
    return [
        m.name
        for m in _METHODS.values()
        if at in (None, m.place) and "scores" not in m.needs
    ]


def in_ranges(**ranges: tuple[float, float]) -> OptionCheck:
    """A check that each option, where it is given, is within its (least, most)."""

    def check(options: Options, budget: bool) -> None:
        for name, (least, most) in ranges.items():
            value = options.get(name, least)
            if isinstance(value, str) or not least <= value <= most:
                raise InputError(
                    f"{name} {value} is out of range; expected {least:g} to {most:g}"
                )

    return check


def get_method(name: str) -> Method:
    """The method of this name or alias, `package.module:function`, or a scorer's.

    The folder of a trained scorer means the method `learned`, or `threshold` where it
    learned a count, too. `InputError` lists the known ones.
    """
    if isinstance(name, str) and name not in _NAMES:
        if is_scorer(name):
            return _METHODS["threshold" if counts_itself(name) else "learned"]
        _load_entry_points()
        if ":" in name and name not in _NAMES:
            return _imported(name)
    if not isinstance(name, str) or name not in _NAMES:
        known = ", ".join(list_pruners())
        raise InputError(
            f"unknown pruning method {name!r}; known methods are {known}."
            + nearest(str(name), _NAMES)
        )
    return _METHODS[_NAMES[name]]


def is_registered(name: str) -> bool:
    """Whether this name is known without importing somebody's module for it."""
    _load_entry_points()
    return name in _NAMES


def _imported(path: str) -> Method:
    """The method of a function by its path; registered under that unless it is."""
    module, _, attribute = path.partition(":")
    if "" not in sys.path:  # an installed command would not see this folder
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # somebody else's module
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


def _takes_features(function) -> bool:
    """Whether it can be called as methods are."""
    try:
        inspect.signature(function).bind(None, keep=1)
    except (TypeError, ValueError):
        return False
    return True


@functools.lru_cache(maxsize=1)
def _load_entry_points() -> None:
    """Import what installed packages name; each registers its methods."""
    for entry in metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # whatever somebody else's package runs into
            warnings.warn(
                f"methods of {entry.value} are left out: {error}", stacklevel=2
            )

"""Pruners by name, and `Pruner`: a method with its budget, ready to call.

A pruner is a pure function `(Features, *, keep, **options) -> Selection`. `keep` is a
Python int, so every shape is static; only prompt-stage methods that choose a count per
sample get `None`. Registering one makes it known to every command.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

import mlx.core as mx

from ..errors import InputError, nearest
from ..features import Features, Selection

PruneFunction = Callable[..., Selection]
# (options, whether there is a budget) -> None, or `InputError`
OptionCheck = Callable[[Mapping[str, float], bool], None]


@dataclass(frozen=True)
class Method:
    """A registered method: `needs` names the extras of `Features` that it reads.

    stage: `vision` before the projector, `prompt` at the language model's input.
    counts: who says how many tokens stay: the `budget`, the method's `own` rule, or
    the budget when there is one (`either`). check: of the values of its options.
    """

    name: str
    function: PruneFunction
    needs: tuple[str, ...] = ()
    seeded: bool = False
    stage: str = "vision"
    counts: str = "budget"
    check: OptionCheck | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that the method takes besides its budget."""
        parameters = inspect.signature(self.function).parameters
        return tuple(p for p in parameters if p not in ("features", "keep", "seed"))

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or "").strip().splitlines()[0]


_METHODS: dict[str, Method] = {}
_NAMES: dict[str, str] = {}  # every name and alias -> name


def register(
    name: str,
    *,
    needs: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    seeded: bool = False,
    stage: str = "vision",
    counts: str = "budget",
    check: OptionCheck | None = None,
) -> Callable[[PruneFunction], PruneFunction]:
    """Register a pruner function under `name`; raises `ValueError` on a known name."""

    def add(function: PruneFunction) -> PruneFunction:
        for word in (name, *aliases):
            if word in _NAMES:
                raise ValueError(f"pruner name {word!r} is already registered")
        _METHODS[name] = Method(name, function, needs, seeded, stage, counts, check)
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


def list_pruners(stage: str | None = None) -> list[str]:
    """Names of the methods (of one stage), in the order of registration."""
    return [m.name for m in _METHODS.values() if stage in (None, m.stage)]


def get_method(name: str) -> Method:
    """The method of this name or alias; `InputError` lists the known ones."""
    if not isinstance(name, str) or name not in _NAMES:
        known = ", ".join(_METHODS)
        raise InputError(
            f"unknown pruning method {name!r}; known methods are {known}."
            + nearest(str(name), _NAMES)
        )
    return _METHODS[_NAMES[name]]


def count_kept(total: int, keep_ratio: float) -> int:
    """K = max(1, int(N * ratio)), the one place where a ratio becomes a count."""
    return max(1, int(total * keep_ratio))


def check_seed(seed: int) -> None:
    """Raise `InputError` unless MLX takes `seed`."""
    if not isinstance(seed, Integral) or not 0 <= seed < 1 << 64:
        raise InputError(f"seed {seed} is out of range; expected 0 to 2**64 - 1")


@dataclass(frozen=True)
class Pruner:
    """A method and its budget: `Pruner("norm", keep_ratio=0.5)(features)`.

    Give `keep_ratio` in (0, 1] or `keep_tokens` (at least 1), not both; neither keeps
    every token, or as many as a method with a rule of its own says. `seed` is read by
    seeded methods only; `options` are the method's own. Raises `InputError` for an
    unknown method or option, a budget out of range, or more tokens than there are.
    """

    method: str = "norm"
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    seed: int = 0
    options: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        object.__setattr__(self, "method", get_method(self.method).name)
        self._check_options()
        ratio, tokens = self.keep_ratio, self.keep_tokens
        if ratio is not None and tokens is not None:
            raise InputError("give a keep ratio or a number of tokens, not both")
        number = isinstance(ratio, Real) and not isinstance(ratio, bool)
        if ratio is not None and not (number and 0 < ratio <= 1):
            shown = f"{ratio:g}" if number else repr(ratio)
            raise InputError(
                f"keep ratio {shown} is outside (0, 1]; 1 keeps every visual token"
            )
        whole = isinstance(tokens, Integral) and not isinstance(tokens, bool)
        if tokens is not None and not (whole and tokens >= 1):
            raise InputError(
                f"cannot keep {tokens} visual tokens; expected a whole number from 1"
            )
        check_seed(self.seed)
        if self.method == "none" and (ratio or 1) < 1:
            raise InputError(
                f"method 'none' keeps every visual token, so a keep ratio of "
                f"{ratio:g} needs another method, such as 'norm'"
            )

    def _check_options(self) -> None:
        known = get_method(self.method).options
        if not isinstance(self.options, Mapping) or not all(
            isinstance(name, str) and isinstance(value, Real)
            for name, value in self.options.items()
        ):
            raise InputError(f"options are numbers by name, not {self.options!r}")
        for name in self.options:
            if name not in known:
                takes = f"takes {', '.join(known)}" if known else "takes no options"
                raise InputError(
                    f"method {self.method!r} {takes}, not {name!r}."
                    + nearest(name, known)
                )
        budget = self.keep_ratio is not None or self.keep_tokens is not None
        if budget and get_method(self.method).counts == "own":
            raise InputError(
                f"method {self.method!r} decides itself how many visual tokens to keep;"
                " leave out the keep ratio, or use 'trimvla', which takes one"
            )
        check = get_method(self.method).check
        if check:
            check(self.options, budget)

    @property
    def stage(self) -> str:
        """`vision` or `prompt`: where in the pipeline this pruner runs."""
        return "vision" if self.keeps_all else get_method(self.method).stage

    @property
    def has_own_count(self) -> bool:
        """Whether the method, not a budget, says how many tokens stay."""
        unset = self.keep_ratio is None and self.keep_tokens is None
        return unset and get_method(self.method).counts != "budget"

    @property
    def needs(self) -> tuple[str, ...]:
        """The extras of `Features` this pruner reads, none when it keeps everything."""
        return () if self.keeps_all else get_method(self.method).needs

    @property
    def keeps_all(self) -> bool:
        if self.has_own_count:
            return False
        ratio_is_full = self.keep_ratio is None or self.keep_ratio == 1
        return self.method == "none" or (ratio_is_full and self.keep_tokens is None)

    @property
    def key(self) -> tuple:
        """What tells pruners apart, hashable."""
        options = tuple(sorted(self.options.items()))
        return self.method, self.keep_ratio, self.keep_tokens, self.seed, options

    def count(self, total: int) -> int:
        """How many of `total` visual tokens to keep."""
        if self.keep_tokens is None:
            return count_kept(total, self.keep_ratio or 1.0)
        if self.keep_tokens > total:
            raise InputError(
                f"cannot keep {self.keep_tokens} visual tokens; there are {total}, "
                f"so the most is {total}"
            )
        if self.method == "none" and self.keep_tokens < total:
            raise InputError(
                f"method 'none' keeps all {total} visual tokens, so keeping "
                f"{self.keep_tokens} needs another method, such as 'norm'"
            )
        return int(self.keep_tokens)

    def __call__(self, features: Features) -> Selection:
        method = get_method(self.method)
        total = features.tokens.shape[1]
        keep = None if self.has_own_count else self.count(total)
        if keep == total:
            method = get_method("none")
        missing = [name for name in method.needs if getattr(features, name) is None]
        if missing:
            raise ValueError(f"{method.name} needs features with {missing}")
        if method.seeded:
            return method.function(features, keep=keep, seed=int(self.seed))
        if method.stage == "prompt":
            return method.function(features, keep=keep, **self.options)
        options = tuple(sorted(self.options.items())) if method.options else ()
        return _compiled(method, keep, features.grid, options)(features)


@functools.lru_cache(maxsize=256)
def _compiled(method: Method, keep: int, grid: tuple[int, int], options: tuple):
    """The method under `mx.compile`: one graph per budget, grid and options."""

    def arrays(tokens, *extras):
        features = Features(tokens, grid, *extras)
        selection = method.function(features, keep=keep, **dict(options))
        return (selection.indices, *filter(_is_array, (selection.weights,)))

    compiled = mx.compile(arrays)

    def call(features: Features) -> Selection:
        extras = filter(_is_array, (features.attention,))
        return Selection(*compiled(features.tokens, *extras))

    return call


def _is_array(value) -> bool:
    return value is not None

"""`Pruner`: a method, its budget and its place, ready to call."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError, nearest
from ..features import Features, Selection
from .registry import Depths, Method, Options, Place, get_method
from .scorers import is_scorer, load_scorer

log = logging.getLogger("mlx_tokprune")
DEFAULT_METHOD = "norm"
POLICY_METHOD = "trimvla"  # default of policies


def count_kept(total: int, keep_ratio: float) -> int:
    """Return K = max(1, int(N * ratio)), the only conversion of a ratio to a count."""
    return max(1, int(total * keep_ratio))


def check_seed(seed: int) -> None:
    """Raise `InputError` unless `seed` is a whole number that MLX accepts."""
    if not isinstance(seed, Integral) or not 0 <= seed < 1 << 64:
        raise InputError(f"seed {seed} is out of range; expected 0 to 2**64 - 1")


@dataclass(frozen=True)
class Pruner:
    """A method, its budget and its place: `Pruner("norm", keep_ratio=0.5)(features)`.

    Give `keep_ratio` in (0, 1] or `keep_tokens` (at least 1), not both. Without either,
    every token is kept, or the method's own rule decides the count.

    method: a registered name or alias, `package.module:function`, or the folder of a
        scorer that `mlx_tokprune train prune` wrote, which is then also `folder`.
    at: "tower" (before the projector), "prompt" (at the language model's input) or k
        (after k of its layers: FastV is `Pruner("attention", 0.5, at=2)`). Default: the
        method's place. Several places are shares of the depth, with the budget at each.
    seed: for seeded methods only.
    options: options of the method, by name.
    scorer: an `nn.Module` from `Features` to scores (B, N), for methods that need
        `scores`. Its attribute `needs` names the extras that it reads.

    Raises `InputError` for an unknown method, option or place, a budget out of range,
    or more tokens than there are.
    """

    method: str = DEFAULT_METHOD
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    at: Place | Depths = field(default=None, kw_only=True)  # type: ignore[assignment]
    seed: int = field(default=0, kw_only=True)
    options: Options = field(default_factory=dict, hash=False, kw_only=True)
    scorer: nn.Module | None = field(
        default=None, kw_only=True, compare=False, repr=False
    )
    folder: str | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self):
        method, folder = get_method(self.method), None
        if self.scorer is None and is_scorer(self.method):
            folder = str(self.method)
            object.__setattr__(self, "scorer", load_scorer(folder))
        if method.name == "learned" and _own_count(self.scorer):
            method = get_method("threshold")
        own = method.at if folder is None else self.scorer.at
        at = own if self.at is None else self.at
        if folder is not None and at != own:
            raise InputError(
                f"the scorer of {folder} was trained for {own!r}, not {at!r}"
            )
        if isinstance(at, Integral) and not isinstance(at, bool):
            at = int(at)
        # The dataclass is frozen: its own fields are set once, here.
        object.__setattr__(self, "method", method.name)
        object.__setattr__(self, "at", tuple(at) if isinstance(at, list) else at)
        object.__setattr__(self, "folder", folder)
        if self.at != method.at:
            _check_place(self.at)
        self._check_options()
        ratio, tokens = self.keep_ratio, self.keep_tokens
        if ratio is not None and tokens is not None:
            raise InputError("give a keep ratio or a number of tokens, not both")
        number = isinstance(ratio, Real) and not isinstance(ratio, bool)
        if ratio is not None and not (number and 0 < ratio <= 1):
            shown = f"{ratio:g}" if isinstance(ratio, float) else repr(ratio)[:40]
            raise InputError(
                f"keep ratio {shown} is outside (0, 1]; 1 keeps every visual token"
            )
        whole = isinstance(tokens, Integral) and not isinstance(tokens, bool)
        if tokens is not None and not (whole and tokens >= 1):
            raise InputError(
                f"cannot keep {tokens} visual tokens; expected a whole number from 1"
            )
        check_seed(self.seed)
        for name in ("keep_ratio", "keep_tokens", "seed"):  # of NumPy, too
            if (value := getattr(self, name)) is not None:
                kind = float if name == "keep_ratio" else int
                object.__setattr__(self, name, kind(value))
        if self.method == "none" and (ratio or 1) < 1:
            raise InputError(
                f"method 'none' keeps every visual token, so a keep ratio of "
                f"{ratio:g} needs another method, such as 'norm'"
            )
        if ("scores" in method.needs) != (self.scorer is not None):
            raise InputError(
                f"method {self.method!r} chooses by a scorer; say its folder as the "
                "method, or give one"
                if self.scorer is None
                else f"method {self.method!r} reads no scores; leave out the scorer, "
                "or choose 'learned'"
            )

    def _check_options(self) -> None:
        method = get_method(self.method)
        takes = method.options
        if not isinstance(self.options, Mapping) or not all(
            isinstance(name, str) and isinstance(value, (Real, str))
            for name, value in self.options.items()
        ):
            raise InputError(
                f"options are numbers or words by name, not {self.options!r}"
            )
        for name, value in self.options.items():
            if name not in takes:
                listed = f"takes {', '.join(takes)}" if takes else "takes no options"
                raise InputError(
                    f"method {self.method!r} {listed}, not {name!r}."
                    + nearest(name, takes)
                )
            words = method.words(name)
            if value not in words if words else isinstance(value, str):
                expected = f"expected {' or '.join(words) or 'a number'}"
                raise InputError(
                    f"option {name} of {self.method!r} is {value!r}; {expected}."
                    + nearest(str(value), words)
                )
        budget = self.keep_ratio is not None or self.keep_tokens is not None
        if budget and method.counts == "own":
            raise InputError(
                f"method {self.method!r} decides itself how many visual tokens to keep;"
                " leave out the keep ratio, or use 'trimvla', which takes one"
            )
        if method.check:
            method.check(self.options, budget)

    @property
    def place(self) -> str:
        """Kind of the place: `tower`, `prompt` or `layer`."""
        return self.at if isinstance(self.at, str) else "layer"

    @property
    def has_own_count(self) -> bool:
        """True if the method, not a budget, decides how many tokens are kept."""
        unset = self.keep_ratio is None and self.keep_tokens is None
        method = self._method
        own = method.counts != "budget" or method.counts_itself(self.options)
        return unset and own

    @property
    def _method(self) -> Method:
        return get_method(self.method)

    @property
    def needs(self) -> tuple[str, ...]:
        """Required extras of `Features`; none when everything is kept."""
        if self.keeps_all:
            return ()
        own = (n for n in self._method.needs if n != "scores")
        return tuple(dict.fromkeys((*own, *getattr(self.scorer, "needs", ()))))

    @property
    def reads(self) -> tuple[str, ...]:
        """Required and optional extras of `Features`; none when everything is kept."""
        if self.keeps_all:
            return ()
        return tuple(dict.fromkeys((*self.needs, *self._method.wants)))

    def spread(self, layers: int) -> tuple["Pruner", ...]:
        """Return one pruner for each place in a language model of N `layers`."""
        if not isinstance(self.at, tuple):
            return (self,)
        depths = (round(share * layers) for share in self.at)
        places = dict.fromkeys(max(1, min(layers - 1, depth)) for depth in depths)
        return tuple(replace(self, at=place) for place in places)

    @property
    def prepare(self) -> Callable[[mx.array], mx.array]:
        """Function applied to the inputs of the first layer's queries and keys."""
        return self._method.prepare or (lambda x: x)

    @property
    def keeps_all(self) -> bool:
        """True if every token is kept, whatever the features."""
        if self.has_own_count:
            return False
        ratio_is_full = self.keep_ratio is None or self.keep_ratio == 1
        return self.method == "none" or (ratio_is_full and self.keep_tokens is None)

    @property
    def key(self) -> tuple:
        """Hashable identity of the pruner."""
        options = tuple(sorted(self.options.items()))
        budget = (self.keep_ratio, self.keep_tokens)
        return self.method, *budget, self.at, self.seed, options, id(self.scorer)

    def described(self) -> dict:
        """Return JSON-ready arguments of an equal pruner (a scorer needs a folder)."""
        names = ("method", "keep_ratio", "keep_tokens", "at", "seed")
        fields = {n: getattr(self, n) for n in names} | {"options": dict(self.options)}
        return fields | ({"method": self.folder} if self.folder else {})

    def count(self, total: int) -> int:
        """Return how many of `total` visual tokens are kept, at most.

        Raises `InputError` for a budget of more tokens than `total`.
        """
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

    def count_on(self, grid: tuple[int, int]) -> int:
        """Return how many tokens of a picture are kept; grid methods may keep fewer."""
        keep, fits = self.count(grid[0] * grid[1]), self._method.fits
        return keep if fits is None else fits(grid, keep)

    def __call__(self, features: Features) -> Selection:
        """Choose the tokens of `features` to keep.

        Raises `InputError` for a budget or features that the method cannot use, and
        for a registered method that returns no tokens or tokens out of range.
        """
        selection = self._select(features)
        if not self._method.is_own:
            selection = _in_range(selection, features.total, self.method)
        total, kept = features.total, selection.keep
        log.debug("%s at %s: %d -> %d tokens", self.method, self.at, total, kept)
        return selection

    def _select(self, features: Features) -> Selection:
        keep = None if self.has_own_count else self.count(features.total)
        if keep == features.total:
            return get_method("none").function(features, keep=keep)
        _check_extras(self, features)
        method, options = self._method, tuple(sorted(self.options.items()))
        if keep is None or not method.can_compile:
            return self._run(features, keep)
        shape = (features.grid, features.pictures)
        scorer = None if self.scorer is None else _ModuleKey(self.scorer)
        chosen = _compiled(method, keep, shape, options, scorer)(
            features.tokens,
            {
                name: features.extras[name]
                for name in self.reads
                if name in features.extras
            },
            {} if self.scorer is None else self.scorer.parameters(),
        )
        return Selection(**chosen)

    def _run(self, features: Features, keep: int | None) -> Selection:
        method = self._method
        if self.scorer is not None:
            features = _scored(features, self.scorer, keep)
        seed = {"seed": int(self.seed)} if method.seeded else {}
        return _checked(method.function(features, keep=keep, **seed, **self.options))


def _check_place(at: object) -> None:
    layer = isinstance(at, int) and not isinstance(at, bool) and at >= 1
    if not layer and at not in ("tower", "prompt"):
        raise InputError(
            f"cannot prune at {at!r}; expected 'tower', 'prompt', or a number of "
            "layers from 1"
        )


def _check_extras(pruner: Pruner, features: Features) -> None:
    missing = [n for n in pruner.needs if n != "grid" and n not in features.extras]
    if missing:
        raise ValueError(f"{pruner.method} needs features with {missing}")
    if "grid" in pruner.needs and (features.grid is None or features.pictures > 1):
        raise InputError(
            f"method {pruner.method!r} needs the whole grid of one picture, but there "
            "are several, or another pruner was there before; choose another method, "
            "such as 'norm', or the tower"
        )


def _checked(selection: object) -> Selection:
    """Return the result of a method; `InputError` unless it has tokens."""
    if not isinstance(selection, Selection) or not selection.keep:
        raise InputError(
            f"a pruning method returned {type(selection).__name__} without tokens; "
            "expected a Selection of at least one"
        )
    return selection


def _in_range(selection: Selection, total: int, method: str) -> Selection:
    """Return a custom method's selection; `InputError` for indices out of range.

    MLX reads out of bounds without an error. A compiled call cannot evaluate, so there
    indices are clipped.
    """
    indices, valid = mx.clip(selection.indices, 0, total - 1), True
    with contextlib.suppress(ValueError):  # `item` raises it while MLX traces
        valid = mx.array_equal(indices, selection.indices).item()
    if not valid:
        raise InputError(
            f"method {method!r} chose tokens that do not exist; expected numbers "
            f"from 0 to {total - 1}"
        )
    return replace(selection, indices=indices)


class _ModuleKey:
    """A module as a cache key, equal only to itself."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ModuleKey) and self.module is other.module

    def __hash__(self) -> int:
        return id(self.module)


def _own_count(scorer: nn.Module | None) -> bool:
    return getattr(scorer, "own_count", False)


def _scored(features: Features, scorer: nn.Module, keep: int | None) -> Features:
    extras = dict(features.extras)
    if keep is not None and not _own_count(scorer):
        share = mx.full((len(features.tokens),), keep / features.total)
        extras["budget"] = share
    extras["scores"] = scorer(replace(features, extras=extras))
    return replace(features, extras=extras)


@contextlib.contextmanager
def _parameters(module: nn.Module, parameters: dict) -> Iterator[None]:
    """Swap the parameters of a module inside a `with` block."""
    before = module.parameters()
    module.update(parameters)
    try:
        yield
    finally:
        module.update(before)


@functools.lru_cache(maxsize=256)
def _compiled(
    method: Method, keep: int, shape: tuple, options: tuple, scorer: _ModuleKey | None
) -> Callable:
    """Compile a method with `mx.compile`: one graph per budget, grid and options.

    Extras and the scorer's parameters are inputs: as constants, the graph would keep
    their values of the first call.
    """

    def arrays(
        tokens: mx.array, extras: dict[str, mx.array], parameters: dict
    ) -> dict[str, mx.array]:
        grid, pictures = shape
        features = Features(tokens, grid, pictures, extras)
        if scorer is not None:
            with _parameters(scorer.module, parameters):
                features = _scored(features, scorer.module, keep)
        chosen = method.function(features, keep=keep, **dict(options))
        return _checked(chosen).arrays()

    return mx.compile(arrays)

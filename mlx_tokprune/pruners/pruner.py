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
    """K = max(1, int(N * ratio)), the one place where a ratio becomes a count."""
    return max(1, int(total * keep_ratio))


def check_seed(seed: int) -> None:
    """Raise `InputError` unless MLX takes `seed`."""
    if not isinstance(seed, Integral) or not 0 <= seed < 1 << 64:
        raise InputError(f"seed {seed} is out of range; expected 0 to 2**64 - 1")


@dataclass(frozen=True)
class Pruner:
    """A method, its budget and its place: `Pruner("norm", keep_ratio=0.5)(features)`.

    Give `keep_ratio` in (0, 1] or `keep_tokens` (at least 1), not both; neither keeps
    every token, or as many as a method with a rule of its own says. at: "tower" (before
    the projector), "prompt" (at the language model's input) or k, after k of its layers
    (FastV is `Pruner("attention", 0.5, at=2)`); the method's own place by default,
    which may be several, as shares of the depth, with the budget at each. `seed` is
    read by seeded methods only; `options` are the method's own. scorer: an
    `nn.Module` from `Features` to scores (B, N), for methods that need `scores`; its
    attribute `needs` names extras that it reads. `method` may be the folder of a scorer
    that `mlx_tokprune.train prune` wrote, which `folder` then is. Raises `InputError`
    for an unknown method, option or place, a budget out of range, or more tokens than
    there are.
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
        known, folder = get_method(self.method), None
        if self.scorer is None and is_scorer(self.method):
            folder = str(self.method)
            object.__setattr__(self, "scorer", load_scorer(folder))
        if known.name == "learned" and _own_count(self.scorer):
            known = get_method("threshold")
        own = known.at if folder is None else self.scorer.at
        at = own if self.at is None else self.at
        if folder is not None and at != own:
            raise InputError(
                f"the scorer of {folder} was trained for {own!r}, not {at!r}"
            )
        object.__setattr__(self, "method", known.name)
        object.__setattr__(self, "at", tuple(at) if isinstance(at, list) else at)
        object.__setattr__(self, "folder", folder)
        if self.at != known.at:
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
        if self.method == "none" and (ratio or 1) < 1:
            raise InputError(
                f"method 'none' keeps every visual token, so a keep ratio of "
                f"{ratio:g} needs another method, such as 'norm'"
            )
        if ("scores" in known.needs) != (self.scorer is not None):
            raise InputError(
                f"method {self.method!r} chooses by a scorer; say its folder as the "
                "method, or give one"
                if self.scorer is None
                else f"method {self.method!r} reads no scores; leave out the scorer, "
                "or choose 'learned'"
            )

    def _check_options(self) -> None:
        method = get_method(self.method)
        known = method.options
        if not isinstance(self.options, Mapping) or not all(
            isinstance(name, str) and isinstance(value, (Real, str))
            for name, value in self.options.items()
        ):
            raise InputError(
                f"options are numbers or words by name, not {self.options!r}"
            )
        for name, value in self.options.items():
            if name not in known:
                takes = f"takes {', '.join(known)}" if known else "takes no options"
                raise InputError(
                    f"method {self.method!r} {takes}, not {name!r}."
                    + nearest(name, known)
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
        """`tower`, `prompt` or `layer`."""
        return self.at if isinstance(self.at, str) else "layer"

    @property
    def has_own_count(self) -> bool:
        """Whether the method, not a budget, says how many tokens stay."""
        unset, known = self.keep_ratio is None and self.keep_tokens is None, self._known
        return unset and (known.counts != "budget" or known.counts_itself(self.options))

    @property
    def _known(self) -> Method:
        return get_method(self.method)

    @property
    def needs(self) -> tuple[str, ...]:
        """The extras of `Features` that are read, none when everything is kept."""
        if self.keeps_all:
            return ()
        own = (n for n in self._known.needs if n != "scores")
        return tuple(dict.fromkeys((*own, *getattr(self.scorer, "needs", ()))))

    @property
    def reads(self) -> tuple[str, ...]:
        """The same, with what is read only where there is any."""
        if self.keeps_all:
            return ()
        return tuple(dict.fromkeys((*self.needs, *self._known.wants)))

    def spread(self, layers: int) -> tuple["Pruner", ...]:
        """One pruner for each of its places in a language model of so many layers."""
        if not isinstance(self.at, tuple):
            return (self,)
        found = (round(share * layers) for share in self.at)
        places = dict.fromkeys(max(1, min(layers - 1, place)) for place in found)
        return tuple(replace(self, at=place) for place in places)

    @property
    def prepare(self) -> Callable[[mx.array], mx.array]:
        """What is done to what the first layer makes queries and keys of."""
        return self._known.prepare or (lambda x: x)

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
        budget = (self.keep_ratio, self.keep_tokens)
        return self.method, *budget, self.at, self.seed, options, id(self.scorer)

    def described(self) -> dict:
        """As JSON: what makes an equal pruner, but for a scorer without a folder."""
        names = ("method", "keep_ratio", "keep_tokens", "at", "seed")
        found = {n: getattr(self, n) for n in names} | {"options": dict(self.options)}
        return found | ({"method": self.folder} if self.folder else {})

    def count(self, total: int) -> int:
        """How many of `total` visual tokens to keep, at most."""
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
        """How many of a picture's tokens stay; methods of whole grids keep fewer."""
        keep, fits = self.count(grid[0] * grid[1]), self._known.fits
        return keep if fits is None else fits(grid, keep)

    def __call__(self, features: Features) -> Selection:
        selection = self._select(features)
        if not self._known.is_own:
            selection = _inside(selection, features.total, self.method)
        given, kept = features.total, selection.keep
        log.debug("%s at %s: %d -> %d tokens", self.method, self.at, given, kept)
        return selection

    def _select(self, features: Features) -> Selection:
        keep = None if self.has_own_count else self.count(features.total)
        if keep == features.total:
            return get_method("none").function(features, keep=keep)
        _check_extras(self, features)
        method, options = self._known, tuple(sorted(self.options.items()))
        if keep is None or not method.can_compile:
            return self._run(features, keep)
        shape = (features.grid, features.pictures)
        scorer = None if self.scorer is None else _Same(self.scorer)
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
        method = self._known
        if self.scorer is not None:
            features = _scored(features, self.scorer, keep)
        seed = {"seed": int(self.seed)} if method.seeded else {}
        return _checked(method.function(features, keep=keep, **seed, **self.options))


def _check_place(at) -> None:
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


def _checked(selection) -> Selection:
    """What a method returned; `InputError` unless it chose something."""
    if not isinstance(selection, Selection) or not selection.keep:
        raise InputError(
            f"a pruning method returned {type(selection).__name__} without tokens; "
            "expected a Selection of at least one"
        )
    return selection


def _inside(selection: Selection, total: int, method: str) -> Selection:
    """What somebody else's method chose; `InputError` for tokens that there are not.

    MLX reads whatever lies there. In a compiled call nothing can be looked at: there
    the nearest token is taken.
    """
    indices, right = mx.clip(selection.indices, 0, total - 1), True
    with contextlib.suppress(ValueError):  # MLX's, where it traces
        right = mx.array_equal(indices, selection.indices).item()
    if not right:
        raise InputError(
            f"method {method!r} chose tokens that there are not; expected numbers "
            f"from 0 to {total - 1}"
        )
    return replace(selection, indices=indices)


class _Same:
    """A module as a key: equal to nothing but itself."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __eq__(self, other) -> bool:
        return self.module is other.module

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
    """The module with these parameters, for the length of a `with` block."""
    before = module.parameters()
    module.update(parameters)
    try:
        yield
    finally:
        module.update(before)


@functools.lru_cache(maxsize=256)
def _compiled(
    method: Method, keep: int, shape: tuple, options: tuple, scorer: _Same | None
) -> Callable:
    """The method under `mx.compile`: one graph per budget, grid and options.

    Extras and the scorer's parameters are inputs, so that it chooses by those of today.
    """

    def arrays(tokens, extras, parameters):
        grid, pictures = shape
        features = Features(tokens, grid, pictures, extras)
        if scorer is not None:
            with _parameters(scorer.module, parameters):
                features = _scored(features, scorer.module, keep)
        chosen = method.function(features, keep=keep, **dict(options))
        return _checked(chosen).arrays()

    return mx.compile(arrays)

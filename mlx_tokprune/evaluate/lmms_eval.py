"""A model of lmms-eval, the harness: what its arguments mean, and what answers.

lmms-eval finds `manifest` by the entry-point group `lmms_eval.models`. Its own classes
are only met in `lmms_eval_model`, so that everything here works without it.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
from PIL import Image

from ..attach.mlx_vlm import attach, load_mlx_vlm
from ..checkpoints.loading import load
from ..cli import RUNTIMES
from ..errors import InputError
from ..generate.memory import Memory
from ..generate.stream import check_answers, decoded, stream_generate
from ..pipeline import DEFAULT_POSITIONS, ask, check_positions, run
from ..pipeline.planning import plan_for
from ..pruners import (
    DEFAULT_METHOD,
    Plan,
    Pruner,
    as_plan,
    get_method,
    read_place,
    read_plan,
)
from ..pruners.registry import Options

NAME = "mlx_tokprune"
_LONGEST = 1024  # tokens of an answer where the task does not say, as LLaVA there
# What would change answers and cannot be done, with the values that mean nothing.
_UNKNOWN = {"num_beams": (None, 0, 1), "repetition_penalty": (None, 0, 1)}


def manifest():
    """What lmms-eval knows of the model before it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    path = f"{__package__}.lmms_eval_model.MlxTokprune"
    return ModelManifest(NAME, simple_class_path=path)


# How an answer is wanted ------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """A task's `generation_kwargs`. stops: texts that end an answer."""

    max_tokens: int = _LONGEST
    temp: float = 0.0
    top_p: float = 0.0
    stops: tuple[str, ...] = ()

    @property
    def settings(self) -> dict:
        """As `Settings` takes them."""
        names = ("max_tokens", "temp", "top_p")
        return {name: getattr(self, name) for name in names}


def read_wanted(told: Mapping) -> Wanted:
    """What a task asks for; greedy where it does not say.

    Raises `InputError` for what would change answers and is not known here.
    """
    for name, harmless in _UNKNOWN.items():
        if told.get(name) not in harmless:
            raise InputError(
                f"the task wants {name} {told[name]!r}, which is not known here; "
                f"override it by --gen_kwargs {name}=1"
            )
    greedy = told.get("do_sample") is False or told.get("top_k") == 1
    temp = 0.0 if greedy else told.get("temperature") or 0.0
    if temp and (told.get("top_k") or 0) > 0:
        raise InputError(
            f"the task samples from the best {told['top_k']}, which is not known here; "
            "override it by --gen_kwargs top_k=0"
        )
    stops = told.get("until") or ()
    stops = (stops,) if isinstance(stops, str) else stops
    return Wanted(
        told.get("max_new_tokens") or _LONGEST,
        float(temp),
        float(told.get("top_p") or 0),
        tuple(filter(None, stops)),
    )


def until(pieces: Iterable[str], stops: Sequence[str]) -> str:
    """The text of an answer up to the first of `stops`, and no longer generated."""
    text = ""
    for piece in pieces:
        text += piece
        ends = [end for stop in stops if (end := text.find(stop)) >= 0]
        if ends:
            return text[: min(ends)]
    return text


def seed_of(seed: int, *question) -> int:
    """A seed of each question's own, so that samples do not depend on their order."""
    return zlib.crc32(repr((seed, *question)).encode())


# What prunes ------------------------------------------------------------------------


def read_pruners(
    method: str | None = None,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    at: int | str | None = None,
    prune: str | None = None,
    seed: int = 0,
    options: Options | None = None,
) -> Plan | None:
    """What prunes, by the model's arguments; `None` leaves it to the checkpoint.

    prune: a plan as text. options: of methods. Raises `InputError` for one that none of
    them takes.
    """
    budget = {"keep_ratio": keep_ratio, "keep_tokens": keep_tokens}
    told = {"method": method, **budget, "at": at}
    said, options = [k for k, v in told.items() if v is not None], options or {}
    if prune is not None and said:
        raise InputError(
            f"prune says method, budget and place; leave out {', '.join(said)}"
        )
    if prune is not None:
        plan = read_plan(str(prune), options, seed)
        _check_options(options, [pruner.method for pruner in plan])
        return plan
    if not said:
        _check_options(options, [])
        return None
    name = DEFAULT_METHOD if method is None else str(method)
    _check_options(options, [name])
    unsaid = keep_ratio is None and keep_tokens is None
    if unsaid and get_method(name).lacks_budget(options):
        raise InputError(
            f"method {name!r} needs a budget: give keep_ratio or keep_tokens"
        )
    place = read_place(at) if isinstance(at, str) else at
    return (Pruner(name, **budget, at=place, seed=seed, options=options),)


def _check_options(options: Options, methods: Sequence[str]) -> None:
    known = {name for method in methods for name in get_method(method).options}
    for name in options:
        if name not in known:
            takes = f"; it takes {', '.join(sorted(known))}, too" if known else ""
            raise InputError(
                f"the model has no argument {name!r}; expected some of "
                f"{', '.join(ARGUMENTS)}{takes}"
            )


# What answers -----------------------------------------------------------------------


class OwnRuntime:
    """A checkpoint that this package runs."""

    def __init__(
        self,
        name: str,
        plan: Plan | None,
        positions: str | None,
        adapter: str | None,
        memory: int,
    ):
        self.positions = positions or DEFAULT_POSITIONS
        self._memory = Memory(memory) if memory else None
        self.model, self.processor = load(name, adapter_path=adapter)
        check_answers(self.processor)
        self.plan = plan_for(self.model, plan)

    def answer(
        self, pictures: Sequence, text: str, wanted: Wanted, seed: int
    ) -> Iterator[str]:
        """The pieces of an answer."""
        pieces = stream_generate(
            *(self.model, self.processor, pictures, text),
            pruner=self.plan,
            memory=self._memory,
            positions=self.positions,
            seed=seed if wanted.temp else None,
            **wanted.settings,
        )
        return (piece.text for piece in pieces)

    def loss(
        self, pictures: Sequence, text: str, continuation: str
    ) -> tuple[float, bool]:
        """Mean of -log p of the tokens of `continuation`; whether they are greedy's."""
        images, tokenizer = decoded(pictures), self.processor.tokenizer
        ids = tokenizer.encode(continuation, add_special_tokens=False)
        if not ids:
            raise InputError("a continuation is empty; expected words to be judged")
        scene = ask(self.processor, images, text)
        after = mx.array([ids[:-1]], mx.int32)
        read, _ = run(
            self.model, scene, self.plan, positions=self.positions, after=after
        )
        logits = self.model.decoder.logits(read.hidden)[0].astype(mx.float32)
        wanted = mx.array(ids)[:, None]
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        loss = -mx.take_along_axis(logs, wanted, axis=-1).mean()
        greedy = mx.all(mx.argmax(logits, axis=-1) == wanted[:, 0])
        return loss.item(), greedy.item()


class MlxVlmRuntime:
    """A checkpoint that mlx-vlm runs, with a pruner attached."""

    def __init__(
        self,
        name: str,
        plan: Plan | None,
        positions: str | None,
        adapter: str | None,
        memory: int,
    ):
        if memory:
            raise InputError("mlx-vlm's runtime takes no memory; leave it out")
        pruners = as_plan(plan)
        if len(pruners) > 1:
            raise InputError(
                "in mlx-vlm pruning is at one place, the prompt; give a single method"
            )
        self.model, self.processor = load_mlx_vlm(name, adapter)
        if pruners:
            attach(self.model, self.processor, pruners[0], positions)

    def answer(
        self, pictures: Sequence, text: str, wanted: Wanted, seed: int
    ) -> Iterator[str]:
        """The pieces of an answer; pictures come before the text."""
        from mlx_vlm import stream_generate
        from mlx_vlm.prompt_utils import apply_chat_template

        images: list[Image.Image] = decoded(pictures)
        # Tasks mark pictures as LLaVA does; mlx-vlm has the marks of each family.
        asked = text.replace("<image>", "").strip()
        asked = apply_chat_template(
            self.processor, self.model.config, asked, num_images=len(images)
        )
        mx.random.seed(seed)
        # What is not said would come from the checkpoint's generation_config.json.
        for piece in stream_generate(
            *(self.model, self.processor, asked),
            image=images,
            max_tokens=wanted.max_tokens,
            temperature=wanted.temp,
            top_p=wanted.top_p or 1.0,
            top_k=0,
        ):
            yield piece.text

    def loss(self, *_) -> tuple[float, bool]:
        raise InputError(
            "tasks of log-likelihoods are not known in mlx-vlm; use runtime=own, or a "
            "task that generates"
        )


Runtime = OwnRuntime | MlxVlmRuntime
_PRUNING = ("method", "keep_ratio", "keep_tokens", "at", "prune", "seed")
ARGUMENTS = ("pretrained", *_PRUNING, "positions", "adapter", "runtime", "memory")


def open_runtime(
    pretrained: str = "demo",
    runtime: str = RUNTIMES[0],
    positions: str | None = None,
    adapter: str | None = None,
    memory: int = 0,
    **told,
) -> Runtime:
    """What the arguments of the model name, loaded.

    memory: pictures that are remembered for their next question. told: what prunes, as
    `read_pruners` takes it, and options of methods.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"runtime is {' or '.join(RUNTIMES)}, not {runtime!r}")
    pruning = {name: told.pop(name) for name in _PRUNING if name in told}
    plan = read_pruners(**pruning, options=told)
    check_positions(positions or DEFAULT_POSITIONS)
    kind = OwnRuntime if runtime == "own" else MlxVlmRuntime
    # A folder or hub id of digits comes as a number.
    return kind(str(pretrained), plan, positions, adapter, memory)

"""Model arguments and runtimes for the harness lmms-eval.

lmms-eval loads `manifest` from the entry-point group `lmms_eval.models`. Only
`lmms_eval_model` imports classes of lmms-eval, so that this module works without it.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..attach.mlx_vlm import attach, load_mlx_vlm
from ..checkpoints.loading import load
from ..cli import RUNTIMES
from ..errors import InputError
from ..generate.memory import Memory
from ..generate.settings import Settings
from ..generate.stream import decoded, stream_generate
from ..pipeline import DEFAULT_POSITIONS, ask, check_positions, run
from ..pipeline.planning import plan_for
from ..processing.processor import check_answers
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

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

NAME = "mlx_tokprune"
_USED = ("max_tokens", "temp", "top_p")  # settings that tasks choose
_LONGEST = 1024  # default tokens of an answer, as of LLaVA in lmms-eval
# Unsupported options that would change answers, with their values of no effect.
_UNSUPPORTED = {"num_beams": (None, 0, 1), "repetition_penalty": (None, 0, 1)}


def manifest() -> "ModelManifest":
    """Return the entry of the model in the registry of lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    path = f"{__package__}.lmms_eval_model.MlxTokprune"
    return ModelManifest(NAME, simple_class_path=path)


# Generation options -----------------------------------------------------------------


def read_generation_options(kwargs: Mapping[str, Any]) -> Settings:
    """Return the settings of a task's `generation_kwargs`; greedy by default.

    Raises `InputError` for unsupported options that would change answers.
    """
    for name, harmless in _UNSUPPORTED.items():
        if kwargs.get(name) not in harmless:
            raise InputError(
                f"the task wants {name} {kwargs[name]!r}, which is not supported; "
                f"override it by --gen_kwargs {name}=1"
            )
    greedy = kwargs.get("do_sample") is False or kwargs.get("top_k") == 1
    temp = 0.0 if greedy else kwargs.get("temperature") or 0.0
    if temp and (kwargs.get("top_k") or 0) > 0:
        raise InputError(
            f"the task samples from the best {kwargs['top_k']}, which is not "
            "supported; override it by --gen_kwargs top_k=0"
        )
    stops = kwargs.get("until") or ()
    stops = (stops,) if isinstance(stops, str) else stops
    return Settings(
        max_tokens=kwargs.get("max_new_tokens") or _LONGEST,
        temp=float(temp),
        top_p=float(kwargs.get("top_p") or 0),
        stop=tuple(filter(None, stops)),
    )


def until(pieces: Iterable[str], stops: Sequence[str]) -> str:
    """Return an answer up to the first of `stops`; generation ends there, too."""
    text = ""
    for piece in pieces:
        text += piece
        ends = [end for stop in stops if (end := text.find(stop)) >= 0]
        if ends:
            return text[: min(ends)]
    return text


def seed_of(seed: int, *question: Any) -> int:
    """Return a seed for each question, so that samples do not depend on the order."""
    return zlib.crc32(repr((seed, *question)).encode())


# Pruners ----------------------------------------------------------------------------


def read_pruners(
    method: str | None = None,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    at: int | str | None = None,
    prune: str | None = None,
    seed: int = 0,
    options: Options | None = None,
) -> Plan | None:
    """Return the plan of the model's arguments; `None` is the checkpoint's plan.

    prune: a plan as text. options: of methods. Raises `InputError` for an option that
    none of the methods takes, and for arguments that exclude each other.
    """
    budget = {"keep_ratio": keep_ratio, "keep_tokens": keep_tokens}
    values = {"method": method, **budget, "at": at}
    names, options = [k for k, v in values.items() if v is not None], options or {}
    if prune is not None and names:
        raise InputError(
            f"prune has method, budget and place; leave out {', '.join(names)}"
        )
    plan = None if prune is None else read_plan(str(prune), options, seed)
    name = DEFAULT_METHOD if method is None else str(method)
    _check_options(options, [name] if names else [p.method for p in plan or ()])
    if not names:
        return plan
    unset = keep_ratio is None and keep_tokens is None
    if unset and get_method(name).lacks_budget(options):
        raise InputError(
            f"method {name!r} needs a budget: give keep_ratio or keep_tokens"
        )
    place: dict[str, Any] = {"at": read_place(at) if isinstance(at, str) else at}
    place = {} if at is None else place
    return (Pruner(name, **budget, seed=seed, options=options, **place),)


def _check_options(options: Options, methods: Sequence[str]) -> None:
    names = {name for method in methods for name in get_method(method).options}
    for option in options:
        if option not in names:
            takes = f"; it takes {', '.join(sorted(names))}, too" if names else ""
            raise InputError(
                f"the model has no argument {option!r}; expected one of "
                f"{', '.join(ARGUMENTS)}{takes}"
            )


# Runtimes ---------------------------------------------------------------------------


class OwnRuntime:
    """Checkpoint in our runtime.

    plan: `None` is the checkpoint's own. memory: pictures whose features are kept.
    """

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
        self.model, processor = load(name, adapter_path=adapter)
        self.processor = check_answers(processor)
        self.plan = plan_for(self.model, plan)

    def answer(
        self, pictures: Sequence, text: str, options: Settings, seed: int
    ) -> Iterator[str]:
        """Yield the pieces of an answer."""
        pieces = stream_generate(
            *(self.model, self.processor, pictures, text),
            pruner=self.plan,
            memory=self._memory,
            positions=self.positions,
            seed=seed if options.temp else None,
            **{name: getattr(options, name) for name in _USED},
        )
        return (piece.text for piece in pieces)

    def loss(
        self, pictures: Sequence, text: str, continuation: str
    ) -> tuple[float, bool]:
        """Return the mean of -log p of the continuation's tokens, in nats.

        Also return whether greedy generation gives the same tokens. Raises
        `InputError` for an empty continuation.
        """
        images, tokenizer = decoded(pictures), self.processor.tokenizer
        ids = tokenizer.encode(continuation, add_special_tokens=False)
        if not ids:
            raise InputError("a continuation is empty; expected words to judge")
        scene = ask(self.processor, images, text)
        after = mx.array([ids[:-1]], mx.int32)
        read, _ = run(
            self.model, scene, self.plan, positions=self.positions, after=after
        )
        logits = self.model.decoder.logits(read.hidden)[0].astype(mx.float32)
        targets = mx.array(ids)
        loss = nn.losses.cross_entropy(logits, targets, reduction="mean")
        greedy = mx.all(mx.argmax(logits, axis=-1) == targets)
        return cast(float, loss.item()), bool(greedy.item())


class MlxVlmRuntime:
    """Checkpoint in mlx-vlm's runtime, with a pruner attached.

    Raises `InputError` for a plan of several places, and for memory.
    """

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
        self, pictures: Sequence, text: str, options: Settings, seed: int
    ) -> Iterator[str]:
        """Yield the pieces of an answer; pictures come before the text."""
        from mlx_vlm.generate import stream_generate
        from mlx_vlm.prompt_utils import apply_chat_template

        images: Any = decoded(pictures)  # mlx-vlm's types lack pictures
        # Tasks mark pictures as LLaVA does; mlx-vlm adds the marks of each family.
        prompt = text.replace("<image>", "").strip()
        prompt: Any = apply_chat_template(
            self.processor, self.model.config, prompt, num_images=len(images)
        )
        mx.random.seed(seed)
        # mlx-vlm reads missing options from the checkpoint's generation_config.json.
        for piece in stream_generate(
            *(self.model, self.processor, prompt),
            image=images,
            max_tokens=options.max_tokens,
            temperature=options.temp,
            top_p=options.top_p or 1.0,
            top_k=0,
        ):
            yield piece.text

    def loss(self, *_: Any) -> tuple[float, bool]:
        """Raise `InputError`: mlx-vlm's runtime only generates."""
        raise InputError(
            "tasks of log-likelihoods are not supported in mlx-vlm; use runtime=own, "
            "or a task that generates"
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
    **arguments: Any,
) -> Runtime:
    """Load the checkpoint of lmms-eval's `--model_args`.

    memory: number of pictures whose features are kept for the next question. arguments:
    those of `read_pruners`, and options of methods. Raises `InputError` for an unknown
    runtime, position or argument.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"runtime is {' or '.join(RUNTIMES)}, not {runtime!r}")
    pruning = {name: arguments.pop(name) for name in _PRUNING if name in arguments}
    plan = read_pruners(**pruning, options=arguments)
    check_positions(positions or DEFAULT_POSITIONS)
    kind = OwnRuntime if runtime == "own" else MlxVlmRuntime
    # lmms-eval passes a folder or hub id of digits as a number.
    return kind(str(pretrained), plan, positions, adapter, memory)

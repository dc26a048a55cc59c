"""What is benchmarked: a model that answers or one that acts, behind one face."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .. import control
from ..act import predict_action
from ..answering import stream_generate
from ..errors import InputError
from ..features import StageTimes
from ..models.openvla import OpenVLA
from ..pipeline import Prefill, assemble, first_logits, measure_stages, see
from ..pruners import Pruner
from .graph import Cost, count

LOWER_SIZES = (256, 512, 768)  # rows without pruning, to compare with


@dataclass(frozen=True)
class Asked:
    """A picture and a prompt, and what is done to the visual tokens."""

    images: Sequence
    prompt: str
    pruner: Pruner
    positions: str


@dataclass(frozen=True)
class Counted:
    """The cost of each stage up to the first token; tokens before and after pruning."""

    costs: dict[str, Cost]
    total: int
    kept: int


@dataclass(frozen=True)
class Answering:
    """A FastVLM under the name it has in the table."""

    name: str
    model: object
    processor: object
    method_stages = ("vision",)

    @property
    def image_size(self) -> int:
        return self.processor.image_size

    @property
    def lower_sizes(self) -> tuple[int, ...]:
        """Input sizes to compare pruning with."""
        return tuple(size for size in LOWER_SIZES if size < self.image_size)

    def at(self, size: int, padding: str | None = None) -> "Answering":
        """The same with pictures of another size, or other padding."""
        return dataclasses.replace(self, processor=self.processor.at(size, padding))

    def run(self, asked: Asked, tokens: int) -> dict[str, float | None]:
        """Unfenced times of an answer of at most `tokens`."""
        start = time.perf_counter()
        *_, last = stream_generate(
            *(self.model, self.processor, asked.images, asked.prompt),
            pruner=asked.pruner,
            positions=asked.positions,
            max_tokens=tokens,
        )
        return {
            "ttft_ms": last.ttft_ms,
            "total_ms": (time.perf_counter() - start) * 1e3,
            "decode_tokens_per_second": last.decode_tokens_per_second or None,
        }

    def stages(self, asked: Asked) -> StageTimes:
        """Fenced."""
        return measure_stages(
            *(self.model, self.processor, asked.images, asked.prompt),
            *(asked.pruner, asked.positions),
        )

    def count(self, asked: Asked) -> Counted:
        model, pruner = self.model, asked.pruner
        pixels = mx.array(self.processor.pixels(asked.images))
        prompt = self.processor.prompt(asked.prompt, len(asked.images))
        visual = see(model, pixels, pruner)
        prefill = assemble(model, prompt, visual, "contiguous")
        kept = visual.selection.keep
        channels = model.encode(pixels).tokens.shape[-1]
        tokens = mx.zeros((len(asked.images), kept, channels))

        def first(embeddings):
            return first_logits(model, Prefill(embeddings, None, 0))

        costs = {
            "vision": count(lambda p: model.encode(p, pruner.needs).tokens, pixels),
            "project": count(model.project, tokens),
            "prefill": count(first, mx.zeros(prefill.embeddings.shape)),
        }
        return Counted(costs, visual.total, kept)


@dataclass(frozen=True)
class Acting:
    """An OpenVLA. An OFT policy sees the picture as often as it wants pictures."""

    name: str
    model: OpenVLA
    processor: object
    method_stages = ("vision", "prompt")
    lower_sizes = ()

    @property
    def image_size(self) -> int:
        return self.processor.image_size

    def at(self, size: int, padding: str | None = None) -> "Acting":
        if padding == "skip":
            raise InputError(f"{self.name} stretches pictures, so there is no padding")
        if size != self.image_size:
            raise InputError(
                f"{self.name} sees pictures of {self.image_size} px only, not {size}"
            )
        return self

    def run(self, asked: Asked, tokens: int) -> dict[str, float | None]:
        """Unfenced times of one action; `tokens` does not matter."""
        action = predict_action(
            *(self.model, self.processor, self._images(asked), asked.prompt),
            unnorm_key=self._key,
            proprio=self._state,
            pruner=asked.pruner,
            positions=asked.positions,
        )
        more = len(action.token_ids or "") - 1
        seconds = (action.total_ms - action.ttft_ms) / 1e3
        return {
            "ttft_ms": action.ttft_ms,
            "total_ms": action.total_ms,
            "decode_tokens_per_second": more / seconds if more > 0 else None,
        }

    def stages(self, asked: Asked) -> StageTimes:
        state = self._normalized
        steps = len(self.processor.bounds("action", self._key).low)
        return control.measure_stages(
            *(self.model, self.processor, self._images(asked), asked.prompt),
            *(asked.pruner, asked.positions, state, steps),
        )

    def count(self, asked: Asked) -> Counted:
        model, pruner, images = self.model, asked.pruner, self._images(asked)
        observation = control.observe(
            self.processor, images, asked.prompt, self._normalized
        )
        features = control.encode(model, observation, pruner.needs)
        patches = control.see(model, observation, pruner, features)
        sequence = control.assemble(model, observation, patches, asked.positions)
        kept, oft = patches.indices.shape[1], model.args.oft
        projected = patches.total if pruner.stage == "prompt" else kept
        tokens = mx.zeros((1, projected, features.tokens.shape[-1]))

        def first(embeddings):
            mask = None if oft else "causal"
            hidden = model.hidden_states(embeddings, mask, None)
            return hidden if oft else model.logits(hidden[:, -1:])

        def encode(pixels):
            seen = dataclasses.replace(observation, pixels=pixels)
            return control.encode(model, seen, pruner.needs).tokens

        costs = {
            "vision": count(encode, observation.pixels),
            "project": count(model.project, tokens),
            "prefill": count(first, mx.zeros(sequence.embeddings.shape)),
        }
        return Counted(costs, patches.total, kept)

    def _images(self, asked: Asked) -> list:
        return [asked.images[0]] * self.model.args.pictures

    @property
    def _key(self) -> str | None:
        return next(iter(self.processor.norm_stats), None)

    @property
    def _state(self) -> np.ndarray | None:
        """The middle of what the robot's state can be, where it is read."""
        oft = self.model.args.oft
        if not (oft and oft.proprio_dim):
            return None
        bounds = self.processor.bounds("proprio", self._key)
        return (bounds.low + bounds.high) / 2

    @property
    def _normalized(self) -> mx.array | None:
        return None if self._state is None else mx.zeros((1, len(self._state)))


def subject_of(name: str, model, processor) -> Answering | Acting:
    """A loaded model as a subject."""
    kind = Acting if isinstance(model, OpenVLA) else Answering
    return kind(name, model, processor)

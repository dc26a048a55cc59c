"""Models in mlx-vlm's runtime, for bench and evaluate: answers, times and FLOPs."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
from PIL import Image

from ..attach.mlx_vlm import Handle, attach, load_mlx_vlm
from ..errors import InputError
from ..pruners import Pruner, get_method, list_pruners
from ..pruners.registry import Options
from .cost import Cost, count
from .results import Row, make_rows

SMALLER = "max_pixels"  # label of rows with smaller images instead of pruning


@dataclass(frozen=True)
class Reply:
    """An answer of mlx-vlm with its times and token counts.

    ids: token ids. logs: (V,) log probabilities at each token. ttft_ms, total_ms: time
    to the first and to the last token. prompt: tokens of the prompt. total: visual
    tokens of the whole image. kept: visual tokens that the language model read.
    peak_memory_mb: peak memory of MLX arrays, weights included. places: kept tokens of
    each image, counted from its first token; `None` without pruning.
    """

    ids: list[int]
    logs: list[mx.array] = field(repr=False)
    ttft_ms: float
    total_ms: float
    prompt: int
    total: int
    kept: int
    peak_memory_mb: float
    places: list[list[int]] | None = None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens per second after the first; `None` for an answer of one token."""
        seconds = (self.total_ms - self.ttft_ms) / 1e3
        return (len(self.ids) - 1) / seconds if len(self.ids) > 1 else None


class MlxVlmSubject:
    """A checkpoint loaded by mlx-vlm, unchanged between rows.

    name: folder or hub id. positions: `original`, `contiguous` or `None` for the
    default of its family. Raises `InputError` for an unsupported model.
    """

    kind = "answering"

    def __init__(self, name: str, positions: str | None = None):
        self.name, self.positions = name, positions
        self.model, self.processor = load_mlx_vlm(name)
        # Token totals and costs by input shape: rows and repetitions share them.
        self._cache: dict = {}
        # A trial: it raises for unsupported models and describes supported ones.
        self._handle = cast(
            Handle,
            attach(*(self.model, self.processor, Pruner("norm", 0.5), positions)),
        )
        self._handle.detach()

    @property
    def kind_of_positions(self) -> str:
        """Positions of kept tokens: "original" or "contiguous"."""
        return self._handle.positions

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the processor, which can be the processor itself."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def stops(self) -> set[int]:
        """Token ids that end an answer."""
        return set(self.tokenizer.stopping_criteria.eos_token_ids)

    @property
    def resizes(self) -> bool:
        """Support of `max_pixels`, by which smaller images have fewer tokens."""
        kind = type(getattr(self.processor, "image_processor", None))
        return "qwen" in kind.__module__.lower()

    def rows(
        self,
        methods: Sequence[str],
        ratios: Sequence[float],
        options: Mapping[str, Options],
    ) -> list[Row]:
        """Return rows: the unpruned model, methods at every ratio, smaller images.

        options: options of each method. Raises `InputError` for a method that does not
        fit the model.
        """
        rows = make_rows(methods, ratios, options=options)
        for ratio in ratios if self.resizes else ():
            if ratio < 1:
                rows.append(Row(f"{SMALLER} {ratio:g}", (Pruner("none"),), ratio))
        for row in rows:
            with self._pruned(row):
                pass
        return rows

    def default_methods(self) -> list[str]:
        """Return the methods with a budget that can prune after a projector."""
        provided = set(self._handle.provides)
        return [
            name
            for name in list_pruners()
            if name != "none"
            and get_method(name).place != "layer"
            and get_method(name).counts != "own"
            and set(get_method(name).needs) <= provided
        ]

    @contextlib.contextmanager
    def _pruned(self, row: Row) -> Iterator[Handle]:
        (pruner,) = row.pruners
        attached = attach(self.model, self.processor, pruner, self.positions)
        handle = cast(Handle, attached)  # the subject is a model of mlx-vlm
        try:
            yield handle
        finally:
            handle.detach()

    def ask(
        self,
        row: Row,
        image: Image.Image,
        question: str,
        most: int,
        forced: Sequence[int] | None = None,
    ) -> Reply:
        """Return a greedy answer of at most `most` tokens.

        forced: token ids to decode instead; the reply has the model's probabilities at
        each. TTFT begins with the decoded image and the question.
        """
        from mlx_vlm.generate import stream_generate

        text = self._templated(question)
        sizes = self._sizes(row, image, text)
        options: dict[str, Any] = {"max_tokens": most, "temperature": 0.0, **sizes}
        options["image"] = [image]  # its types lack pictures
        if forced is not None:
            options |= {"sampler": _forced_sampler(forced), "max_tokens": len(forced)}
        ids, logs, first, prompt = [], [], None, 0
        with self._pruned(row) as handle:
            mx.reset_peak_memory()
            start = time.perf_counter()
            for piece in stream_generate(self.model, self.processor, text, **options):
                first = first or time.perf_counter()
                prompt, token = piece.prompt_tokens, piece.token
                # The last piece repeats the last token to report the reason of its end.
                if piece.logprobs is None or token is None:
                    continue
                if len(logs) < piece.generation_tokens:
                    ids.append(int(token))
                    logs.append(piece.logprobs)
            end, peak = time.perf_counter(), mx.get_peak_memory() / 1e6
            last = handle.last
        total = self._total(image, text, sizes)
        kept = last[0].keep if last else total
        first = end if first is None else first
        return Reply(
            *(ids, logs, (first - start) * 1e3, (end - start) * 1e3),
            *(prompt, total, kept, peak),
            last[0].places if last else None,
        )

    def check(self, image: Image.Image, rows: Sequence[Row]) -> None:
        """Raise `InputError` for an image that mlx-vlm's processor does not accept."""
        text = self._templated("What is this?")
        try:
            for share in dict.fromkeys(row.share for row in rows):
                row = Row("", (Pruner("none"),), share)
                self._inputs(image, text, self._sizes(row, image, text))
        except Exception as error:  # whatever mlx-vlm runs into
            reason = " ".join(str(error).split()) or type(error).__name__
            width, height = image.size
            raise InputError(
                f"mlx-vlm does not take a picture of {width} x {height} pixels "
                f"({reason})"
            ) from None

    def _templated(self, question: str) -> str:
        """Return the question about an image in the model's chat template."""
        from mlx_vlm.prompt_utils import apply_chat_template

        text = apply_chat_template(
            self.processor, self.model.config, question, num_images=1
        )
        return cast(str, text)  # a list with `return_messages` alone

    def _sizes(self, row: Row, image: Image.Image, text: str) -> dict:
        """Return `max_pixels` for a row that shrinks the image to a share of tokens."""
        if row.share is None:
            return {}
        (height, width), *_ = self.grids(image, text)
        cell = self.model.config.vision_config
        side = cell.patch_size * cell.spatial_merge_size
        return {"max_pixels": max(1, int(row.share * height * width)) * side * side}

    def _inputs(self, image: Image.Image, text: str, sizes: dict) -> dict:
        from mlx_vlm.utils import prepare_inputs

        return dict(
            prepare_inputs(self.processor, images=[image], prompts=text, **sizes)
        )

    def _total(self, image: Image.Image, text: str, sizes: dict) -> int:
        key = ("total", image.size, text, *sizes.values())
        if key not in self._cache:
            inputs = self._inputs(image, text, sizes)
            self._cache[key] = self._handle.total(inputs)
        return self._cache[key]

    def grids(self, image: Image.Image, text: str) -> list[tuple[int, int]]:
        """Return the token grid (h, w) of each image; empty without grids."""
        if self._handle.grids is None:
            return []
        return self._handle.grids(self._inputs(image, text, {}), self.model.config)

    def cost(
        self, row: Row, image: Image.Image, question: str, kept: int
    ) -> dict[str, Cost] | None:
        """Return the costs of "vision" (tower and projector) and of "prefill".

        `None` where mlx-vlm's code reads values, which MLX cannot trace.
        """
        text = self._templated(question)
        sizes = self._sizes(row, image, text)
        key = ("cost", image.size, text, kept, *sizes.values())
        if key not in self._cache:
            try:
                self._cache[key] = self._cost(self._inputs(image, text, sizes), kept)
            except ValueError:
                self._cache[key] = None
        return self._cache[key]

    def _cost(self, inputs: dict, kept: int) -> dict[str, Cost]:
        from mlx_vlm.models.cache import make_prompt_cache

        total = self._handle.total(inputs)
        names = ("input_ids", "pixel_values", "attention_mask")
        ids, pixels, mask = (inputs.pop(name) for name in names)
        embed, language = self.model.get_input_embeddings, self.model.language_model

        def encode(pixels: mx.array) -> list[mx.array]:
            return [embed(ids, pixels, mask=mask, **inputs).inputs_embeds]

        cache = make_prompt_cache(language)
        embedded = embed(ids, pixels, mask=mask, **inputs)
        extras = {k: v for k, v in embedded.to_dict().items() if v is not None}
        embeddings = extras.pop("inputs_embeds")
        length = embeddings.shape[1] - (total - kept)
        names = ("position_ids", "rope_deltas")
        extras = {k: v for k, v in extras.items() if k in names}
        if "position_ids" in extras:
            extras["position_ids"] = extras["position_ids"][..., :length]

        def read(embeddings: mx.array) -> list[mx.array]:
            blank = mx.zeros(embeddings.shape[:2], mx.int32)
            options = {"inputs_embeds": embeddings, "cache": cache, "logits_to_keep": 1}
            return [language(blank, **options, **extras).logits[:, -1]]

        # Costs depend on shapes only: any `length` tokens stand for the kept ones.
        return {
            "vision": count(encode, pixels),
            "prefill": count(read, embeddings[:, :length]),
        }


def _forced_sampler(ids: Sequence[int]) -> Callable[[mx.array], mx.array]:
    """Return a sampler of the given ids in order, then of the last one."""
    forced = itertools.chain(ids, itertools.repeat(ids[-1]))
    return lambda logs: mx.array([next(forced)], mx.uint32)


def check_mlx_vlm(**options: object) -> None:
    """Raise `InputError` for options that only this package's own runtime has."""
    for name, value in options.items():
        if value:
            raise InputError(
                f"--{name.replace('_', '-')} is for this package's own runtime; leave "
                "it out with --runtime mlx-vlm"
            )

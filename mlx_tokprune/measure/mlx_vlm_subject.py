"""A model in mlx-vlm's runtime, for bench and evaluate: answers, times and FLOPs."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
from PIL import Image

from ..attach.mlx_vlm import Handle, attach, load_mlx_vlm
from ..errors import InputError
from ..pruners import Pruner, get_method, list_pruners
from ..pruners.registry import Options
from .cost import Cost, count
from .results import Row, make_rows

SMALLER = "max_pixels"  # rows of whole pictures with as few tokens


@dataclass(frozen=True)
class Reply:
    """An answer: token ids, the logarithms of their probabilities (V,) one by one, and
    what it took. prompt, total, kept: tokens of the prompt, visual ones of the whole
    picture, and those that the language model read. peak_memory_mb: of MLX's arrays,
    weights included.
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
        seconds = (self.total_ms - self.ttft_ms) / 1e3
        return (len(self.ids) - 1) / seconds if len(self.ids) > 1 else None


class MlxVlmSubject:
    """A checkpoint loaded by mlx-vlm, unchanged between rows."""

    kind = "answering"

    def __init__(self, name: str, positions: str | None = None):
        self.name, self.positions = name, positions
        self.model, self.processor = load_mlx_vlm(name)
        self._counted: dict = {}
        self._known = attach(self.model, self.processor, Pruner("norm", 0.5), positions)
        self._known.detach()  # it refuses what is not known

    @property
    def kind_of_positions(self) -> str:
        """As they are: original or contiguous."""
        return self._known.positions

    @property
    def stops(self) -> set[int]:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return set(tokenizer.stopping_criteria.eos_token_ids)

    @property
    def resizes(self) -> bool:
        """Whether pictures of fewer pixels have fewer tokens, by `max_pixels`."""
        kind = type(getattr(self.processor, "image_processor", None))
        return "qwen" in kind.__module__.lower()

    def decode(self, ids: Sequence[int]) -> str:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return tokenizer.decode([i for i in ids if i not in self.stops])

    def rows(
        self,
        methods: Sequence[str],
        ratios: Sequence[float],
        options: Mapping[str, Options],
    ) -> list[Row]:
        """Return the unpruned model, methods at every ratio, and smaller images.

        Raises `InputError` for a method that cannot choose in this model.
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
        """Methods that can choose after a projector and take a budget."""
        provided = set(self._known.provides)
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
        handle = attach(self.model, self.processor, pruner, self.positions)
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
        """A greedy answer of at most `most` tokens, or the probabilities of `forced`.

        TTFT begins with the decoded picture and the question.
        """
        from mlx_vlm import stream_generate

        text = self._told(question)
        whole = self._sizes(row, image, text)
        how = {"max_tokens": most, "temperature": 0.0, **whole}
        if forced is not None:
            how |= {"sampler": _Forcing(forced), "max_tokens": len(forced)}
        ids, logs, first = [], [], None
        with self._pruned(row) as handle:
            mx.reset_peak_memory()
            start = time.perf_counter()
            for piece in stream_generate(
                self.model, self.processor, text, image=[image], **how
            ):
                first = first or time.perf_counter()
                if piece.logprobs is not None and len(logs) < piece.generation_tokens:
                    ids.append(int(piece.token))
                    logs.append(piece.logprobs)
            end, peak = time.perf_counter(), mx.get_peak_memory() / 1e6
            last = handle.last
        total = self._total(image, text, whole)
        kept = last[0].keep if last else total
        first = end if first is None else first
        return Reply(
            *(ids, logs, (first - start) * 1e3, (end - start) * 1e3),
            *(piece.prompt_tokens, total, kept, peak),
            last[0].places if last else None,
        )

    def check(self, image: Image.Image, rows: Sequence[Row]) -> None:
        """Raise `InputError` for a picture that mlx-vlm's processor does not take."""
        text = self._told("What is this?")
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

    def _told(self, question: str) -> str:
        """The question about a picture in the model's chat template."""
        from mlx_vlm.prompt_utils import apply_chat_template

        return apply_chat_template(
            self.processor, self.model.config, question, num_images=1
        )

    def _sizes(self, row: Row, image: Image.Image, text: str) -> dict:
        """`max_pixels` of a picture that is to have a share of its tokens."""
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
        if key not in self._counted:
            inputs = self._inputs(image, text, sizes)
            self._counted[key] = self._known.total(inputs)
        return self._counted[key]

    def grids(self, image: Image.Image, text: str) -> list[tuple[int, int]]:
        """(h, w) of the tokens of each picture, where they are grids."""
        if self._known.grids is None:
            return []
        return self._known.grids(self._inputs(image, text, {}), self.model.config)

    def cost(
        self, row: Row, image: Image.Image, question: str, kept: int
    ) -> dict[str, Cost] | None:
        """Of the tower with its projector, and of reading the prompt.

        `None` where mlx-vlm's code looks at values on its way, which no graph shows.
        """
        text = self._told(question)
        sizes = self._sizes(row, image, text)
        key = ("cost", image.size, text, kept, *sizes.values())
        if key not in self._counted:
            try:
                self._counted[key] = self._cost(self._inputs(image, text, sizes), kept)
            except ValueError:
                self._counted[key] = None
        return self._counted[key]

    def _cost(self, inputs: dict, kept: int) -> dict[str, Cost]:
        from mlx_vlm.models.cache import make_prompt_cache

        total = self._known.total(inputs)
        names = ("input_ids", "pixel_values", "attention_mask")
        ids, pixels, mask = (inputs.pop(name) for name in names)
        embed, language = self.model.get_input_embeddings, self.model.language_model

        def seen(pixels):
            return [embed(ids, pixels, mask=mask, **inputs).inputs_embeds]

        cache = make_prompt_cache(language)
        found = embed(ids, pixels, mask=mask, **inputs)
        more = {k: v for k, v in found.to_dict().items() if v is not None}
        embeddings = more.pop("inputs_embeds")
        shorter = embeddings.shape[1] - (total - kept)
        more = {k: v for k, v in more.items() if k in ("position_ids", "rope_deltas")}
        if "position_ids" in more:
            more["position_ids"] = more["position_ids"][..., :shorter]

        def read(embeddings):
            blank = mx.zeros(embeddings.shape[:2], mx.int32)
            how = {"inputs_embeds": embeddings, "cache": cache, "logits_to_keep": 1}
            return [language(blank, **how, **more).logits[:, -1]]

        return {
            "vision": count(seen, pixels),
            "prefill": count(read, embeddings[:, :shorter]),
        }


class _Forcing:
    """A sampler that gives these ids, whatever is likely."""

    def __init__(self, ids: Sequence[int]):
        self._ids, self._next = list(ids), 0

    def __call__(self, logs: mx.array) -> mx.array:
        number = min(self._next, len(self._ids) - 1)
        self._next += 1
        return mx.array([self._ids[number]], mx.uint32)


def check_mlx_vlm(**others) -> None:
    """Raise `InputError` for options that only this package's own runtime has."""
    for name, value in others.items():
        if value:
            raise InputError(
                f"--{name.replace('_', '-')} is for this package's own runtime; leave "
                "it out with --runtime mlx-vlm"
            )

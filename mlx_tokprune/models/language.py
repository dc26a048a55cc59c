"""Language model of every family: mlx-lm's, read layer by layer.

Weights, layers and cache are mlx-lm's. This module adds custom token positions (mlx-lm
numbers tokens by the cache offset, which would close the gaps between kept visual
tokens), a last layer that is computed for the last tokens only, and pruning of visual
tokens after any layer. Positions and lengths belong to the call and to each layer, so
one model serves several threads and interleaved answers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ..features import Features, Selection, place_marked
from .positions import LayerCache, PositionedRoPE, TokenPositions, follow_mask

PREFILL_STEP = 2048  # prompt tokens per chunk, as in mlx-lm


class LayerPruner(Protocol):
    """Pruner inside the language model, as `Decoder.read` calls it."""

    @property
    def at(self) -> Any:
        """Number of layers before the pruner (an int)."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the extras of `Features` that the pruner reads."""
        ...

    def __call__(self, features: Features) -> Selection:
        """Choose the visual tokens to keep."""
        ...


@dataclass(frozen=True)
class TokenSequence:
    """Input of the language model: T tokens of B samples.

    embeddings: (B, T, D). positions: (T,) or (B, T) int32; `None` numbers the tokens
    from 0. end: position of the next token, one number or one per sample. mask:
    "causal", "full", "prefix" (full, and causal for later tokens), or (B, T, T) bool,
    true where the row's token attends to the column's. visual: ranges of the visual
    tokens.
    """

    embeddings: mx.array
    positions: mx.array | None
    end: int | mx.array
    mask: mx.array | str = "causal"
    visual: tuple[slice, ...] = ()

    def extended(self, embeddings: mx.array) -> "TokenSequence":
        """Return the sequence with (B, L, D) causal tokens appended.

        Raises `ValueError` if tokens of the sequence attend to later tokens.
        """
        if not isinstance(self.mask, str) or self.mask == "full":
            raise ValueError("only a causal or prefix sequence can be extended")
        (batch, length), more = self.embeddings.shape[:2], embeddings.shape[1]
        positions, mask = self.positions, self.mask
        if mask == "prefix":
            mask = mx.tri(length + more, length + more, 0, mx.bool_)
            mask = mask | (mx.arange(length + more) < length)
            mask = mx.broadcast_to(mask, (batch, *mask.shape))
        if positions is None and isinstance(self.end, int) and self.end != length:
            positions = mx.arange(length)
        joined = [self.embeddings, embeddings.astype(self.embeddings.dtype)]
        if positions is not None:
            after = mx.array(self.end)[..., None] + mx.arange(more)
            after = mx.broadcast_to(after, (*positions.shape[:-1], more))
            after = after.astype(positions.dtype)
            positions = mx.concatenate([positions, after], axis=-1)
        return dataclasses.replace(
            self,
            embeddings=mx.concatenate(joined, axis=1),
            positions=positions,
            end=self.end + more,
            mask=mask,
        )


@dataclass(frozen=True)
class ReadResult:
    """Output of the language model for a sequence.

    hidden: (B, R, D) states of the last R tokens after the final norm. cache: one per
    layer, for mlx-lm or `Decoder.follow`; empty if `Decoder.read` had no cache.
    choices: for each pruner its layer, and the kept ones of the visual tokens that
    reached it. attended: (B, R, M) attention from those R tokens to the M visual tokens
    in layer `attention_of`, mean over heads.
    """

    hidden: mx.array
    cache: list["LayerCache"]
    choices: tuple[tuple[int, Selection], ...] = ()
    attended: mx.array | None = None


class Decoder:
    """Language model of one of mlx-lm's Llama-like families.

    A plain object, not a `nn.Module`: a model's parameters are those of its
    `language_model`. scale: factor of the text embeddings (Gemma).
    """

    # Per call: a `_State` holds hidden states, positions and mask until `read` returns.
    # Per layer: the caller's `LayerCache`s hold what later calls need: keys and values,
    # the shift from cache length to position, and the visible tokens. A pruner after
    # layer k gives the layers after it shorter caches, so one length is not enough.
    # Positions and cache lengths are never on the model: threads and interleaved
    # answers share it, and one call would rotate its keys by another call's positions.
    # mlx-lm's layers read the offset of the cache that they are passed, so
    # `LayerCache.offset` brings a call's positions to `PositionedRoPE`.

    def __init__(self, language_model: nn.Module, scale: float = 1.0):
        self._model: Any = language_model
        self._scale = scale
        for layer in self.layers:
            # Stateless: mlx-lm's own calls, with an integer offset, are unchanged.
            layer.self_attn.rope = PositionedRoPE(layer.self_attn.rope)

    @property
    def layers(self) -> list:
        """mlx-lm's transformer layers, in order."""
        return self._model.layers

    def embed(self, token_ids: mx.array) -> mx.array:
        """Return the embeddings (B, T, D) of token ids (B, T)."""
        model = self._model.model  # MLX unpacks modes without biases to bfloat16
        embedded = model.embed_tokens(token_ids).astype(model.norm.weight.dtype)
        return embedded if self._scale == 1 else embedded * self._scale

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the logits (B, T, V) of hidden states (B, T, D)."""
        if "lm_head" in self._model:
            return self._model.lm_head(hidden)
        return self._model.model.embed_tokens.as_linear(hidden)

    def make_cache(self) -> list:
        """Return an empty mlx-lm cache, one entry per layer."""
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self._model)

    def cache_of(
        self,
        layers: Sequence[tuple[mx.array, mx.array]],
        shifts: Sequence[int | mx.array],
    ) -> list[LayerCache]:
        """Return a filled cache.

        layers: keys and values (B, H, S, d) of each layer. shifts: of each layer, the
        next token's position less the length of its cache.
        """
        cache = self.make_cache()
        for layer, (keys, values) in zip(cache, layers, strict=True):
            layer.keys, layer.values, layer.offset = keys, values, keys.shape[2]
        return [LayerCache(*pair) for pair in zip(cache, shifts, strict=True)]

    def read(
        self,
        sequence: TokenSequence,
        cache: list | None = None,
        *,
        rows: int = 1,
        plan: Sequence[LayerPruner] = (),
        cached: int = 0,
        step: int = PREFILL_STEP,
        watch: Callable[[int, mx.array], None] | None = None,
        attention_of: int | None = None,
    ) -> ReadResult:
        """Read a sequence; lazy, except between the chunks of a long one.

        cache: mlx-lm's, which this call fills; `None` keeps nothing. rows: number of
        last tokens to return states for; the first of them is the prompt's last. plan:
        pruners with an integer `at`, in order; each drops visual tokens after that many
        layers. cached: number of tokens that are already in the cache. step: tokens per
        chunk. watch: called with the number of each layer and its input (B, T, D).
        attention_of: number of the layer whose attention is returned. watch and
        attention_of require cached=0 and a sequence of one chunk.

        Reads the weights once; mlx-lm reads them again for the prompt's last token.
        """
        state = _State(self, sequence, cache, rows, cached, step, watch, attention_of)
        choices = []
        for pruner in plan:
            state.advance(pruner.at, keeps_input=True)
            choices.append((pruner.at, state.drop(pruner)))
        hidden = state.finish()
        return ReadResult(hidden, state.followers(), tuple(choices), state.attended)

    def follow(
        self,
        token_ids: mx.array,
        cache: list[LayerCache],
        watch: Callable[[int, mx.array], None] | None = None,
    ) -> mx.array:
        """Return the states (B, L, D), after the norm, of the next tokens (B, L).

        cache: holds the tokens before; takes these, too. watch: called with the number
        of each layer and its input (B, L, D).
        """
        hidden = self.embed(token_ids)
        for number, (layer, part) in enumerate(zip(self.layers, cache, strict=True)):
            if watch:
                watch(number, hidden)
            hidden = layer(hidden, follow_mask(part, hidden.shape[1]), part)
        return self.norm(hidden)

    def norm(self, hidden: mx.array) -> mx.array:
        """Apply the final norm."""
        return self._model.model.norm(hidden)

    def attention_to(
        self,
        number: int,
        hidden: mx.array,
        rows: mx.array,
        positions: mx.array | None = None,
        mask: mx.array | str = "causal",
    ) -> mx.array:
        """Return the attention (B, R, T) from tokens `rows` (B, R) in layer `number`.

        hidden: (B, T, D), the layer's input. Mean over heads, float32. Computes these
        rows only, never T x T.
        """
        layer, (batch, length, _) = self.layers[number], hidden.shape
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        places = mx.arange(length) if positions is None else positions
        places = mx.broadcast_to(places, (batch, length))
        query_states = mx.take_along_axis(x, rows[..., None], axis=1)
        query_places = mx.take_along_axis(places, rows, axis=1)
        queries = _heads(attention.q_proj, query_states, attention.n_heads)
        keys = _heads(attention.k_proj, x, attention.n_kv_heads)
        queries = attention.rope(queries, offset=TokenPositions(query_places))
        keys = _grouped(attention.rope(keys, offset=TokenPositions(places)), attention)
        products = queries @ keys.swapaxes(-1, -2) * attention.scale
        if isinstance(mask, mx.array):
            visible = mx.take_along_axis(mask, rows[..., None], axis=1)[:, None]
            products = mx.where(visible, products, -1e9)
        elif mask == "causal":
            future = mx.arange(length) > rows[:, None, :, None]
            products = mx.where(future, -1e9, products)
        return mx.mean(mx.softmax(products, axis=-1, precise=True), axis=1)

    def attention_to_cache(
        self, number: int, hidden: mx.array, part: LayerCache
    ) -> mx.array:
        """Return the attention (B, L, S) from new tokens to a layer's cache.

        hidden: (B, L, D), the input of layer `number`. part: its cache, before the
        layer has read these tokens. Mean over heads, float32.
        """
        layer = self.layers[number]
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        queries = _heads(attention.q_proj, x, attention.n_heads)
        queries = attention.rope(queries, offset=part.offset)
        keys = _grouped(part.inner.keys[..., : part.inner.offset, :], attention)
        products = queries @ keys.swapaxes(-1, -2) * attention.scale
        return mx.mean(mx.softmax(products, axis=-1, precise=True), axis=1)

    def keys(self, number: int, hidden: mx.array) -> mx.array:
        """Return the keys (B, T, C) of layer `number`, heads joined.

        hidden: (B, T, D), the layer's input. Without rotary positions.
        """
        layer = self.layers[number]
        return layer.self_attn.k_proj(layer.input_layernorm(hidden))

    def queries_and_keys(
        self, visual: mx.array, text: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return the first layer's queries of `visual` and keys of `text`.

        (B, N, D) and (B, T, D) -> (B, heads, N, d) and (B, heads, T, d), without norm
        and rotary positions.
        """
        attention = self.layers[0].self_attn
        queries = _heads(attention.q_proj, visual, attention.n_heads)
        keys = _heads(attention.k_proj, text, attention.n_kv_heads)
        return queries, _grouped(keys, attention)


def greedy(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Return the best tokens (...) of logits (..., V), and a checked copy.

    The copy is -1 where the logits are not finite.
    """
    token = mx.argmax(logits, axis=-1).astype(mx.int32)
    finite = mx.isfinite(mx.max(logits, axis=-1))  # NaN is the largest of all
    return token, mx.where(finite, token, -1)


def _heads(project: nn.Module, x: mx.array, count: int) -> mx.array:
    return project(x).reshape(*x.shape[:2], count, -1).swapaxes(1, 2)


def _grouped(keys: mx.array, attention: Any) -> mx.array:
    """Repeat keys of fewer heads, one for each head of the queries."""
    groups = attention.n_heads // attention.n_kv_heads
    return mx.repeat(keys, groups, axis=1) if groups > 1 else keys


class _State:
    """Sequence on its way through the layers, for one call of `Decoder.read`."""

    def __init__(
        self,
        decoder: Decoder,
        sequence: TokenSequence,
        cache: list | None,
        rows: int,
        cached: int,
        step: int,
        watch: Callable[[int, mx.array], None] | None,
        attention_of: int | None,
    ):
        self._decoder, self._rows, self._watch = decoder, rows, watch
        self._attention_of, self.attended = attention_of, None
        self._cache = cache or [None] * len(decoder.layers)
        self._cached = cached
        # Chunks need a cache, and tokens that do not attend to later ones.
        whole = cache is None or sequence.mask != "causal"
        self._step = max(1, sequence.embeddings.shape[1]) if whole else step
        self._hidden = sequence.embeddings[:, cached:]
        self._positions, self._mask = sequence.positions, sequence.mask
        self._end = sequence.end
        self._visual = _indices(sequence.visual)
        self._text = sequence.visual[-1].stop if sequence.visual else 0
        self._done = 0  # layers
        self._before = self._hidden  # input of the last layer done
        # One entry per layer done: `drop` changes length, end and mask in between.
        self._shifts: list[int | mx.array] = []
        self._visible: list[mx.array | None] = []

    @property
    def _length(self) -> int:
        return self._cached + self._hidden.shape[1]

    def _chunks(self) -> list[tuple[int, int]]:
        """Return the token ranges that are read at once."""
        starts = list(range(self._cached, self._length, self._step))
        return list(zip(starts, [*starts[1:], self._length], strict=True))

    def _part(self, number: int, start: int, stop: int) -> LayerCache:
        """Return a layer's cache for reading tokens `start` to `stop`."""
        positions = self._positions
        positions = None if positions is None else positions[..., start:stop]
        return LayerCache(self._cache[number], 0, positions)

    def _mask_of(self, start: int, stop: int) -> mx.array | str | None:
        """Return the mask of these tokens in the form that mlx-lm's layers take."""
        if isinstance(self._mask, str):
            return "causal" if self._mask == "causal" else None
        return self._mask[:, None, start:stop, :stop]

    def _remember(self) -> None:
        """Keep what tokens after the sequence need from a layer."""
        self._shifts.append(self._end - self._length)
        mask = self._mask
        self._visible.append(None if isinstance(mask, str) else mask[:, -1, :])

    def advance(self, stop: int, keeps_input: bool = False) -> None:
        """Read all tokens through the layers before `stop`, chunk by chunk.

        keeps_input: keep the input of the last of these layers, for `drop`.
        """
        parts, before = [], []
        for start, end in self._chunks() if stop > self._done else ():
            if parts:  # frees the activations of a chunk before the next is read
                mx.eval(parts, _states(self._cache[self._done : stop]))
            hidden = self._hidden[:, start - self._cached : end - self._cached]
            for number in range(self._done, stop):
                if keeps_input and number == stop - 1:
                    before.append(hidden)
                hidden = self._layer(number, hidden, start, end)
            parts.append(hidden)
        for _ in range(self._done, stop):
            self._remember()
        self._done = max(self._done, stop)
        self._hidden = mx.concatenate(parts, axis=1) if parts else self._hidden
        self._before = mx.concatenate(before, axis=1) if before else self._before

    def _layer(self, number: int, hidden: mx.array, start: int, end: int) -> mx.array:
        self._observe(number, hidden)
        part, mask = self._part(number, start, end), self._mask_of(start, end)
        return self._decoder.layers[number](hidden, mask, part)

    def _observe(self, number: int, hidden: mx.array) -> None:
        """Pass a layer's input to `watch`, and keep the attention that is returned."""
        if self._watch:
            self._watch(number, hidden)
        if number != self._attention_of:
            return
        rows = mx.arange(self._length - self._rows, self._length)[None]
        rows = mx.broadcast_to(rows, (len(hidden), self._rows))
        attended = self._decoder.attention_to(
            number, hidden, rows, self._positions, self._mask
        )
        visual = mx.broadcast_to(self._visual, (len(hidden), self._visual.shape[1]))
        self.attended = mx.take_along_axis(attended, visual[:, None], axis=2)

    def finish(self) -> mx.array:
        """Return the last tokens' states (B, R, D) after the final norm."""
        last = len(self._decoder.layers) - 1
        self.advance(last)
        hidden = self._last(self._decoder.layers[last], last)
        self._remember()
        return self._decoder.norm(hidden[:, -self._rows :])

    def _last(self, layer: nn.Module, number: int) -> mx.array:
        """Fill the last layer's cache for all tokens; return the last rows' states."""
        hidden, start, end = self._hidden, self._cached, self._length
        self._observe(number, hidden)
        rows = min(self._rows, hidden.shape[1])
        if self._cache[number] is None or rows == hidden.shape[1]:
            part = self._part(number, start, end)
            return layer(hidden, self._mask_of(start, end), part)
        cut = end - rows
        # MLX is lazy: of this call only the keys and values are ever computed.
        part = self._part(number, start, cut)
        layer(hidden[:, :-rows], self._mask_of(start, cut), part)
        mask = self._mask_of(cut, end)
        mask = None if rows == 1 and isinstance(mask, str) else mask
        return layer(hidden[:, -rows:], mask, self._part(number, cut, end))

    def drop(self, pruner: LayerPruner) -> Selection:
        """Remove the visual tokens that the pruner does not choose."""
        hidden, length = self._hidden, self._length
        batch = hidden.shape[0]
        places = mx.broadcast_to(self._visual, (batch, self._visual.shape[1]))
        visual = mx.take_along_axis(hidden, places[..., None], axis=1)
        extras = self._extras(pruner.reads, places)
        selection = pruner(Features(visual, None, extras=extras).fixed)
        kept = mx.take_along_axis(places, selection.indices, axis=1)
        if selection.weights is not None:
            merged = selection.apply(visual)
            hidden = mx.put_along_axis(hidden, kept[..., None], merged, axis=1)
        is_visual = mx.zeros((batch, length), mx.bool_)
        is_visual = mx.put_along_axis(is_visual, places, mx.array(True), axis=1)
        is_kept = mx.put_along_axis(~is_visual, kept, mx.array(True), axis=1)
        rows = place_marked(is_kept, length - places.shape[1] + selection.keep)
        self._hidden = mx.take_along_axis(hidden, rows[..., None], axis=1)
        self._text -= length - rows.shape[1]
        remain = mx.take_along_axis(is_visual, rows, axis=1)
        self._visual = place_marked(remain, selection.keep)
        if self._positions is not None:
            positions = mx.broadcast_to(self._positions, (batch, length))
            self._positions = mx.take_along_axis(positions, rows, axis=1)
        else:  # tokens are numbered from 0 in each layer, so the end moves, too
            self._end = self._end - (length - rows.shape[1])
        if isinstance(self._mask, mx.array):
            mask = mx.broadcast_to(self._mask, (batch, length, length))
            mask = mx.take_along_axis(mask, rows[..., None], axis=1)
            self._mask = mx.take_along_axis(mask, rows[:, None], axis=2)
        return selection

    def _extras(self, names: tuple[str, ...], visual: mx.array) -> dict[str, mx.array]:
        """Return a pruner's extras from the last layer done; visual: (B, M) places."""
        extras, last, number = {}, self._length - self._rows, self._done - 1
        text = mx.arange(self._text, last + 1)[None]
        rows = {"attention": mx.array([[last]]), "text_attention": text}
        for name in rows.keys() & set(names):
            queried = mx.broadcast_to(rows[name], (len(visual), rows[name].shape[1]))
            attended = self._decoder.attention_to(
                number, self._before, queried, self._positions, self._mask
            )
            extras[name] = mx.take_along_axis(attended, visual[:, None], axis=2)
        if "attention" in extras:
            extras["attention"] = extras["attention"][:, 0]
        if "text" in names:
            extras["text"] = self._hidden[:, self._text : last + 1]
        if "keys" in names:
            keys = self._decoder.keys(number, self._before)
            extras["keys"] = mx.take_along_axis(keys, visual[..., None], axis=1)
        return extras

    def followers(self) -> list[LayerCache]:
        """Return the layers' caches for the tokens after the sequence."""
        if self._cache[0] is None:
            return []
        parts = zip(self._cache, self._shifts, self._visible, strict=True)
        return [LayerCache(inner, shift, None, mask) for inner, shift, mask in parts]


def _states(cache: list) -> list:
    return [layer.state for layer in cache if layer is not None]


def _indices(slices: tuple[slice, ...]) -> mx.array:
    """Return the places (1, M) in all slices."""
    places = [mx.arange(s.start, s.stop, dtype=mx.int32) for s in slices]
    return mx.concatenate(places)[None] if places else mx.zeros((1, 0), mx.int32)

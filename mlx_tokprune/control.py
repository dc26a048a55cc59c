"""The way of an observation: encode -> prune -> project -> sequence -> action.

`pipeline.py` for robots: the only other place that knows models and pruners together.
Everything here is lazy, but for prompt-stage pruners that choose their own count.
A batch is B observations with one instruction and n pictures each.
"""

from dataclasses import dataclass

import mlx.core as mx

from .features import Features, Selection, StageTimes
from .models.openvla import OpenVLA
from .pipeline import Clock
from .pruners import Pruner


@dataclass(frozen=True)
class Observation:
    """What B robots see and are told.

    pixels: (B * n, S, S, 3), the n pictures of a robot after each other. start: the id
    that opens the sequence. prompt: (P,) ids that follow the pictures. proprio:
    (B, p) normalised robot states, or `None`.
    """

    pixels: mx.array
    start: int | mx.array
    prompt: mx.array
    pictures: int = 1
    proprio: mx.array | None = None

    @property
    def batch(self) -> int:
        return self.pixels.shape[0] // self.pictures


@dataclass(frozen=True)
class Patches:
    """The kept visual tokens of B observations.

    embeddings: (B, M, D). indices: (B, M) into the tokens of all pictures. mask: (B, M)
    bool where samples keep different counts, else `None`. total: tokens before pruning.
    selection: as the pruner gave it, per picture or per observation.
    """

    embeddings: mx.array
    indices: mx.array
    mask: mx.array | None
    total: int
    grid: tuple[int, int]
    selection: Selection


@dataclass(frozen=True)
class Sequence:
    """What goes into the language model.

    embeddings: (B, T, D). positions: (B, T) of its tokens, `None` where they are
    contiguous. keys: (B, T) bool, false for padding, or `None`.
    """

    embeddings: mx.array
    positions: mx.array | None
    keys: mx.array | None


@dataclass(frozen=True)
class ActionTimes(StageTimes):
    """Milliseconds of each stage; decode: the tokens after the first, 0 for OFT."""

    decode: float = 0.0


def observe(processor, images: list, instruction: str, state=None) -> Observation:
    """Decoded pictures and an instruction as a policy takes them."""
    start, prompt = processor.prompt(instruction)
    pixels = mx.array(processor.pixels(images))
    return Observation(pixels, start, mx.array(prompt), len(images), state)


def tail(model: OpenVLA, observation: Observation) -> mx.array:
    """(B, T, D): what follows the visual tokens.

    The prompt; for OFT the robot state, the prompt, empty action slots and a stop.
    """
    batch = observation.batch
    prompt = model.embed(observation.prompt[None])
    parts = [mx.broadcast_to(prompt, (batch, *prompt.shape[1:]))]
    oft = model.args.oft
    if oft:
        stop = model.embed(mx.array([[model.args.text["eos_token_id"]]]))
        size = (batch, oft.slots, prompt.shape[-1])
        parts += [mx.zeros(size, prompt.dtype)]
        parts += [mx.broadcast_to(stop, (batch, 1, prompt.shape[-1]))]
        if observation.proprio is not None:
            state = observation.proprio.astype(prompt.dtype)
            parts = [model.proprio_projector(state)[:, None], *parts]
    return mx.concatenate(parts, axis=1)


def encode(
    model: OpenVLA, observation: Observation, needs: tuple[str, ...] = ()
) -> Features:
    """The towers' features of every picture, conditioned on the prompt with FiLM."""
    language = None
    if model.args.oft and model.args.oft.film:
        # The mean over what the reference calls the language: all but action slots.
        stop = model.args.text["eos_token_id"]
        ends = [mx.array(observation.start).reshape(1), mx.array([stop])]
        words = mx.concatenate([ends[0], observation.prompt, ends[1]])
        mean = mx.mean(model.embed(words[None]), axis=1)
        shape = (observation.pixels.shape[0], mean.shape[-1])
        language = mx.broadcast_to(mean, shape)
    return model.encode(observation.pixels, needs, language)


def see(
    model: OpenVLA, observation: Observation, pruner: Pruner, features: Features
) -> Patches:
    """Prune `features` before the projector or after it, as the pruner's stage says."""
    if pruner.stage == "prompt":
        return choose(model, observation, pruner, project_all(model, features))
    selection = pruner(features)
    kept = selection.apply(features.tokens)
    return place(model, observation, selection, kept, features)


def place(
    model: OpenVLA,
    observation: Observation,
    selection: Selection,
    kept: mx.array,
    features: Features,
) -> Patches:
    """Project the `kept` tokens (B * n, K, C) of each picture and join the pictures."""
    n, batch = observation.pictures, observation.batch
    each = features.tokens.shape[1]
    offsets = (mx.arange(batch * n) % n * each)[:, None]
    return Patches(
        model.project(kept).reshape(batch, n * selection.keep, -1),
        (selection.indices + offsets).reshape(batch, -1),
        None,
        n * each,
        features.grid,
        selection,
    )


def project_all(model: OpenVLA, features: Features) -> Features:
    """Features with projected tokens, for pruners that look at the prompt."""
    return Features(model.project(features.tokens), features.grid)


def choose(
    model: OpenVLA, observation: Observation, pruner: Pruner, projected: Features
) -> Patches:
    """Let a prompt-stage pruner choose among the tokens of all pictures."""
    batch = observation.batch
    size = projected.tokens.shape[-1]
    tokens = projected.tokens.reshape(batch, -1, size)
    text = tail(model, observation)
    queries, keys = None, None
    if "queries" in pruner.needs:
        queries, keys = model.first_layer(tokens, text)
    asked = Features(tokens, projected.grid, None, text, queries, keys)
    selection = pruner(asked)
    return Patches(
        selection.apply(tokens),
        selection.indices,
        selection.mask,
        tokens.shape[1],
        projected.grid,
        selection,
    )


def assemble(
    model: OpenVLA, observation: Observation, patches: Patches, positions: str
) -> Sequence:
    """`<s>`, the kept visual tokens, and the tail, with their positions."""
    after = tail(model, observation)
    batch, kept = patches.indices.shape
    opening = model.embed(mx.array(observation.start).reshape(1, 1))
    first = mx.broadcast_to(opening, (batch, 1, after.shape[-1]))
    visual = patches.embeddings.astype(first.dtype)
    embeddings = mx.concatenate([first, visual, after], axis=1)
    keys = None
    if patches.mask is not None:
        ones = [mx.ones((batch, size), mx.bool_) for size in (1, after.shape[1])]
        keys = mx.concatenate([ones[0], patches.mask, ones[1]], axis=1)
    if keys is None and (kept == patches.total or positions == "contiguous"):
        return Sequence(embeddings, None, keys)
    if positions == "original":
        where, counts = patches.indices + 1, mx.full((batch, 1), patches.total)
    else:
        # Padding takes no place: count only what each sample kept.
        counts = mx.sum(patches.mask, axis=1, keepdims=True)
        where = mx.cumsum(patches.mask.astype(mx.int32), axis=1)
    rest = 1 + counts + mx.arange(after.shape[1])
    start = mx.zeros((batch, 1), mx.int32)
    joined = [part.astype(mx.int32) for part in (start, where, rest)]
    where = mx.concatenate(joined, axis=1)
    return Sequence(embeddings, where, keys)


def decode(model: OpenVLA, sequence: Sequence, steps: int) -> list[mx.array]:
    """Greedy action tokens: `steps` arrays (B,), each depending on the one before.

    Nothing is evaluated, so one `mx.eval` runs the whole action without a pause.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    length = sequence.embeddings.shape[1]
    positions, keys = extended(sequence, steps)
    mask = "causal" if keys is None else _causal(length) & keys[:, None, None, :length]
    tokens = []
    with model.positions.using(positions):
        hidden = model.hidden_states(sequence.embeddings, mask, cache)[:, -1:]
        while True:
            tokens.append(mx.argmax(model.logits(hidden)[:, -1], axis=-1))
            if len(tokens) == steps:
                return tokens
            end = length + len(tokens)
            mask = None if keys is None else keys[:, None, None, :end]
            hidden = model.hidden_states(model.embed(tokens[-1][:, None]), mask, cache)


def extended(sequence: Sequence, steps: int) -> tuple:
    """Positions and key mask of the sequence and of `steps` tokens after it."""
    positions, keys = sequence.positions, sequence.keys
    batch = sequence.embeddings.shape[0]
    if positions is not None:
        more = positions[:, -1:] + 1 + mx.arange(steps)
        positions = mx.concatenate([positions, more.astype(mx.int32)], axis=1)
    if keys is not None:
        ones = mx.ones((batch, steps), mx.bool_)
        keys = mx.concatenate([keys, ones], axis=1)
    return positions, keys


def _causal(length: int) -> mx.array:
    return mx.tril(mx.ones((length, length), mx.bool_))[None, None]


def first_slot(sequence: Sequence, slots: int) -> int:
    """Where the states of the action slots begin, counted from the end.

    OFT reads each action from the state before its slot, as a language model would;
    counted from the front, the kept visual tokens count, not all of them.
    """
    return sequence.embeddings.shape[1] - 1 - slots - 1


def regress(model: OpenVLA, sequence: Sequence) -> mx.array:
    """(B, chunk, A) normalised actions in one forward with full attention (OFT)."""
    slots = model.args.oft.slots
    keys = None if sequence.keys is None else sequence.keys[:, None, None]
    with model.positions.using(sequence.positions):
        hidden = model.hidden_states(sequence.embeddings, keys, None)
    start = first_slot(sequence, slots)
    return model.action_head(hidden[:, start : start + slots])


def measure_stages(
    model: OpenVLA,
    processor,
    images: list,
    instruction: str,
    pruner: Pruner,
    positions: str,
    state: mx.array | None,
    steps: int,
) -> ActionTimes:
    """Run the path once from decoded pictures to the last of `steps` tokens.

    Each stage is fenced. Prompt-stage pruners run after the projector.
    """
    clock = Clock()
    with clock.stage("preprocess") as done:
        observation = observe(processor, images, instruction, state)
        done += [observation.pixels, observation.prompt]
    with clock.stage("vision") as done:
        features = encode(model, observation, pruner.needs)
        done += [a for a in (features.tokens, features.attention) if a is not None]
    if pruner.stage == "prompt":
        with clock.stage("project") as done:
            projected = project_all(model, features)
            done.append(projected.tokens)
        with clock.stage("prune") as done:
            patches = choose(model, observation, pruner, projected)
            done += [patches.embeddings, patches.indices]
    else:
        with clock.stage("prune") as done:
            selection = pruner(features)
            kept = selection.apply(features.tokens)
            done += [kept, selection.indices]
        with clock.stage("project") as done:
            patches = place(model, observation, selection, kept, features)
            done.append(patches.embeddings)
    with clock.stage("prefill") as done:
        sequence = assemble(model, observation, patches, positions)
        if model.args.oft:
            done.append(regress(model, sequence))
            tokens = []
        else:
            tokens = decode(model, sequence, steps)
            done.append(tokens[0])
    with clock.stage("decode") as done:
        done += tokens
    return ActionTimes(**clock.times)

"""A tiny checkpoint loaded by mlx-vlm: asked, pruned, masked, and served."""

import contextlib

import mlx.core as mx
import mlx_vlm
import numpy as np
from mlx_vlm.prompt_utils import apply_chat_template
from mlx_vlm.utils import prepare_inputs

from mlx_tokprune import Pruner
from mlx_tokprune.attach.mlx_vlm import attach

from .families import picture, prompt

QUESTION, MORE = "what is in the picture ?", "which colour is it ?"
LENGTH = 8
HALF = Pruner("norm", 0.5)


class Loaded:
    """Tiny checkpoint in mlx-vlm, and images for it."""

    def __init__(self, family, folder):
        self.family, self.folder = family, folder
        family.write(folder)
        self.files = [str(folder / f"{seed}.png") for seed in range(3)]
        for seed, file in enumerate(self.files):
            picture(family, seed).save(file)
        self.narrow = str(folder / "narrow.png")  # the second, about half as wide
        width, height = family.size
        size = (max(8, width // 16 * 8), height)
        picture(family, 1).resize(size).save(self.narrow)
        self.model, self.processor = mlx_vlm.load(str(folder))

    def ask(self, text=None, file=None, **named):
        """Return the ids of a greedy answer, and the length of the prompt."""
        text = text or prompt(self.processor, self.model.config, QUESTION)
        named = {"max_tokens": LENGTH, "temperature": 0.0, **named}
        if not {"image", "video"} & named.keys():
            named["image"] = [file or self.files[0]]
        pieces = mlx_vlm.stream_generate(self.model, self.processor, text, **named)
        last = list(pieces)[-1]
        return last.token_ids, last.prompt_tokens

    def chat(self, *answers: str) -> str:
        """Return the prompt of a conversation with the image in its first turn."""
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        turns = [{"role": "user", "content": content}]
        for answer in answers:
            turns.append({"role": "assistant", "content": answer})
            turns.append({"role": "user", "content": MORE})
        return apply_chat_template(
            self.processor, self.model.config, turns, num_images=1
        )

    @contextlib.contextmanager
    def pruned(self, pruner=HALF, positions=None):
        handle = attach(self.model, self.processor, pruner, positions)
        try:
            yield handle
        finally:
            handle.detach()

    @property
    def original(self) -> str | None:
        """Setting of `positions` that gives original positions."""
        return None if self.family.mrope else "original"


@contextlib.contextmanager
def masked(model, columns):
    """Mask these columns in the attention of the language model."""
    attention, kind = mx.fast.scaled_dot_product_attention, type(model)
    embed, seen = kind.get_input_embeddings, []

    def unseen(queries, keys, values, *, scale, mask=None, **named):
        length, total = queries.shape[-2], keys.shape[-2]
        if not seen:
            return attention(queries, keys, values, scale=scale, mask=mask, **named)
        allowed = mx.ones((length, total), mx.bool_)
        if isinstance(mask, str):
            allowed = mx.tri(length, total, total - length, mx.bool_)
        gone = np.isin(np.arange(total), columns)
        bias = mx.where(allowed & ~mx.array(gone), 0.0, -1e9).astype(queries.dtype)
        if isinstance(mask, mx.array):
            more = mx.where(mask, 0.0, -1e9) if mask.dtype == mx.bool_ else mask
            bias = bias + more.astype(bias.dtype)
        return attention(queries, keys, values, scale=scale, mask=bias, **named)

    def watched(self, *args, **named):
        features = embed(self, *args, **named)
        seen.append(True)
        return features

    mx.fast.scaled_dot_product_attention = unseen
    kind.get_input_embeddings = watched
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = attention
        kind.get_input_embeddings = embed


def served(loaded, requests) -> list[list[int]]:
    """Return answers to (text, file) requests, read in one batch like the server."""
    from mlx_vlm.generate.ar import BatchGenerator

    gen = BatchGenerator(
        loaded.model.language_model,
        loaded.processor,
        prefill_batch_size=2,
        completion_batch_size=2,
        compute_logprobs=False,
    )
    uids = []
    for text, file in requests:
        inputs = dict(prepare_inputs(loaded.processor, images=[file], prompts=text))
        ids, pixels, mask = (
            inputs.pop(n) for n in ("input_ids", "pixel_values", "attention_mask")
        )
        features = loaded.model.get_input_embeddings(ids, pixels, mask=mask, **inputs)
        given = {k: v for k, v in features.to_dict().items() if v is not None}
        rows = [ids.squeeze(0).tolist()]
        uids += gen.insert(rows, max_tokens=LENGTH, prompt_kwargs=[inputs | given])
    answers = {uid: [] for uid in uids}
    while gen.has_work:
        for response in gen.next()[1]:
            answers[response.uid].append(response.token)
    gen.close()
    return [answers[uid] for uid in uids]

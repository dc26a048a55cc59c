"""Demo model's tokenizer: byte-level BPE over its questions and chat template."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer

from tokenizers import decoders, models, pre_tokenizers, trainers  # isort: skip

from mlx_tokprune.models.fastvlm import FastVLM
from mlx_tokprune.scenes.pictures import WORDS, sample_scene
from mlx_tokprune.scenes.questions import ask_many

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Words with the space before them, single digits, punctuation, white space.
_PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def build_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer at `path`, or train and save it there."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        min_frequency=10,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL])
    tokenizer.save(str(path))
    return tokenizer


def _texts() -> list[str]:
    rng = np.random.default_rng(0)
    chat = FastVLM.prompt_prefix + FastVLM.prompt_suffix
    for token in SPECIAL:
        chat = chat.replace(token, "")
    texts = [chat] * 400 + list(WORDS) * 20
    for _ in range(6000):
        for question in ask_many(rng, sample_scene(rng), 5):
            texts += [f"\n{question.prompt}", question.answer]
    return texts


def encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Return a cached function from text to token ids."""

    @functools.lru_cache(maxsize=1 << 16)
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return encode

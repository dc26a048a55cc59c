"""`PromptCache`: the cache of a prompt's pictures in a file, in mlx-lm's format.

The first question writes the file and later ones, also of other processes, read it in
place of encoding the pictures. A file belongs to its pictures, pruner, model, positions
and to the text before the last picture; under other ones it is refused.
"""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from ..checkpoints.shards import read_header
from ..errors import InputError
from ..features import Selection
from ..files import check_output, replacing
from ..models.protocol import VisionModel
from ..pipeline import VisionStep, VisualTokens
from ..processing.processor import Processor
from ..processing.prompt import Prompt
from ..pruners import Plan
from .memory import Memory, Picture, Recollection, images_digest, weights_digest

_NUMBERS = 8  # per tensor, of a model's digest


class PromptCache(Memory):
    """A `Memory` of one prompt's pictures in a file: `memory=PromptCache(FILE)`.

    path: a file that ends in .safetensors, read if it exists, else written after the
    first token. Pruners must be at the tower, as others may choose by the question.
    Raises `InputError` for a path that cannot be used.
    """

    def __init__(self, path: str | Path):
        super().__init__(1)
        if not str(path).endswith(".safetensors"):
            raise InputError(f"{path} is no prompt cache; expected NAME.safetensors")
        check_output(path, None)
        self._path = Path(path)

    def about(
        self,
        model: VisionModel,
        processor: Processor,
        images: Sequence[Image.Image],
        plan: Plan,
        vision: VisionStep | None,
    ) -> Recollection:
        """Return the recollection of the file; `InputError` for other pictures."""
        if vision is not None or any(pruner.place != "tower" for pruner in plan):
            raise InputError(
                "a prompt cache file holds pictures that are pruned at the tower, "
                "before the question is read; choose another place, or leave it out"
            )
        pruners = [(*p.key[:-1], weights_digest(p.scorer)) for p in plan]
        settings = {
            "model": _model_digest(cast(nn.Module, model)),
            "picture": images_digest(images),
            "image size": f"{processor.image_size} {processor.padding}",
            "pruner": str(pruners),
        }
        if not self._path.exists():
            return _FileRecollection(self._path, settings, Picture())
        picture, stored = _read(self._path, bool(plan))
        _compare(self._path, stored, settings)
        return _FileRecollection(self._path, stored, picture)


class _FileRecollection(Recollection):
    """A recollection whose cache is in a file. settings: those of the file."""

    def __init__(self, path: Path, settings: dict[str, str], picture: Picture):
        super().__init__(picture, lambda: None, keeps_cache=True)
        self._path, self._settings = path, settings

    def fill(self, cache: list, prompt: Prompt, positions: str) -> int:
        """Fill the cache from the file; `InputError` for another opening."""
        if self._picture.layers:
            _compare(self._path, self._settings, _opening(prompt, positions))
            self._picture.opening = (prompt.segments[:-1], positions)
        return super().fill(cache, prompt, positions)

    def keep(self, cache: list, prompt: Prompt, positions: str) -> None:
        """Write the cache up to the last visual token to the file."""
        super().keep(cache, prompt, positions)
        settings = self._settings | _opening(prompt, positions)
        _write(self._path, settings, self._picture)


def _opening(prompt: Prompt, positions: str) -> dict[str, str]:
    """Return the positions, and the token ids before the last picture."""
    ids = [list(map(int, segment)) for segment in prompt.segments[:-1]]
    return {"positions setting": positions, "text before the picture": str(ids)}


def _model_digest(model: nn.Module) -> str:
    """Return a digest of some numbers of every tensor; hashing all would be slow."""
    digest, samples = hashlib.sha256(), []
    for name, array in sorted(cast(list, tree_flatten(model.parameters()))):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        step = max(1, array.size // _NUMBERS)
        samples.append(array.reshape(-1)[::step].astype(mx.float32))
    digest.update(np.array(mx.concatenate(samples)).tobytes())
    return digest.hexdigest()[:16]


def _compare(path: Path, stored: dict[str, str], settings: dict[str, str]) -> None:
    for name, value in settings.items():
        if stored.get(name) != value:
            raise InputError(
                f"{path} was made with another {name}; expected that of this question, "
                "or a new file name"
            )


# Files ------------------------------------------------------------------------------


def _arrays(visual: VisualTokens) -> list[mx.array | None]:
    chosen = visual.selection
    selection = (chosen.indices, chosen.weights, chosen.mask)
    return [visual.embeddings, visual.indices, visual.mask, *selection]


def _write(path: Path, settings: dict[str, str], picture: Picture) -> None:
    from mlx_lm.models.cache import ArraysCache, KVCache, save_prompt_cache

    visual = cast(VisualTokens, picture.visual)
    caches: list = [KVCache.from_state((k, v, k.shape[2])) for k, v in picture.layers]
    caches.append(ArraysCache(0))
    caches[-1].cache = _arrays(visual)
    shape = " ".join(map(str, (*visual.grid, visual.pictures)))
    digest = _digest(picture.layers, visual)
    with replacing(path) as file:
        save_prompt_cache(
            cast(str, file), caches, settings | {"shape": shape, "digest": digest}
        )


def _digest(layers: Sequence, visual: VisualTokens) -> str:
    """Return a digest of all arrays, to find damage."""
    digest = hashlib.sha256()
    for array in [*itertools.chain(*layers), *_arrays(visual)]:
        if array is not None:
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return digest.hexdigest()


def _read(path: Path, pruned: bool) -> tuple[Picture, dict[str, str]]:
    """Return the picture of a file, and the settings that it was made with."""
    from mlx_lm.models.cache import load_prompt_cache

    read_header(path)  # MLX cannot tell all damage
    try:
        caches, settings = load_prompt_cache(str(path), return_metadata=True)
        states = [cache.state for cache in caches]
        embeddings, indices, mask, *selection = states[-1][0]
        rows, columns, pictures = map(int, settings["shape"].split())
        visual = VisualTokens(
            *(embeddings, indices, Selection(*selection), (rows, columns), pictures),
            mask,
        )
        visual = visual.chosen_at("tower") if pruned else visual
        layers = tuple((keys, values) for keys, values, _ in states[:-1])
        if settings["digest"] == _digest(layers, visual):
            return Picture(visual, layers=layers), settings
    except Exception:  # a file of another program may have anything in it
        pass
    raise InputError(
        f"{path} is damaged, or no prompt cache of mlx_tokprune; expected a file that "
        "--prompt-cache-file wrote, or a new file name"
    )

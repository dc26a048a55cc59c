"""Model folder that stock mlx-vlm loads and that prunes by itself.

It holds links to the checkpoint's files, its config with mlx-vlm's official
`model_file`, and our settings. Weights are never written.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..checkpoints.carried import carry, read_carried
from ..checkpoints.hub import is_local, resolve
from ..errors import InputError
from ..files import new_folder, read_json
from .mlx_vlm import Attachable, attach, check_known, import_mlx_vlm, name_of
from .pixels import Pixels, split

MODEL_FILE, SETTINGS = "tokprune_model.py", "tokprune.json"
_CODE = '''"""Written by mlx_tokprune.attach: the model of this folder, which prunes."""

from mlx_tokprune.attach import prune_when_loaded

globals().update(prune_when_loaded(__file__))
'''


def write_folder(
    source: str | Path,
    target: str | Path,
    pruner: Attachable,
    positions: str | None = None,
) -> Path:
    """Write the folder `target`: `source` (a folder or hub id) with a pruner attached.

    pruner, positions: as in `attach`. Returns `target`. Raises `InputError` for a
    checkpoint or a pruner that `attach` does not support.
    """
    import_mlx_vlm()
    from mlx_vlm.utils import get_model_and_args, get_model_type

    folder = resolve(source)
    config = read_json(folder / "config.json")
    own = config.get("model_file")
    if (folder / SETTINGS).exists() or (folder / MODEL_FILE).exists():
        raise InputError(
            f"{folder} prunes already; expected a checkpoint without a pruner"
        )
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(folder)):
        raise InputError(f"{target} is inside {folder}; choose a folder elsewhere")
    _check_own(folder, own)
    if own is not None and not is_local(str(source)):
        raise InputError(
            f"{source} brings custom code ({own}), which is not run from the hub; "
            "expected a folder on this machine"
        )
    try:
        name = name_of(get_model_and_args(config)[0].Model)
    except (AttributeError, KeyError, ValueError):  # not a model of mlx-vlm
        name = str(get_model_type(config))
    check_known(name, pruner, positions)
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no weights; expected *.safetensors")
    with new_folder(target) as made:
        for path in sorted(folder.iterdir()):
            if path.name not in ("config.json", MODEL_FILE, SETTINGS):
                (made / path.name).symlink_to(os.path.realpath(path))
        changed = config | {"model_file": MODEL_FILE}
        tokens, pixels = split(pruner)
        settings = carry(tokens, {}, made)
        settings |= {"positions": positions, "model_file": own}
        settings |= {"pixels": dataclasses.asdict(pixels)} if pixels else {}
        for name, value in (("config.json", changed), (SETTINGS, settings)):
            (made / name).write_text(json.dumps(value, indent=2) + "\n")
        (made / MODEL_FILE).write_text(_CODE)
    return Path(target)


def prune_when_loaded(file: str) -> dict[str, Any]:
    """Return the names of the module `file`: the family's, and a `Model` that prunes.

    A processor is loaded after its model, by the same thread. The first processor of
    the same folder gets the pruner attached; until then, mlx-vlm's `load_processor` is
    replaced. Raises `InputError` for settings that name no pruners.
    """
    folder = Path(file).resolve().parent
    settings = read_json(folder / SETTINGS)
    pruner = [*read_carried(settings, folder)]
    pruner += Pixels.read(settings.get("pixels", {})).pruners
    stock = _stock(folder, settings.get("model_file"))

    class Model(stock.Model):
        def __init__(self, *args: Any, **named: Any):
            super().__init__(*args, **named)
            _PENDING.add(folder, (self, pruner, settings.get("positions")))

    # `attach` and mlx-vlm find the family by the module of the class.
    Model.__module__ = stock.Model.__module__
    names = {name: value for name, value in vars(stock).items() if name[:2] != "__"}
    return names | {"Model": Model}


class _PendingModels:
    """Models whose processors are not loaded yet, by thread and folder.

    mlx-vlm loads a model file without its processor, which `attach` needs. So
    `mlx_vlm.utils.load_processor` is replaced while there are such models.
    """

    def __init__(self):
        self._models: dict[tuple[int, Path], tuple] = {}
        self._lock, self._original = threading.Lock(), None

    def add(self, folder: Path, entry: tuple) -> None:
        """Add a model of `folder`, in place of an earlier one of this thread.

        entry: the model, its pruners and positions.
        """
        from mlx_vlm import utils

        with self._lock:
            self._models[threading.get_ident(), folder] = entry
            if self._original is None:
                self._original = utils.load_processor
                utils.load_processor = functools.partial(self._load, self._original)

    def _load(
        self, original: Callable, path: str | Path, *args: Any, **named: Any
    ) -> Any:
        """Load a processor with mlx-vlm's function, and attach its model's pruner."""
        from mlx_vlm import utils

        try:
            processor = original(path, *args, **named)
        finally:
            key = (threading.get_ident(), Path(path).resolve())
            with self._lock:
                entry = self._models.pop(key, None)
                if not self._models and self._original is not None:
                    utils.load_processor, self._original = self._original, None
        if entry is not None:
            model, pruner, positions = entry
            attach(model, processor, pruner, positions)
            # There is no handle to detach it: `attach` names the folder instead.
            type(model)._tokprune = str(path)
        return processor


_PENDING = _PendingModels()


def _check_own(folder: Path, own: object) -> None:
    """Raise `InputError` unless a custom model file lies in the folder."""
    if own is not None and not (isinstance(own, str) and Path(own).name == own):
        raise InputError(
            f"{folder} names the model file {own!r}; expected a file in the folder"
        )


def _stock(folder: Path, own: str | None) -> ModuleType:
    """Return the module that mlx-vlm loads for the checkpoint without a pruner."""
    from mlx_vlm.utils import get_model_and_args

    config = read_json(folder / "config.json")
    del config["model_file"]
    if own is None:
        return get_model_and_args(config)[0]
    _check_own(folder, own)
    spec = importlib.util.spec_from_file_location("stock_model", folder / own)
    if spec is None or spec.loader is None:
        raise InputError(f"{folder / own} is not a Python module; expected one")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

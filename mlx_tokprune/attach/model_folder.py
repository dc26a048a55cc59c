"""A folder that stock mlx-vlm loads and that prunes by itself.

Links to the checkpoint's files, its config with mlx-vlm's official `model_file`, and
our settings. Weights are never written.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import threading
from pathlib import Path

from ..checkpoints.carried import carry, read_carried
from ..checkpoints.hub import is_local, resolve
from ..errors import InputError
from ..files import new_folder, read_json
from .mlx_vlm import Attachable, attach, check_known, import_mlx_vlm
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
    """Write `target`, which is `source` (a folder or hub id) with a pruner attached.

    Raises `InputError` for a checkpoint or a method that `attach` does not know.
    """
    import_mlx_vlm()
    from mlx_vlm.utils import get_model_type

    folder = resolve(source)
    config = read_json(folder / "config.json")
    own = config.get("model_file")
    if (folder / SETTINGS).exists() or (folder / MODEL_FILE).exists():
        raise InputError(f"{folder} prunes already; expected a checkpoint without")
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(folder)):
        raise InputError(f"{target} is inside {folder}; choose a folder elsewhere")
    _check_own(folder, own)
    if own is not None and not is_local(str(source)):
        raise InputError(
            f"{source} brings code of its own ({own}), which is not run from the hub; "
            "expected a folder on this machine"
        )
    check_known(get_model_type(config), pruner, positions)
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


def prune_when_loaded(file: str) -> dict:
    """The names of the module `file`: those of the family, and a `Model` that prunes.

    A processor is loaded after its model, by the same thread. The first that is for the
    same folder gets the pruner attached; until then mlx-vlm's `load_processor` is ours.
    """
    folder = Path(file).resolve().parent
    settings = read_json(folder / SETTINGS)
    pruner = [*read_carried(settings, folder)]
    pruner += Pixels.read(settings.get("pixels", {})).pruners
    stock = _stock(folder, settings.get("model_file"))

    class Model(stock.Model):
        def __init__(self, *args, **named):
            super().__init__(*args, **named)
            _WAITING.add(folder, (self, pruner, settings.get("positions")))

    Model.__module__ = stock.Model.__module__
    names = {name: value for name, value in vars(stock).items() if name[:2] != "__"}
    return names | {"Model": Model}


class _Waiting:
    """Models whose processors are still to be loaded, by thread and folder."""

    def __init__(self):
        self._models: dict[tuple[int, Path], tuple] = {}
        self._lock, self._original = threading.Lock(), None

    def add(self, folder: Path, asked: tuple) -> None:
        """asked: a model, its pruner and positions; another of the folder is gone."""
        from mlx_vlm import utils

        with self._lock:
            self._models[threading.get_ident(), folder] = asked
            if self._original is None:
                self._original = utils.load_processor
                utils.load_processor = functools.partial(self._load, self._original)

    def _load(self, original, path, *args, **named):
        from mlx_vlm import utils

        try:
            processor = original(path, *args, **named)
        finally:
            key = (threading.get_ident(), Path(path).resolve())
            with self._lock:
                asked = self._models.pop(key, None)
                if not self._models and self._original is not None:
                    utils.load_processor, self._original = self._original, None
        if asked is not None:
            model, pruner, positions = asked
            attach(model, processor, pruner, positions)
            type(model)._tokprune = str(path)  # nobody has a handle of it
        return processor


_WAITING = _Waiting()


def _check_own(folder: Path, own) -> None:
    """Raise `InputError` unless a model file of the checkpoint's own lies in it."""
    if own is not None and not (isinstance(own, str) and Path(own).name == own):
        raise InputError(f"{folder} names the model file {own!r}; expected one in it")


def _stock(folder: Path, own: str | None):
    """The module that mlx-vlm would have taken."""
    from mlx_vlm.utils import get_model_and_args

    config = read_json(folder / "config.json")
    del config["model_file"]
    if own is None:
        return get_model_and_args(config)[0]
    _check_own(folder, own)
    spec = importlib.util.spec_from_file_location("stock_model", folder / own)
    if spec is None or spec.loader is None:
        raise InputError(f"{folder / own} is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Visual-token pruning for vision-language models on Apple silicon, in MLX.

>>> from mlx_tokprune import Pruner, generate, load
>>> model, processor = load("FastVLM-0.5B-mlx")
>>> generate(model, processor, ["photo.jpg"], "What is this?",
...          pruner=Pruner("norm", keep_ratio=0.5))

>>> from mlx_tokprune import Policy
>>> policy = Policy(*load("openvla-7b-mlx"), pruner=Pruner("trimvla", keep_ratio=0.5))
>>> policy(["frame.png"], "open the drawer")
"""

from .runtime import preload

preload()  # before anything imports MLX

from . import convert  # noqa: E402, F401  (registers the model families)
from .act import Policy, predict_action  # noqa: E402
from .checkpoints.loading import load  # noqa: E402
from .errors import InputError  # noqa: E402
from .features import Features, Selection  # noqa: E402
from .generate import Chat, Memory, Temporal, generate, stream_generate  # noqa: E402
from .pruners import Pruner, list_pruners, register  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Chat",
    "Features",
    "InputError",
    "Memory",
    "Policy",
    "Pruner",
    "Selection",
    "Temporal",
    "generate",
    "list_pruners",
    "load",
    "predict_action",
    "register",
    "stream_generate",
]

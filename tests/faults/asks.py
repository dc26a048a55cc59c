"""Valid arguments of commands, to which a case adds a fault."""

import json
from pathlib import Path
from random import Random

from .case import Place

DATA = Path(__file__).parents[1] / "data"
TINY, POLICY = DATA / "fastvlm-tiny", DATA / "openvla-tiny"
PICTURES = {TINY: TINY / "image_1.png", POLICY: POLICY / "image_0.png"}
# Cores are busy with other cases, and Core ML's converter is slow.
WEIGHTS = {"generate": 6, "act": 5, "evaluate": 5, "convert": 4, "report": 3}
WEIGHTS |= {"bench": 2, "coreml": 0.25, "prune": 1, "lora": 1, "fuse": 0.5}
WEIGHTS |= {"attach": 1}


def pick(rng: Random, commands=WEIGHTS) -> str:
    return rng.choices(list(commands), [WEIGHTS[name] for name in commands])[0]


def right(command: str, place: Place, model: Path | None = None) -> list[str]:
    """Return arguments of a small run that succeeds, on `model` if one is used."""
    seen = str(PICTURES[POLICY if command == "act" else TINY])
    name = str(model or (POLICY if command == "act" else TINY))
    few = ["--methods", "norm", "--keep-ratios", "0.5"]
    about = ["--model", name, "--image", seen]
    short, to = ["--tokens", "1", "--max-tokens", "2"], ["--output"]
    lines = str(place.base / "questions.jsonl")
    step = ["--steps", "1", "--batch", "1", "--questions", "1"]
    adapter = ["--adapter-path", str(place.base / "adapter")]
    return {
        "generate": [*about, "--prompt", "What?", "--max-tokens", "2"],
        "chat": [*about, "--max-tokens", "2"],
        "act": [*about, "--instruction", "pick up the cup", "--json"],
        "convert": ["--hf-path", name, "--mlx-path", "made"],
        "evaluate": [*about[:2], "--data", lines, *few, *short[2:], *to, "e.json"],
        "bench": [*about, *few, "--runs", "1", *short[:2], *to, "b.json"],
        "report": [str(place.base / "e.json"), "--pictures", "0", *to, "r.html"],
        "coreml": [*about[:2], "--keep-ratio", "0.5", *to, "m.mlpackage"],
        "attach": [*about[:2], "--keep-ratio", "0.5", "--mlx-path", "attached"],
        "prune": ["prune", *about[:2], "--data", lines, *step, *to, "scorer"],
        "lora": ["lora", *about[:2], "--data", lines, *step, *to, "adapter"],
        "fuse": ["fuse", *about[:2], *adapter, *to, "fused"],
    }[command]


def finite_action(out: str) -> str | None:
    """Return an error if the action in the last line has a non-finite number."""
    lines = out.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return None
    try:
        json.loads(lines[-1], parse_constant=_refuse)
    except ValueError as error:
        return f"an action with {error}: {lines[-1][:300]}"
    return None


def _refuse(name: str):
    raise ValueError(name)


CHECKS = {"act": finite_action}

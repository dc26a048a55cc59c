"""Upload of a written folder, with a model card, to the Hugging Face hub."""

import json
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json, replacing
from .hub import HUB_ID, is_local

_ASK = '--image photo.jpg --prompt "What is this?"'
# By the file that tells a folder's kind: its description, and how it is used.
_KINDS = {
    "tokprune.json": (
        "A checkpoint that prunes its visual tokens when mlx-vlm loads it",
        f"hf download {{repo}} --local-dir {{name}}\n"
        f"python -m mlx_vlm.generate --model {{name}} {_ASK}",
    ),
    "scorer.json": (
        "A scorer of visual tokens",
        "hf download {repo} --local-dir {name}\n"
        f"mlx_tokprune generate --model {{base}} --method ./{{name}} \\\n"
        f"    --keep-ratio 0.25 {_ASK}",
    ),
    "adapter_config.json": (
        "An adapter of the language model, trained under visual-token pruning",
        "hf download {repo} --local-dir {name}\n"
        f"mlx_tokprune generate --model {{base}} --adapter-path ./{{name}} \\\n"
        f"    --keep-ratio 0.25 {_ASK}",
    ),
    "config.json": (
        "A checkpoint in MLX format",
        f"mlx_tokprune generate --model {{repo}} {_ASK}",
    ),
}
_POLICY = 'mlx_tokprune act --model {repo} --image frame.png --instruction "lift it"'
_CARD = """\
# {repo}

{kind}{of}, written by [mlx-tokprune](https://pypi.org/project/mlx-tokprune/) {version}:

    {command}
{settings}
## Use

    pip install {package}
    {use}

## Measured

Nothing was measured by the command above. `mlx_tokprune evaluate --data FILE`
measures accuracy on your questions, `mlx_tokprune bench` time to first token.
"""


def check_repo(repo: str | None) -> None:
    """Raise `InputError` unless `repo` is `None` or a name such as org/name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        valid = repo is None or "/" in repo
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(f"--upload-repo {repo!r} is no name such as org/name")


def upload(
    repo: str | None,
    folder: str | Path,
    base: str,
    name: str,
    argv: Sequence[str] | None,
) -> None:
    """Upload a folder and a new model card, and print its address; `None` does nothing.

    repo: org/name, created if it does not exist. base: name of the model that the
    folder was made from. name, argv: the command and its arguments, for the card, in
    which local files stand without their folders. Metadata of a card in the folder,
    such as the licence, are kept. Raises `InputError` if the hub refuses.
    """
    if repo is None:
        return
    from huggingface_hub import HfApi

    words = [name, *(sys.argv[1:] if argv is None else argv)]
    command = shlex.join(["mlx_tokprune", *map(_without_folder, words)])
    try:
        _write_card(Path(folder), repo, base, command)
        api = HfApi()
        api.create_repo(repo_id=repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), repo_type="model")
    except Exception as error:  # the hub's client raises types of several libraries
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{folder} is written, but cannot be uploaded to {repo} ({reason})"
        ) from None
    print(f"uploaded to https://huggingface.co/{repo}")


def _without_folder(word: str) -> str:
    flag, equals, value = word.rpartition("=")
    local = os.sep in value and os.path.exists(os.path.expanduser(value))
    return f"{flag}{equals}{Path(value).name if local else value}"


def _write_card(folder: Path, repo: str, base: str, command: str) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    path = folder / "README.md"
    data: Any = ModelCard.load(path).data if path.is_file() else ModelCardData()
    hub_id = HUB_ID.fullmatch(base) if not is_local(base) else None
    data.base_model = hub_id[1] if hub_id else data.base_model
    data.library_name = "mlx"
    tags = [*(data.tags or []), "mlx", "mlx-tokprune", "visual-token-pruning"]
    data.tags = list(dict.fromkeys(tags))
    file = next(name for name in _KINDS if (folder / name).exists())
    (kind, use), config = _KINDS[file], read_json(folder / file)
    acts = "norm_stats" in config or (folder / "norm_stats.json").exists()
    use = _POLICY if acts else use
    if file not in ("scorer.json", "adapter_config.json"):
        data.pipeline_tag = "robotics" if acts else "image-text-to-text"
    names = {"repo": repo, "name": repo.rpartition("/")[2]}
    names["base"] = hub_id[0] if hub_id else _without_folder(base)
    settings = config.get("pruner") if file == "config.json" else config
    settings = textwrap.indent(json.dumps(settings, indent=2), " " * 4)
    text = _CARD.format(
        **names,
        kind=kind,
        of=f" of [{hub_id[1]}](https://huggingface.co/{hub_id[1]})" if hub_id else "",
        version=metadata.version("mlx-tokprune"),
        command=command,
        settings="" if "null" == settings.strip() else f"\nSettings:\n\n{settings}\n",
        package=f"mlx-tokprune{'[mlx-vlm]' if file == 'tokprune.json' else ''}",
        use=use.format(**names).replace("\n", "\n    "),
    )
    with replacing(path) as stream:  # a link of `attach` is replaced, not followed
        stream.write(f"---\n{data.to_yaml()}\n---\n\n{text}".encode())

"""Group 1: checkpoint folders with one or two faults."""

import contextlib
import json
import os
import shutil
import struct
from pathlib import Path
from random import Random

import numpy as np

from . import damage
from .asks import CHECKS, PICTURES, POLICY, TINY, right
from .case import Outcome, Place, perform

JSON_FILES = ("tokenizer_config.json", "preprocessor_config.json", "tokenizer.json")
NEW_FILES = ("generation_config.json", "dataset_statistics.json", "vocab.json")
DEPTHS = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
INDEX = "model.safetensors.index.json"
NAMES = (
    *("../model.safetensors", "/etc/passwd", "sub/model.safetensors", "", ".", ".."),
    *("x" * 5000, "a\nb", "\x1b[2J", "nul\x00", "model.safetensors\x00", "\ud800"),
    *("model.safetensors", "config.json", 7, None, ["model.safetensors"], "~", "x"),
)
SPANS = ([0, 8], [8, 0], [0], [-8, 0], [1e3], [0, 2**63], "x")
WEIGHT = "model.safetensors"
MARK = "ran"  # the file that code in a checkpoint would write


def run(rng: Random, place: Place) -> Outcome:
    made = [place.base / name for name in ("quantized", "oft")]
    source = rng.choice((TINY, TINY, POLICY, POLICY, *made))
    folder = copied(source, place.folder / "model")
    names = list(FAULTS)
    faults = rng.choices(names, [FAULTS[f] for f in names], k=rng.choice((1, 1, 2)))
    for fault in faults:
        # The first fault may leave nothing for the second to damage.
        with contextlib.suppress(TypeError, ValueError, LookupError, AttributeError):
            fault(rng, folder)
    command = _command(rng, source)
    argv = right(command, place, folder)
    if command == "act" and source.name == "oft":
        numbers = rng.choice((["0"], ["0"], ["0"], ["nan"], ["inf"], ["1e308"]))
        argv += ["--image", str(PICTURES[POLICY]), "--proprio", *numbers * 5]
    if command == "evaluate" and source == POLICY:
        argv += ["--data", str(place.base / "actions.jsonl")]
    if command == "convert" and rng.random() < 0.4:
        argv += rng.choice((["-q"], ["--dtype", "float16"], ["--pictures", "2"]))
    outcome = perform(command, argv, place, CHECKS.get(command))
    if list(place.folder.rglob(MARK)):
        return Outcome("wrong", f"code of the checkpoint ran: {outcome.told}")
    told = f"{outcome.told}\n  {[fault.__name__ for fault in faults]} of {source.name}"
    return Outcome(outcome.kind, told)


def _command(rng: Random, source: Path) -> str:
    acts = source.name in (POLICY.name, "oft")
    own, other = ("act", "generate") if acts else ("generate", "act")
    names, weights = zip(
        *((own, 8), ("convert", 7), ("evaluate", 4), (other, 1), ("coreml", 0.4)),
        strict=True,
    )
    return rng.choices(names, weights)[0]


def copied(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".png" and not path.name.startswith("expected"):
            shutil.copyfile(path, folder / path.name)
    return folder


def _json(path: Path) -> dict:
    """Return a file's JSON object, empty where an earlier fault made it unreadable."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# Faults -----------------------------------------------------------------------------


def config(rng: Random, folder: Path) -> None:
    path = folder / "config.json"
    _put(path, damage.json_bytes(rng, _json(path)))


def sizes(rng: Random, folder: Path) -> None:
    """Replace a size of the language model by an odd value."""
    found = _json(folder / "config.json")
    inner = found.get("text_config", found)
    number = rng.choice((0, -1, 1, 3, 10**6, 10**9, 10**30, 1.5, "3", None, [3]))
    inner[rng.choice(DEPTHS)] = number
    _put(folder / "config.json", damage.as_json(found))


def oft(rng: Random, folder: Path) -> None:
    """Damage the settings of OpenVLA-OFT: chunk, images and normalization."""
    found = _json(folder / "config.json")
    found["oft"] = damage.changed(rng, found.get("oft") or {"chunk": 8})
    _put(folder / "config.json", damage.as_json(found))


def vision(rng: Random, folder: Path) -> None:
    found = _json(folder / "config.json")
    found["vision_config"] = damage.changed(rng, found.get("vision_config", {"a": 1}))
    _put(folder / "config.json", damage.as_json(found))


def statistics(rng: Random, folder: Path) -> None:
    path = folder / "dataset_statistics.json"
    if path.is_file():
        _put(path, damage.as_json(damage.changed(rng, _json(path), 2)))
        return
    found = _json(folder / "config.json")
    stats = found.get("norm_stats") or {"x": {"action": {"q01": [0], "q99": [1]}}}
    found["norm_stats"] = damage.changed(rng, stats, rng.choice((1, 2, 3)))
    _put(folder / "config.json", damage.as_json(found))


def quantization(rng: Random, folder: Path) -> None:
    found = _json(folder / "config.json")
    values = (4, 8, 4.0, 64.0, 64, 32, 0, -4, 3, 10**30, "4", None, True, [4], {})
    chosen = {"group_size": rng.choice(values), "bits": rng.choice(values)}
    chosen["mode"] = rng.choice(("affine", "mxfp4", "x", None, 7))
    found["quantization"] = rng.choice((chosen, chosen, chosen, damage.odd(rng)))
    _put(folder / "config.json", damage.as_json(found))


def side_json(rng: Random, folder: Path) -> None:
    path = folder / rng.choice((*JSON_FILES, *NEW_FILES))
    value = _json(path) or {"eos_token_id": [1], "toy": {"action": {"q01": [0]}}}
    _put(path, damage.json_bytes(rng, value))


def side_bytes(rng: Random, folder: Path) -> None:
    path = folder / rng.choice(JSON_FILES)
    data = path.read_bytes() if path.is_file() else b"{}"
    _put(path, damage.damaged(rng, data))


def gone(rng: Random, folder: Path) -> None:
    rng.choice(sorted(folder.iterdir())).unlink()


def header(rng: Random, folder: Path) -> None:
    """Damage header entries: they contradict themselves, each other, or the file."""
    entries, data = _opened(folder)
    how = rng.randrange(5)
    name = rng.choice([name for name in entries if name != "__metadata__"])
    if how == 0:
        entries["__metadata__"] = rng.choice(({"a": 1}, [], "x", None, {"a": None}))
    elif how == 1:
        entries[name]["dtype"] = rng.choice(("F64", "I64", "U8", "F8_E4M3", "x", 7, []))
    elif how == 2:
        entries[name]["data_offsets"] = rng.choice(SPANS)
    elif how == 3:
        entries[rng.choice(NAMES[6:12])] = entries.pop(name)
    else:
        entries = damage.changed(rng, entries)
    _write(folder, entries, data)


def header_bytes(rng: Random, folder: Path) -> None:
    entries, data = _opened(folder)
    text = damage.damaged(rng, json.dumps(entries).encode())
    lengths = (len(text), len(text), 0, 1, 10**8 + 1, 2**63, 2**64 - 1, len(text) + 8)
    start = struct.pack("<Q", rng.choice(lengths))
    _put(folder / WEIGHT, start + text + data)


def weight_bytes(rng: Random, folder: Path) -> None:
    path = folder / WEIGHT
    data = path.read_bytes() if path.is_file() else b""
    _put(path, damage.damaged(rng, data))


def not_finite(rng: Random, folder: Path) -> None:
    """Set one number of a random float32 tensor to NaN, infinity or 3e38."""
    entries, data = _opened(folder)
    name = rng.choice(_floats(entries))
    begin, end = entries[name]["data_offsets"]
    values = np.frombuffer(data, np.uint8).copy()
    at = begin + 4 * rng.randrange((end - begin) // 4)
    number = rng.choice((np.nan, np.inf, -np.inf, 3e38, -3e38))
    values[at : at + 4] = np.frombuffer(np.float32(number).tobytes(), np.uint8)
    _write(folder, entries, values.tobytes())


def _floats(entries: dict) -> list[str]:
    named = entries.items()
    return [n for n, e in named if isinstance(e, dict) and e.get("dtype") == "F32"]


def huge_weights(rng: Random, folder: Path) -> None:
    """Fill a random float32 tensor with finite numbers whose products overflow."""
    entries, data = _opened(folder)
    name = rng.choice(_floats(entries))
    begin, end = entries[name]["data_offsets"]
    values = np.full((end - begin) // 4, rng.choice((1e38, -3e38, 1e30)), np.float32)
    _write(folder, entries, data[:begin] + values.tobytes() + data[end:])


def index(rng: Random, folder: Path) -> None:
    names = [name for name in _opened(folder)[0] if name != "__metadata__"]
    if rng.random() < 0.7:
        weights = dict.fromkeys(names, WEIGHT)
        weights[rng.choice(names)] = rng.choice(NAMES)
    else:
        weights = {name: rng.choice(NAMES) for name in names[:3]}
    text = damage.as_json({"weight_map": weights})
    if rng.random() < 0.3:
        text = damage.json_bytes(rng, {"weight_map": weights, "metadata": {"a": 1}})
    _put(folder / INDEX, text)


def pipe(rng: Random, folder: Path) -> None:
    names = ("config.json", WEIGHT, INDEX, *JSON_FILES, *NEW_FILES, "README.md")
    path = folder / rng.choice(names)
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(rng: Random, folder: Path) -> None:
    """Replace a file by a link to a secret, itself, nothing, a folder or /dev/zero."""
    names = ("config.json", WEIGHT, INDEX, "README.md", "LICENSE", *JSON_FILES)
    path = folder / rng.choice((*names, *NEW_FILES))
    secret = folder.parent / "secret.json"
    secret.write_text('{"secret": 1}')
    path.unlink(missing_ok=True)
    ends = (secret, "/etc/passwd", path, folder / "nothing", "/", "/dev/zero")
    path.symlink_to(rng.choice(ends))


def code(rng: Random, folder: Path) -> None:
    """Add code to the checkpoint, and a config that asks to run it."""
    text = f"open({str(folder / MARK)!r}, 'w')\nclass Own: pass\n"
    (folder / "own.py").write_text(text)
    name = rng.choice(("config.json", "tokenizer_config.json"))
    found = _json(folder / name)
    found["auto_map"] = {
        "AutoConfig": "own.Own",
        "AutoTokenizer": ["own.Own", "own.Own"],
        "AutoModel": "own.Own",
    }
    if rng.random() < 0.5:
        found["tokenizer_class"] = rng.choice(("Own", "own.Own", "os.system"))
    _put(folder / name, damage.as_json(found))


def pickled(rng: Random, folder: Path) -> None:
    """Write a pickle that would run a command when loaded."""
    run = f"cos\nsystem\n(Vtouch {folder / MARK}\ntR.".encode()
    name = ("action_head--1_checkpoint.pt", "model.bin", "tokenizer.pkl")
    _put(folder / rng.choice(name), run)
    if rng.random() < 0.2:
        (folder / WEIGHT).unlink(missing_ok=True)


def _opened(folder: Path) -> tuple[dict, bytes]:
    """Return header and data of the weights, or of undamaged weights."""
    for path in (folder / WEIGHT, TINY / WEIGHT):
        raw = path.read_bytes() if path.is_file() else b""
        length = int.from_bytes(raw[:8], "little")
        try:
            header = json.loads(raw[8 : 8 + length])
        except (ValueError, OverflowError):
            continue
        if isinstance(header, dict):
            return header, raw[8 + length :]
    raise AssertionError(TINY)


def _write(folder: Path, entries: dict, data: bytes) -> None:
    text = damage.as_json(entries)
    _put(folder / WEIGHT, struct.pack("<Q", len(text)) + text + data)


def _put(path: Path, data: bytes) -> None:
    """Write `data` in place of `path`, which may be a pipe or a link."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


FAULTS = {config: 6, sizes: 3, vision: 3, statistics: 4, quantization: 3, side_json: 5}
FAULTS |= {side_bytes: 2, gone: 1, header: 4, header_bytes: 2, weight_bytes: 1}
FAULTS |= {not_finite: 2, huge_weights: 2, index: 4, pipe: 2, link: 3, code: 2}
FAULTS |= {pickled: 1, oft: 1}

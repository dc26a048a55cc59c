"""Damage of JSON values and bytes."""

import copy
import json
from random import Random

_DEEP = "@@DEEP@@"
ODD = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 1.5, -0.0, 4.0, 64.0, 1e-320, 1e308),
    *(10**6, 2**31, 2**63, 10**30, -(10**30), float("nan"), float("inf")),
    *(float("-inf"), "", "x", "0", "nan", "\x1b[31mred", "a\nb", "\x00", "\ud800"),
    *("é\u202e", "../../etc/passwd", "/etc/passwd", "x" * 5000, "<image>", "{}"),
    *([], [1], ["x"], [None], [[[]]], [1, 2, 3, 4, 5, 6, 7], {}, {"a": 1}, {"": {}}),
    *([float("nan")] * 7, [10**30] * 7, _DEEP),
)


def odd(rng: Random):
    """Draw an odd JSON value."""
    return copy.deepcopy(rng.choice(ODD))


def places(value, found: list | None = None) -> list[tuple]:
    """Return (container, key) of every nested value."""
    found = [] if found is None else found
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], found)
    return found


def changed(rng: Random, value, times: int = 1):
    """Return a copy with nested values deleted, replaced, scaled or copied."""
    value = copy.deepcopy(value)
    for _ in range(times):
        spots = places(value)
        if spots:
            _change(rng, *rng.choice(spots))
    return value


def _change(rng: Random, container, key) -> None:
    how = rng.randrange(6)
    old = container[key]
    if how == 0:
        del container[key]
    elif how == 1 and type(old) in (int, float):
        container[key] = old * rng.choice((-1, 2, 3, 0.5, 1000, 10**6))
    elif how == 2 and isinstance(old, list) and old:
        container[key] = old * 2 if rng.random() < 0.5 else old[:-1]
    elif how == 3 and isinstance(container, dict):
        container[rng.choice(("x" * 5000, "a\nb", "\x1b[2J", "", key + "x"))] = old
    else:
        container[key] = odd(rng)


def as_json(value) -> bytes:
    """Return JSON bytes, also of values nested too deeply for the encoder."""
    deep = "[" * 100_000 + "]" * 100_000
    return json.dumps(value).replace(f'"{_DEEP}"', deep).encode()


def json_bytes(rng: Random, value) -> bytes:
    """Return damaged JSON of `value`; in three of four cases only fields differ."""
    if rng.random() < 0.75:
        return as_json(changed(rng, value, rng.choice((1, 1, 1, 2, 4))))
    text = as_json(value)
    other = (b"", b"[]", b"null", b"NaN", b"\xff\xfe{", b"{" * 100_000, b'{"a":' * 9999)
    return rng.choice((*other, *(cut(rng, text), flipped(rng, text)) * 4))


def cut(rng: Random, data: bytes) -> bytes:
    """Return a random prefix of `data`."""
    return data[: rng.randrange(len(data) + 1)]


def flipped(rng: Random, data: bytes, within: int | None = None) -> bytes:
    """Return `data` with up to eight of its first `within` bytes replaced."""
    damaged = bytearray(data)
    reach = min(len(damaged), within or len(damaged))
    for _ in range(rng.randint(1, 8) if reach else 0):
        byte = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        damaged[rng.randrange(reach)] = byte
    return bytes(damaged)


def grown(rng: Random, data: bytes) -> bytes:
    """Return `data` with random bytes inserted."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 8, 1000))) + data[at:]


def damaged(rng: Random, data: bytes, within: int | None = None) -> bytes:
    how = rng.choice((cut, flipped, flipped, grown))
    return how(rng, data, within) if how is flipped else how(rng, data)

"""Group 10: pictures by odd URLs, from servers that answer wrongly, and from stdin."""

import base64
import io
import json
import socket
import sys
import threading
from functools import cache
from random import Random
from unittest import mock

from mlx_tokprune.processing import sources

from . import damage, pictures
from .asks import PICTURES, TINY, right
from .case import Outcome, Place, perform

DATA = PICTURES[TINY].read_bytes()
ANSWERS: dict[str, bytes] = {}  # whole responses by path
HEADS = (
    *(b"HTTP/1.1 200 OK", b"HTTP/1.0 200 OK", b"HTTP/1.1 404 Not Found", b"HTTP/9.9 1"),
    *(b"HTTP/1.1 301 Moved", b"HTTP/1.1 302 Found", b"HTTP/1.1 308 Moved", b"ICY 200"),
    *(b"HTTP/1.1 204 No Content", b"HTTP/1.1 500 \xff\xfe", b"HTTP/1.1 999", b"", b"x"),
    *(b"HTTP/1.1 401 Unauthorized", b"HTTP/1.1 100 Continue", b"HTTP/1.1 -1 no"),
)
HEADERS = (
    *(b"Content-Length: 99999999999999", b"Content-Length: -1", b"Content-Length: x"),
    *(b"Content-Length: 10", b"Transfer-Encoding: chunked", b"Content-Type: \xff"),
    *(b"Location: file:///etc/passwd", b"Location: /a", b"Location: ftp://x/y"),
    *(b"Location: http://[", b"Location: \xc3\xa9", b"Location: //", b"no header"),
    *(b"Location: data:image/png,x", b"Content-Encoding: gzip", b"A: " + b"x" * 70_000),
    b"WWW-Authenticate: Basic",
)
ODD = (
    *("http://", "https://", "http:///x", "http://h:0/", "http://h:99999/", "http://["),
    *("HTTP://127.0.0.1:1/", "https://127.0.0.1:1/x", "http://u:p@127.0.0.1:1/x"),
    *("http://127.0.0.1:1/\n", "http://127.0.0.1:1/\udc80", "http://\u2603/", "data:,"),
    *("data:", "data:x", "data:;base64,", "data:;base64,@", "data:image/png,%89PNG"),
    *("data:" + "a" * 10**5 + ",b", "data:;base64," + "A" * 10**6, "file:", "file://"),
    *("file:///", "file:///etc", "file:///dev/null", "file:///%00", "file://h/x", "-"),
    *("ftp://h/x", "s3://b/k", "javascript://x", "x://", "://", "file:///nowhere.png"),
    *("http://127.0.0.1:1/" + "x" * 10**5, "data:image/png;base64,iVBORw0KGgo="),
)


def run(rng: Random, place: Place) -> Outcome:
    sources.SECONDS = 2.0
    kinds = {_served: 5, _written: 3, _good: 3, _odd: 3, _piped: 2}
    source, data, good = rng.choices(list(kinds), list(kinds.values()))[0](rng, place)
    command = rng.choices(("generate", "chat"), (4, 1))[0]
    argv = right(command, place)
    argv[argv.index("--image") + 1] = source
    if command == "generate":
        more = rng.choice(([], ["--each"], ["--image", source], ["--temporal"]))
        argv += ["--json"] if good else more
    check = _same_answer if good and command == "generate" else None
    stdin = io.TextIOWrapper(io.BytesIO(data))
    with mock.patch.object(sys, "stdin", stdin):
        outcome = perform(command, argv, place, check)
    if good and command == "generate" and outcome.kind == "refused":
        return Outcome("wrong", f"an undamaged picture is refused: {outcome.told}")
    return outcome


@cache
def _expected(place_text: str) -> list[int]:
    from mlx_tokprune import load, stream_generate

    options = {"max_tokens": 2, "seed": 0}
    pieces = stream_generate(*load(TINY), [PICTURES[TINY]], "What?", **options)
    return [piece.token for piece in pieces]


def _same_answer(out: str) -> str | None:
    ids = json.loads(out.strip().splitlines()[-1])["token_ids"]
    return None if ids == _expected("") else f"another answer: {ids}"


@cache
def _port() -> int:
    """Return the port of a server of this process that sends `ANSWERS`."""
    made = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            client, _ = made.accept()
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    def answer(client: socket.socket) -> None:
        with client:
            client.settimeout(5)
            try:
                path = client.recv(1 << 16).split(b" ")[1].decode("latin-1")
                client.sendall(ANSWERS.get(path, b""))
            except (OSError, IndexError):
                pass

    threading.Thread(target=serve, daemon=True).start()
    return made.getsockname()[1]


def _address(response: bytes) -> str:
    path = f"/{len(ANSWERS)}"
    ANSWERS[path] = response
    return f"http://127.0.0.1:{_port()}{path}"


def _response(body: bytes, *headers: bytes) -> bytes:
    head = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join([*head, b"Connection: close", b"", body])


def _good(rng: Random, place: Place) -> tuple[str, bytes, bool]:
    """Return an undamaged picture in one of the forms, piped or not."""
    away = b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n"
    url = _address(_response(DATA))
    for _ in range(rng.randrange(3)):
        url = _address(away % url.encode())
    text = base64.b64encode(DATA).decode()
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
    )
    forms = [
        url,
        _address(chunked % (len(DATA), DATA)),
        f"data:image/png;base64,{text}",
    ]
    forms += [PICTURES[TINY].as_uri(), "-"]
    return rng.choice(forms), DATA, True


def _served(rng: Random, place: Place) -> tuple[str, bytes, bool]:
    """Return the URL of a response that is damaged, or made of odd parts."""
    if rng.random() < 0.5:
        whole = _response(DATA, b"Content-Type: image/png")
        return (
            _address(damage.damaged(rng, whole, rng.choice((30, 90, 300)))),
            b"",
            False,
        )
    parts = [rng.choice(HEADS), *rng.sample(HEADERS, rng.randrange(4)), b"", b""]
    body = rng.choice((DATA, DATA[:99], b"", b"<html></html>", b"5\r\nhello\r\n0\r\n"))
    return _address(rng.choice((b"\r\n", b"\n")).join(parts) + body), b"", False


def _written(rng: Random, place: Place) -> tuple[str, bytes, bool]:
    """Return a damaged picture in a response, a `data:` URI or standard input."""
    data = pictures._bytes(rng)
    if rng.random() < 0.3:
        return "-", data, False
    if rng.random() < 0.5:
        return _address(_response(data)), b"", False
    return f"data:image/png;base64,{base64.b64encode(data).decode()}", b"", False


def _odd(rng: Random, place: Place) -> tuple[str, bytes, bool]:
    return rng.choice(ODD), rng.choice((b"", DATA, b"\xff" * 9)), False


def _piped(rng: Random, place: Place) -> tuple[str, bytes, bool]:
    data = damage.damaged(rng, DATA, rng.choice((16, len(DATA))))
    return "-", rng.choice((data, b"", b"\0" * 99)), False

"""Pictures by URL, `data:` URI, standard input and bytes; loopback servers only."""

import base64
import http.server
import io
import sys
import threading
import time
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from mlx_tokprune import generate
from mlx_tokprune.errors import InputError
from mlx_tokprune.evaluate.items import read_questions
from mlx_tokprune.processing import sources
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.processing.sources import named_image

PICTURE = TINY / "image_1.png"
DATA = PICTURE.read_bytes()
BASE64 = base64.b64encode(DATA).decode()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the path of the request."""

    requests: ClassVar[list] = []

    def do_GET(self):
        self.requests.append((self.path, self.headers["User-Agent"]))
        kind, _, rest = self.path[1:].partition("/")
        if kind == "to":  # /to/N redirects N times, then to a picture
            left = int(rest)
            return self.redirect(f"/to/{left - 1}" if left > 1 else "/picture")
        if kind == "away":
            return self.redirect(sources.urlsplit(self.path).query)
        if kind == "status":
            self.send_response(int(rest))
            self.end_headers()
            return None
        body = {"picture": DATA, "html": b"<html></html>", "empty": b""}.get(kind, DATA)
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if kind == "html" else "image/png")
        length = {"short": len(body) + 9, "huge": 10**12}.get(kind, len(body))
        if kind != "endless":
            self.send_header("Content-Length", str(length))
        self.end_headers()
        try:
            while kind in ("slow", "endless"):
                self.wfile.write(b"\0" * (1 if kind == "slow" else 1 << 20))
                time.sleep(0.05 if kind == "slow" else 0)
            self.wfile.write(body)
        except OSError:
            pass
        return None

    def redirect(self, where: str):
        self.send_response(302)
        self.send_header("Location", where)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    """Return the address of a server on this machine."""
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


@pytest.fixture
def piped(monkeypatch):
    """Return a function that sets the bytes of standard input."""

    def pipe(data: bytes, terminal: bool = False):
        stdin = types.SimpleNamespace(
            buffer=io.BytesIO(data), isatty=lambda: terminal, read=lambda: data.decode()
        )
        monkeypatch.setattr(sys, "stdin", stdin)

    return pipe


def same(picture: Image.Image) -> bool:
    return np.array_equal(np.asarray(picture), np.asarray(load_image(PICTURE)))


@pytest.mark.enable_socket
@pytest.mark.parametrize("path", ["/picture", "/to/1", "/to/4", "/picture?a=b&c#d"])
def test_a_url_is_fetched(server, path):
    assert same(named_image(server + path))
    assert same(named_image(server.replace("http", "HTTP") + path))


@pytest.mark.enable_socket
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/status/404", "the server answers 404 Not Found"),
        ("/status/500", "the server answers 500"),
        ("/to/9", "redirect"),
        ("/away/?file:///etc/passwd", "to url 'file:///etc/passwd' is not allowed"),
        (
            "/away/?ftp://127.0.0.1/x",
            "redirects to ftp://127.0.0.1/x, which is no http",
        ),
        ("/away/?data:image/png,x", "is not allowed"),
        ("/html", "(its type is text/html) is not a picture that Pillow can read"),
        ("/empty", "no bytes; expected those of a picture"),
        ("/short", "cannot fetch"),
        ("/huge", "more than 50 MB"),
        ("/a b", "which is no http or https URL"),
        ("/é", "which is no http or https URL"),
    ],
)
def test_a_url_that_cannot_be_fetched(server, path, message):
    with pytest.raises(InputError) as error:
        named_image(server + path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.enable_socket
@pytest.mark.parametrize("path", ["/slow", "/endless"])
def test_a_download_is_bounded_in_time_and_size(server, path, monkeypatch):
    monkeypatch.setattr(sources, "SECONDS", 0.5)
    monkeypatch.setattr(sources, "LARGEST", 3 << 20)
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"within 0\.5 s|more than 3 MB"):
        named_image(server + path)
    assert time.monotonic() - begin < 5


@pytest.mark.enable_socket
def test_a_server_that_does_not_answer(monkeypatch):
    import socket

    monkeypatch.setattr(sources, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(InputError, match=r"within 0\.3 s"):
            named_image(f"http://127.0.0.1:{silent.getsockname()[1]}/x")
        port = silent.getsockname()[1]
    with pytest.raises(InputError, match="refused"):
        named_image(f"http://127.0.0.1:{port}/x")


@pytest.mark.enable_socket
def test_a_url_of_a_data_file_is_not_fetched(server, tmp_path):
    Handler.requests.clear()
    lines = tmp_path / "q.jsonl"
    lines.write_text(
        f'{{"image": "{server}/picture", "question": "Q?", "answer": "a"}}\n'
    )
    with pytest.raises(InputError, match="does not exist"):
        [item.load() for item in read_questions(str(lines), 1, None).items]
    with pytest.raises(InputError, match="is a URL, which is not fetched from here"):
        load_image(f"{server}/picture")
    assert not Handler.requests


@pytest.mark.parametrize(
    "source",
    [
        PICTURE,
        str(PICTURE),
        PICTURE.as_uri(),
        f"file://localhost{PICTURE}",
        f"file:{PICTURE}",
        DATA,
        bytearray(DATA),
        memoryview(DATA),
        f"data:image/png;base64,{BASE64}",
        f"DATA:;base64,{BASE64.rstrip('=')}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in DATA),
        np.asarray(load_image(PICTURE)),
        load_image(PICTURE),
    ],
)
def test_forms_of_one_picture(source):
    assert same(named_image(source))


def test_a_file_url_has_escapes(tmp_path):
    name = tmp_path / "a b%c é.png"
    name.write_bytes(DATA)
    assert same(named_image(name.as_uri()))


def test_standard_input(piped):
    piped(DATA)
    assert same(named_image("-"))
    with pytest.raises(InputError, match="standard input: no bytes"):
        named_image("-")
    piped(DATA, terminal=True)
    with pytest.raises(InputError, match="is a terminal; pipe a picture"):
        named_image("-")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ftp://host/x.png", "has the scheme 'ftp'; expected a file, or an http"),
        ("http://", "which is no http or https URL"),
        ("http:///x.png", "which is no http or https URL"),
        ("https://name:secret@host/x.png", "https://host/x.png, which is no http"),
        ("http://host:99999/x", "which is no http or https URL"),
        ("http://[::1/x", "which is no http or https URL"),
        ("http://h/\n", "which is no http or https URL"),
        ("file://otherhost/x.png", "is no file of this machine"),
        ("file:///nowhere.png", "does not exist or is not a file"),
        ("data:image/png;base64,@@@@", "is no base64"),
        ("data:image/png;base64,", "no bytes"),
        ("data:text/plain,hello", "is not a picture that Pillow can read"),
        ("data:", "no bytes"),
        (b"", "no bytes"),
        (b"hello", "is not a picture"),
        (DATA[:50], "picture"),
        (7, "a picture is a file"),
    ],
)
def test_what_is_no_picture(source, message):
    with pytest.raises(InputError) as error:
        named_image(source)
    assert message in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.enable_socket
def test_generate_takes_all_forms(tiny, server):
    options = {"max_tokens": 3}
    expected = generate(*tiny, [PICTURE], "Hi", **options)
    for source in (DATA, f"{server}/picture", [Image.open(io.BytesIO(DATA))]):
        assert generate(*tiny, source, "Hi", **options) == expected


def test_a_folder_of_a_name_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:b,c.png").write_bytes(DATA)
    assert same(named_image("a:b,c.png"))

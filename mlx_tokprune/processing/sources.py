"""Pictures that the user names: files, URLs, `data:` URIs, standard input, bytes.

Data files never come here: `load_image`, which reads them, fetches nothing.
"""

import base64
import binascii
import http.client
import io
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import IO, Any
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image

from ..errors import InputError
from .image import load_image, open_image

LARGEST = 50_000_000  # bytes of a picture that is not a file
SECONDS = 30.0  # for a whole download
_REDIRECTS = 5
_SCHEME = re.compile(r"(?:data|file)(?=:)|[a-z][a-z0-9+.-]*(?=://)", re.I)


def named_image(source: Any) -> Image.Image:
    """Decode a picture that the user named to RGB.

    source: a file, an http(s), `file:` or `data:` URL, "-" for standard input, the
    bytes of a picture, or what `load_image` takes. Raises `InputError` for each fault.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), "(bytes)")
    if not isinstance(source, str):
        return load_image(source)
    if source == "-":
        return _decode(_read_stdin(), "standard input")
    scheme = _SCHEME.match(source)
    if scheme is None:
        return load_image(source)
    name = scheme[0].lower()
    if name in ("http", "https"):
        data, kind = _fetch(source)
        type_ = f" (its type is {kind})" if kind else ""
        return _decode(data, f"{_shown(source)}{type_}")
    if name == "file":
        return load_image(_path(source))
    if name == "data":
        return _decode(_data(source), f"{source[:40]}...")
    raise InputError(
        f"picture {_shown(source)} has the scheme {name!r}; expected a file, or an "
        "http, https, file or data URL"
    )


def _decode(data: bytes, name: str) -> Image.Image:
    if not data:
        raise InputError(f"{name}: no bytes; expected those of a picture")
    _check_size(len(data), name)
    return open_image(io.BytesIO(data), name)


def _check_size(size: int, name: str) -> None:
    if size > LARGEST:
        raise InputError(
            f"{name}: more than {LARGEST // 10**6} MB; expected a smaller picture, "
            "or a file"
        )


def _read_stdin() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("standard input is a terminal; pipe a picture into it")
    return sys.stdin.buffer.read(LARGEST + 1)


def _path(url: str) -> str:
    """Return the path of a `file:` URL."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise InputError(
            f"picture {url[:200]!r} is no file of this machine; expected "
            "file:///FOLDER/PICTURE"
        )
    return os.fsdecode(unquote_to_bytes(os.fsencode(parts.path)))


def _data(uri: str) -> bytes:
    """Return the bytes of a `data:` URI (RFC 2397)."""
    head, _, body = uri.partition(",")
    data = unquote_to_bytes(os.fsencode(body))
    if not head.lower().endswith(";base64"):
        return data
    try:
        data = re.sub(rb"\s", b"", data)
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(
            f"the picture of {uri[:40]}... is no base64; expected "
            "data:image/png;base64,DATA"
        ) from None


# Downloads --------------------------------------------------------------------------


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Handler of redirects: few, and to http or https only."""

    max_redirections = max_repeats = _REDIRECTS

    def redirect_request(
        self, req: Any, fp: IO, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Return the next request; `InputError` for another scheme."""
        try:
            _check_url(newurl, f"{_shown(req.full_url)} redirects to ")
        except InputError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_url(url: str, begin: str = "") -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        valid = valid and parts.username is None and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(
            f"{begin}{_shown(url)}, which is no http or https URL; expected "
            "https://HOST/PICTURE, without a user name, and with %XX for characters "
            "that are not ASCII"
        )


def _shown(url: str) -> str:
    """Return a URL without user name and password, cut to a message's length."""
    return re.sub(r"//[^/?#]*@", "//", url)[:200]


def _fetch(url: str) -> tuple[bytes, str]:
    """Return the bytes and the media type of a URL, within `SECONDS`.

    A thread downloads, because a timeout of a socket bounds each read, not the whole.
    """
    _check_url(url)
    results: list = []

    def work() -> None:
        try:
            results.append(_download(url))
        except Exception as error:  # raised below, in the caller's thread
            results.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS)
    result = results[0] if results else TimeoutError()
    if isinstance(result, InputError):
        raise result
    if isinstance(result, Exception):
        raise InputError(f"cannot fetch {_shown(url)} ({_reason(result)})") from None
    return result


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        text = f"the server answers {error.code} {error.reason}"
    else:
        cause = getattr(error, "reason", error)
        late = isinstance(cause, TimeoutError)
        text = f"no whole picture within {SECONDS:g} s" if late else str(cause)
    return " ".join(text.split())[:200] or type(error).__name__


def _download(url: str) -> tuple[bytes, str]:
    opener = urllib.request.build_opener(_Redirects)
    headers = {"User-Agent": "mlx-tokprune", "Accept": "image/*,*/*;q=0.5"}
    request = urllib.request.Request(url, headers=headers)
    end = time.monotonic() + SECONDS
    with opener.open(request, timeout=SECONDS) as response:
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        _check_size(total or 0, _shown(url))
        parts, size = [], 0
        while part := response.read(1 << 16):
            parts.append(part)
            size += len(part)
            _check_size(size, _shown(url))
            if time.monotonic() > end:
                raise TimeoutError
        if total is not None and size < total:
            raise http.client.IncompleteRead(b"", total - size)
        return b"".join(parts), response.headers.get_content_type()

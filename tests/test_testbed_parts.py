"""Sources of the test bed: packages of every kind, and refusals."""

import io
import lzma
import tarfile
import zipfile

import pytest

from mlx_tokprune import InputError
from recipes.testbed import parts, run, things


def _tar(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return made.getvalue()


def _ar(files: dict[str, bytes]) -> bytes:
    made = b"!<arch>\n"
    for name, content in files.items():
        made += f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode()
        made += content + b"\n" * (len(content) % 2)
    return made


FILES = {"a/one.txt": b"one", "two.bin": bytes(range(9))}


def test_packages_of_every_kind_are_read(tmp_path):
    wheel, npm, debian = (
        tmp_path / f"p{suffix}" for suffix in (".whl", ".tgz", ".deb")
    )
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    npm.write_bytes(_tar(FILES))
    packed = lzma.compress(_tar(FILES))
    odd = {"debian-binary": b"2.0", "control.tar.xz": b"12345", "data.tar.xz": packed}
    debian.write_bytes(_ar(odd))
    for package in (wheel, npm, debian):
        assert dict(parts.members(package)) == FILES, package


def test_a_package_that_is_another_is_refused(tmp_path):
    package = parts.Package("p.whl", "https://example.org/p.whl", "0" * 64)
    (tmp_path / "p.whl").write_bytes(b"something else")
    with pytest.raises(InputError, match="not the package that we know"):
        parts.fetch(package, tmp_path)


def test_a_package_that_cannot_be_had_is_said(tmp_path, monkeypatch):
    def fail(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(parts.urllib.request, "urlopen", fail)
    with pytest.raises(InputError, match=r"cannot get resnet.*no route.*that file in"):
        parts.fetch(parts.TOWER, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_test_bed_says_how_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_TOKPRUNE_CACHE", str(tmp_path))
    things.stock.cache_clear()
    with pytest.raises(InputError, match=r"python -m recipes\.testbed"):
        things.stock("test")


def test_commands_run_on_the_test_bed_when_it_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "BUILT", tmp_path / "none")
    with pytest.raises(SystemExit):
        run.main(["generate", "--model", "testbed"])
    assert "python -m recipes.testbed" in capsys.readouterr().err
    run.main(["methods"])
    assert "norm" in capsys.readouterr().out

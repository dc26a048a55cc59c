"""Revisions and uploads, against a fake hub; nothing is sent anywhere."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from conftest import TINY, TINY_POLICY
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError

from mlx_tokprune import __main__ as program
from mlx_tokprune import load
from mlx_tokprune.checkpoints.hub import resolve
from mlx_tokprune.checkpoints.upload import check_repo, upload
from mlx_tokprune.errors import InputError

IMAGE = str(TINY / "image_1.png")
ID, COMMIT = "org/tiny", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch):
    """Return the requests to a hub whose org/tiny has some revisions."""
    requests = []

    def snapshot_download(repo_id, *, allow_patterns, revision=None):
        requests.append((repo_id, revision))
        if repo_id not in (ID, "org/tiny-policy"):
            raise ValueError("401 Client Error")
        if revision not in (None, "main", "v1.0", "a/branch", COMMIT):
            raise ValueError(f"404 Client Error\nno revision {revision}")
        return str(TINY if repo_id == ID else TINY_POLICY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return requests


@pytest.mark.parametrize("revision", ["main", "v1.0", "a/branch", COMMIT])
def test_a_hub_id_may_name_a_revision(hub, revision):
    assert resolve(f"{ID}@{revision}") == TINY
    assert resolve(ID) == TINY
    assert hub == [(ID, revision), (ID, None)]
    load(f"{ID}@{revision}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            f"{ID}@v2",
            "org/tiny at revision v2 is no local folder and cannot be fetched",
        ),
        ("org/other@main", "401 Client Error"),
        (f"{ID}@", "does not exist; expected a checkpoint folder"),
        (f"{ID}@a b", "does not exist"),
        (f"{ID}@a@b", "does not exist"),
        ("demo@main", "does not exist"),
    ],
)
def test_a_revision_that_is_not_there(hub, name, message):
    with pytest.raises(InputError) as error:
        resolve(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_with_an_at_is_a_folder(tmp_path, hub, monkeypatch):
    (tmp_path / "org").mkdir()
    shutil.copytree(TINY, tmp_path / "org/tiny@main")
    monkeypatch.chdir(tmp_path)
    assert resolve(f"{ID}@main") == Path(f"{ID}@main")
    assert not hub


FEW = ["--keep-ratio", "0.5"]
ASK = ["--image", IMAGE, "--prompt", "Hi", "--max-tokens", "1"]
LINES = '{"image": "%s", "question": "What?", "answer": "a"}\n'
COMMANDS = {
    "generate": ["--model", ID, *ASK],
    "chat": ["--model", ID, "--image", IMAGE],
    "bench": ["--model", ID, "--image", IMAGE, "--methods", "norm", "--runs", "1"],
    "evaluate": ["--model", ID, "--data", "q.jsonl", "--methods", "norm"],
    "convert": ["--hf-path", ID, "--mlx-path", "made"],
    "fuse": ["--model", ID, "--adapter-path", "nowhere", "--save-path", "fused"],
    "act": ["--model", "org/tiny-policy", "--image", IMAGE, "--instruction", "lift"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_a_revision(hub, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("q.jsonl").write_text(LINES % IMAGE)
    monkeypatch.setattr("builtins.input", lambda _: "q")
    more = {"bench": ["--tokens", "1", "--keep-ratios", "0.5"]}
    more["evaluate"] = ["--max-tokens", "1", "--keep-ratios", "0.5"]
    argv = [*COMMANDS[name], *more.get(name, []), "--revision", "v1.0"]
    command = ["train", "fuse"] if name == "fuse" else [name]
    try:
        program.main([*command, *argv])
    except SystemExit:
        assert name == "fuse"  # there is no adapter
    assert {revision for _, revision in hub} == {"v1.0"}, capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--model", "demo"], ["--model", str(TINY)]])
def test_a_revision_is_of_a_hub_id(hub, capsys, flags):
    for more in (["--model", f"{ID}@v1.0"], []):
        with pytest.raises(SystemExit) as stop:
            program.main(["generate", *flags, *more, *ASK, "--revision", "main"])
        assert stop.value.code == 2
        assert "--revision is a branch, tag or commit of a hub id" in (
            capsys.readouterr().err
        )


# Uploads ----------------------------------------------------------------------------


class FakeHub:
    """Hub that copies what is uploaded. refusal: error of `create_repo`."""

    def __init__(self, folder: Path):
        self.folder, self.calls, self.refusal = folder, [], None

    def create_repo(self, *, repo_id, exist_ok):
        self.calls.append(("create", repo_id, exist_ok))
        if self.refusal:
            raise self.refusal

    def upload_folder(self, *, repo_id, folder_path, repo_type):
        self.calls.append(("upload", repo_id, repo_type))
        shutil.copytree(folder_path, self.folder)


@pytest.fixture
def uploads(monkeypatch, tmp_path):
    fake = FakeHub(tmp_path / "uploaded")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.chdir(tmp_path)
    return fake


def card_of(fake: FakeHub) -> ModelCard:
    return ModelCard.load(fake.folder / "README.md")


def test_a_converted_checkpoint_is_uploaded(uploads, hub, capsys):
    flags = ["--hf-path", f"{ID}@v1.0", "--mlx-path", "made", "--prune", "norm:0.5"]
    program.main(["convert", *flags, "--upload-repo", "me/tiny-mlx"])
    assert uploads.calls == [
        ("create", "me/tiny-mlx", True),
        ("upload", "me/tiny-mlx", "model"),
    ]
    files = {path.name for path in uploads.folder.iterdir()}
    assert {"config.json", "README.md", "tokenizer.json"} <= files
    assert any(name.endswith(".safetensors") for name in files)
    card = card_of(uploads)
    assert card.data.base_model == ID
    assert card.data.library_name == "mlx"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "visual-token-pruning" in card.data.tags
    for text in (
        "# me/tiny-mlx",
        "mlx_tokprune convert --hf-path org/tiny@v1.0 --mlx-path made --prune norm:0.5",
        "mlx_tokprune generate --model me/tiny-mlx --image photo.jpg",
        '"method": "norm"',
        "Nothing was measured",
    ):
        assert text in card.text
    out = capsys.readouterr().out
    assert "uploaded to https://huggingface.co/me/tiny-mlx" in out


def test_nothing_is_uploaded_without_the_flag(uploads):
    program.main(["convert", "--hf-path", str(TINY), "--mlx-path", "made"])
    assert not uploads.calls
    assert not Path("made/README.md").exists()


def test_metadata_of_the_source_s_card_are_kept(uploads, checkpoint):
    text = "---\nlicense: apple-amlr\ntags: [ml]\nbase_model: apple/x\n---\n# Old\n"
    (checkpoint / "README.md").write_text(text)
    flags = ["--hf-path", str(checkpoint), "--mlx-path", "made"]
    program.main(["convert", *flags, "--upload-repo", "me/x"])
    card = card_of(uploads)
    assert (card.data.license, card.data.base_model) == ("apple-amlr", "apple/x")
    assert card.data.tags[0] == "ml"
    assert "Old" not in card.text
    assert str(checkpoint.parent) not in card.content  # no folder of this machine
    assert f"--hf-path {checkpoint.name}" in card.text
    assert (checkpoint / "README.md").read_text() == text


def test_a_policy_s_card(uploads):
    flags = ["--hf-path", str(TINY_POLICY), "--mlx-path", "made"]
    program.main(["convert", *flags, "--upload-repo", "me/policy"])
    card = card_of(uploads)
    assert card.data.pipeline_tag == "robotics"
    assert "mlx_tokprune act --model me/policy" in card.text


def test_a_scorer_and_an_adapter_are_uploaded(uploads):
    Path("q.jsonl").write_text(LINES % IMAGE)
    small = ["--data", "q.jsonl", "--iters", "1", "--batch-size", "1"]
    small += ["--model", str(TINY), "--questions", "1"]
    for kind, file in (("prune", "scorer.json"), ("lora", "adapter_config.json")):
        flags = ["--output", kind, "--upload-repo", f"me/{kind}"]
        program.main(["train", kind, *small, *flags])
        files = {path.name for path in uploads.folder.iterdir()}
        assert {file, "README.md"} <= files
        card = card_of(uploads)
        assert f"mlx_tokprune train {kind} --data q.jsonl" in card.text
        assert f"hf download me/{kind} --local-dir {kind}" in card.text
        config = json.loads((Path(kind) / file).read_text())
        assert f'"{next(iter(config))}"' in card.text
        shutil.rmtree(uploads.folder)


def test_a_folder_of_attach_is_uploaded_with_what_its_links_lead_to(
    uploads, monkeypatch, tmp_path
):
    source = tmp_path / "source"
    shutil.copytree(TINY, source)
    (source / "README.md").write_text("# theirs\n")
    folder = tmp_path / "attached"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "tokprune.json").write_text('{"pruner": []}')
    upload("me/x", folder, "org/vlm", "attach", ["--model", "org/vlm"])
    assert (source / "README.md").read_text() == "# theirs\n"
    assert not (folder / "README.md").is_symlink()
    assert "python -m mlx_vlm.generate --model x --image" in card_of(uploads).text
    assert card_of(uploads).data.base_model == "org/vlm"
    assert (uploads.folder / "model.safetensors").stat().st_size > 1000


@pytest.mark.parametrize("repo", ["", "name", "a/b/c", "a b/c", "a/b--c", "/", "a/.."])
def test_a_name_that_is_no_repository(uploads, repo, capsys):
    with pytest.raises(InputError, match="is no name such as org/name"):
        check_repo(repo)
    flags = ["--hf-path", str(TINY), "--mlx-path", "made", "--upload-repo", repo]
    with pytest.raises(SystemExit):
        program.main(["convert", *flags])
    assert not Path("made").exists()
    assert not uploads.calls


@pytest.mark.parametrize(
    "error",
    [
        OSError("no network"),
        ValueError("403 Forbidden\nno write token"),
        RepositoryNotFoundError.__new__(RepositoryNotFoundError),
    ],
)
def test_a_hub_that_refuses_leaves_the_folder(uploads, error, capsys):
    uploads.refusal = error
    flags = ["--hf-path", str(TINY), "--mlx-path", "made", "--upload-repo", "me/x"]
    with pytest.raises(SystemExit) as stop:
        program.main(["convert", *flags])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "made is written, but cannot be uploaded to me/x" in err
    assert err.count("\n") == 1
    load("made")

"""Folders that prune when loaded: stock load, command and server of mlx-vlm."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

mlx_vlm = pytest.importorskip("mlx_vlm")

from vlm.families import FAMILIES, prompt  # noqa: E402
from vlm.loaded import HALF, LENGTH, MORE, QUESTION, Loaded  # noqa: E402

from mlx_tokprune import InputError  # noqa: E402
from mlx_tokprune.attach.__main__ import main  # noqa: E402

pytestmark = pytest.mark.usefixtures("not_compiled")
ASK = ["--method", "norm", "--keep-ratio", "0.5"]


@pytest.fixture(scope="module")
def folder(qwen, tmp_path_factory):
    target = tmp_path_factory.mktemp("pruned") / "m"
    main(["--model", str(qwen.folder), "--mlx-path", str(target), *ASK])
    return target


def expected(loaded, text: str, file: str) -> tuple[list[int], int]:
    """Return the ids and the prompt length of the answer after `attach` in Python."""
    with loaded.pruned(HALF):
        return loaded.ask(prompt(loaded.processor, loaded.model.config, text), file)


def test_links_and_settings_but_no_weights(qwen, folder):
    for path in folder.iterdir():
        linked = path.name not in ("config.json", "tokprune.json", "tokprune_model.py")
        assert path.is_symlink() == linked
    weights = (folder / "model.safetensors").resolve()
    assert weights == (qwen.folder / "model.safetensors").resolve()
    settings = json.loads((folder / "tokprune.json").read_text())
    (entry,) = settings["pruner"]
    assert (entry["method"], entry["keep_ratio"]) == ("norm", 0.5)


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", "qwen3_5_moe", "fastvlm", "gemma3n", "phi3_v"]
)
def test_stock_load_prunes(name, tmp_path):
    """A folder that `mlx_vlm.load` opens answers like the pruned model."""
    loaded = Loaded(FAMILIES[name], tmp_path / "m")
    target = tmp_path / "pruned"
    main(["--model", str(loaded.folder), "--mlx-path", str(target), *ASK])
    load_processor = mlx_vlm.utils.load_processor
    model, processor = mlx_vlm.load(str(target))
    assert mlx_vlm.utils.load_processor is load_processor
    text = prompt(processor, model.config, QUESTION)
    pieces = mlx_vlm.stream_generate(
        *(model, processor, text),
        **{"image": loaded.files[:1], "max_tokens": LENGTH, "temperature": 0.0},
    )
    last = list(pieces)[-1]
    wanted = expected(loaded, QUESTION, loaded.files[0])
    assert (last.token_ids, last.prompt_tokens) == wanted
    assert wanted != loaded.ask()


def run(module: str, *options: str, **how) -> subprocess.Popen:
    """Start a stock mlx-vlm command in a subprocess."""
    env = os.environ | {"MLX_DISABLE_COMPILE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"mlx_vlm.{module}", *options]
    return subprocess.Popen(command, env=env, **how)


def test_the_command_prunes(qwen, folder):
    asked = ["--model", str(folder), "--image", qwen.files[0], "--prompt", QUESTION]
    asked += ["--max-tokens", str(LENGTH), "--temperature", "0", "--verbose"]
    process = run("generate", *asked, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=120)
    ids, count = expected(qwen, QUESTION, qwen.files[0])
    assert f"Prompt: {count} tokens" in out
    assert qwen.processor.tokenizer.decode(ids) in out


@pytest.mark.enable_socket
def test_the_server_prunes_two_requests_at_once(qwen, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    process = run("server", *options, stderr=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{base}/health", timeout=5).read()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)

        def ask(request: tuple[str, str]) -> tuple[str, int]:
            text, file = request
            picture = {"type": "image_url", "image_url": {"url": file}}
            content = [{"type": "text", "text": text}, picture]
            body = {
                **{"model": str(folder), "max_tokens": LENGTH, "temperature": 0},
                "messages": [{"role": "user", "content": content}],
            }
            asked = urllib.request.Request(
                f"{base}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            found = json.load(urllib.request.urlopen(asked, timeout=60))
            usage = found["usage"]
            count = usage.get("prompt_tokens", usage.get("input_tokens"))
            return found["choices"][0]["message"]["content"], count

        requests = [(QUESTION, qwen.files[0]), (MORE, qwen.files[1])]
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(ask, requests))
    finally:
        process.terminate()
        process.wait(timeout=30)
    for request, (answer, count) in zip(requests, answers, strict=True):
        ids, wanted = expected(qwen, *request)
        assert count == wanted
        assert answer == qwen.processor.tokenizer.decode(ids)


def test_what_is_refused(qwen, folder, tmp_path, capsys):
    def refused(match: str, *options: str) -> None:
        target = tmp_path / "target"
        with pytest.raises(SystemExit) as stopped:
            main(["--mlx-path", str(target), *options])
        assert stopped.value.code == 2
        assert match in capsys.readouterr().err
        assert not target.exists()

    stock = ["--model", str(qwen.folder)]
    refused("prunes already", "--model", str(folder), *ASK)
    refused("nothing would be pruned", *stock, "--keep-ratio", "1")
    refused("needs queries", *stock, "--method", "trimvla", "--keep-ratio", "0.5")
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"model_type": "qwen2_vll"}')
    refused("qwen2_vl", "--model", str(strange), *ASK)


def test_code_of_the_hub_is_not_run(monkeypatch, tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    config = {"model_type": "qwen2_vl", "model_file": "model.py"}
    (hub / "config.json").write_text(json.dumps(config))
    found = "mlx_tokprune.attach.model_folder.resolve"
    monkeypatch.setattr(found, lambda name: Path(hub))
    from mlx_tokprune.attach.model_folder import write_folder

    with pytest.raises(InputError, match="not run from the hub"):
        write_folder("somebody/model", tmp_path / "target", HALF)


def test_folders_load_in_threads_and_after_a_load_that_failed(qwen, folder):
    load_processor = mlx_vlm.utils.load_processor

    def tokens(_=None) -> int:
        model, processor = mlx_vlm.load(str(folder))
        text = prompt(processor, model.config, QUESTION)
        inputs = mlx_vlm.utils.prepare_inputs(
            processor, images=qwen.files[:1], prompts=text
        )
        return inputs["input_ids"].shape[1]

    _, wanted = expected(qwen, QUESTION, qwen.files[0])
    mlx_vlm.utils.load_model(folder)  # no processor follows
    assert tokens() == wanted
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(tokens, range(3))) == [wanted] * 3
    assert mlx_vlm.utils.load_processor is load_processor


def test_more_that_is_refused(qwen, tmp_path, capsys):
    def refused(match: str, source, target=None, *options: str) -> None:
        target = target or tmp_path / "target"
        with pytest.raises(SystemExit) as stopped:
            main(["--model", str(source), "--mlx-path", str(target), *(options or ASK)])
        assert stopped.value.code == 2
        assert match in capsys.readouterr().err
        assert not target.exists()

    refused("choose a folder elsewhere", qwen.folder, qwen.folder / "inside")
    positions = [*ASK, "--positions", "contiguous"]
    refused("stay original", qwen.folder, None, *positions)
    strange = tmp_path / "strange"
    strange.mkdir()
    for config, match in (
        ({"model_type": "qwen2_vl"}, "no weights"),
        (
            {"model_type": "qwen2_vl", "model_file": "../x.py"},
            "expected a file in the folder",
        ),
        ({"model_type": "qwen2_vl", "model_file": 5}, "expected a file in the folder"),
    ):
        (strange / "config.json").write_text(json.dumps(config))
        refused(match, strange)


def test_folders_of_older_versions_find_their_module():
    """`mlx_tokprune.adapters.folder`, which older folders import, still works."""
    from mlx_tokprune import attach
    from mlx_tokprune.adapters import folder

    assert folder.prune_when_loaded is attach.prune_when_loaded

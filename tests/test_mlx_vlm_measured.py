"""`evaluate`, `bench` and `report` of models that mlx-vlm runs."""

import json

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mlx_vlm")

from test_report import damaged, paths
from vlm.families import prompt
from vlm.loaded import HALF, LENGTH, MORE, QUESTION

from mlx_tokprune import InputError
from mlx_tokprune.attach.model_folder import write_folder
from mlx_tokprune.bench.__main__ import main as bench
from mlx_tokprune.bench.mlx_vlm_benchmark import read_mlx_vlm, tabulate
from mlx_tokprune.evaluate import read_result
from mlx_tokprune.evaluate.__main__ import main as evaluate
from mlx_tokprune.measure.mlx_vlm_subject import MlxVlmSubject
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.report.__main__ import main as report

pytestmark = pytest.mark.usefixtures("not_compiled")


@pytest.fixture(scope="module")
def guest(qwen):
    return MlxVlmSubject(str(qwen.folder))


@pytest.fixture(scope="module")
def evaluated(qwen, tmp_path_factory):
    """Return the result file of two questions about each of two images."""
    folder = tmp_path_factory.mktemp("evaluated")
    lines = [
        {"image": file, "question": text, "answer": "x"}
        for file in qwen.files[:2]
        for text in (QUESTION, MORE)
    ]
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    output = folder / "evaluate.json"
    asked = ["--runtime", "mlx-vlm", "--model", str(qwen.folder), "--data", str(data)]
    asked += ["--methods", "norm", "--keep-ratios", "0.5", "--output", str(output)]
    evaluate([*asked, "--max-tokens", str(LENGTH), "--plot", str(folder / "p.png")])
    return output


def test_answers_are_those_of_stock_mlx_vlm_and_of_attach(qwen, evaluated):
    result = read_result(evaluated)
    assert [row["label"] for row in result["rows"]] == [
        *("none", "norm 0.5", "max_pixels 0.5")
    ]
    decode = qwen.processor.tokenizer.decode
    for answer in result["answers"]:
        asked = (
            prompt(qwen.processor, qwen.model.config, answer["question"]),
            answer["picture"],
        )
        assert answer["given"]["none"] == decode(qwen.ask(*asked)[0])
        with qwen.pruned(HALF):
            assert answer["given"]["norm 0.5"] == decode(qwen.ask(*asked)[0])
    none, norm, smaller = result["rows"]
    assert (none["kept"], norm["kept"]) == (30, 15)
    assert 8 <= smaller["kept"] <= 15
    # A smaller picture spares the tower, too.
    assert smaller["flops"] < norm["flops"] < none["flops"]
    assert none["divergence"]["value"] == 0 < norm["divergence"]["value"]


def test_divergence_is_that_of_the_forced_answer(qwen, guest):
    """Log-probabilities of a forced answer equal those of one pass over it."""
    image = load_image(qwen.files[0])
    none, norm = guest.rows(["norm"], [0.5], {})[:2]
    reply = guest.ask(none, image, QUESTION, LENGTH)
    forced = guest.ask(norm, image, QUESTION, LENGTH, reply.ids)
    assert forced.ids == reply.ids
    from mlx_vlm.utils import prepare_inputs

    model, text = qwen.model, prompt(qwen.processor, qwen.model.config, QUESTION)
    with qwen.pruned(HALF):
        inputs = dict(
            prepare_inputs(qwen.processor, images=qwen.files[:1], prompts=text)
        )
        names = ("input_ids", "pixel_values", "attention_mask")
        ids, pixels, mask = (inputs.pop(name) for name in names)
        found = model.get_input_embeddings(ids, pixels, mask=mask, **inputs)
        said = mx.array([reply.ids[:-1]])
        after = model.language_model.model.embed_tokens(said)
        places = found.position_ids[..., -1:] + 1 + mx.arange(said.shape[1])
        logits = model.language_model(
            mx.concatenate([ids, said], axis=1),
            inputs_embeds=mx.concatenate([found.inputs_embeds, after], axis=1),
            position_ids=mx.concatenate([found.position_ids, places], axis=-1),
        ).logits[0, -LENGTH:]
    wanted = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert np.allclose(np.array(mx.stack(forced.logs)), np.array(wanted), atol=1e-4)


def test_bench_times_every_row_in_every_round(qwen, tmp_path, capsys):
    output = tmp_path / "bench.json"
    asked = ["--runtime", "mlx-vlm", "--model", str(qwen.folder), "--runs", "2"]
    asked += ["--image", qwen.files[0], "--prompt", QUESTION, "--tokens", "3"]
    asked += ["--methods", "norm", "dart", "--keep-ratios", "0.5"]
    bench([*asked, "--output", str(output)])
    result = read_mlx_vlm(output)
    labels = ["none", "norm 0.5", "dart 0.5", "max_pixels 0.5"]
    assert [row["label"] for row in result["rows"]] == labels
    for row in result["rows"]:
        assert len(row["samples"]["ttft_ms"]) == 2
        assert all(
            0 < megabytes < 1e4 for megabytes in row["samples"]["peak_memory_mb"]
        )
        assert all(
            0 < first <= whole
            for first, whole in zip(
                row["samples"]["ttft_ms"], row["samples"]["total_ms"], strict=True
            )
        )
    whole, norm, dart, smaller = result["rows"]
    assert whole["prompt_tokens"] - norm["prompt_tokens"] == 15 == dart["kept"]
    assert smaller["flops"] < norm["flops"] < whole["flops"]
    assert "| norm 0.5 | 15 |" in capsys.readouterr().out


def test_report_shows_both(qwen, evaluated, tmp_path):
    speed, page = tmp_path / "bench.json", tmp_path / "report.html"
    asked = ["--runtime", "mlx-vlm", "--model", str(qwen.folder), "--runs", "1"]
    asked += ["--image", qwen.files[0], "--methods", "norm", "--keep-ratios", "0.5"]
    bench([*asked, "--tokens", "2", "--output", str(speed)])
    report([str(speed), str(evaluated), "--output", str(page), "--pictures", "1"])
    text = page.read_text()
    assert "Speed in mlx-vlm" in text
    assert "max_pixels 0.5" in text
    # Cards of three rows, and one of them is shaded: it is not the plain picture.
    cards = [part.split('"')[0] for part in text.split('<figure><img src="')[1:]]
    assert len(cards) == 3
    assert cards[0] != cards[1]


def test_any_damage_is_found_or_does_no_harm(qwen, tmp_path):
    file = tmp_path / "bench.json"
    asked = ["--runtime", "mlx-vlm", "--model", str(qwen.folder), "--runs", "1"]
    asked += ["--image", qwen.files[0], "--methods", "norm", "--keep-ratios", "0.5"]
    bench([*asked, "--tokens", "2", "--output", str(file)])
    whole, harmful = json.loads(file.read_text()), []
    for path in paths(whole):
        for wrong in (..., None, "x", 0, [], 10**400):
            file.write_text(json.dumps(damaged(whole, path, wrong)))
            try:
                tabulate(read_mlx_vlm(file)).markdown()
            except InputError:
                continue
            except Exception as error:
                harmful.append((path, wrong, repr(error)))
    assert not harmful
    with pytest.raises(SystemExit):  # nor is anything else written over
        bench([*asked, "--output", str(file)])


def test_flags_of_the_other_runtime_are_refused(qwen, capsys):
    def refused(command, match: str, *options: str) -> None:
        asked = ["--runtime", "mlx-vlm", "--model", str(qwen.folder)]
        with pytest.raises(SystemExit) as stopped:
            command([*asked, *options])
        assert stopped.value.code == 2
        assert match in capsys.readouterr().err

    refused(evaluate, "--plans is for", "--plans", "norm:0.5")
    refused(evaluate, "--recommend is for", "--recommend", "0.1")
    refused(evaluate, "needs queries", "--methods", "trimvla")
    refused(bench, "--image-sizes is for", "--image-sizes", "64")
    refused(bench, "stay original", "--positions", "contiguous")


def test_pictures_that_mlx_vlm_does_not_take_are_skipped(qwen, tmp_path, capsys):
    thin, output = tmp_path / "thin.png", tmp_path / "evaluate.json"
    Image.new("RGB", (600, 2)).save(thin)
    data = tmp_path / "questions.jsonl"
    lines = [
        {"image": str(file), "question": text, "answer": "x"}
        for file, text in ((thin, MORE), (qwen.files[0], MORE), (thin, QUESTION))
    ]
    asked = ["--runtime", "mlx-vlm", "--model", str(qwen.folder), "--methods", "norm"]
    asked += ["--keep-ratios", "0.5", "--output", str(output)]

    def ask(lines: list[dict]) -> None:
        data.write_text("\n".join(["no JSON", *map(json.dumps, lines)]))
        evaluate([*asked, "--data", str(data), "--max-tokens", "2"])

    ask(lines)
    result = read_result(output)
    assert [line for line, _ in result["skipped"]] == [1, 2, 4]
    assert "600 x 2 pixels (" in dict(map(tuple, result["skipped"]))[4]
    assert [answer["picture"] for answer in result["answers"]] == [qwen.files[0]]
    assert "skipped line 4: mlx-vlm does not take" in capsys.readouterr().out
    output.unlink()
    for refused in (
        lambda: ask(lines[::2]),
        lambda: bench([*asked, "--image", str(thin)]),
    ):
        with pytest.raises(SystemExit) as stopped:
            refused()
        assert stopped.value.code == 2
        assert "does not take a picture of 600 x 2" in capsys.readouterr().err
    assert not output.exists()


def test_a_folder_that_prunes_is_not_measured(qwen, tmp_path, capsys):
    folder = tmp_path / "pruned"
    write_folder(qwen.folder, folder, HALF)
    with pytest.raises(SystemExit):
        evaluate(["--runtime", "mlx-vlm", "--model", str(folder)])
    assert "prunes by itself" in capsys.readouterr().err


def test_what_mlx_vlm_does_not_know(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(InputError, match="mlx-vlm cannot load"):
        MlxVlmSubject(str(tmp_path))

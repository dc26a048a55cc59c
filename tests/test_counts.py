"""A command tokenizes, decodes and encodes each input once."""

import json

import pytest
from PIL import Image

from mlx_tokprune.act.__main__ import main as act
from mlx_tokprune.checkpoints.embedded import PICTURES, POLICY_FRAME
from mlx_tokprune.evaluate.__main__ import main as evaluate
from mlx_tokprune.generate.__main__ import main as generate
from mlx_tokprune.measure import subject
from mlx_tokprune.models.fastvithd import FastViTHD
from mlx_tokprune.models.openvla import VisionBackbone
from mlx_tokprune.processing import image as pictures
from mlx_tokprune.processing.processor import ActionProcessor, Processor
from mlx_tokprune.report.__main__ import main as report

FILE = ["--image", str(PICTURES[0].path)]
ASKED = [*FILE, "--prompt", PICTURES[0].question, "--max-tokens", "2"]
SHORT = ["--max-tokens", "2", *FILE]


@pytest.fixture
def counted(monkeypatch):
    """Return the counts of tokenized prompts, decoded files and tower runs."""
    found = dict.fromkeys(("prompts", "decoded", "towers"), 0)

    def count(owner, name, what):
        original = getattr(owner, name)

        def counting(*args, **options):
            found[what] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, counting)

    for processor in (Processor, ActionProcessor):
        count(processor, "prompt", "prompts")
    for tower in (FastViTHD, VisionBackbone):
        count(tower, "__call__", "towers")
    count(pictures, "_decode", "decoded")
    traced = subject.AnswerSubject.count_shapes

    def tracing(*args):
        """Leave out the tower calls of counting FLOPs, which runs no tower."""
        before = dict(found)
        cost = traced(*args)
        found.update(before)
        return cost

    monkeypatch.setattr(subject.AnswerSubject, "count_shapes", tracing)
    return found


def once(prompts=1, decoded=1, towers=1):
    return {"prompts": prompts, "decoded": decoded, "towers": towers}


@pytest.mark.parametrize(
    "more", [[], ["--stages"], ["--json"], ["--keep-ratio", ".5", "--at", "2"]]
)
def test_one_question(counted, more):
    generate([*ASKED, *more])
    assert counted == once()


def test_three_questions_about_one_picture(counted):
    prompts = [f"What is at place {n}?" for n in range(3)]
    generate([*SHORT, *(part for text in prompts for part in ("--prompt", text))])
    assert counted == once(prompts=3)


def test_questions_that_look_at_the_prompt_share_the_tower(counted, capsys):
    """Two questions share one tower run, and keep different tokens."""
    asked = ["--prompt", "What does the sign say?", "--prompt", "Which color is it?"]
    pruner = ["--method", "trimvla", "--keep-ratio", "0.25"]
    generate([*SHORT, *asked, *pruner, "--json"])
    assert counted == once(prompts=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    first, second = (json.loads(line)["kept_indices"] for line in lines)
    assert first != second
    generate([*SHORT, *asked[2:], *pruner, "--json"])
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert alone["kept_indices"] == second


def test_a_folder_is_asked_about_picture_by_picture(counted, tmp_path, capsys):
    for number, picture in enumerate(PICTURES):
        Image.open(picture.path).save(tmp_path / f"{number}.png")
    generate([*ASKED[2:], "--image", str(tmp_path), "--json"])
    assert counted == once(prompts=2, decoded=2, towers=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    names = [json.loads(line)["image"] for line in lines]
    assert names == [str(tmp_path / "0.png"), str(tmp_path / "1.png")]


@pytest.mark.parametrize("more", [[], ["--stages"], ["--keep-ratio", "0.5"]])
def test_one_action(counted, more):
    frame = ["--image", str(POLICY_FRAME.path), "--instruction", POLICY_FRAME.question]
    act([*frame, *more])
    assert counted == once()


def test_evaluate_encodes_a_picture_once_for_all_rows_and_questions(counted, tmp_path):
    lines = [
        {"image": str(PICTURES[0].path), "question": text, "answer": "EAST"}
        for text in ("What does the sign say?", "Which color is it?")
    ]
    data, output = tmp_path / "q.jsonl", tmp_path / "e.json"
    data.write_text("\n".join(map(json.dumps, lines)))
    methods = ["--methods", "norm", "attention", "--keep-ratios", "0.5"]
    evaluate(["--data", str(data), "--output", str(output), *methods])
    # Reading the questions checks each picture; each question is asked once.
    assert counted == once(prompts=2, decoded=4)
    counted.update(dict.fromkeys(counted, 0))
    report([str(output), "--output", str(tmp_path / "r.html"), "--pictures", "1"])
    assert counted["towers"] == 3  # one for each row that is drawn

"""The Swift package of examples/ios and its golden answers agree with the library."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_tokprune
from mlx_tokprune.coreml.describe import PROMPT_KEY, Function, prompt_settings

IOS = Path(__file__).parents[1] / "examples" / "ios"
GOLDEN = IOS / "Tests" / "PrunedAnswerTests" / "Golden"
SOURCES = {path.stem: path.read_text() for path in IOS.glob("Sources/*/*.swift")}
PAGE = (IOS / "README.md").read_text()


def load_script():
    spec = importlib.util.spec_from_file_location("golden", IOS / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "answers.json").read_text())


@pytest.fixture(scope="module")
def demo():
    return load_script().load_demo()


@pytest.fixture(scope="module")
def visual(golden):
    features = mx.load(str(GOLDEN / "features.safetensors"))["features"]
    pairs = zip(features, golden["kept"], strict=True)
    return [load_script().visual_tokens(*pair) for pair in pairs]


def depends(row: dict) -> bool:
    """Return whether the answer depends on the positions."""
    return row["original"] != row["contiguous"]


def test_golden_answers_are_those_of_mlx(golden, demo, visual):
    script, rows = load_script(), golden["questions"]
    assert sum(map(depends, rows)) >= 17
    for row in rows:
        where = (*demo, visual[row["picture"]], [row["question"]])
        assert script.answers(*where) == [row["original"]]
        if depends(row):
            assert script.answers(*where, "contiguous") == [row["contiguous"]]
    for picture, tokens in enumerate(visual):
        chat = [row for row in rows if row["picture"] == picture]
        questions = [row["question"] for row in chat]
        ids = script.answers(*demo, tokens, questions)
        assert ids == [row["in_chat"] for row in chat]


def test_golden_chat_is_that_of_the_library(golden, demo, visual, monkeypatch):
    """`Chat` gives the golden answers to successive questions about one picture."""
    rows = [row for row in golden["questions"] if row["picture"] == 0]
    pipeline = sys.modules[
        "mlx_tokprune.pipeline.run"
    ]  # whose name a function has, too
    monkeypatch.setattr(pipeline, "look", lambda *_: visual[0])
    image = np.zeros((512, 512, 3), np.uint8)
    chat = mlx_tokprune.Chat(*demo, image)
    for row in rows:
        assert chat.ask(row["question"]).token_ids == row["in_chat"]


@pytest.mark.parametrize("bits", [8, 4])
def test_golden_answers_of_quantized_weights(golden, visual, bits):
    script, rows = load_script(), golden["questions"]
    model = script.load_demo(bits)
    changed = [row for row in rows if row[f"bits_{bits}"] != row["original"]]
    assert changed  # so that quantized weights can be told from others
    for row in [*changed, *rows[:8]]:
        tokens = visual[row["picture"]]
        ids = script.answers(*model, tokens, [row["question"]])
        assert ids == [row[f"bits_{bits}"]]


def test_golden_texts_are_the_prompts(golden, demo):
    processor, prompt, texts = demo[1], golden["prompt"], golden["texts"]
    assert prompt == json.loads(prompt_settings(*demo)[PROMPT_KEY])
    for question in {row["question"] for row in golden["questions"]}:
        opening = texts[prompt["prefix"]], texts[f"\n{question}{prompt['suffix']}"]
        assert tuple(map(tuple, opening)) == processor.prompt(question, 1).segments
        later = texts[f"{prompt['turn']}{question}{prompt['suffix']}"]
        assert later == processor.continued(question)


def fields(text: str) -> set[str]:
    """Return the stored properties of Swift code in snake case."""
    lines = re.findall(r"^ *public let ([\w, ]+):", text, re.M)
    names = {name for line in lines for name in line.split(", ")}
    return {re.sub(r"(?<=[a-z])([A-Z])", r"_\1", name).lower() for name in names}


def test_swift_reads_the_metadata_that_the_export_writes(demo):
    vision = SOURCES["PrunedVision"]
    function = vision[: vision.index("public struct Output")]
    assert fields(function) == {f.name for f in dataclasses.fields(Function)}
    assert f'"{PROMPT_KEY}"' in vision
    template = SOURCES["PromptTemplate"].split("struct PromptTemplate")[1]
    assert fields(template) == set(json.loads(prompt_settings(*demo)[PROMPT_KEY]))


def test_a_policy_has_no_prompt():
    assert prompt_settings(*mlx_tokprune.load("demo-policy", lazy=True)) == {}


def test_the_readers_code_is_short():
    """From export to an answer on screen in at most 40 lines."""
    answer = PAGE[PAGE.index("## An answer on screen") :]
    code = re.findall(r"```swift\n(.*?)```", answer[: answer.index("\n## ", 5)], re.S)
    lines = [line for part in code for line in part.splitlines() if line.strip()]
    assert 10 < len(lines) <= 40


def test_the_page_calls_what_there_is():
    """Argument labels of the page's calls are those of the package's declarations."""
    for name in ("PrunedVision", "Qwen2Model", "PromptTemplate", "TextTokenizer"):
        assert f"{name}(" in PAGE
    for call in ("VisualTokens", "PrunedAnswer", "ask"):
        calls = re.findall(rf"\b{call}\(([^()]*(?:\([^()]*\)[^()]*)*)\)", PAGE)
        labels = re.findall(r"(?:^|,)\s*(\w+):", "\n".join(calls), re.M)
        assert labels
        for label in labels:
            assert re.search(rf"\b{label}\b[\w ]*:", SOURCES["PrunedAnswer"])

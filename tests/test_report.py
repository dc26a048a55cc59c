"""The report: one page, everything inside, nothing fetched."""

import json
import re

import pytest
from PIL import Image

from mlx_tokprune.bench.__main__ import main as bench
from mlx_tokprune.demo import PICTURES
from mlx_tokprune.evaluate.__main__ import main as evaluate
from mlx_tokprune.report import main, picture, table_of


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    questions = folder / "questions.jsonl"
    asked = [
        {"image": str(p.path), "question": p.question, "answer": p.answer}
        for p in PICTURES
    ]
    asked[0]["question"] = "What does the sign say? <b>"
    questions.write_text("\n".join(map(json.dumps, asked)))
    methods = ["--methods", "norm", "similarity", "--keep-ratios", "0.25"]
    evaluate(["--data", str(questions), *methods, "--output", str(folder / "e.json")])
    bench(
        [*methods, "--runs", "1", "--tokens", "2", "--output", str(folder / "b.json")]
    )
    return folder


def test_a_page_of_both(results, capsys):
    page = results / "page.html"
    files = [str(results / name) for name in ("b.json", "e.json")]
    main([*files, "--output", str(page), "--pictures", "2", "--title", "A & B"])
    text = page.read_text()
    assert "<title>A &amp; B</title>" in text
    assert text.count('<img class="plot"') == 4  # three of speed, one of answers
    # Two pictures, each with the unpruned row and two methods.
    assert text.count("<figure>") == 6
    assert text.count('class="right"') + text.count('class="wrong"') == 6
    assert "similarity 0.25: " in text
    assert "sign say? &lt;b&gt;" in text
    assert "<td>norm 0.25</td>" in text


def test_nothing_is_fetched(results):
    page = results / "alone.html"
    main([str(results / "e.json"), "--output", str(page), "--pictures", "1"])
    text = page.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    assert not re.findall(r"url\(|@import|<script|<link", text)


def test_tables_are_read_from_markdown():
    shown = table_of("Machine <x>.\n\n| a | b |\n|---|---:|\n| 1 | <2> |\n\nNote.")
    assert shown.startswith('<div class="wide"><table><tr><th>a</th><th>b</th></tr>')
    assert "<tr><td>1</td><td>&lt;2&gt;</td></tr>" in shown
    assert '<p class="note">Machine &lt;x&gt;.</p>' in shown


def test_answers_are_text_not_markup():
    shown = picture(Image.new("RGB", (4, 4)), 'a <b> "c"')
    assert "a &lt;b&gt; &quot;c&quot;" in shown
    assert "<b>" not in shown


@pytest.mark.parametrize("content", [None, "{", "[]", '{"schema": "other"}'])
def test_other_files_are_refused(tmp_path, capsys, content):
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main([str(file), "--output", str(tmp_path / "page.html")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()

"""The report is one page that contains everything and fetches nothing."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from mlx_tokprune import cli as options
from mlx_tokprune.bench import mlx_vlm_benchmark, plots
from mlx_tokprune.bench import speed_table as bench_table
from mlx_tokprune.bench.__main__ import main as bench
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.errors import InputError
from mlx_tokprune.evaluate import accuracy_table as evaluation_table
from mlx_tokprune.evaluate.__main__ import main as evaluate
from mlx_tokprune.measure import results as reading
from mlx_tokprune.measure.accuracy import accuracies
from mlx_tokprune.measure.tables import Table
from mlx_tokprune.report import __main__ as report
from mlx_tokprune.report.__main__ import main
from mlx_tokprune.report.page import picture, render_table


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


def test_a_table_as_html_and_as_markdown():
    table = Table(["", "b"], [["1|", "<2>"], ["", ""]], ["Machine <x>."], ["Note."])
    assert render_table(table) == (
        '<div class="wide"><table><tr><th></th><th>b</th></tr>'
        "<tr><td>1|</td><td>&lt;2&gt;</td></tr><tr><td></td><td></td></tr></table>"
        '</div><p class="note">Machine &lt;x&gt;.</p><p class="note">Note.</p>'
    )
    assert table.markdown() == (
        "Machine <x>.\n\n| | b |\n|---|---:|\n| 1/ | <2> |\n|  |  |\n\nNote."
    )


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


def test_pictures_are_drawn_as_the_run_saw_them(tmp_path, monkeypatch):
    """Images are drawn on the grid of the run, which skips padding."""
    wide = tmp_path / "pictures" / "wide.png"
    wide.parent.mkdir()
    Image.open(PICTURES[1].path).convert("RGB").resize((512, 288)).save(wide)
    file, drawn = tmp_path / "e.json", []
    asked = ["--data", str(wide.parent), "--prompt", "What?", "--max-tokens", "2"]
    methods = ["--methods", "norm", "--keep-ratios", "0.5", "--padding", "skip"]
    evaluate([*asked, *methods, "--output", str(file)])
    draw = options.draw_overlay

    def watched(images, selection, grid, padded):
        drawn.append((grid, selection.keep))
        return draw(images, selection, grid, padded)

    monkeypatch.setattr(options, "draw_overlay", watched)
    main([str(file), "--output", str(tmp_path / "page.html")])
    assert drawn == [((5, 8), 40), ((5, 8), 20)]
    kept = [row["kept"] for row in json.loads(file.read_text())["rows"]]
    assert kept == [40, 20]


DAMAGES = {
    "e.json": {
        "rows[0].agreement is missing": lambda r: r["rows"][0].pop("agreement"),
        "run.weights is missing": lambda r: r["run"].pop("weights"),
        "image_size is '512'; expected int": lambda r: r.update(image_size="512"),
        "rows[1].flops": lambda r: r["rows"][1].update(flops="1"),
        "value is 'nan'": lambda r: r["rows"][1]["divergence"].update(value=math.nan),
    },
    "b.json": {
        "costs.prefill is missing": lambda r: r["rows"][1]["costs"].pop("prefill"),
        "rows[0].kept is 'True'": lambda r: r["rows"][0].update(kept=True),
        "limit_ms is 'inf'": lambda r: r["rows"][0].update(limit_ms=math.inf),
    },
}


@pytest.mark.parametrize(
    ("name", "message"),
    [(name, message) for name, some in DAMAGES.items() for message in some],
)
def test_damaged_files_are_one_sentence(results, tmp_path, capsys, name, message):
    result, file = json.loads((results / name).read_text()), tmp_path / name
    DAMAGES[name][message](result)
    file.write_text(json.dumps(result))
    with pytest.raises(SystemExit) as stop:
        main([str(file), "--output", str(tmp_path / "page.html")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"{file} is damaged: " in error
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("name", ["b.json", "e.json"])
def test_any_damage_is_found_or_does_no_harm(results, tmp_path, name):
    whole, file = json.loads((results / name).read_text()), tmp_path / name
    harmful = []
    for path in paths(whole):
        for wrong in (..., None, "x", 0, []):
            file.write_text(json.dumps(damaged(whole, path, wrong)))
            try:
                shown(*report._read([file]))
            except InputError:
                continue
            except Exception as error:
                harmful.append((path, wrong, repr(error)))
    assert not harmful


def damaged(whole: dict, path: tuple, wrong) -> dict:
    """Return a copy with another value at a path, or without it for `...`."""
    result = place = copy.deepcopy(whole)
    for key in path[:-1]:
        place = place[key]
    if wrong is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = wrong
    return result


def shown(speeds: list, guests: list, answers: list) -> None:
    """Build all tables of these results."""
    for result in speeds:
        bench_table.tabulate(result)
    for result in guests:
        mlx_vlm_benchmark.tabulate(result)
    for result in answers:
        accuracies(result)
        evaluation_table.tabulate(result["rows"])


def paths(value, start: tuple = ()):
    """Yield the keys that lead to each part of a result."""
    several = {dict: lambda v: v, list: lambda v: range(len(v))}.get(type(value))
    for key in several(value) if several else ():
        yield (*start, key)
        yield from paths(value[key], (*start, key))


def asked_of_demo(tmp_path, *options) -> str:
    few = ["--pictures", "1", "--methods", "norm", "--keep-ratios", "0.5"]
    file = tmp_path / "e.json"
    evaluate([*few, *options, "--output", str(file)])
    return str(file)


def test_black_pictures_are_shown_black(tmp_path):
    file, page = asked_of_demo(tmp_path, "--blind"), tmp_path / "page.html"
    main([file, "--output", str(page)])
    assert "<figure>" in page.read_text()


def test_pictures_of_other_weights_are_refused(tmp_path, capsys):
    file, page = Path(asked_of_demo(tmp_path)), tmp_path / "page.html"
    result = json.loads(file.read_text())
    result["run"]["weights"] = "0" * 16
    file.write_text(json.dumps(result))
    with pytest.raises(SystemExit):
        main([str(file), "--output", str(page)])
    assert "has other weights here" in capsys.readouterr().err
    main([str(file), "--output", str(page), "--pictures", "0"])
    assert "<figure>" not in page.read_text()


def test_accuracy_is_of_the_weights_that_were_timed(results, tmp_path):
    answers = json.loads((results / "e.json").read_text())
    speeds = json.loads((results / "b.json").read_text())
    known = accuracies(answers)
    weights = speeds["options"]["weights"]["demo"]
    assert (weights, "original", "norm 0.25", 512) in known
    assert all(key[0] == weights for key in known)
    answers["run"]["weights"] = "other"
    drawn = plots.draw_all(speeds, tmp_path, accuracies(answers))
    assert [path.name for path in drawn] == ["ttft_by_stage.png", "ttft_by_tokens.png"]
    assert len(plots.draw_all(speeds, tmp_path, known)) == 3
    assert set(plots._accurate_points(speeds, known)) == {"none", "norm", "similarity"}


def test_a_result_has_a_largest_size(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    file.write_text('{"a": 1}')
    monkeypatch.setattr(reading, "MOST_BYTES", 8)
    assert reading.read_any(file) == {"a": 1}
    monkeypatch.setattr(reading, "MOST_BYTES", 7)
    for target in (file, tmp_path):
        with pytest.raises(InputError, match="is no JSON file that can be read"):
            reading.read_any(target)

"""HTML page of results of `bench` and `evaluate`: tables, plots and pictures.

The page is self-contained: styles and pictures are inline, and it fetches nothing.
"""

import base64
import functools
import html
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..bench import mlx_vlm_benchmark, plots, speed_table
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.hub import is_local
from ..checkpoints.loading import load
from ..cli import draw_choices
from ..errors import InputError
from ..evaluate import accuracy_table
from ..evaluate.items import Item, blinded, read_questions
from ..files import SOFTWARE
from ..measure.machine import format_versions
from ..measure.mlx_vlm_subject import MlxVlmSubject
from ..measure.results import Row
from ..measure.subject import AnswerSubject, OwnSubject, subject_of
from ..measure.tables import Table
from ..pipeline import run
from ..pipeline.planning import plan_for
from ..processing.overlay import draw_overlay
from ..pruners import Pruner, get_method, is_registered
from ..pruners.scorers import is_scorer

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem;
  padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
.plot { max-width: 100%; height: auto; background: white; }
.cards { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
figure { margin: 0; } figure img { width: 100%; height: auto; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; }
.right { color: #17803d; } .wrong { color: #c2410c; }
small, .note { color: #777; }
"""
_SIDE = 320  # pixels of a picture on the page
# (picture, question, row of the run) -> overlay
Draw = Callable[[Image.Image, str, dict], Image.Image]


def page(title: str, sections: Sequence[str]) -> str:
    """Return the HTML document. sections: HTML, in their order."""
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{SOFTWARE}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def render_table(table: Table) -> str:
    """Return the table as HTML, followed by its notes."""
    lines = [_row("th", table.columns), *(_row("td", row) for row in table.rows)]
    notes = [_note(line) for line in (*table.before, *table.after)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>{"".join(notes)}'


def _row(kind: str, cells: Sequence[str]) -> str:
    escaped = "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells)
    return f"<tr>{escaped}</tr>"


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def picture(image: Image.Image, text: str, style: str = "") -> str:
    """Return a figure with its caption as HTML. style: CSS class of the caption."""
    image = image.convert("RGB")
    image.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    caption = html.escape(text)
    source = _inline(data.getvalue(), "jpeg")
    return (
        f'<figure><img src="{source}" alt="{caption}">'
        f'<figcaption class="{style}">{caption}</figcaption></figure>'
    )


def _inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _plot(file: Path) -> str:
    name = html.escape(file.stem.replace("_", " "))
    source = _inline(file.read_bytes(), "png")
    return f'<p><img class="plot" src="{source}" alt="{name}"></p>'


# Sections ---------------------------------------------------------------------------


def bench_section(result: dict, accuracy: plots.Accuracy) -> str:
    """Return the table and the plots of a benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        files = plots.draw_all(result, Path(folder), accuracy)
        images = "".join(_plot(file) for file in files)
    return f"<h2>Speed</h2>{render_table(speed_table.tabulate(result))}{images}"


def mlx_vlm_section(result: dict) -> str:
    """Return the table of a benchmark in mlx-vlm."""
    return (
        f"<h2>Speed in mlx-vlm</h2>{render_table(mlx_vlm_benchmark.tabulate(result))}"
    )


def evaluation_section(result: dict) -> str:
    """Return the table of an evaluation and the plot of accuracy against FLOPs."""
    title = html.escape(f"{result['questions']} questions of {result['data']}")
    machine = result["machine"]
    versions = format_versions(machine)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "curve.png"
        accuracy_table.draw(result["rows"], file)
        curve = _plot(file)
    note = _note(
        "Shares in percent with 95 % intervals; KL against the unpruned model, per "
        f"token. {machine['device']}, {versions}, commit {machine['commit']}"
    )
    table = render_table(accuracy_table.tabulate(result["rows"]))
    return f"<h2>Answers: {title}</h2>{table}{note}{curve}"


def picture_sections(
    result: dict, pictures: int, methods: Sequence[str]
) -> Iterator[str]:
    """Yield a section for each of N questions: kept tokens and answer of each row.

    pictures: N. methods: the custom ones that may be imported. Raises `InputError` for
    a model, method, question or weights that differ from the results.
    """
    _check_methods(result, methods)
    name = result["model"]
    if not is_local(name):
        raise InputError(
            f"model {name!r} of the results is no folder here, and a result file must "
            "not choose downloads; give --pictures 0"
        )
    draw = _drawing(name, result)
    answers = result["answers"][:: max(1, len(result["answers"]) // pictures)]
    items = _items(result)
    for answer in answers[:pictures]:
        key = (answer["picture"], answer["question"])
        if key not in items:
            raise InputError(
                f"question {key[1]!r} about {key[0]} is no longer in {result['data']}; "
                "give --pictures 0, or restore the questions"
            )
        yield _picture_section(draw, result, answer, items[key])


def _check_methods(result: dict, methods: Sequence[str]) -> None:
    """Raise `InputError` for unnamed custom methods: a file must not import code."""
    for name in methods:
        get_method(name)
    for row in result["run"]["rows"]:
        for name in [pruner["method"] for pruner in _pruners(row)]:
            if not is_registered(name) and not is_scorer(name):
                raise InputError(
                    f"method {name!r} of the results is unknown here; if it is yours, "
                    f"allow it with --method {name}"
                )


def _items(result: dict) -> dict[tuple[str, str], Item]:
    names = {answer["picture"] for answer in result["answers"]}
    prompt = result["answers"][0]["question"] if result["answers"] else None
    questions = read_questions(result["data"], max(1, len(names)), prompt)
    questions = blinded(questions) if result["run"].get("blind") else questions
    return {(item.picture, item.question): item for item in questions.items}


def _drawing(name: str, result: dict) -> Draw:
    """Return a function that draws a row's kept tokens on a picture."""
    run = result["run"]
    if run.get("runtime") == "mlx-vlm":
        subject = MlxVlmSubject(
            name, None if run["positions"] == "original" else "contiguous"
        )
        return functools.partial(_mlx_vlm_overlay, subject)
    subject = subject_of(name, *load(name, adapter_path=run.get("adapter")))
    if fingerprint(subject.model) != run["weights"]:
        raise InputError(
            f"{name} has other weights here, or another precision, than the measured "
            "model; give --pictures 0"
        )
    subject = subject.at(result["image_size"], run.get("padding"))
    return functools.partial(_overlay, subject, run["positions"])


def _picture_section(draw: Draw, result: dict, answer: dict, item: Item) -> str:
    image, right = item.load(), answer["answers"]
    solution = f" (right: {', '.join(dict.fromkeys(right))})" if right else ""
    cards = []
    for row in result["run"]["rows"]:
        overlay = draw(image, item.question, row)
        label = row["label"]
        score, text = answer["scores"][label], answer["given"][label]
        style = "" if score is None else "right" if score > 0.5 else "wrong"
        cards.append(picture(overlay, f"{label}: {text}", style))
    question = html.escape(answer["question"] + solution)
    return f'<h2>{question}</h2><div class="cards">{"".join(cards)}</div>'


def _pruners(row: dict) -> list[dict]:
    """Return the descriptions of a row's pruners."""
    return [row["pruner"], *row.get("others", [])]


def _pruner(description: dict) -> Pruner:
    try:
        return Pruner(**description)
    except TypeError:
        raise InputError(
            f"the results describe a pruner as {str(description)[:80]}; expected one "
            "of mlx_tokprune.evaluate"
        ) from None


def _overlay(
    subject: OwnSubject, positions: str, image: Image.Image, text: str, row: dict
) -> Image.Image:
    """Return the picture with dropped tokens dimmed, as the run encoded it."""
    plan = plan_for(subject.model, map(_pruner, _pruners(row)))
    scene = subject.scene([image], text)
    _, visual = run(subject.model, scene, plan, positions=positions)
    images = [image]
    if isinstance(subject, AnswerSubject):
        images = subject.processor.encoded(images)
    return draw_choices(images, visual, padded=subject.processor.pads)


def _mlx_vlm_overlay(
    subject: MlxVlmSubject, image: Image.Image, text: str, row: dict
) -> Image.Image:
    """Return the overlay in mlx-vlm, or the picture if its tokens are not one grid."""
    pruner = _pruner(row["pruner"])
    reply = subject.ask(Row(row["label"], (pruner,)), image, text, 1)
    grids = subject.grids(image, text)
    if len(grids) != 1 or reply.places is None or len(reply.places) != 1:
        return image
    return draw_overlay([image], [np.array(reply.places[0])], grids[0], False)

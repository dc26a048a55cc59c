"""Stock mlx-vlm loads the tiny checkpoints of `vlm`, and their answers vary."""

import mlx.core as mx
import pytest

mlx_vlm = pytest.importorskip("mlx_vlm")

from mlx_vlm.utils import prepare_inputs  # noqa: E402
from vlm import tokens  # noqa: E402
from vlm.families import FAMILIES, picture, prompt  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("not_compiled"),
    pytest.mark.filterwarnings("ignore:.*getdata is deprecated"),  # Kimi's processors
]
QUESTION = "what is in the picture ?"
LENGTH = 8


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    """Return (family, model, processor, files of two images)."""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(family.name)
    family.write(folder)
    files = [folder / f"{seed}.png" for seed in range(2)]
    for seed, file in enumerate(files):
        picture(family, seed).save(file)
    return family, *mlx_vlm.load(str(folder)), [str(file) for file in files]


def inputs_of(model, processor, file: str) -> dict:
    text = prompt(processor, model.config, QUESTION)
    return prepare_inputs(processor, images=[file], prompts=text)


def embed(model, inputs: dict) -> mx.array:
    rest = dict(inputs)
    ids, pixels, mask = (
        rest.pop(name) for name in ("input_ids", "pixel_values", "attention_mask")
    )
    return model.get_input_embeddings(ids, pixels, mask=mask, **rest).inputs_embeds[0]


def test_a_picture_becomes_as_many_rows_as_are_said(loaded):
    family, model, processor, files = loaded
    both = [inputs_of(model, processor, file) for file in files]
    ids = both[0]["input_ids"][0]
    here = ids < 0 if family.image_token_id is None else ids == family.image_token_id
    rows = family.rows(*family.size)
    assert here.sum().item() == family.count(*family.size)
    embedded = [embed(model, inputs) for inputs in both]
    assert embedded[0].shape[0] - ids.size == rows - family.count(*family.size)
    changed = mx.any(embedded[0] != embedded[1], axis=-1).sum().item()
    assert rows / 2 <= changed <= rows  # some have rows that end lines, too


def test_answers_are_about_the_picture(loaded):
    family, model, processor, files = loaded
    text = prompt(processor, model.config, QUESTION)
    answers = []
    for file in files:
        pieces = mlx_vlm.stream_generate(
            model, processor, text, image=[file], max_tokens=LENGTH, temperature=0.0
        )
        answers.append(list(pieces)[-1].token_ids)
    special = len(tokens.COMMON) + len(family.specials)
    assert answers[0] != answers[1]
    for answer in answers:
        assert len(answer) == LENGTH
        assert len(set(answer)) > LENGTH / 2
        assert min(answer) >= special

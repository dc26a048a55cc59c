"""Order of images and text, and positions of kept tokens."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY

from mlx_tokprune import Pruner, generate, stream_generate
from mlx_tokprune.errors import InputError
from mlx_tokprune.features import Selection
from mlx_tokprune.pipeline import Scene, assemble, grouped, look
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.processing.prompt import Prompt, place_pictures

IMAGES = [TINY / "image_0.png", TINY / "image_1.png"]
QUARTER = (Pruner("norm", 0.25),)
# Its embeddings are the token ids.
COUNTER = SimpleNamespace(
    text=lambda prompt, state: [ids[..., None] * 1.0 for ids in prompt.arrays()],
    attends="causal",
    gap=0,
)


def scene_of(processor, images, text) -> Scene:
    pixels = mx.array(processor.pixels([load_image(i) for i in images]))
    return Scene(pixels, processor.prompt(text, len(images)))


def kept_tokens(indices, grid, groups, mask=None):
    """Return kept tokens with embeddings 100 * image + index."""
    indices = mx.array(indices)
    marks = 100.0 * (1 + mx.arange(len(indices))[:, None]) + indices
    mask = None if mask is None else mx.array(mask)
    return grouped(marks[..., None], Selection(indices, mask=mask), grid, groups)


def test_texts_and_pictures_are_joined_in_order():
    scene = Scene(None, Prompt(((1, 2), (3,), (4, 5))))
    visual = kept_tokens([[0, 3], [1, 2]], (2, 2), 2)
    original = assemble(COUNTER, scene, visual)
    shown = [1, 2, 100, 103, 3, 201, 202, 4, 5]
    assert original.embeddings.reshape(-1).tolist() == shown
    assert original.visual == (slice(2, 4), slice(5, 7))
    assert original.positions.tolist() == [0, 1, 2, 5, 6, 8, 9, 11, 12]
    assert (original.end, original.mask) == (13, "causal")
    closed = assemble(COUNTER, scene, visual, positions="contiguous")
    assert closed.embeddings.reshape(-1).tolist() == shown
    assert (closed.positions, closed.end, closed.mask) == (None, 9, "causal")
    assert closed.visual == original.visual


def test_each_of_a_batch_has_its_pictures_and_positions():
    """Each of two robots has its images and positions at both places."""
    scene = Scene(None, Prompt(((1,), (2,), ())), batch=2)
    indices = [[0], [3], [1], [2], [2], [1], [3], [0]]
    found = assemble(COUNTER, scene, kept_tokens(indices, (2, 2), 4))
    assert found.embeddings[..., 0].tolist() == [
        [1, 100, 203, 2, 301, 402],
        [1, 502, 601, 2, 703, 800],
    ]
    # Positions of a place begin at 1 and at 10: 8 tokens, and the text between.
    assert found.positions.tolist() == [[0, 1, 8, 9, 11, 16], [0, 3, 6, 9, 13, 14]]
    assert (found.end, found.visual) == (18, (slice(1, 3), slice(4, 6)))


@pytest.mark.parametrize("attends", ["causal", "full"])
def test_padding_takes_no_place_and_nobody_sees_it(attends):
    model = SimpleNamespace(text=COUNTER.text, attends=attends, gap=0)
    scene = Scene(None, Prompt(((1,), (2,))), batch=2)
    padding = [[True, True], [True, False]]
    visual = kept_tokens([[1, 2], [3, 3]], (2, 2), 2, padding)
    original = assemble(model, scene, visual)
    closed = assemble(model, scene, visual, positions="contiguous")
    assert original.positions.tolist() == [[0, 2, 3, 5], [0, 4, 4, 5]]
    assert original.end == 6
    seen = np.array([[True, True, True, True], [True, True, False, True]])
    where = np.array(closed.positions)
    assert where[0].tolist() == [0, 1, 2, 3]
    assert where[1, seen[1]].tolist() == [0, 1, 2]
    assert closed.end.tolist() == [4, 3]
    rows = np.tril(np.ones((4, 4), bool)) if attends == "causal" else True
    for sequence in (original, closed):
        assert np.array_equal(sequence.mask, np.tile(seen[:, None], (1, 4, 1)) & rows)


def test_places_on_a_picture_without_its_padding_are_those_of_the_square():
    """Positions of a 2 x 4 grid are those of the middle of a 4 x 4 grid."""
    scene = Scene(None, Prompt(((1,), (2,))))
    found = assemble(COUNTER, scene, kept_tokens([[0, 7]], (2, 4), 1))
    assert found.positions.tolist() == [0, 1 + 4, 1 + 11, 17]
    assert found.end == 18


def test_two_pictures_reach_the_model_in_order(tiny):
    model, processor = tiny
    scene = scene_of(processor, IMAGES, "First <image> then <image>?")
    together = look(model, scene, QUARTER)
    embeddings = assemble(model, scene, together).embeddings[0]
    parts = []
    for number, segment in enumerate(scene.prompt.segments):
        parts.append(model.decoder.embed(mx.array(segment)))
        if number < 2:
            one = Scene(scene.pixels[number : number + 1], Prompt(((), ())))
            parts.append(look(model, one, QUARTER).embeddings[0])
    np.testing.assert_allclose(
        np.array(embeddings), np.array(mx.concatenate(parts)), rtol=1e-4, atol=1e-4
    )


def test_swapped_pictures_change_the_answer(tiny):
    options = {"prompt": "<image> or <image>?", "max_tokens": 8}
    one = generate(*tiny, IMAGES, **options)
    assert one == generate(*tiny, IMAGES, **options)
    assert one != generate(*tiny, IMAGES[::-1], **options)


def test_pictures_go_in_front_unless_placed():
    assert place_pictures("What?", 2, "<image>") == "<image>\n<image>\nWhat?"
    assert place_pictures("A <image> b", 1, "<image>") == "A <image> b"


@pytest.mark.parametrize(
    ("text", "pictures", "message"),
    [
        ("<image> and <image>?", 1, "2 <image> but there is 1 picture"),
        ("<image>?", 2, "1 <image> but there are 2 pictures"),
        ("", 1, "prompt is empty"),
        (" <image>\n", 1, "prompt is empty"),
    ],
)
def test_wrong_prompts_say_so(text, pictures, message):
    with pytest.raises(InputError, match=message):
        place_pictures(text, pictures, "<image>")


def test_positions_agree_where_nothing_is_dropped(tiny):
    model, processor = tiny
    scene = scene_of(processor, IMAGES[1:], "Where?")
    plain = assemble(model, scene, look(model, scene, ()))
    assert plain.positions is None
    # Force explicit positions 0..T-1: they must equal contiguous ones.
    counted = replace(plain, positions=mx.arange(plain.end))
    theirs = model(None, input_embeddings=plain.embeddings)[:, -1]
    for sequence in (plain, counted):
        ours = model.decoder.logits(model.decoder.read(sequence).hidden)[:, -1]
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1e-5)


def test_original_positions_equal_masking_the_dropped_tokens(tiny):
    """Dropping tokens at original positions equals masking them."""
    model, processor = tiny
    scene = scene_of(processor, IMAGES[:1], "Where?")
    pruned = look(model, scene, QUARTER)
    read = {
        positions: model.decoder.read(
            assemble(model, scene, pruned, positions=positions)
        ).hidden
        for positions in ("original", "contiguous")
    }
    ours, other = (model.decoder.logits(hidden)[:, -1] for hidden in read.values())
    full = assemble(model, scene, look(model, scene, ()))
    start, total = len(scene.prompt.segments[0]), pruned.total
    seen = np.ones(full.embeddings.shape[1], bool)
    seen[start : start + total] = False
    seen[start + np.array(pruned.selection.indices[0])] = True
    mask = mx.array(np.tril(np.ones((len(seen), len(seen)), bool)) & seen[None])
    hidden = full.embeddings
    for layer in model.layers:
        hidden = layer(hidden, mask, None)
    inner = model.language_model.model
    logits = inner.embed_tokens.as_linear(inner.norm(hidden[:, -1:]))[:, 0]
    np.testing.assert_allclose(np.array(ours), np.array(logits), atol=1e-4)
    assert float(mx.max(mx.abs(ours - other))) > 1e-3  # the option does something


def test_decoding_goes_on_at_original_positions(tiny):
    """Greedy ids of the stream equal those of uncached full forwards."""
    model, processor = tiny
    options = {"pruner": QUARTER, "positions": "original", "max_tokens": 6}
    stream = stream_generate(model, processor, IMAGES[:1], "Where?", **options)
    ids = [piece.token for piece in stream]
    scene = scene_of(processor, IMAGES[:1], "Where?")
    sequence = assemble(model, scene, look(model, scene, QUARTER))
    end = sum(map(len, scene.prompt.segments)) + 64  # as if nothing were dropped
    assert len(ids) > 1
    for number, expected in enumerate(ids):
        logits = model.decoder.logits(model.decoder.read(sequence).hidden)
        token = int(mx.argmax(logits[0, -1]))
        assert token == expected
        more = model.decoder.embed(mx.array([[token]]))
        sequence = replace(
            sequence,
            embeddings=mx.concatenate([sequence.embeddings, more], axis=1),
            positions=mx.concatenate([sequence.positions, mx.array([end + number])]),
        )


def test_an_abandoned_stream_leaves_nothing_behind(tiny):
    model, processor = tiny
    before = generate(model, processor, [IMAGES[0]], "What?", max_tokens=6)
    stream = stream_generate(
        model, processor, [IMAGES[0]], "What?", pruner=Pruner("norm", 0.25)
    )
    next(stream)
    assert generate(model, processor, [IMAGES[0]], "What?", max_tokens=6) == before
    stream.close()
    assert generate(model, processor, [IMAGES[0]], "What?", max_tokens=6) == before


def test_only_a_causal_sequence_can_be_extended():
    scene, visual = Scene(None, Prompt(((1,), (2,)))), kept_tokens([[0]], (2, 2), 1)
    model = SimpleNamespace(text=COUNTER.text, attends="full", gap=0)
    sequence, more = assemble(model, scene, visual), mx.zeros((1, 2, 1))
    assert sequence.mask == "full"
    with pytest.raises(ValueError, match="only a causal or prefix sequence"):
        sequence.extended(more)
    longer = assemble(COUNTER, scene, visual).extended(more)
    assert longer.positions.tolist() == [0, 1, 5, 6, 7]
    assert longer.end == 8

"""Order of pictures and text, and positions of what is kept."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY

from mlx_tokprune import Pruner, generate, load, stream_generate
from mlx_tokprune.errors import InputError
from mlx_tokprune.image import load_image
from mlx_tokprune.pipeline import assemble, first_logits, see
from mlx_tokprune.prompt import Prompt, original_positions, place_pictures, splice

IMAGES = [TINY / "image_0.png", TINY / "image_1.png"]


def test_two_pictures_keep_their_order():
    prompt = Prompt(((1, 2), (3,), (4, 5)))
    visual = mx.array([[[10.0], [11]], [[20], [21]]])
    spliced = splice(prompt, lambda ids: ids[..., None].astype(mx.float32), visual)
    assert spliced.reshape(-1).tolist() == [1, 2, 10, 11, 3, 20, 21, 4, 5]


def test_two_pictures_reach_the_model_in_order(tiny):
    model, processor = tiny
    pixels = mx.array(processor.pixels([load_image(i) for i in IMAGES]))
    prompt = processor.prompt("First <image> then <image>?", 2)
    together = see(model, pixels, Pruner("norm", 0.25))
    embeddings = assemble(model, prompt, together, "contiguous").embeddings[0]
    parts = []
    for number, segment in enumerate(prompt.segments):
        parts.append(model.embed(mx.array(segment)))
        if number < 2:
            alone = see(model, pixels[number : number + 1], Pruner("norm", 0.25))
            parts.append(alone.embeddings[0])
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


def test_original_positions_skip_what_was_dropped():
    prompt = Prompt(((1, 2), (3,), (4, 5)))
    kept = [mx.array([0, 3]), mx.array([1, 2])]
    where, shift = original_positions(prompt, kept, 4)
    assert where.tolist() == [0, 1, 2, 5, 6, 8, 9, 11, 12]
    assert shift == 4


def test_positions_agree_where_nothing_is_dropped(tiny):
    model, processor = tiny
    pixels = mx.array(processor.pixels([load_image(IMAGES[1])]))
    prompt = processor.prompt("Where?", 1)
    visual = see(model, pixels, Pruner("none"))
    # Force explicit positions 0..T-1: they must equal contiguous ones.
    plain = first_logits(model, assemble(model, prompt, visual, "contiguous"), None)
    embeddings = assemble(model, prompt, visual, "contiguous").embeddings
    with model.positions.using(mx.arange(embeddings.shape[1])):
        explicit = model(None, input_embeddings=embeddings)[:, -1]
    np.testing.assert_allclose(np.array(explicit), np.array(plain), atol=1e-5)


def test_original_positions_equal_masking_the_dropped_tokens(tiny):
    """Dropping a token at its place is the full prompt with that token masked out."""
    model, processor = tiny
    pixels = mx.array(processor.pixels([load_image(IMAGES[0])]))
    prompt = processor.prompt("Where?", 1)
    pruned = see(model, pixels, Pruner("norm", 0.25))
    ours = first_logits(model, assemble(model, prompt, pruned, "original"), None)
    full = assemble(model, prompt, see(model, pixels, Pruner("none")), "contiguous")
    start, total = len(prompt.segments[0]), pruned.total
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
    contiguous = assemble(model, prompt, pruned, "contiguous")
    other = first_logits(model, contiguous, None)
    assert float(mx.max(mx.abs(ours - other))) > 1e-3  # the option does something


def test_decoding_goes_on_at_original_positions(tiny):
    """Greedy ids of the stream equal those of running the whole sequence each time."""
    model, processor = tiny
    options = {"pruner": Pruner("norm", 0.25), "positions": "original"}
    stream = stream_generate(
        model, processor, [IMAGES[0]], "Where?", max_tokens=6, **options
    )
    ids = [piece.token for piece in stream]
    pixels = mx.array(processor.pixels([load_image(IMAGES[0])]))
    visual = see(model, pixels, options["pruner"])
    prefill = assemble(model, processor.prompt("Where?", 1), visual, "original")
    embeddings, where = prefill.embeddings, prefill.positions
    for expected in ids:
        with model.positions.using(where):
            logits = model(None, input_embeddings=embeddings)
        token = int(mx.argmax(logits[0, -1]))
        assert token == expected
        more = model.embed(mx.array([[token]]))
        embeddings = mx.concatenate([embeddings, more], axis=1)
        after = mx.array([embeddings.shape[1] - 1 + prefill.shift])
        where = mx.concatenate([where, after])


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


def test_the_original_layout_loads_without_conversion(tiny):
    again = load(TINY)[0]
    ids = mx.array([[1, 2, 3]])
    assert mx.array_equal(again(ids), tiny[0](ids))

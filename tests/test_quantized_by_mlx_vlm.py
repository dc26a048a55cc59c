"""FastVLM folders that mlx-vlm quantized answer here as they answer in mlx-vlm."""

import contextlib
import io
import json

import mlx.core as mx
import pytest
from test_convert import edit_weights

mlx_vlm = pytest.importorskip("mlx_vlm")

from mlx_vlm.convert import convert as quantize  # noqa: E402
from mlx_vlm.models import fastvlm  # noqa: E402
from mlx_vlm.models.cache import KVCache  # noqa: E402

from mlx_tokprune import load  # noqa: E402
from mlx_tokprune.checkpoints.embedded import PICTURES  # noqa: E402
from mlx_tokprune.convert import convert  # noqa: E402
from mlx_tokprune.pipeline import Scene, run  # noqa: E402
from mlx_tokprune.processing.image import load_image  # noqa: E402

pytestmark = pytest.mark.usefixtures("not_compiled")
QUESTIONS = ("What is in the centre?", "Which colour is the square?")
LENGTH = 3
MODES = {
    "affine, 4 bits": {},
    "affine, 2 bits": {"q_bits": 2, "q_group_size": 32},
    "affine, 6 bits": {"q_bits": 6, "q_group_size": 128},
    "mixed_4_6": {"quant_predicate": "mixed_4_6"},
    "mixed_3_8": {"quant_predicate": "mixed_3_8"},
    **{
        m: {"q_mode": m, "q_bits": None, "q_group_size": None}
        for m in ("mxfp4", "nvfp4", "mxfp8")
    },
}


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """Return the demo in float32, with the unused head that mlx-vlm requires."""
    folder = convert("demo", str(tmp_path_factory.mktemp("demo") / "m"), "float32")
    head = {"vision_tower.vision_model.head.proj": mx.zeros((512, 768))}
    edit_weights(folder, lambda weights: weights.update(head))
    sizes = json.loads((folder / "config.json").read_text())["vision_config"]
    with pytest.MonkeyPatch.context() as patch:
        # mlx-vlm has one tower's sizes, as attributes of a class.
        for name in ("layers", "embed_dims", "mlp_ratios"):
            patch.setattr(fastvlm.VisionConfig, name, sizes[name])
        yield folder


@pytest.fixture(scope="module")
def scenes(demo):
    pixels = mx.array(demo[1].pixels([load_image(PICTURES[0].path)]))
    return [Scene(pixels, demo[1].prompt(question, 1)) for question in QUESTIONS]


def ours(folder, scenes) -> list[list[int]]:
    model, answers = load(folder)[0], []
    for scene in scenes:
        cache, ids = model.decoder.make_cache(), []
        read, _ = run(model, scene, (), positions="original", cache=cache)
        hidden = read.hidden
        for _ in range(LENGTH):
            logits = model.decoder.logits(hidden)
            ids.append(mx.argmax(logits.reshape(-1, logits.shape[-1])[-1]).item())
            hidden = model.decoder.follow(mx.array([ids[-1:]]), read.cache)
        answers.append(ids)
    return answers


def theirs(folder, scenes) -> list[list[int]]:
    model, answers = mlx_vlm.load(str(folder))[0], []
    for scene in scenes:
        before, after = scene.prompt.segments
        tokens = mx.array([[*before, model.config.image_token_index, *after]])
        pixels = scene.pixels.transpose(0, 3, 1, 2)
        embeddings = model.get_input_embeddings(tokens, pixels).inputs_embeds
        cache, ids = [KVCache() for _ in model.language_model.layers], []
        inputs = {"inputs_embeds": embeddings}
        for _ in range(LENGTH):
            logits = model.language_model(tokens, cache=cache, **inputs).logits
            ids.append(mx.argmax(logits[0, -1]).item())
            tokens, inputs = mx.array([ids[-1:]]), {}
        answers.append(ids)
    return answers


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_token_ids_are_those_of_mlx_vlm(exact, scenes, tmp_path, options):
    folder = tmp_path / "quantized"
    with contextlib.redirect_stdout(io.StringIO()):
        quantize(str(exact), str(folder), quantize=True, **options)
    names = mx.load(str(folder / "model.safetensors")).keys()
    assert "mm_projector.0.scales" in names
    assert ours(folder, scenes) == theirs(folder, scenes)

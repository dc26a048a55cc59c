"""Checkpoints that mlx-vlm or mlx-lm quantized: every mode, layer and family."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY, TINY_CHUNKS, TINY_POLICY
from test_convert import edit_config, edit_weights
from test_testbed import folder as resnet_vlm  # noqa: F401

from mlx_tokprune import load
from mlx_tokprune.checkpoints.opening import build, open_checkpoint
from mlx_tokprune.checkpoints.quantization import Format
from mlx_tokprune.convert import convert
from mlx_tokprune.convert.__main__ import main
from mlx_tokprune.errors import InputError

IDS = mx.array([[5, 17, 40, 3]])
FORMATS = [Format(32, bits) for bits in (1, 2, 3, 4, 5, 6, 8)]
FORMATS += [Format(32, 4, "mxfp4"), Format(16, 4, "nvfp4"), Format(32, 8, "mxfp8")]
PROJECTOR, DOWN = "mm_projector.0", "language_model.model.layers.0.mlp.down_proj"


def quantize(source, folder, choose) -> None:
    """Write `folder` with layers packed in the formats that `choose(path)` returns."""
    convert(str(source), str(folder))
    family, _, config = open_checkpoint(folder)
    modules = build(family, config, False).named_modules()
    layers = [p for p, m in modules if isinstance(m, (nn.Linear, nn.Embedding))]

    def pack(weights):
        for path in layers:
            weight = weights[f"{path}.weight"]
            format = choose(path)
            if format and weight.shape[1] % format.group_size == 0:
                weights |= format.pack(path, weight)

    edit_weights(folder, pack)


def section(folder, format, **layers) -> None:
    section = {**format._asdict(), **layers}
    edit_config(folder, quantization=section, quantization_config=section)


def dequantize(folder, formats) -> None:
    """Replace packed layers by the floats that they stand for."""

    def unpack(weights):
        for path, format in formats.items():
            packed, *parts = [
                weights.pop(f"{path}.{part}", None)
                for part in ("weight", "scales", "biases")
            ]
            if format.mode == "affine":  # before the product is rounded
                parts = [array.astype(mx.float32) for array in parts]
            weights[f"{path}.weight"] = mx.dequantize(
                packed, *parts, *format, dtype=mx.float32
            )

    edit_weights(folder, unpack)


def answer(model) -> mx.array:
    hidden = model.decoder.embed(IDS)
    for layer in model.layers:
        hidden = layer(hidden, "causal", None)
    return model.decoder.logits(model.decoder.norm(hidden))


@pytest.mark.parametrize(
    ("source", "format"),
    [(TINY, format) for format in FORMATS]
    + [(f, format) for f in (TINY_POLICY, TINY_CHUNKS) for format in FORMATS[2:4]]
    + [(f, format) for f in (TINY_POLICY, TINY_CHUNKS) for format in FORMATS[7:]],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_every_layer_of_every_family_can_be_quantized(source, format, tmp_path):
    check_every_layer(source, format, tmp_path)


def test_every_layer_of_a_resnet_vlm_can_be_quantized(request, tmp_path):
    source = request.getfixturevalue("resnet_vlm")
    check_every_layer(source, Format(16, 4, "nvfp4"), tmp_path)


def check_every_layer(source, format, tmp_path) -> None:
    """A model whose layers are all packed computes with the values of the packing."""
    folder = tmp_path / "q"
    quantize(source, folder, lambda path: format)
    section(folder, format)
    packed = load(folder)[0]
    formats = open_checkpoint(folder).checkpoint.quantization.formats
    assert any(not path.startswith("language_model.") for path in formats)
    assert isinstance(packed.layers[0].mlp.down_proj, nn.QuantizedLinear)
    dequantize(folder, formats)
    floats = load(folder)[0]
    pixels = mx.random.uniform(shape=(1, 128, 128, 3), key=mx.random.key(0))
    if source != TINY:
        pixels = pixels[:, : packed.image_size, : packed.image_size]
    for compute in (
        answer,
        lambda m: m.project(m.encode(pixels).tokens),
    ):
        ours, exact = (np.array(compute(m), np.float32) for m in (packed, floats))
        np.testing.assert_allclose(ours, exact, atol=2e-4 * np.abs(exact).max())


def test_layers_have_formats_of_their_own(tmp_path):
    """Entries of layers, under MLX's or the text model's names, and `false`."""
    eight, four, default = Format(32, 8), Format(32, 4, "mxfp4"), Format(64, 4)
    own = {DOWN: eight, PROJECTOR: four, f"{DOWN[:-9]}up_proj": None}
    folder = tmp_path / "q"
    quantize(TINY, folder, lambda path: own.get(path, default))
    short = DOWN.removeprefix("language_model.")
    entries = {
        short: {"group_size": 32, "bits": 8},
        PROJECTOR: {"mode": "mxfp4"},
        f"{DOWN[:-9]}up_proj": False,
        "language_model.model.layers.9.mlp.up_proj": {"bits": 2, "group_size": 32},
    }
    section(folder, default, **entries)
    model = load(folder)[0]
    mlp = model.layers[0].mlp
    assert (mlp.down_proj.bits, mlp.down_proj.group_size) == (8, 32)
    assert (mlp.gate_proj.bits, mlp.gate_proj.group_size) == (4, 64)
    assert isinstance(mlp.up_proj, nn.Linear)
    target = convert(str(folder), str(tmp_path / "again"))
    assert mx.array_equal(load(target)[0](IDS), model(IDS))
    written = json.loads((target / "config.json").read_text())["quantization"]
    assert written[DOWN] == eight._asdict()


def change(name, edit):
    return lambda folder: edit_weights(
        folder, lambda w: w.update({name: edit(w[name])})
    )


def drop(name):
    return lambda folder: edit_weights(folder, lambda w: w.pop(name))


def stated(**entries):
    return lambda folder: section(folder, Format(32, 4), **entries)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: section(f, Format(32, 8)),
            r"scales of .*, 2\) .*, 1\) and a float for 8",
        ),
        (
            lambda f: section(f, Format(64, 4)),
            "scales of shape .*; .* groups of 64",
        ),
        (
            lambda f: section(f, Format(64, 2)),
            r"from 2 bits.* \(320, 128\); expected \(320, 64\)",
        ),
        (
            lambda f: section(f, Format(32, 4, "mxfp4")),
            "type F32; expected .* U8 for 4",
        ),
        (lambda f: section(f, Format(32, 7)), "gives 7 bits and group_size 32"),
        (lambda f: section(f, Format(32, 4, "fp3")), "mode 'fp3'; expected"),
        (lambda f: section(f, Format(32, 4, ["x"])), r"mode \['x'\]; expected"),
        (stated(activations="int8"), "quantization with activations 'int8'; expected"),
        (stated(**{DOWN: False}), f"says false for {DOWN}"),
        (stated(**{DOWN: {"global_scale": True}}), "says global_scale for"),
        (stated(**{DOWN: {"bits": 8, "group_size": 32}}), f"{DOWN}.scales of shape"),
        (stated(**{DOWN: {"bits": 9}}), f"gives {DOWN} 9 bits and group_size 64"),
        (
            stated(**{"vision_tower.vision_model.network.0.0.mlp": {"bits": 4}}),
            None,
        ),
        (
            drop(f"{PROJECTOR}.scales"),
            "mm_projector.0.weight of type U32 without scales",
        ),
        (drop(f"{PROJECTOR}.biases"), "biases of shape None and type None; expected"),
        (drop(f"{PROJECTOR}.weight"), "scales for a weight of shape"),
        (
            change(f"{PROJECTOR}.weight", lambda a: a.reshape(1, *a.shape)),
            "for a weight of shape .*; expected a matrix for .*; conv",
        ),
        (change(f"{PROJECTOR}.scales", lambda a: a * mx.nan), "not finite"),
        (
            lambda f: edit_config(f, quantize_activations=True),
            "quantize_activations in its config.json; expected it",
        ),
        (
            lambda f: edit_config(
                f, quantization=None, quantization_config={"quant_method": "awq"}
            ),
            "of type U32, from 'awq'; expected floats",
        ),
    ],
)
def test_formats_that_do_not_fit_are_refused(tmp_path, damage, message):
    folder = tmp_path / "q"
    quantize(TINY, folder, lambda path: Format(32, 4))
    section(folder, Format(32, 4))
    damage(folder)
    if message is None:
        assert load(folder)
        return
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    assert len(str(error.value)) < 600


def test_a_second_section_that_differs_is_told(tmp_path, caplog):
    folder = tmp_path / "q"
    quantize(TINY, folder, lambda path: Format(32, 4))
    section(folder, Format(32, 4))
    load(folder)
    assert "differs" not in caplog.text
    edit_config(folder, quantization_config={"quant_method": "awq"})
    load(folder)
    assert "quantization_config of" in caplog.text
    assert "differs and is not followed" in caplog.text


def test_a_layer_without_scales_is_not_quantized(tmp_path):
    folder = tmp_path / "q"
    quantize(TINY, folder, lambda path: Format(32, 4) if path != PROJECTOR else None)
    section(folder, Format(32, 4), **{PROJECTOR: {"bits": 4, "group_size": 32}})
    with pytest.raises(InputError, match=rf"a tensor {PROJECTOR}\.scales"):
        load(folder)


# Our own conversion -------------------------------------------------------------------


def converted(tmp_path, *options) -> tuple:
    """Return the folder and the formats of a conversion by the command."""
    target = tmp_path / "q"
    main(["--hf-path", "demo", "--mlx-path", str(target), "-q", *options])
    return target, open_checkpoint(target).checkpoint.quantization.formats


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_modes_have_their_own_sizes(tmp_path, mode):
    target, formats = converted(tmp_path, "--q-mode", mode)
    expected = next(f for f in FORMATS if f.mode == mode)
    assert set(formats.values()) == {expected}
    assert all(path.startswith("language_model.") for path in formats)
    layer = load(target)[0].layers[1].mlp.up_proj
    assert (layer.group_size, layer.bits, layer.mode) == expected


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
def test_recipes_are_those_of_mlx_lm(tmp_path, recipe, demo):
    from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

    from mlx_tokprune.convert.converter import RECIPES

    assert set(RECIPES) == set(QUANT_RECIPES)
    _, formats = converted(tmp_path, "--quant-predicate", recipe)
    language = demo[0].language_model
    choose = mixed_quant_predicate_builder(recipe, language, 64)
    layers = dict(language.named_modules())
    for path, format in formats.items():
        name = path.removeprefix("language_model.")
        assert format._asdict() == choose(name, layers[name])
    assert len({format.bits for format in formats.values()}) == 2


def test_widths_that_groups_do_not_divide_are_said(tmp_path, caplog, capsys):
    _, formats = converted(tmp_path, "--q-group-size", "128")
    assert "groups of 128 do not divide the width of" in caplog.text
    assert caplog.text.count("language_model.") == 1
    assert {path.rpartition(".")[2] for path in formats} == {"down_proj"}
    target = tmp_path / "none"
    argv = ["--hf-path", str(TINY_CHUNKS), "--mlx-path", str(target), "-q"]
    with pytest.raises(SystemExit):
        main([*argv, "--q-group-size", "128"])
    assert "nothing would be quantized; expected 32 or 64" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["-q", "--q-mode", "mxfp4", "--q-bits", "8"],
            "8 bits in groups of 32 in mxfp8",
        ),
        (["-q", "--q-mode", "nvfp4", "--q-group-size", "32"], "of 16 in nvfp4"),
        (["-q", "--quant-predicate", "mixed_4_6", "--q-bits", "4"], "the recipe sets"),
        (
            ["-q", "--quant-predicate", "mixed_4_6", "--q-mode", "mxfp4"],
            "expected one of mixed_2_6",
        ),
        (["--q-mode", "mxfp4"], "require -q"),
        (["--quant-predicate", "mixed_4_6"], "require -q"),
    ],
)
def test_options_that_exclude_each_other(tmp_path, capsys, options, message):
    argv = ["--hf-path", "demo", "--mlx-path", str(tmp_path / "q"), *options]
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("name", [f"{PROJECTOR}.weight", f"{DOWN}.weight"])
def test_numbers_beyond_float16_are_refused(tmp_path, capsys, name):
    source, target = tmp_path / "source", tmp_path / "half"
    convert(str(TINY), str(source), dtype="float32")
    edit_weights(source, lambda w: w.update({name: w[name] * 1e7}))
    argv = ["--hf-path", str(source), "--mlx-path", str(target), "--dtype"]
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "float16"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"tensor {name} has numbers up to" in error
    assert "expected --dtype bfloat16" in error
    assert not target.exists()
    with pytest.raises(InputError, match="float16 ends at 65504: expected dtype bf"):
        load(source, dtype=mx.float16)
    main([*argv, "bfloat16"])
    assert mx.all(mx.isfinite(load(target)[0](IDS))).item()

"""Quantized conversion: only the language model, in bit widths that MLX supports."""

import numpy as np
import pytest
from conftest import TINY
from test_convert import IDS, edit_config

from mlx_tokprune import generate, load
from mlx_tokprune.checkpoints.shards import Checkpoint
from mlx_tokprune.convert import convert
from mlx_tokprune.convert.__main__ import main
from mlx_tokprune.errors import InputError


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_only_the_language_model_is_quantized(checkpoint, tmp_path, bits, tiny):
    options = ["-q", "--q-bits", str(bits), "--q-group-size", "32"]
    target = tmp_path / "q"
    main(["--hf-path", str(checkpoint), "--mlx-path", str(target), *options])
    opened = Checkpoint.open(target)
    scales = [n for n in opened.tensors if n.endswith(".scales")]
    assert scales
    assert all(n.startswith("language_model.") for n in scales)
    assert opened.config["quantization"]["bits"] == bits
    model, processor = load(target)
    exact, ours = np.array(tiny[0](IDS)), np.array(model(IDS))
    error = np.abs(ours - exact).mean() / np.abs(exact).mean()
    assert 0 < error < {2: 2, 3: 1, 4: 0.3, 5: 0.2, 6: 0.15, 8: 0.02}[bits]
    images = [TINY / "image_0.png"]
    assert isinstance(generate(model, processor, images, "Hi", max_tokens=3), str)
    with pytest.raises(InputError, match="already quantized"):
        convert(str(target), str(tmp_path / "again"), quantize=True)
    for wrong in (None, {"bits": bits}):
        edit_config(target, quantization=wrong, quantization_config=wrong)
        with pytest.raises(InputError, match="bits and group_size None"):
            load(target)


def test_mlx_lm_quantizes_the_language_model_only():
    import mlx.nn as nn

    model = load(TINY)[0]
    nn.quantize(model, 32, 4, class_predicate=model.quant_predicate)
    quantized = {p for p, m in model.named_modules() if hasattr(m, "scales")}
    assert any(path.startswith("language_model.") for path in quantized)
    assert all(path.startswith("language_model.") for path in quantized)


@pytest.mark.parametrize("options", [{"q_bits": 7}, {"q_group_size": 48}])
def test_quantization_options_are_checked(checkpoint, tmp_path, options):
    with pytest.raises(InputError, match="expected 1, 2, 3, 4, 5, 6 or 8 bits in"):
        convert(str(checkpoint), str(tmp_path / "q"), quantize=True, **options)


@pytest.mark.parametrize("option", [["--q-bits", "8"], ["--q-group-size", "32"]])
def test_bits_without_quantizing_are_refused(checkpoint, tmp_path, capsys, option):
    paths = ["--hf-path", str(checkpoint), "--mlx-path", str(tmp_path / "mlx")]
    with pytest.raises(SystemExit) as stop:
        main([*paths, *option])
    assert stop.value.code == 2
    assert "require -q" in capsys.readouterr().err
    assert not (tmp_path / "mlx").exists()

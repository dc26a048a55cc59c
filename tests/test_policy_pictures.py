"""Pictures of OpenVLA policies: TensorFlow's preparation, and which one is used.

`data/pictures.npz` holds what TensorFlow 2.21.0 computed (`goldens/pictures.py`).
"""

import json
import logging

import mlx.core as mx
import numpy as np
import pytest
from conftest import DATA, TINY_POLICY, copy_policy, side_tensors
from PIL import Image

from mlx_tokprune import load
from mlx_tokprune.act.__main__ import main as act
from mlx_tokprune.checkpoints.opening import open_checkpoint
from mlx_tokprune.convert import convert
from mlx_tokprune.convert.__main__ import main as convert_main
from mlx_tokprune.errors import InputError
from mlx_tokprune.processing.image import load_image, preprocess_naive
from mlx_tokprune.processing.jpeg import jpeg_round_trip

GOLDEN = dict(np.load(DATA / "pictures.npz"))
PICTURE = load_image(TINY_POLICY / "image_0.png")
EVALUATION = {"crop": 0.9, "resize": "lanczos", "jpeg": 95}
PLAIN = {"crop": 1.0, "resize": "bicubic", "jpeg": 0}
NUMBERS = {k: [v] * 7 for k, v in (("q01", -1.0), ("q99", 1.0))}
NUMBERS |= {"min": [-10.0] * 7, "max": [10.0] * 7}


def levels(name: str, crop: float, jpeg: int) -> np.ndarray:
    picture = Image.fromarray(GOLDEN[name])
    pixels = preprocess_naive([picture], 56, crop, Image.Resampling.LANCZOS, jpeg)
    return np.rint(pixels[0] * 255).astype(int)


@pytest.mark.parametrize("name", ["photo", "noise"])
def test_the_jpeg_round_trip_is_tensorflow_s(name):
    assert np.array_equal(jpeg_round_trip(GOLDEN[name], 95), GOLDEN[f"{name}_jpeg"])


@pytest.mark.parametrize("name", ["photo", "noise"])
@pytest.mark.parametrize(
    ("golden", "crop", "jpeg"), [("resized", 1.0, 0), ("prepared", 0.9, 95)]
)
def test_resizing_and_crop_are_tensorflow_s(name, golden, crop, jpeg):
    """At most 0.1 % of the levels differ, by the rounding of one level."""
    difference = levels(name, crop, jpeg) - GOLDEN[f"{name}_{golden}"].astype(int)
    assert np.abs(difference).max() <= 1
    assert np.mean(difference != 0) < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 16), (17, 33)])
@pytest.mark.parametrize("quality", [1, 50, 100])
def test_jpeg_keeps_shape_and_grey_of_any_size(size, quality):
    grey = np.full((*size, 3), 128, np.uint8)
    assert np.array_equal(jpeg_round_trip(grey, quality), grey)


def test_a_picture_of_the_input_size_is_only_cropped():
    picture = PICTURE.resize((56, 56))
    plain = preprocess_naive([picture], 56)
    options = (1.0, Image.Resampling.LANCZOS, 95)
    assert np.array_equal(preprocess_naive([picture], 56, *options), plain)


# Which preparation is used --------------------------------------------------------


def policy(folder, data_sets=("toy_robot",), file=False, oft=None, **config):
    """Write a tiny policy with statistics in config.json or in a file; return it."""
    copy_policy(folder)
    stats = {name: {"action": NUMBERS, "proprio": NUMBERS} for name in data_sets}
    stored = json.loads((folder / "config.json").read_text()) | config
    if file:
        (folder / "dataset_statistics.json").write_text(json.dumps(stats))
    else:
        stored["norm_stats"] = stats
    (folder / "config.json").write_text(json.dumps(stored))
    if oft is not None:
        weights = mx.load(str(folder / "model.safetensors")) | side_tensors(proprio=7)
        mx.eval(weights)
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def opened(folder, **settings):
    """Return (image_processing, oft, notes) of a checkpoint."""
    _, checkpoint, config = open_checkpoint(folder, settings=settings)
    return config.get("image_processing"), config.get("oft"), checkpoint.notes


@pytest.mark.parametrize(
    ("data_sets", "file", "expected", "reason"),
    [
        (("libero_spatial_no_noops",), False, EVALUATION, "LIBERO"),
        (("libero_spatial",), True, EVALUATION, "LIBERO"),
        (("bridge_orig", "libero_10_no_noops"), False, EVALUATION, "LIBERO"),
        (("my_lab_pick",), True, EVALUATION, "dataset_statistics.json"),
        (("my_lab_pick", "my_lab_place"), True, EVALUATION, "dataset_statistics"),
        (("my_lab_pick",), False, PLAIN, "nothing says that it was fine-tuned"),
        (("calibero_pick",), False, PLAIN, "nothing says that it was fine-tuned"),
        (("fractal20220817_data", "bridge_orig"), False, PLAIN, "pretraining"),
        (("kuka", "fractal20220817_data", "bridge_orig"), True, PLAIN, "pretraining"),
    ],
)
def test_statistics_tell_how_pictures_are_prepared(
    tmp_path, data_sets, file, expected, reason
):
    chosen, _, notes = opened(policy(tmp_path / "p", data_sets, file))
    assert chosen == expected
    assert len(notes) == 1
    assert reason in notes[0]


def test_a_folder_of_finetune_py_tells_the_crop(tmp_path):
    name = "openvla-7b+my_data+b16+lr-0.0005--image_aug"
    assert opened(policy(tmp_path / name))[0] == EVALUATION


@pytest.mark.parametrize(
    ("config", "crop"),
    [
        ({"crop": 0.8}, 0.8),
        ({"crop": 1}, 1.0),
        ({"center_crop": True}, 0.9),
        ({"center_crop": False}, 1.0),
        ({"crop": 0.5, "center_crop": True}, 0.5),
        ({"center_crop": True, "image_processing": {"crop": 0.7}}, 0.7),
    ],
)
@pytest.mark.parametrize("data_set", ["toy_robot", "libero_spatial_no_noops"])
def test_a_stated_crop_is_followed(tmp_path, config, crop, data_set):
    folder = policy(tmp_path / "p", (data_set,), **config)
    assert opened(folder)[0]["crop"] == crop
    assert load(folder)[1].crop == crop


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"crop": 0}, "crop of pictures is 0; expected"),
        ({"crop": 1.5}, "crop of pictures is 1.5"),
        ({"crop": True}, "crop of pictures is True"),
        ({"crop": "0.9"}, "crop of pictures is '0.9'"),
        ({"center_crop": 0.9}, "center_crop 0.9; expected true or false"),
        (
            {"crop": 0.9, "center_crop": False},
            "center_crop False; expected what fits crop 0.9",
        ),
        (
            {"image_processing": {"zoom": 2}},
            "zoom of pictures is 2; expected crop, resize, jpeg only",
        ),
        (
            {"image_processing": {"resize": "lanzcos"}},
            "resize of pictures is 'lanzcos'; expected bicubic or lanczos",
        ),
        ({"image_processing": {"jpeg": 101}}, "jpeg of pictures is 101"),
        ({"image_processing": [0.9]}, "image_processing"),
    ],
)
def test_a_crop_that_cannot_be_followed_is_refused(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        load(policy(tmp_path / "p", **config))


def test_a_crop_may_stand_in_the_preprocessor_s_file(tmp_path):
    folder = policy(tmp_path / "p")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"center_crop": True}))
    assert opened(folder)[0]["crop"] == 0.9


def test_settings_of_the_caller_count_first(tmp_path):
    folder = policy(tmp_path / "p", ("libero_spatial",), crop=0.8)
    chosen, _, notes = opened(folder, crop=0.7, jpeg=0)
    assert chosen == {"crop": 0.7, "resize": "lanczos", "jpeg": 0}
    assert "with resize lanczos, because" in notes[0]
    assert not opened(folder, **PLAIN)[2]


def test_converted_policies_keep_their_preparation_in_silence(tmp_path):
    source = policy(tmp_path / "p", ("libero_spatial_no_noops",))
    target = convert(str(source), str(tmp_path / "mlx"), jpeg=80)
    chosen, _, notes = opened(target)
    assert chosen == EVALUATION | {"jpeg": 80}
    assert not notes
    _, processor = load(target)
    options = (112, 0.9, Image.Resampling.LANCZOS, 80)
    assert np.array_equal(
        processor.pixels([PICTURE]), preprocess_naive([PICTURE], *options)
    )


def test_an_oft_policy_of_an_earlier_version_acts_as_before(tmp_path):
    oft = {"chunk": 3, "pictures": 1, "rule": "bounds_q99", "crop": 0.8}
    folder = policy(tmp_path / "p", file=True, oft=oft)
    stored = json.loads((folder / "config.json").read_text()) | {"oft": oft}
    (folder / "config.json").write_text(json.dumps(stored))
    chosen, settings, notes = opened(folder)
    assert chosen == {"crop": 0.8, "resize": "lanczos", "jpeg": 0}
    assert settings["chunk"] == 3
    assert "earlier version of convert" in notes[0]


@pytest.mark.parametrize("flag", ["--crop", "--jpeg"])
def test_act_takes_the_flags_and_says_what_it_guessed_once(tmp_path, caplog, flag):
    folder = policy(tmp_path / "p", ("libero_spatial_no_noops",))
    run = ["--model", str(folder), "--image", str(TINY_POLICY / "image_0.png")]
    run += ["--instruction", "pick up the cup"]
    with caplog.at_level(logging.WARNING):
        act([*run, flag, "1"])
    lines = [r.getMessage() for r in caplog.records if "pictures are" in r.getMessage()]
    assert len(lines) == 1
    assert flag.strip("-") not in lines[0].partition("because")[0]


# The robot of an OFT policy -------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "data_sets", "robot", "reason"),
    [
        ("p", ("cambridge_lab_pick",), (8, 2, "bounds_q99"), "no data set names one"),
        ("p", ("kaloharm_pick",), (8, 2, "bounds_q99"), "no data set names one"),
        ("p", ("calibero_pick",), (8, 2, "bounds_q99"), "no data set names one"),
        ("p", ("aloha1_fold_shirt",), (25, 3, "bounds"), "'aloha1_fold_shirt' names"),
        ("p", ("BridgeV2-orig",), (5, 1, "bounds_q99"), "'BridgeV2-orig' names it"),
        ("libero-run", ("aloha_fold",), (25, 3, "bounds"), "'aloha_fold' names it"),
        ("aloha-copy", ("my_lab",), (25, 3, "bounds"), "folder 'aloha-copy' names it"),
        ("cambridge-run", ("my_lab",), (8, 2, "bounds_q99"), "no data set names one"),
        ("libero-bridge", ("my_lab",), (8, 2, "bounds_q99"), "no data set names one"),
    ],
)
def test_a_robot_is_a_whole_word_of_statistics_or_folder(
    tmp_path, folder, data_sets, robot, reason
):
    _, oft, notes = opened(policy(tmp_path / folder, data_sets, file=True, oft={}))
    assert (oft["chunk"], oft["pictures"], oft["rule"]) == robot
    notes = [note for note in notes if "robot is not recorded" in note]
    assert len(notes) == 1
    assert reason in notes[0]


def test_data_sets_of_several_robots_need_a_choice(tmp_path):
    folder = policy(tmp_path / "p", ("libero_goal", "aloha_fold"), True, {})
    with pytest.raises(InputError, match=r"several robots \(libero, aloha\)"):
        load(folder)
    assert opened(folder, unnorm_key="aloha_fold")[1]["chunk"] == 25
    settings = {"actions_per_chunk": 6, "pictures": 1, "norm": "min_max"}
    _, oft, notes = opened(folder, **settings)
    assert (oft["chunk"], oft["pictures"], oft["rule"]) == (6, 1, "bounds")
    assert not any("robot is not recorded" in note for note in notes)


def test_the_norm_of_an_oft_policy_sets_units(tmp_path, capsys):
    """Extremes are ten times the quantiles here, and so are the actions."""
    folder = policy(tmp_path / "p", ("my_lab_pick",), file=True, oft={})
    run = ["--model", str(folder), "--image", str(TINY_POLICY / "image_0.png")]
    run += ["--instruction", "pick", "--state", *"0000000", "--json"]
    run += ["--pictures", "1", "--actions-per-chunk", "3"]
    actions = []
    for norm in ("quantiles", "min_max"):
        act([*run, "--norm", norm])
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        actions.append(record)
    ours = [np.array(record["action"]) for record in actions]
    assert ours[0].shape == (3, 7)
    for record, action, scale in zip(actions, ours, (1, 10), strict=True):
        expected = np.array(record["normalized_action"]) * scale
        np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actions_per_chunk": 2}, "--actions-per-chunk .*for OpenVLA-OFT policies"),
        ({"norm": "min_max"}, "--norm is one of the options"),
        ({"croop": 1}, "Did you mean 'crop'"),
    ],
)
def test_settings_that_a_plain_policy_lacks_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        open_checkpoint(policy(tmp_path / "p"), settings=settings)


@pytest.mark.parametrize("norm", ["mean_std", "identity"])
def test_norms_that_oft_does_not_have_are_refused(tmp_path, norm, capsys):
    folder = policy(tmp_path / "p", file=True, oft={})
    paths = ["--hf-path", str(folder), "--mlx-path", str(tmp_path / "mlx")]
    with pytest.raises(SystemExit) as error:
        convert_main([*paths, "--norm", norm])
    assert error.value.code == 2
    assert "expected quantiles (bounds_q99) or min_max" in capsys.readouterr().err
    assert not (tmp_path / "mlx").exists()


def test_a_model_that_answers_has_no_picture_settings(checkpoint):
    with pytest.raises(InputError, match="--crop is one of the options for OpenVLA"):
        load(checkpoint, settings={"crop": 0.9})

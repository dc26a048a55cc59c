"""The command `mlx_tokprune.act`: output and refusals."""

import functools
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, TINY_POLICY, copy_policy

from mlx_tokprune import InputError, Policy, Pruner, load, predict_action
from mlx_tokprune.act import __main__ as act
from mlx_tokprune.act.__main__ import main
from mlx_tokprune.features import Selection
from mlx_tokprune.generate.__main__ import main as generate_main
from mlx_tokprune.pipeline import VisualTokens

PICTURE = str(TINY_POLICY / "image_0.png")
INSTRUCTION = "pick up the cup"
ASK = ["--model", str(TINY_POLICY), "--image", PICTURE, "--instruction", INSTRUCTION]
PROMISED = {
    *("action", "normalized_action", "token_ids", "visual_tokens", "kept_indices"),
    *("stages_ms", "ttft_ms", "total_ms", "actions_per_second", "peak_memory_mb"),
    *("method", "keep", "places", "positions", "device", "wrong", "calls"),
}


@pytest.fixture
def two_data_sets(tmp_path):
    """Return the tiny policy with two sets of statistics, one of twice the range."""
    folder = copy_policy(tmp_path / "two")
    config = json.loads((folder / "config.json").read_text())
    first = config["norm_stats"]["toy_robot"]["action"]
    double = {k: (2 * np.array(first[k])).tolist() for k in ("q01", "q99")}
    second = {"action": first | double}
    config["norm_stats"] = {"toy_robot": {"action": first}, "big_robot": second}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_json_has_what_is_promised(capsys):
    asked = [*ASK, "--method", "norm", "--keep-ratio", "0.25", "--json"]
    main([*asked, "--runs", "1", "--stages"])
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record.keys() == PROMISED
    assert (record["visual_tokens"], record["keep"]) == (64, 16)
    stages = ["preprocess", "vision", "prune", "project", "prefill", "decode"]
    assert list(record["stages_ms"]) == stages
    assert all(ms > 0 for ms in record["stages_ms"].values())
    assert 0 < record["ttft_ms"] <= record["total_ms"]
    assert "actions/s" in captured.err
    # Unless asked for, nothing is fenced and no run is repeated.
    main(asked)
    captured = capsys.readouterr()
    again = json.loads(captured.out)
    assert again.keys() == PROMISED
    assert again["token_ids"] == record["token_ids"]
    assert again["stages_ms"] is None
    assert again["actions_per_second"] is None
    assert "actions/s" not in captured.err


def test_the_data_set_gives_the_units(two_data_sets):
    asked = (*load(two_data_sets), [PICTURE], INSTRUCTION)
    small = predict_action(*asked, unnorm_key="toy_robot")
    large = predict_action(*asked, unnorm_key="big_robot")
    assert np.array_equal(small.normalized, large.normalized)
    # The last number, the gripper, is masked: it has no units.
    np.testing.assert_allclose(large.values[:-1], 2 * small.values[:-1])
    assert large.values[-1] == small.values[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--unnorm-key", "toy_robt"], "toy_robot"),
        (["--instruction", ""], "the instruction is empty"),
        (["--instruction", "  "], "the instruction is empty"),
        (["--instruction", "go " * 4000], "the instruction is too long"),
        (["--instruction", "\udcff"], "not valid Unicode"),
        (["--image", PICTURE], "takes 1 picture; 2 given"),
        (["--image", "nowhere.png"], "'nowhere.png' does not exist"),
        (["--proprio", "1", "2"], "reads no robot state"),
        (["--keep-ratio", "0"], "keep ratio 0 is outside (0, 1]"),
        (["--keep-tokens", "65"], "cannot keep 65 visual tokens; there are 64"),
        (["--method", "trimvl"], "Did you mean 'trimvla'?"),
        (["--method", "lightvla", "--keep-ratio", "0.5"], "lightvla"),
        (["--coverage", "2"], "coverage 2 is outside (0, 1]"),
        (["--coverage", "0"], "coverage 0 is outside (0, 1]"),
        (["--coverage", "0.3", "--keep-ratio", "0.5"], "give a budget or coverage"),
        (
            ["--method", "norm", "--keep-ratio", "0.5", "--coverage", "0.5"],
            "takes no options, not 'coverage'",
        ),
        (["--model", str(TINY)], "answers in words"),
        (["--model", "nowhere"], "nowhere does not exist"),
        (["--model", ""], "has no config.json"),
        (["--runs", "-1"], "cannot time -1 runs"),
        (["--overlay", PICTURE], "is no PNG picture of this command"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main([*ASK, *options])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def robots(policy, batch, proprio=None):
    return policy.act_on_batch(batch, INSTRUCTION, proprio)


def test_batches_that_do_not_fit_are_refused(tiny_policy, oft_policy, tiny):
    policy, oft = Policy(*tiny_policy), Policy(*oft_policy)
    state = [0.5, -1.0, 2.0, 0.0, 1.0]
    for call, message in (
        (lambda: robots(policy, []), "the batch is empty"),
        (lambda: robots(policy, [[PICTURE], [PICTURE] * 2]), "1 picture; 2 given"),
        (lambda: robots(policy, [[PICTURE]], [state]), "reads no robot state"),
        (lambda: robots(oft, [[PICTURE] * 2]), "give proprio, 5 numbers"),
        (lambda: robots(oft, [[PICTURE]], [state]), "2 pictures; 1 given"),
        (lambda: robots(oft, [[PICTURE] * 2] * 2, [state]), "no state for each"),
        (lambda: Policy(*tiny), "answers in words"),
        (lambda: Policy(tiny_policy[0], tiny[1]), "answers in words"),
        (lambda: Policy(*tiny_policy, pruner="norm"), "not str"),
        (lambda: policy(None, INSTRUCTION), "not NoneType"),
        (lambda: policy([PICTURE], ["go"]), "not list"),
        (lambda: Policy(*tiny_policy, unnorm_key={}), "unknown unnorm key"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_statistics_of_another_length_are_refused(oft_folder, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(oft_folder, folder)
    entry = {"q01": [0.0], "q99": [1.0], "mask": [True]}
    stats = {"toy_robot": {"action": entry, "proprio": entry}}
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))
    with pytest.raises(InputError, match=r"scale 1 numbers of action, but .* have 7"):
        Policy(*load(folder))


def test_an_action_that_is_not_finite_is_never_given(oft_policy):
    model, processor = oft_policy
    bias = model.action_head.model.fc2.bias
    asked = ([PICTURE] * 2, INSTRUCTION)
    state = [0.0] * 5
    try:
        model.action_head.model.fc2.bias = bias * float("nan")
        with pytest.raises(InputError, match="not finite"):
            predict_action(model, processor, *asked, proprio=state)
        with pytest.raises(InputError, match="not finite"):
            Policy(model, processor)(*asked, state)
    finally:
        model.action_head.model.fc2.bias = bias


def test_numbers_below_zero_with_exponents_are_numbers(oft_folder, capsys):
    model = ["--model", str(oft_folder), *ASK[2:], *ASK[2:4]]
    main([*model, "--proprio", "-1e-3", "0", "-.5", "-1", "-1.5E+0", "--runs", "1"])
    assert "actions/s" in capsys.readouterr().out


def test_an_overlay_never_replaces_another_file(tmp_path, capsys):
    note = tmp_path / "note.txt"
    note.write_text("mine")
    with pytest.raises(SystemExit):
        main([*ASK, "--overlay", str(note)])
    assert "is no PNG picture of this command" in capsys.readouterr().err
    assert note.read_text() == "mine"


def test_rate_counts_the_actions_of_a_chunk(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(act.time, "perf_counter", lambda: next(clock))
    for shape, rate in (((7,), 1), ((8, 7), 8)):
        policy = functools.partial(lambda values, *asked: values, np.zeros(shape))
        assert act._actions_per_second(policy, [], "", None, 3) == rate


def test_what_was_kept_of_each_of_several_pictures():
    kept = mx.array([[0, 3, 64, 70, 127]])
    visual = VisualTokens(None, kept, Selection(kept), (8, 8), pictures=2)
    first, second = visual.per_picture(visual.left())
    assert first.tolist() == [0, 3]
    assert second.tolist() == [0, 6, 63]


def test_an_ambiguous_data_set_lists_the_keys(two_data_sets, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(two_data_sets), *ASK[2:]])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "toy_robot" in error
    assert "big_robot" in error


def test_an_instruction_is_needed(capsys):
    with pytest.raises(SystemExit):
        main(ASK[:4])
    assert "no instruction was given" in capsys.readouterr().err


def test_generate_refuses_policies_but_runs_their_pruners(capsys):
    asked = ["--image", PICTURE, "--prompt", "Hi", "--max-tokens", "1"]
    with pytest.raises(SystemExit) as stop:
        generate_main(["--model", str(TINY_POLICY), *asked])
    assert stop.value.code == 2
    assert "mlx_tokprune act" in capsys.readouterr().err
    own = range(1, 64)
    for how, counts in ((["trimvla", "--keep-tokens", "9"], [9]), (["lightvla"], own)):
        generate_main(["--model", str(TINY), *asked, "--json", "--method", *how])
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (record["method"], record["visual_tokens"]) == (how[0], 64)
        assert len(record["kept_indices"][0]) == record["keep"]
        assert record["keep"] in counts


def test_no_statistics_are_named(tmp_path):
    folder = copy_policy(tmp_path / "none")
    config = json.loads((folder / "config.json").read_text())
    config["norm_stats"] = {}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="norm_stats"):
        predict_action(*load(folder), [PICTURE], INSTRUCTION, pruner=Pruner())

"""OpenVLA-OFT's `lora_adapter/`: merged once, unless the weights contain it."""

import json
import math
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY_POLICY, copy_policy

from mlx_tokprune import load
from mlx_tokprune.checkpoints.family import identify
from mlx_tokprune.checkpoints.shards import Checkpoint
from mlx_tokprune.convert import convert, sidefiles
from mlx_tokprune.convert.__main__ import main
from mlx_tokprune.convert.oft_adapter import add_adapter
from mlx_tokprune.errors import InputError

RANK, ALPHA = 4, 2
IDS = mx.array([[1, 2, 3, 4]])
TOWER = "vision_backbone.featurizer"
POOL = "vision_backbone.fused_featurizer.attn_pool.kv"
# Linear layers of every part, one that is dropped, and a convolution, which peft takes
# for one of them, since its name ends like theirs.
PLACES = (
    "language_model.model.layers.0.self_attn.q_proj",
    "language_model.model.layers.1.mlp.down_proj",
    f"{TOWER}.blocks.0.attn.qkv",
    f"{TOWER}.patch_embed.proj",
    "projector.fc1",
    POOL,
)


def weights_of(folder) -> dict:
    arrays = mx.load(str(folder / "model.safetensors"))
    return {name: np.array(array) for name, array in arrays.items()}


def save(weights: dict, file) -> None:
    mx.save_safetensors(str(file), {k: mx.array(v) for k, v in weights.items()})


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def factors(scale: float = 0.1) -> dict:
    """Return random LoRA factors under peft's names."""
    random, made = np.random.default_rng(0), {}
    weights = weights_of(TINY_POLICY)
    for place in PLACES:
        rows, *columns = weights[f"{place}.weight"].shape
        down = random.normal(size=(RANK, *columns))
        up = scale * random.normal(size=(rows, RANK, *(1 for _ in columns[1:])))
        for which, array in (("A", down), ("B", up)):
            name = f"base_model.model.{place}.lora_{which}.weight"
            made[name] = array.astype(np.float32)
    return made


def add_folder(policy, scale: float = 0.1, **settings) -> None:
    """Write a `lora_adapter/` as OpenVLA-OFT's training saves it."""
    folder = policy / "lora_adapter"
    folder.mkdir()
    save(factors(scale), folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "openvla/openvla-7b",
        "bias": "none",
        "init_lora_weights": "gaussian",
        "lora_dropout": 0.0,
        "r": RANK,
        "lora_alpha": ALPHA,
        "modules_to_save": None,
        "rank_pattern": {},
        "target_modules": ["q_proj", "qkv", "proj"],
        "use_dora": False,
    } | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def merged(scale: float = ALPHA / RANK, size: float = 0.1) -> dict:
    """Return the weights with the adapter merged by NumPy."""
    weights, made = weights_of(TINY_POLICY), factors(size)
    for place in PLACES:
        down, up = (made[f"base_model.model.{place}.lora_{x}.weight"] for x in "AB")
        weight = weights[f"{place}.weight"]
        change = up.reshape(len(up), -1) @ down.reshape(RANK, -1)
        weights[f"{place}.weight"] = weight + scale * change.reshape(weight.shape)
    return weights


def assert_layout_of(target, expected: dict) -> None:
    """Check that a converted folder has the expected weights."""
    ours = weights_of(target)
    assert len(ours) > 80
    for name, array in ours.items():
        wanted = expected[name]
        if name.endswith("patch_embed.proj.weight"):
            wanted = wanted.transpose(0, 2, 3, 1)
        np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.fixture
def policy(policy_checkpoint):
    """Return the tiny policy with an unmerged adapter beside its weights."""
    add_folder(policy_checkpoint)
    return policy_checkpoint


def test_an_unmerged_adapter_is_added(policy, tmp_path, caplog):
    target = convert(str(policy), str(tmp_path / "mlx"))
    assert_layout_of(target, merged())
    assert "lora_adapter was added to 6 matrices" in caplog.text
    assert not (target / "lora_adapter").exists()  # or it would be asked about again


def test_a_merged_adapter_is_not_added_twice(policy, tmp_path, caplog):
    save(merged(), policy / "model.safetensors")
    target = convert(str(policy), str(tmp_path / "mlx"))
    assert_layout_of(target, merged())
    assert "was not added to the weights: they hold 1.0" in caplog.text


def test_loading_it_is_loading_the_merged_one(policy, tmp_path):
    plain = copy_policy(tmp_path / "plain")
    save(merged(), plain / "model.safetensors")
    expected, ours = (load(folder)[0](IDS) for folder in (plain, policy))
    assert mx.allclose(ours, expected, rtol=1e-4, atol=1e-4)
    assert not mx.allclose(ours, load(TINY_POLICY)[0](IDS), rtol=1e-2, atol=1e-2)


def test_rank_stabilized_factors_scale_by_the_root(policy, tmp_path):
    edit(policy / "lora_adapter" / "adapter_config.json", use_rslora=True)
    target = convert(str(policy), str(tmp_path / "mlx"))
    assert_layout_of(target, merged(ALPHA / math.sqrt(RANK)))


def test_sums_are_exact_before_they_are_rounded(policy, tmp_path):
    half = {
        name: mx.array(array).astype(mx.bfloat16)
        for name, array in weights_of(TINY_POLICY).items()
    }
    mx.save_safetensors(str(policy / "model.safetensors"), half)
    target = convert(str(policy), str(tmp_path / "mlx"))
    name = f"{PLACES[0]}.weight"
    change = mx.array(merged()[name] - weights_of(TINY_POLICY)[name])
    expected = (half[name].astype(mx.float32) + change).astype(mx.bfloat16)
    ours = mx.load(str(target / "model.safetensors"))[name]
    assert ours.dtype == mx.bfloat16
    wrong = mx.sum(ours != expected).item()  # a tie may fall the other way
    assert wrong <= ours.size // 1000


def test_an_adapter_that_changes_nothing_is_left(policy_checkpoint, tmp_path, caplog):
    add_folder(policy_checkpoint, scale=0.0)
    target = convert(str(policy_checkpoint), str(tmp_path / "mlx"))
    assert_layout_of(target, weights_of(TINY_POLICY))
    assert "it changes nothing" in caplog.text


@pytest.mark.parametrize(
    ("how", "part"), [("merge", 1.0), ("ignore", 0.0), ("auto", None)]
)
@pytest.mark.parametrize(("size", "held"), [(1e-4, 0.0), (0.1, 0.5)])
def test_in_doubt_the_user_decides(tmp_path, how, part, size, held):
    """An adapter too small to detect, or half merged, requires `--lora-adapter`."""
    folder = copy_policy(tmp_path / "policy")
    add_folder(folder, scale=size)
    save(merged(held * ALPHA / RANK, size), folder / "model.safetensors")
    target = tmp_path / "mlx"
    if part is None:
        with pytest.raises(InputError, match=r"--lora-adapter merge or .* ignore"):
            convert(str(folder), str(target))
        with pytest.raises(InputError, match="does not tell"):
            load(folder)
        return
    options = ["--hf-path", str(folder), "--mlx-path", str(target)]
    main([*options, "--lora-adapter", how])
    assert_layout_of(target, merged((held + part) * ALPHA / RANK, size))


def test_an_adapter_alone_asks_for_its_base(policy, tmp_path):
    base, target = tmp_path / "base", tmp_path / "mlx"
    base.mkdir()
    for name in ("model.safetensors", "config.json"):
        (policy / name).rename(base / name)
    (base / "LICENSE").write_text("of the base model")
    for use in (load, lambda folder: convert(str(folder), str(target))):
        with pytest.raises(InputError, match=r"no weights.*--base-model openvla"):
            use(policy)
    options = ["--hf-path", str(policy), "--mlx-path", str(target)]
    main([*options, "--base-model", str(base)])
    assert_layout_of(target, merged())
    assert (target / "LICENSE").read_text() == "of the base model"
    assert load(target)[1].norm_stats == load(TINY_POLICY)[1].norm_stats


def test_a_base_beside_weights_or_without_an_adapter_is_refused(policy, tmp_path):
    options = {"mlx_path": str(tmp_path / "mlx"), "base_model": str(TINY_POLICY)}
    with pytest.raises(InputError, match="has weights of its own"):
        convert(str(policy), **options)
    (policy / "model.safetensors").unlink()
    shutil.rmtree(policy / "lora_adapter")
    with pytest.raises(InputError, match="no lora_adapter folder"):
        convert(str(policy), **options)
    with pytest.raises(InputError, match="unknown lora_adapter 'yes'; expected one of"):
        convert(str(TINY_POLICY), str(tmp_path / "mlx"), lora_adapter="yes")


def test_fastvlm_has_no_such_adapter(checkpoint, tmp_path):
    refusal = "is a FastVLM checkpoint; leave out --lora-adapter"
    with pytest.raises(InputError, match=refusal):
        convert(str(checkpoint), str(tmp_path / "mlx"), lora_adapter="merge")


def film_names(folder) -> None:
    """Rename the adapter's tensors as in a backbone that FiLM wraps."""
    file = folder / "lora_adapter" / "adapter_model.safetensors"
    renamed = {}
    for name, array in weights_of_file(file).items():
        name = name.replace("vision_backbone.", "vision_backbone.vision_backbone.")
        renamed[name.replace("blocks.0.attn", "blocks.0.block.attn")] = array
    save(renamed, file)


def weights_of_file(file) -> dict:
    return {name: np.array(array) for name, array in mx.load(str(file)).items()}


def test_towers_of_a_side_file_have_it_already(policy, monkeypatch):
    film_names(policy)
    for part in ("action_head", "vision_backbone"):
        (policy / f"{part}--1_checkpoint.pt").write_bytes(b"")
    tower = mx.ones((144, 48))
    side = {
        "action_head": {"model.fc2.bias": mx.zeros(7)},
        "vision_backbone": {"vision_backbone.featurizer.blocks.0.scale.weight": tower},
    }
    monkeypatch.setattr(sidefiles, "_read", lambda path: side[path.name.split("--")[0]])
    _, found = identify(Checkpoint.open(policy))
    assert "added to 3 matrices" in found.notes[0]
    weights = found.load()
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(np.array(weights[name]), merged()[name], rtol=1e-5)
    assert mx.array_equal(weights[f"{TOWER}.blocks.0.scale.weight"], tower)


# What is refused.


def settings(**changes):
    return lambda folder: edit(folder / "adapter_config.json", **changes)


def tensors(change):
    def damage(folder):
        file = folder / "adapter_model.safetensors"
        weights = weights_of_file(file)
        change(weights)
        save(weights, file)

    return damage


FIRST = f"base_model.model.{PLACES[0]}"


def renamed(weights):
    for which in "AB":
        name = f"base_model.model.{PLACES[0]}.lora_{which}.weight"
        weights[name.replace("q_proj", "q_porj")] = weights.pop(name)


def not_finite(weights):
    weights[f"{FIRST}.lora_B.weight"][0, 0] = np.inf


def pickled(folder):
    file = folder / "adapter_model.safetensors"
    file.rename(file.with_suffix(".bin"))


def film_without_its_tower(folder):
    film_names(folder.parent)


REFUSED = [
    (settings(use_dora=True), "use_dora True; expected it unset"),
    (settings(bias="lora_only"), "bias 'lora_only'; expected 'none'"),
    (settings(modules_to_save=["fc"]), r"modules_to_save \['fc'\]; expected it unset"),
    (settings(rank_pattern={"q_proj": 8}), "rank_pattern .* expected it unset"),
    (settings(a_new_setting=1), "a_new_setting 1; expected it unset"),
    (settings(peft_type="IA3"), "peft_type 'IA3'; expected 'LORA'"),
    (
        settings(init_lora_weights="pissa"),
        "init_lora_weights 'pissa'; expected a start",
    ),
    (settings(r=0), "r 0; expected a whole number from 1 to 65535"),
    (
        settings(lora_alpha="2"),
        "lora_alpha '2'; expected a number between 1e-6 and 1e6",
    ),
    (settings(use_rslora="yes"), "use_rslora 'yes'; expected true or false"),
    (settings(r=8), r"\(96, 4\) and \(4, 96\) of rank 8 do not fit tensor language"),
    (tensors(renamed), "changes .*q_porj, of which the model in .* has no weight"),
    (tensors(not_finite), f"tensor {FIRST}.lora_B.weight of .* not finite"),
    (
        tensors(lambda w: w.pop(f"{FIRST}.lora_B.weight")),
        r"lora_A of .*q_proj but no lora_B; expected both",
    ),
    (
        tensors(lambda w: w.update({f"{FIRST}.lora_A.weight": np.ones((4, 95))})),
        r"do not fit tensor .*q_proj.weight, which has shape \(96, 96\)",
    ),
    (
        tensors(lambda w: w.update({f"{FIRST}.lora_magnitude_vector": np.ones(4)})),
        "lora_magnitude_vector; expected only lora_A and lora_B",
    ),
    (tensors(lambda w: w.clear() or w.update(none=np.ones(1))), "has the tensor none"),
    (pickled, r"has adapter_model.bin; expected\s+adapter_model.safetensors"),
    (film_without_its_tower, r"policy with FiLM, but .* has no\s+vision_backbone--"),
    (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
]


@pytest.mark.parametrize(
    ("damage", "message"), REFUSED, ids=[text for _, text in REFUSED]
)
def test_adapters_that_cannot_be_added_are_refused(policy, tmp_path, damage, message):
    damage(policy / "lora_adapter")
    for how in ("auto", "merge"):
        with pytest.raises(InputError, match=message) as error:
            convert(str(policy), str(tmp_path / "mlx"), lora_adapter=how)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "mlx").exists()
    convert(str(policy), str(tmp_path / "mlx"), lora_adapter="ignore")


def test_the_adapter_is_added_lazily(policy):
    """Merging computes no tensor before the tensor is evaluated."""
    found = add_adapter(Checkpoint.open(policy), "merge")
    before = mx.get_active_memory()
    weights = found.load()
    assert mx.get_active_memory() - before < 1000
    mx.eval(weights[f"{PLACES[0]}.weight"])
    assert mx.get_active_memory() - before > 96 * 96 * 4

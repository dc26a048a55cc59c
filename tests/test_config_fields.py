"""Every field of a config that the reference code reads is followed or refused.

The tables say of each field a value that differs from the tiny checkpoint's, and what
comes of it: a result that changes (FOLLOWED), a sentence (REFUSED, NOTED), or nothing,
with the reason. Fields are those that apple/ml-fastvlm and transformers 5.24 read.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import MANIFESTS, TINY, read_manifest, write_headers
from PIL import Image
from test_convert import edit_config
from test_text_config import change, chunk_checkpoint, states  # noqa: F401

from mlx_tokprune import generate, load
from mlx_tokprune.checkpoints.opening import open_checkpoint
from mlx_tokprune.convert import convert
from mlx_tokprune.errors import InputError

FOLLOWED, REFUSED, NOTED = "followed: ", "refused: ", "noted: "
SHAPE = f"{REFUSED}has shape"
TRAINING, TENSORS = "only training reads it", "the tensors decide"
SLIDING = ["sliding_attention"] * 3
LINEAR = {"rope_type": "linear", "factor": 2.0}
# Other fields that a value needs to have an effect.
BESIDE = {
    "layer_types": {"sliding_window": 8},
    "use_sliding_window": {"sliding_window": 8, "max_window_layers": 1},
}

# Field of the text settings -> (value, outcome) of every architecture.
TEXT = {
    "hidden_size": (128, SHAPE),
    "intermediate_size": (64, SHAPE),
    "num_hidden_layers": (2, f"{REFUSED}unknown tensor"),
    "num_attention_heads": (8, SHAPE),
    "num_key_value_heads": (4, SHAPE),
    "vocab_size": (608, SHAPE),
    "rms_norm_eps": (0.5, f"{FOLLOWED}states"),
    "rope_theta": (77.0, f"{FOLLOWED}states"),
    "rope_parameters": ({"rope_theta": 77.0}, f"{FOLLOWED}states"),
    "rope_scaling": (LINEAR, f"{FOLLOWED}states"),
    "partial_rotary_factor": (0.5, f"{REFUSED}partial_rotary_factor of the rope type"),
    "max_position_embeddings": (1024, f"{FOLLOWED}context"),
    "hidden_act": ("relu", f"{REFUSED}hidden_act 'relu'; expected"),
    "layer_types": (
        SLIDING,
        f"{REFUSED}layer 0 with sliding_window 8 'sliding_attention'",
    ),
    "use_sliding_window": (
        True,
        f"{REFUSED}layer 1 with sliding_window 8 'sliding_attention'",
    ),
    "sliding_window": (8, "use_sliding_window is false"),
    "max_window_layers": (0, "use_sliding_window is false"),
    "attention_dropout": (0.5, TRAINING),
    "initializer_range": (0.5, TRAINING),
    "use_cache": (False, "answers are the same"),
    "pad_token_id": (3, "prompts are not padded with it"),
    "bos_token_id": (3, "the tokenizer says whether there is one"),
    "torch_dtype": ("bfloat16", TENSORS),
    "dtype": ("bfloat16", TENSORS),
}
QWEN2 = TEXT | {
    "head_dim": (32, f"{REFUSED}head_dim 32; expected 16"),
    "attention_bias": (True, "queries, keys and values always have biases"),
    "eos_token_id": ([5], f"{FOLLOWED}stops"),
    "tie_word_embeddings": (False, f"{NOTED}but there is no lm_head"),
}
LLAMA = TEXT | {
    "num_key_value_heads": (2, SHAPE),
    "head_dim": (48, SHAPE),
    "attention_bias": (True, f"{REFUSED}lacks tensor"),
    "mlp_bias": (True, f"{REFUSED}lacks tensor"),
    "eos_token_id": (5, f"{FOLLOWED}stop"),
    "pretraining_tp": (2, "the same products in slices"),
    "tie_word_embeddings": (True, TENSORS),
}
GEMMA = TEXT | {
    "hidden_size": (96, SHAPE),
    "num_hidden_layers": (1, f"{REFUSED}unknown tensor"),
    "num_key_value_heads": (3, SHAPE),
    "rope_scaling": (LINEAR, f"{REFUSED}rope type 'linear'; expected default"),
    "max_position_embeddings": (1024, "the policy's own length of a prompt"),
    "hidden_activation": ("silu", f"{REFUSED}hidden_activation 'silu'; expected"),
    "head_dim": (8, SHAPE),
    "attention_bias": (True, TENSORS),
    "use_bidirectional_attention": (True, "the policy passes a mask"),
    "eos_token_id": (5, "the tokenizer's <eos> ends an answer"),
    "tie_word_embeddings": (True, TENSORS),
}
APPLE = QWEN2 | {
    "mm_vision_tower": ("mobileclip_l_256", f"{FOLLOWED}pixels"),
    "vision_tower": ("mobileclip_l_256", "read only without mm_vision_tower"),
    "mm_hidden_size": (128, f"{REFUSED}mm_hidden_size 128, but"),
    "mm_projector_type": ("linear", f"{REFUSED}'linear'; expected 'mlp2x_gelu'"),
    "mm_patch_merge_type": ("spatial_unpad", f"{REFUSED}; expected 'flat', the only"),
    "image_aspect_ratio": ("square", f"{FOLLOWED}pixels"),
    "image_grid_pinpoints": ([[512, 512]], "read only with anyres"),
    "mm_use_im_start_end": (True, f"{REFUSED}the tokenizer has no <im_end>"),
    "mm_use_im_patch_token": (True, "adds a token that no prompt has"),
    "mm_vision_select_layer": (-1, "MobileCLIP's tower has one output"),
    "mm_vision_select_feature": ("cls_patch", "MobileCLIP's tower has one output"),
    "tokenizer_padding_side": ("left", "masked in batches"),
    "tokenizer_model_max_length": (9, "would cut off the question; prompts are whole"),
    "max_sequence_length": (9, "told to callers, who do not use it"),
    "unfreeze_mm_vision_tower": (True, TRAINING),
    "tune_mm_mlp_adapter": (True, TRAINING),
    "freeze_mm_mlp_adapter": (True, TRAINING),
    "mm_projector_lr": (1.0, TRAINING),
    "use_mm_proj": (False, "written, and read by nothing"),
    "s2": (True, "CLIP's towers only"),
    "image_token_index": (7, "pictures are placed by position"),
    "text_config": ({"rms_norm_eps": 0.5}, f"{REFUSED}text_config.rms_norm_eps 0.5"),
}
VISION = {
    "image_size": (500, f"{REFUSED}image_size 500; expected one size, a multiple"),
    "patch_size": (32, TENSORS),
    "down_patch_size": (3, TENSORS),
    "repmixer_kernel_size": (5, TENSORS),
}
TRANSFORMERS = {
    "projector_hidden_act": ("relu", f"{REFUSED}'relu'; expected 'gelu'"),
    "vision_feature_layer": (-2, f"{REFUSED}-2; expected -1"),
    "vision_feature_select_strategy": ("default", f"{REFUSED}expected 'full'"),
    "multimodal_projector_bias": (False, f"{REFUSED}False; expected True"),
    "image_token_index": (7, "pictures are placed by position"),
    "image_seq_length": (9, "only marks the place of a picture in transformers"),
    "tie_word_embeddings": (False, f"{NOTED}but there is no lm_head"),
    "dtype": ("bfloat16", TENSORS),
}
TIMM = {
    "architecture": ("vit_base", f"{REFUSED}expected timm's fastvit_mci3"),
    "image_size": (256, f"{FOLLOWED}pixels"),
    "hidden_size": (9, TENSORS),
    "do_pooling": (False, "the pooled output is not read"),
    "global_pool": ("max", "the pooled output is not read"),
    "num_classes": (9, "there is no classifier"),
}
TABLES = [
    *(("checkpoint", "", name, *row) for name, row in APPLE.items()),
    *(("checkpoint", "vision_config", name, *row) for name, row in VISION.items()),
    *(("fast_vlm", "", name, *row) for name, row in TRANSFORMERS.items()),
    *(("fast_vlm", "text_config", name, *row) for name, row in QWEN2.items()),
    *(("fast_vlm", "vision_config", name, *row) for name, row in TIMM.items()),
    *(("policy_checkpoint", "text_config", n, *row) for n, row in LLAMA.items()),
    *(("chunk_checkpoint", "text_config", name, *row) for name, row in GEMMA.items()),
]


def observed(folder) -> dict:
    """Return what a checkpoint's settings could change."""
    model, processor = load(folder)
    notes = open_checkpoint(folder).checkpoint.notes
    picture = np.random.default_rng(0).integers(0, 255, (60, 100, 3), np.uint8)
    results = {
        "states": states(folder),
        "stops": sorted(processor.tokenizer.eos_token_ids),
        "context": getattr(model.args, "context", None),
        "stop": model.args.text["eos_token_id"] if model.answers == "bins" else None,
        "notes": notes,
        "pixels": processor.pixels([Image.fromarray(picture)]),
    }
    if model.answers == "text":
        results["prompt"] = processor.prompt("Hi", 1).segments
        tokens = mx.random.normal((1, 2, model.feature_size), key=mx.random.key(0))
        results["projected"] = np.array(model.project(tokens))
    return results


@pytest.fixture(scope="module")
def before():
    """Return what was observed of the unchanged checkpoints, by fixture."""
    return {}


@pytest.mark.parametrize(("fixture", "section", "name", "value", "outcome"), TABLES)
def test_a_field_is_followed_or_refused(
    fixture, section, name, value, outcome, request, before
):
    folder = request.getfixturevalue(fixture)
    kind, _, detail = outcome.partition(": ")
    if kind not in ("refused", "noted") and fixture not in before:
        before[fixture] = observed(folder)
    if name.startswith("rope_"):
        change(folder, section, rope_theta=None, rope_parameters=None)
    change(folder, section, **BESIDE.get(name, {}))
    change(folder, section, **{name: value})
    if kind == "refused":
        with pytest.raises(InputError) as error:
            load(folder)
        assert detail in str(error.value)
        return
    if kind == "noted":
        assert detail in " ".join(open_checkpoint(folder).checkpoint.notes)
        return
    old, new = before[fixture], observed(folder)
    same = {key: np.array_equal(old[key], new[key]) for key in old if key != "prompt"}
    if kind == "followed":
        assert not same[detail]
    else:
        assert all(same.values()), same
        assert old.get("prompt") == new.get("prompt")


@pytest.mark.parametrize(
    ("table", "fields"),
    [
        (
            APPLE,
            "mm_vision_tower vision_tower s2 mm_hidden_size hidden_size image_aspect_"
            "ratio mm_projector_type mm_patch_merge_type image_grid_pinpoints "
            "mm_use_im_start_end mm_use_im_patch_token mm_vision_select_layer "
            "mm_vision_select_feature tokenizer_model_max_length "
            "tokenizer_padding_side max_sequence_length unfreeze_mm_vision_tower "
            "tune_mm_mlp_adapter",
        ),
        (
            TRANSFORMERS,
            "image_token_index image_seq_length projector_hidden_act "
            "vision_feature_select_strategy vision_feature_layer "
            "multimodal_projector_bias tie_word_embeddings",
        ),
        (QWEN2, "head_dim use_sliding_window sliding_window max_window_layers"),
        (LLAMA, "pretraining_tp attention_bias mlp_bias head_dim"),
        (GEMMA, "head_dim attention_bias use_bidirectional_attention"),
        *(
            (
                table,
                "vocab_size hidden_size intermediate_size num_hidden_layers "
                "num_attention_heads num_key_value_heads hidden_act "
                "max_position_embeddings initializer_range rms_norm_eps use_cache "
                "tie_word_embeddings rope_parameters attention_dropout pad_token_id "
                "bos_token_id eos_token_id",
            )
            for table in (QWEN2, LLAMA, GEMMA)
        ),
    ],
)
def test_the_tables_have_what_the_reference_reads(table, fields):
    assert not set(fields.split()) - table.keys()


# Published checkpoints --------------------------------------------------------------

# The fields beside sizes of apple/FastVLM's configs.
PUBLISHED = {
    **{"attention_dropout": 0.0, "bos_token_id": 151643, "hidden_act": "silu"},
    **{"freeze_mm_mlp_adapter": False, "image_grid_pinpoints": None},
    **{"initializer_range": 0.02, "max_window_layers": 24, "mm_projector_lr": None},
    **{"mm_patch_merge_type": "flat", "mm_use_im_patch_token": False},
    **{"mm_use_im_start_end": False, "mm_vision_select_feature": "patch"},
    **{"mm_vision_select_layer": -2, "sliding_window": 32768, "use_cache": True},
    **{"tokenizer_padding_side": "right", "tune_mm_mlp_adapter": False},
    **{"unfreeze_mm_vision_tower": True, "use_mm_proj": True},
    **{"use_sliding_window": False, "transformers_version": "4.39.3"},
}
PROCESSOR = {
    **{"crop_size": {"height": 1024, "width": 1024}, "size": {"shortest_edge": 1024}},
    **{"do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3},
    **{"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]},
    **{"rescale_factor": 0.00392156862745098, "do_rescale": True},
    **{"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True},
}


@pytest.mark.parametrize("processor", [None, PROCESSOR])
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_published_checkpoints_say_nothing_new(manifest, processor, tmp_path):
    content = read_manifest(manifest)
    config = content["config"] | PUBLISHED
    write_headers(tmp_path / "apple", content["tensors"], config)
    if processor:
        file = tmp_path / "apple" / "preprocessor_config.json"
        file.write_text(json.dumps(processor))
    source = open_checkpoint(tmp_path / "apple")
    assert source.checkpoint.notes == []
    assert "image_size" not in source.config.get("vision_config", {})
    args = source.family.args.from_dict(source.config)
    assert (args.vision.image_size, args.crops, args.marks) == (1024, False, ("", ""))


# Input size -------------------------------------------------------------------------


def resize(folder, processor=None, name="preprocessor_config.json", **fields) -> None:
    """Leave the input size to `fields` and an image processor."""
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]["image_size"], config["mm_vision_tower"]
    (folder / "config.json").write_text(json.dumps(config | fields))
    if processor:
        (folder / name).write_text(json.dumps(processor))


def square(side: int, **fields) -> dict:
    both = {"crop_size": {"height": side, "width": side}, "size": side}
    return PROCESSOR | both | fields


@pytest.mark.parametrize(
    ("side", "options", "note"),
    [
        (512, {"mm_vision_tower": "mobileclip_l_512"}, None),
        (1536, {"mm_vision_tower": "mobileclip_l_1536"}, None),
        (768, {"mm_vision_tower": "mobileclip_l_768"}, None),
        (1024, {}, None),
        (1024, {"mm_vision_tower": "fastvithd"}, "ends in no input size; 1024 px is"),
        (256, {"processor": square(256)}, None),
        (256, {"processor": {"size": {"shortest_edge": 256}}}, None),
        (256, {"processor": PROCESSOR | {"do_center_crop": False, "size": 256}}, None),
        (
            256,
            {
                "processor": {"image_processor": square(256)},
                "name": "processor_config.json",
            },
            None,
        ),
        (256, {"processor": square(256), "mm_vision_tower": "fastvithd"}, None),
        (
            512,
            {"processor": PROCESSOR, "mm_vision_tower": "mobileclip_l_512"},
            "'mobileclip_l_512', but preprocessor_config.json says crop_size",
        ),
    ],
)
def test_the_input_size_is_the_trained_one(checkpoint, side, options, note):
    resize(checkpoint, **options)
    source = open_checkpoint(checkpoint)
    assert source.family.args.from_dict(source.config).vision.image_size == side
    assert len(source.checkpoint.notes) == (note is not None)
    assert (note or "") in "".join(source.checkpoint.notes)


def test_the_size_of_the_towers_name_beats_that_of_vision_config(checkpoint, tmp_path):
    edit_config(checkpoint, mm_vision_tower="mobileclip_l_256")
    model, processor = load(checkpoint)
    assert (model.image_size, processor.image_size) == (256, 256)
    (note,) = open_checkpoint(checkpoint).checkpoint.notes
    assert "vision_config.image_size 512; the first is used, as Apple's code" in note
    converted = open_checkpoint(convert(str(checkpoint), str(tmp_path / "mlx")))
    assert converted.checkpoint.notes == []
    assert converted.config["vision_config"]["image_size"] == 256


def test_an_image_processor_beats_vision_config(fast_vlm):
    (fast_vlm / "preprocessor_config.json").write_text(json.dumps(square(256)))
    source = open_checkpoint(fast_vlm)
    assert source.config["vision_config"]["image_size"] == 256
    assert "as transformers and mlx-vlm would do" in source.checkpoint.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mm_vision_tower": "mobileclip_l_1000"},
            "_1000'; expected one size, a multip",
        ),
        ({"mm_vision_tower": "mobileclip_l_0"}, "_0'; expected one size, a multiple"),
        ({"mm_vision_tower": 512}, "512; expected a name that ends in the input size"),
        ({"processor": square(500)}, "size 500; expected one size, a multiple"),
        ({"processor": square(512, size=1024)}, "and size 1024; expected one size"),
        (
            {"processor": {"crop_size": {"height": 512, "width": 256}}},
            "expected one size",
        ),
        ({"processor": {"size": "large"}}, "size 'large'; expected one size"),
        ({"processor": square(512, image_mean=[0.5] * 3)}, r"expected \[0, 0, 0\]"),
        ({"processor": square(512, image_std=[0.5] * 3)}, r"expected \[1, 1, 1\]"),
        ({"processor": square(512, do_resize=False)}, "do_resize False; expected True"),
        ({"processor": square(512, resample=2)}, "resample 2; expected 3"),
        (
            {"processor": square(512, rescale_factor=1.0)},
            "rescale_factor 1.0; expected",
        ),
    ],
)
def test_impossible_sizes_are_refused(checkpoint, options, message):
    resize(checkpoint, **options)
    with pytest.raises(InputError, match=message):
        load(checkpoint)


# Pictures and prompts ---------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(100, 60), (60, 101), (700, 512), (512, 512), (30, 200)]
)
def test_square_pictures_are_the_middle_as_clip_takes_it(checkpoint, size):
    """The shorter side becomes 512 pixels; the middle of the longer is kept."""
    edit_config(checkpoint, image_aspect_ratio="square")
    processor = load(checkpoint)[1]
    noise = np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), np.uint8)
    image = Image.fromarray(noise)
    width, height = (int(512 * side / min(size)) for side in size)
    left, top = (width - 512) // 2, (height - 512) // 2
    whole = image.resize((width, height), Image.Resampling.BICUBIC)
    expected = np.asarray(whole)[top : top + 512, left : left + 512] / 255
    np.testing.assert_allclose(processor.pixels([image])[0], expected, atol=1e-6)
    (part,) = processor.encoded([image])
    assert part.size == (min(size), min(size))
    with pytest.raises(InputError, match="crops pictures; expected padding keep"):
        processor.at(512, "skip")


def test_a_very_long_picture_is_its_middle(checkpoint):
    edit_config(checkpoint, image_aspect_ratio="none")
    image = Image.new("RGB", (40_000, 2))
    image.paste((255, 255, 255), (19_999, 0, 20_001, 2))
    assert (load(checkpoint)[1].pixels([image]) == 1).all()


@pytest.mark.parametrize("value", ["anyres", "anyres_max_9", "highres", 1, ["pad"]])
def test_tiles_are_refused(checkpoint, value):
    edit_config(checkpoint, image_aspect_ratio=value)
    with pytest.raises(InputError, match=r"tiles \(anyres\) are not supported"):
        load(checkpoint)


def test_a_missing_aspect_ratio_crops_with_a_note(checkpoint):
    change(checkpoint, "", image_aspect_ratio=None)
    assert load(checkpoint)[1].crops
    (note,) = open_checkpoint(checkpoint).checkpoint.notes
    assert "pictures are cropped to their middle square, as in Apple's code" in note


def test_the_overlay_of_a_cropped_picture_is_its_middle(checkpoint, tmp_path):
    from mlx_tokprune.generate.__main__ import main

    edit_config(checkpoint, image_aspect_ratio="square")
    Image.new("RGB", (90, 40), "red").save(tmp_path / "wide.png")
    arguments = {"model": checkpoint, "image": tmp_path / "wide.png", "prompt": "Hi"}
    arguments |= {"max-tokens": 1, "overlay": tmp_path / "kept.png", "keep-ratio": 0.5}
    main([str(word) for n, v in arguments.items() for word in (f"--{n}", v)])
    with Image.open(tmp_path / "kept.png") as overlay:
        assert overlay.width == overlay.height


def test_start_and_end_tokens_stand_around_each_picture(checkpoint):
    edit_config(checkpoint, mm_use_im_start_end=True)
    file = checkpoint / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    taken = {token["id"] for token in tokenizer["added_tokens"]}
    taken |= set(tokenizer["model"]["vocab"].values())
    free = [i for i in range(320) if i not in taken]
    for token_id, word in zip(free, ("<im_start>", "<im_end>"), strict=False):
        added = tokenizer["added_tokens"][-1] | {"id": token_id, "content": word}
        tokenizer["added_tokens"].append(added)
    file.write_text(json.dumps(tokenizer))
    model, processor = load(checkpoint)
    ids = processor.tokenizer.get_vocab()
    first, last = ids["<im_start>"], ids["<im_end>"]
    for text, pictures in (("Hi", 1), ("Hi", 2), ("One <image> and <image>?", 2)):
        segments = processor.prompt(text, pictures).segments
        assert all(segment[-1] == first for segment in segments[:-1])
        assert all(segment[0] == last for segment in segments[1:])
        assert sum(map(len, segments)) == 2 * pictures + sum(
            map(len, load(TINY)[1].prompt(text, pictures).segments)
        )
    generate(model, processor, [TINY / "image_0.png"], "Hi", max_tokens=2)

"""Every field that the references read from a policy's files, and its effect here.

The references are github.com/openvla/openvla, github.com/moojink/openvla-oft,
github.com/huggingface/lerobot (pi0_fast) and github.com/Physical-Intelligence/openpi. A
field is followed, refused with a sentence, or has no effect for the stated reason.
`text_config` is checked with the language models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CONFIG, IMAGES = "config.json", "preprocessor_config.json"
STATISTICS, BEFORE = "dataset_statistics.json", "policy_preprocessor.json"
AFTER = "policy_postprocessor.json"
NORM_STATS = "assets/physical-intelligence/libero/norm_stats.json"
STATE_FILE = "policy_preprocessor_step_3_normalizer_processor.safetensors"
CAMERA = {"type": "VISUAL", "shape": [3, 56, 56]}


@dataclass(frozen=True)
class Field:
    """A field of a file of a policy.

    path: keys from the file's root; numbers are indices. value: the changed value.
    effect: what is read (args, config) and its new value for a followed field; the
    message of a refused one; `None` for a field without effect, and its reason.
    """

    policy: str
    file: str
    path: tuple
    value: Any
    effect: tuple[Callable, Any] | str | None = None
    reason: str = ""

    def __str__(self) -> str:
        return (
            f"{self.policy}-{self.file.split('/')[-1]}-{'.'.join(map(str, self.path))}"
        )


def fields(policy: str, file: str, *rows: tuple) -> list[Field]:
    """Return fields from rows of (dotted path, value, effect or reason)."""
    made = []
    for path, value, effect, *reason in rows:
        keys = tuple(int(k) if k.isdigit() else k for k in path.split("/"))
        made.append(Field(policy, file, keys, value, effect, *reason))
    return made


def arg(name: str, value: Any) -> tuple[Callable, Any]:
    return lambda args, config: getattr(args, name), value


def image(name: str, value: Any) -> tuple[Callable, Any]:
    return lambda args, config: getattr(args.images, name), value


def oft(name: str, value: Any) -> tuple[Callable, Any]:
    return lambda args, config: getattr(args.oft, name), value


def rule(part: str, value: str) -> tuple[Callable, Any]:
    return lambda args, config: args.rules[part], value


def statistic(*keys: str, value: Any) -> tuple[Callable, Any]:
    def read(args, config) -> Any:
        found = config["norm_stats"]
        for key in keys:
            found = found[key]
        return found

    return read, value


def nothing(reason: str) -> tuple[None, str]:
    return None, reason


ONE = [0.5] * 7
TRAINING = nothing("is for training only")
CODE = nothing("names Python code of the reference, which is not run here")
PRECISION = nothing(
    "is the precision of the reference's weights; here that of the file"
)
OPENVLA = [
    *fields(
        "openvla",
        CONFIG,
        ("architectures", ["Other"], *CODE),
        ("auto_map", {"AutoConfig": "x.Y"}, *CODE),
        ("transformers_version", "4.0", *CODE),
        ("model_type", "prismatic", *nothing("the tensors tell the family")),
        ("arch_specifier", "linear", *nothing("the tensors tell the projector")),
        ("vision_backbone_id", "other", *nothing("timm_* and image_sizes tell it")),
        ("hf_llm_id", "other", *nothing("text_config tells the language model")),
        ("llm_backbone_id", "vicuna-v15-7b", "ends with -pure, as other models"),
        ("llm_max_length", 7, *TRAINING),
        ("output_projector_states", True, *nothing("is an output that is not used")),
        ("pad_token_id", 7, *nothing("prompts are not padded")),
        ("torch_dtype", "float16", *PRECISION),
        ("use_fused_vision_backbone", False, "expected a list of 1, one per tower"),
        ("image_resize_strategy", "letterbox", "expected 'resize-naive'"),
        ("image_sizes", [224, 224], "input_sizes"),
        ("image_sizes", [112, 224], "equal sizes and patches in both towers"),
        ("timm_model_ids", ["a"], "expected a list of 2, one per tower"),
        (
            "timm_override_act_layers",
            ["quick_gelu", None],
            (lambda args, config: args.towers[0].quick_gelu, True),
        ),
        ("n_action_bins", 128, arg("bins", 128)),
        ("pad_to_multiple_of", 32, arg("padding", 32)),
        ("empty_token_id", 6, arg("empty_token_id", 6)),
        ("vision_config/featurizer/num_heads", 5, "multiple of num_heads"),
        (
            "norm_stats/toy_robot/action/q99",
            ONE,
            statistic("toy_robot", "action", "q99", value=ONE),
        ),
        ("crop", 0.5, image("crop", 0.5)),
        ("center_crop", True, image("crop", 0.9)),
        ("image_processing", {"jpeg": 80}, image("jpeg", 80)),
        ("image_processing", {"resize": "lanczos"}, image("resize", "lanczos")),
        ("text_config/model_type", "mistral", "expected 'llama'"),
    ),
    *fields(
        "openvla",
        IMAGES,
        ("processor_class", "Other", *CODE),
        ("image_processor_type", "Other", *CODE),
        ("auto_map", {"AutoProcessor": "x.Y"}, *CODE),
        (
            "use_fused_vision_backbone",
            False,
            *nothing("the lists have an entry for each tower of config.json"),
        ),
        ("image_resize_strategy", "letterbox", "expected 'resize-naive'"),
        ("image_resize_strategy", "resize-crop", "expected 'resize-naive'"),
        ("input_sizes/0", [3, 224, 224], "input_sizes"),
        ("interpolations/1", "bilinear", "interpolations"),
        ("means/0", [0.1, 0.2, 0.3], (lambda args, _: args.means[0], (0.1, 0.2, 0.3))),
        ("stds/1", [0.1, 0.2, 0.3], (lambda args, _: args.stds[1], (0.1, 0.2, 0.3))),
        ("tvf_do_letterbox", True, "tvf_do_letterbox True; expected false"),
        (
            "tvf_letterbox_fill",
            [0, 0, 0],
            *nothing("is read with tvf_do_letterbox only"),
        ),
        ("tvf_resize_params", [{"size": [99, 99]}] * 2, "tvf_resize_params size"),
        ("tvf_resize_params", [{"interpolation": 2}] * 2, "params interpolation 2"),
        ("tvf_crop_params", [{"output_size": [99, 99]}] * 2, "tvf_crop_params output"),
        (
            "tvf_normalize_params",
            [{"mean": [0.0] * 3}] * 2,
            "tvf_normalize_params mean",
        ),
        ("tvf_normalize_params", [{}, {"std": [1.0] * 3}], "tvf_normalize_params std"),
    ),
    *fields(
        "openvla",
        STATISTICS,
        ("new", {"action": {}}, (lambda _, c: "new" in c["norm_stats"], True)),
        ("toy/num_trajectories", 9, *TRAINING),
        ("toy/num_transitions", 9, *TRAINING),
        ("toy/action/mean", ONE, *nothing("actions are scaled by quantiles")),
        (
            "toy/action/mask",
            [False] * 7,
            statistic("toy", "action", "mask", value=[False] * 7),
        ),
    ),
]
OFT = [
    *fields(
        "oft",
        CONFIG,
        ("oft", {"chunk": 4}, oft("chunk", 4)),
        ("oft", {"pictures": 1}, oft("pictures", 1)),
        ("oft", {"rule": "bounds"}, oft("rule", "bounds")),
        ("oft", {"rule": "normal"}, "OpenVLA-OFT has no norm 'normal'"),
        ("oft", {"chunk": 0}, "oft chunk 0"),
        ("oft", {"action_dim": 9}, *nothing("the tensors tell it")),
        ("oft", {"proprio_dim": 9}, *nothing("the tensors tell it")),
        ("oft", {"film": True}, *nothing("the tensors tell it")),
        ("center_crop", False, image("crop", 1.0)),
    ),
    *fields(
        "oft",
        STATISTICS,
        ("aloha_fold", {"action": {}}, oft("chunk", 25)),
        ("toy/proprio/q01", ONE, statistic("toy", "proprio", "q01", value=ONE)),
        (
            "toy/proprio/std",
            ONE,
            *nothing("states are scaled by quantiles or extremes"),
        ),
    ),
]
NORMALIZER = {"registry_name": "normalizer_processor", "config": {}}
RELATIVE = {"registry_name": "relative_actions_processor", "config": {"enabled": True}}
LEROBOT = [
    *fields(
        "lerobot",
        CONFIG,
        ("type", "pi0", "type 'pi0'; expected 'pi0_fast'"),
        ("paligemma_variant", "gemma_300m", *nothing("the tensors tell the sizes")),
        ("action_expert_variant", "x", *nothing("pi0-FAST has no action expert")),
        ("dtype", "bfloat16", *PRECISION),
        ("device", "cuda", *nothing("MLX chooses the device")),
        ("use_amp", True, *PRECISION),
        ("compile_model", True, *nothing("does not change values")),
        ("use_kv_cache", False, *nothing("does not change values")),
        ("rtc_config", {"enabled": True}, *nothing("is a control loop of lerobot")),
        ("n_obs_steps", 2, *nothing("pi0-FAST reads one observation in any case")),
        ("n_action_steps", 2, *nothing("executed actions are the caller's `first`")),
        ("chunk_size", 5, arg("horizon", 5)),
        ("max_state_dim", 9, *nothing("the state's statistics or feature tell it")),
        ("max_action_dim", 9, *nothing("the action's feature tells it")),
        ("max_action_tokens", 9, *TRAINING),
        ("max_decoding_steps", 21, arg("steps", 21)),
        ("max_decoding_steps", None, "policy steps None"),
        ("tokenizer_max_length", 81, arg("longest_prompt", 81)),
        ("fast_skip_tokens", 127, arg("skipped", 127)),
        ("validate_action_token_prefix", True, arg("strict", True)),
        ("temperature", 0.7, "temperature 0.7; expected 0, for greedy tokens"),
        ("image_resolution", [224, 224], "image_resolution .*the tower's"),
        ("empty_cameras", 1, *nothing("an absent camera has no tokens")),
        ("use_relative_actions", True, "actions are relative to its state"),
        (
            "relative_exclude_joints",
            ["x"],
            *nothing("is for relative actions, refused"),
        ),
        ("action_feature_names", ["x"], *nothing("is for relative actions, refused")),
        (
            "text_tokenizer_name",
            "x/y",
            *nothing("the folder has the tokenizer's files"),
        ),
        (
            "action_tokenizer_name",
            "x/y",
            *nothing("the folder has the tokenizer's files"),
        ),
        ("gradient_checkpointing", True, *TRAINING),
        ("optimizer_lr", 1.0, *TRAINING),
        (
            "normalization_mapping/STATE",
            "MIN_MAX",
            *nothing("the processors' file counts"),
        ),
        (
            "input_features/observation.image",
            CAMERA,
            (lambda args, _: args.cameras[3:], ("image",)),
        ),
        (
            "input_features/observation.images.top",
            CAMERA,
            (lambda args, _: args.cameras[3:], ("top",)),
        ),
        (
            "input_features/observation.images.image",
            CAMERA,
            (lambda a, _: a.cameras[3], "image"),
        ),
        (
            "input_features/observation.environment_state",
            {"type": "ENV", "shape": [4]},
            *nothing("pi0-FAST does not read it"),
        ),
        ("output_features/action/shape", [2], arg("action_dim", 2)),
        ("vision_config/num_attention_heads", 2, (lambda a, _: a.tower.num_heads, 2)),
    ),
    *fields(
        "lerobot",
        BEFORE,
        ("name", "other", *nothing("is a label")),
        ("steps/0/state_file", "none.safetensors", "is not a file"),
        ("steps/0/config/eps", 1e-6, "eps of a normalizer 1e-06; expected 1e-08"),
        (
            "steps/0/config/norm_map/VISUAL",
            "MEAN_STD",
            "VISUAL by 'MEAN_STD'; expected",
        ),
        ("steps/0/config/norm_map/STATE", "MIN_MAX", rule("proprio", "bounds")),
        ("steps/0/config/norm_map/ACTION", "MEAN_STD", rule("action", "mean_std")),
        ("steps/0/config/norm_map", {"ACTION": "MIN_MAX"}, rule("proprio", "identity")),
        ("steps/0/config/features", {"action": {}}, rule("proprio", "identity")),
        ("steps/0/config/normalize_observation_keys", [], rule("proprio", "identity")),
        ("steps/0/config/normalize_observation_keys", 5, "expected a list of features"),
        ("steps/1", RELATIVE, "relative_actions_processor, which is not supported"),
        (
            "steps/1",
            {
                "registry_name": "relative_actions_processor",
                "config": {"enabled": False},
            },
            *nothing("is off"),
        ),
        (
            "steps/1",
            {"class": "lerobot.processor.RelativeActionsProcessorStep"},
            *nothing("is off"),
        ),
        ("steps/1", {"registry_name": "image_crop_resize_processor"}, "it is unknown"),
        ("steps/1", {"class": "my.robot.FlipStep"}, "step my.robot.FlipStep"),
        (
            "steps/1",
            {
                "registry_name": "rename_observations_processor",
                "config": {"rename_map": {"a": "b"}},
            },
            *nothing("pictures are given by the policy's own names"),
        ),
        (
            "steps/1",
            {"registry_name": "to_batch_processor"},
            *nothing("adds a batch of 1"),
        ),
        (
            "steps/1",
            {"registry_name": "device_processor", "config": {"float_dtype": "float16"}},
            *PRECISION,
        ),
        (
            "steps/1",
            {
                "registry_name": "pi0_fast_prepare_state_tokenizer_processor_step",
                "config": {"max_state_dim": 9},
            },
            *nothing("the reference does not use it"),
        ),
        (
            "steps/1",
            {"registry_name": "tokenizer_processor", "config": {"max_length": 70}},
            arg("longest_prompt", 70),
        ),
        (
            "steps/1",
            {
                "registry_name": "tokenizer_processor",
                "config": {"tokenizer_name": "x/y"},
            },
            "text_tokenizer_name .*expected 'x/y'",
        ),
        (
            "steps/1",
            {
                "registry_name": "tokenizer_processor",
                "config": {"padding_side": "left"},
            },
            *nothing("prompts are not padded"),
        ),
        (
            "steps/1",
            {
                "registry_name": "action_tokenizer_processor",
                "config": {"max_length": 7, "fast_skip_tokens": 5},
            },
            *TRAINING,
        ),
    ),
    *fields(
        "lerobot",
        AFTER,
        (
            "steps/0",
            {
                "registry_name": "unnormalizer_processor",
                "config": {"norm_map": {"ACTION": "MEAN_STD"}},
                "state_file": STATE_FILE,
            },
            rule("action", "mean_std"),
        ),
        (
            "steps/0",
            {
                "registry_name": "absolute_actions_processor",
                "config": {"enabled": True},
            },
            "absolute_actions_processor, which is not supported",
        ),
        ("steps/0", {"registry_name": "my_gripper_processor"}, "it is unknown"),
    ),
]
OPENPI = [
    *fields(
        "openpi",
        CONFIG,
        ("action_dim", 2, arg("action_dim", 2)),
        ("action_horizon", 6, arg("horizon", 6)),
        ("max_token_len", 81, arg("longest_prompt", 81)),
        ("paligemma_variant", "gemma_300m", *nothing("the tensors tell the sizes")),
        ("precision", "float16", *PRECISION),
    ),
    *fields(
        "openpi",
        NORM_STATS,
        (
            "norm_stats/state/q01",
            [0.25] * 2,
            statistic(
                *("physical-intelligence/libero", "proprio", "q01"), value=[0.25] * 2
            ),
        ),
        ("norm_stats/state/q01", None, rule("action", "mean_std")),
        (
            "norm_stats/other",
            {"mean": [1.0]},
            *nothing("pi0-FAST has state and actions"),
        ),
    ),
]
FIELDS = [*OPENVLA, *OFT, *LEROBOT, *OPENPI]

"""OpenVLA (arXiv 2406.09246) and Prismatic models: ViT towers, projector, Llama-2.

The language model is mlx-lm's. `OpenVLA` has `layers` and accepts `input_embeddings`,
so that mlx-lm's caches, generation and quantization accept it. With `oft` in its config
it is an OpenVLA-OFT policy (`oft.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError
from ..features import Features
from ..files import object_of
from ..processing.actions import MOST_NUMBERS
from ..processing.image import Preparation
from ..processing.prompt import Prompt
from .checks import check_token, expect, is_number, is_size
from .language import Decoder
from .layers import gelu
from .oft import ActionHead, OFTConfig, ProprioProjector
from .protocol import POLICY_PROVIDES, ModelBase
from .text_config import read_text
from .vit import ViT, ViTConfig, tower_config

TOWERS = ("featurizer", "fused_featurizer")


@dataclass(frozen=True)
class ModelArgs:
    """Checked `config.json` of a Prismatic model or policy.

    text: passed to mlx-lm's Llama. towers: one or two. means, stds: of the
    pixels in [0, 1], per tower. bins: number of action bins. padding: unused rows at
    the end of the vocabulary. images: preparation of the pictures before that.
    """

    text: dict
    towers: tuple[ViTConfig, ...]
    means: tuple[tuple[float, ...], ...]
    stds: tuple[tuple[float, ...], ...]
    bins: int = 256
    padding: int = 64
    empty_token_id: int = 29871
    oft: OFTConfig | None = None
    images: Preparation = field(default_factory=Preparation)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelArgs":
        """Check a config.

        `config` holds `preprocessor`, the content of preprocessor_config.json. Raises
        `InputError` for sizes that are missing, impossible or inconsistent.
        """
        text = dict(object_of(config, "text_config"))
        model_type = text.setdefault("model_type", "llama")
        expect(model_type == "llama", "text_config.model_type", model_type, "'llama'")
        text = {**_LLAMA_2_7B, **text} if _is_openvla_7b(text) else text
        text.setdefault("num_key_value_heads", text.get("num_attention_heads"))
        text.setdefault("rms_norm_eps", 1e-6)
        text.setdefault("tie_word_embeddings", False)
        text = read_text(text, model_type)
        towers = _towers(config)
        means, stds = _normalization(config, towers)
        vocabulary, stop = text["vocab_size"], text.setdefault("eos_token_id", 2)
        empty = config.get("empty_token_id", 29871)
        check_token("empty_token_id", empty, vocabulary)
        check_token("text_config.eos_token_id", stop, vocabulary)
        padding = config.get("pad_to_multiple_of", 64)
        right = is_size(padding) and padding < vocabulary
        expect(right, "pad_to_multiple_of", padding, f"a number below {vocabulary}")
        bins, most = config.get("n_action_bins", 256), vocabulary - padding
        right = is_size(bins) and 2 <= bins <= most
        expect(right, "n_action_bins", bins, f"a whole number from 2 to {most}")
        oft = object_of(config, "oft")
        oft = OFTConfig.from_dict(oft) if oft else None
        images = Preparation.from_dict(object_of(config, "image_processing"))
        args = cls(text, towers, means, stds, bins, padding, empty, oft, images)
        if args.longest_prompt < 1:
            raise InputError(
                f"config.json says max_position_embeddings {args.context}, which has "
                f"no room for a prompt beside {args.visual_tokens} visual tokens and "
                f"{args.action_tokens} of actions"
            )
        return args

    @property
    def depth(self) -> int:
        """Number of language model layers and tower blocks."""
        return self.text["num_hidden_layers"] + sum(t.depth for t in self.towers)

    @property
    def pictures(self) -> int:
        """Pictures per observation."""
        return self.oft.pictures if self.oft else 1

    @property
    def state_size(self) -> int:
        """Numbers of robot state that the policy reads, 0 for none."""
        return self.oft.proprio_dim if self.oft else 0

    @property
    def rule(self) -> str:
        """Scaling of actions: by quantiles (`bounds_q99`) or extremes (`bounds`)."""
        return self.oft.rule if self.oft else "bounds_q99"

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of all pictures, before pruning."""
        return self.towers[0].side ** 2 * self.pictures

    @property
    def action_tokens(self) -> int:
        """Most tokens or slots of an action."""
        return self.oft.slots if self.oft else MOST_NUMBERS

    @property
    def context(self) -> int:
        """Most tokens that the language model can read."""
        return self.text.get("max_position_embeddings", 2048)

    @property
    def longest_prompt(self) -> int:
        """Most tokens of an instruction's prompt; 3 are <s>, </s> and the state."""
        return self.context - self.visual_tokens - self.action_tokens - 3

    @property
    def vocabulary(self) -> int:
        """Number of tokens without the padding; the last `bins` of them are actions."""
        return self.text["vocab_size"] - self.padding


# The published config.json omits the sizes of Llama-2-7B.
_LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32064,
}


def _is_openvla_7b(text: Mapping) -> bool:
    return "hidden_size" not in text


def _towers(config: Mapping) -> tuple[ViTConfig, ...]:
    ids, sizes = config.get("timm_model_ids"), config.get("image_sizes")
    fused = config.get("use_fused_vision_backbone", False)
    right = isinstance(fused, bool)
    expect(right, "use_fused_vision_backbone", fused, "true or false")
    expected = 2 if fused else 1
    for name, value in (("timm_model_ids", ids), ("image_sizes", sizes)):
        right = isinstance(value, list) and len(value) == expected
        expect(right, name, value, f"a list of {expected}, one per tower")
    acts = config.get("timm_override_act_layers") or [None] * expected
    right = isinstance(acts, list) and len(acts) == expected
    expect(right, "timm_override_act_layers", acts, f"a list of {expected}")
    overrides = object_of(config, "vision_config")
    towers = tuple(
        tower_config(ids[i], sizes[i], acts[i], overrides.get(TOWERS[i]))
        for i in range(expected)
    )
    right = len({(t.side, t.image_size) for t in towers}) == 1
    expect(right, "image_sizes", sizes, "equal sizes and patches in both towers")
    return towers


def _normalization(config: Mapping, towers: Sequence[ViTConfig]) -> list[tuple]:
    preprocessor = config.get("preprocessor")
    if not isinstance(preprocessor, dict):
        raise InputError(
            "the checkpoint has no preprocessor_config.json, which gives the mean and "
            "std of the pixels; copy it from the original"
        )
    statistics = []
    for name in ("means", "stds"):
        values = preprocessor.get(name)
        lists = values if isinstance(values, list) else []
        if len(lists) != len(towers) or not all(map(_is_color, lists)):
            raise InputError(
                f"preprocessor_config.json says {name} {values!r}; expected three "
                f"numbers for each of {len(towers)} tower{'s' * (len(towers) > 1)}"
            )
        statistics.append(tuple(tuple(map(float, value)) for value in lists))
    if not all(all(v > 1e-6 for v in std) for std in statistics[1]):
        raise InputError(
            f"preprocessor_config.json has stds {preprocessor['stds']!r}, "
            "not positive; expected numbers above 1e-6"
        )
    side = towers[0].image_size
    for name, only in (("interpolations", "bicubic"), ("input_sizes", [3, side, side])):
        values = preprocessor.get(name, [only])
        right = isinstance(values, list) and all(value == only for value in values)
        expect(
            right, name, values, f"{only!r} for every tower, the only supported value"
        )
    for source, default in ((preprocessor, "letterbox"), (config, "resize-naive")):
        strategy = source.get("image_resize_strategy", default)
        right = strategy == "resize-naive"
        expect(right, "image_resize_strategy", strategy, "'resize-naive'")
    _check_transforms(preprocessor, side, *statistics)
    return statistics


def _check_transforms(
    preprocessor: Mapping, side: int, means: Sequence, stds: Sequence
) -> None:
    """Raise `InputError` unless stored transforms (`tvf_*`) repeat the other fields.

    The reference reads them in the place of those.
    """
    letterbox = preprocessor.get("tvf_do_letterbox", False)
    expect(letterbox is False, "tvf_do_letterbox", letterbox, "false")
    for i, (mean, std) in enumerate(zip(means, stds, strict=True)):
        for name, key, *choices in (
            ("tvf_resize_params", "size", [side, side]),
            ("tvf_resize_params", "interpolation", 3, "bicubic"),
            ("tvf_crop_params", "output_size", [side, side]),
            ("tvf_normalize_params", "mean", _rounded(mean)),
            ("tvf_normalize_params", "std", _rounded(std)),
        ):
            stored = preprocessor.get(name)
            stored = stored[i] if isinstance(stored, list) and len(stored) > i else {}
            value = stored.get(key, choices[0]) if isinstance(stored, dict) else stored
            right = _rounded(value) in choices
            expect(right, f"{name} {key}", value, f"{choices[0]}, as in other fields")


def _rounded(value: object) -> object:
    """Return the numbers of a list to six digits: transforms are stored as float32."""
    if isinstance(value, list | tuple) and all(map(is_number, value)):
        return [round(number, 6) for number in value]
    return value


def _is_color(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(is_number, value))


class VisionBackbone(nn.Module):
    """One ViT, or two with their channels joined."""

    def __init__(self, args: ModelArgs, complete: bool):
        super().__init__()
        film = args.text["hidden_size"] if args.oft and args.oft.film else None
        for name, tower in zip(TOWERS, args.towers, strict=False):
            setattr(self, name, ViT(tower, film, complete))
        self._means = [mx.array(mean) for mean in args.means]
        self._stds = [mx.array(std) for std in args.stds]
        self._count = len(args.towers)

    def __call__(
        self,
        pixels: mx.array,
        needs: tuple[str, ...] = (),
        language: mx.array | None = None,
    ) -> Features:
        """Encode pixels (B, S, S, 3) in [0, 1] as tokens of C1 + C2 channels.

        language: (B, D), the mean prompt embedding, for FiLM. The extras `needs` are
        those of the first tower with a class token, else of the first tower.
        """
        towers = [getattr(self, name) for name in TOWERS[: self._count]]
        with_class = [i for i, t in enumerate(towers) if t.config.class_token]
        source, tokens, extras = (with_class or [0])[0], [], {}
        for i, tower in enumerate(towers):
            dtype = tower.pos_embed.dtype
            normal = ((pixels - self._means[i]) / self._stds[i]).astype(dtype)
            part, new = tower(normal, language, needs if i == source else ())
            tokens.append(part)
            extras |= new
        side = towers[0].config.side
        return Features(mx.concatenate(tokens, axis=-1), (side, side), extras=extras)


class Projector(nn.Module):
    """Projector: three layers for two towers, two layers for one."""

    def __init__(self, inputs: int, hidden: int, fused: bool):
        super().__init__()
        if fused:
            self.fc1 = nn.Linear(inputs, 4 * inputs)
            self.fc2 = nn.Linear(4 * inputs, hidden)
            self.fc3 = nn.Linear(hidden, hidden)
        else:
            self.fc1 = nn.Linear(inputs, hidden)
            self.fc2 = nn.Linear(hidden, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        """Project (B, K, C) to (B, K, D)."""
        x = self.fc2(gelu(self.fc1(x)))
        return self.fc3(gelu(x)) if "fc3" in self else x


class OpenVLA(ModelBase, nn.Module):
    """OpenVLA: `encode` and `project` for pictures; a call runs the language model.

    With `inference=False` its parameters are exactly the tensors of the MLX layout.
    """

    sees_parts = False
    provides = POLICY_PROVIDES

    def __init__(self, args: ModelArgs, inference: bool = True):
        super().__init__()
        from mlx_lm.models import llama

        self.args, self.carried = args, ()
        hidden = args.text["hidden_size"]
        channels = sum(tower.embed_dim for tower in args.towers)
        self.vision_backbone = VisionBackbone(args, complete=not inference)
        self.projector = Projector(channels, hidden, len(args.towers) > 1)
        self.language_model = llama.Model(llama.ModelArgs.from_dict(args.text))
        if args.oft:
            self.action_head = ActionHead(args.oft, hidden)
            if args.oft.proprio_dim:
                self.proprio_projector = ProprioProjector(args.oft.proprio_dim, hidden)
        self._decoder = Decoder(self.language_model)

    @property
    def answers(self) -> str:
        """Form of the action: "slots" (OFT) or "bins"."""
        return "slots" if self.args.oft else "bins"

    @property
    def attends(self) -> str:
        """Attention mask: "full" (OFT) or "causal"."""
        return "full" if self.args.oft else "causal"

    @property
    def reads_prompt(self) -> bool:
        """True if FiLM conditions the towers on the prompt."""
        return bool(self.args.oft and self.args.oft.film)

    @property
    def pictures(self) -> int:
        """Pictures per observation."""
        return self.args.pictures

    @property
    def image_size(self) -> int:
        """Pixels per side of the square pictures that the towers were trained on."""
        return self.args.towers[0].image_size

    @property
    def stride(self) -> int:
        """Pixels per side of a visual token."""
        return self.args.towers[0].patch_size

    @property
    def feature_size(self) -> int:
        """C, channels of a visual token before the projector."""
        return sum(tower.embed_dim for tower in self.args.towers)

    def encode(
        self,
        pixels: mx.array,
        needs: tuple[str, ...] = (),
        prompt: Prompt | None = None,
    ) -> Features:
        """Encode pixels (B, S, S, 3) in [0, 1] as tokens before the projector.

        needs: names of the extras. prompt: read by the towers of policies with FiLM.
        """
        language = None
        if self.reads_prompt and prompt is not None:
            mean = mx.mean(self._words(prompt), axis=1)
            language = mx.broadcast_to(mean, (pixels.shape[0], mean.shape[-1]))
        return self.vision_backbone(pixels, needs, language)

    def _words(self, prompt: Prompt) -> mx.array:
        """Return the embeddings (1, T, D) that FiLM reads: all but action slots."""
        ids = mx.concatenate([*prompt.arrays(), self._stop], axis=1)
        return self.decoder.embed(ids)

    @property
    def _stop(self) -> mx.array:
        return mx.array([[self.args.text["eos_token_id"]]])

    def project(self, tokens: mx.array) -> mx.array:
        """Project visual tokens (B, K, C) to embeddings (B, K, D)."""
        return self.projector(tokens)

    def text(self, prompt: Prompt, state: mx.array | None = None) -> list[mx.array]:
        """Return the embeddings (1 or B, L, D) of each text around the pictures.

        For OFT the last text is the robots' `state` (B, p), the prompt, empty action
        slots and a stop token.
        """
        *before, last = [self.decoder.embed(ids) for ids in prompt.arrays()]
        if self.args.oft:
            empty = mx.zeros((1, self.args.oft.slots, last.shape[-1]), last.dtype)
            last = mx.concatenate([last, empty, self.decoder.embed(self._stop)], axis=1)
        if state is not None:
            token = self.proprio_projector(state.astype(last.dtype))[:, None]
            last = mx.broadcast_to(last, (token.shape[0], *last.shape[1:]))
            last = mx.concatenate([token, last], axis=1)
        return [*before, last]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the tensors of the inference form: no unused blocks. Idempotent."""
        skipped = []
        for name, tower in zip(TOWERS, self.args.towers, strict=False):
            prefix = f"vision_backbone.{name}"
            skipped += [f"{prefix}.norm.", f"{prefix}.blocks.{tower.depth - 1}."]
        return {k: v for k, v in weights.items() if not k.startswith(tuple(skipped))}

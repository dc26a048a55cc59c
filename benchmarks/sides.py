"""Sides of `peers.py` with one interface: ours, mlx-vlm's model and transformers'."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# Each side imports its packages when it is made, so that `--startup` never counts the
# imports of another side.

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Task:
    """Image and question for every side.

    chat: the question in the model's chat template. tokens: tokens to generate.
    """

    image: Image.Image
    question: str
    chat: str
    tokens: int


class Unfit(Exception):
    """Error of a side that cannot run here or on this folder."""


class MlxSide:
    """Base class of the two sides on MLX; a subclass sets `model`."""

    @property
    def weights(self) -> int:
        from mlx.utils import tree_flatten

        return sum(array.nbytes for _, array in tree_flatten(self.model.parameters()))

    def peak_memory(self, run: Callable) -> float:
        """Return the peak MB during `run`, without the memory of other sides."""
        import mlx.core as mx

        mx.reset_peak_memory()
        before = mx.get_active_memory()
        run()
        return (mx.get_peak_memory() - before + self.weights) / 1e6


class Ours(MlxSide):
    name = "mlx_tokprune"

    def __init__(self, folder: Path):
        import mlx_tokprune

        self.model, self.processor = mlx_tokprune.load(folder)
        self.processor.tokenizer.eos_token_ids = []  # never stop

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Return (1, S, S, 3) pixels, as `pixels` of every side does."""
        return self.processor.pixels([image])

    def tower(self, pixels: np.ndarray) -> None:
        import mlx.core as mx

        mx.eval(self.model.encode(mx.array(pixels)).tokens)
        mx.synchronize()

    def answer(self, task: Task, on_token: Callable, ratio: float = 1.0) -> None:
        """Call `on_token` with each id as soon as it is on the host."""
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        from mlx_tokprune import Pruner, stream_generate

        pruner = Pruner("norm", ratio) if ratio < 1 else None
        asked = (self.model, self.processor, [task.image], task.question)
        for piece in stream_generate(*asked, pruner=pruner, max_tokens=task.tokens):
            on_token(piece.token)
        mx.synchronize(generation_stream)  # a token more than asked for is under way


class MlxVlm(MlxSide):
    name = "mlx-vlm"

    def __init__(self, folder: Path):
        import mlx.core as mx
        import mlx_vlm

        config = json.loads((folder / "config.json").read_text())
        self._fit_sizes(config.get("vision_config") or {})
        # Not strict: the demo lacks the tower's head, which is never evaluated.
        self.model, self.processor = mlx_vlm.load(str(folder), strict=False)
        if mx.default_device().type == mx.DeviceType.cpu:
            self.model.update(_as_float32(self.model))  # as ours is there
            mx.eval(self.model.parameters())
        self.processor.tokenizer.stopping_criteria.eos_token_ids = []
        self._name_all_ids()
        size = self.model.config.vision_config.image_size
        self.processor.image_processor.size = {"shortest_edge": size}
        self.processor.image_processor.crop_size = {"height": size, "width": size}

    def _name_all_ids(self) -> None:
        """Name the ids that the tokenizer lacks, as mlx-lm does.

        Random checkpoints answer with such ids.
        """
        names = getattr(self.processor.detokenizer, "tokenmap", None)
        if names is not None:
            size = self.model.language_model.model.embed_tokens.weight.shape[0]
            names += ["!"] * (size - len(names))

    @staticmethod
    def _fit_sizes(sizes: dict) -> None:
        """Set the tower's sizes in mlx-vlm, whose defaults are Apple's."""
        from mlx_vlm.models.fastvlm.config import VisionConfig

        for name in ("layers", "embed_dims", "mlp_ratios", "cls_ratio"):
            if name in sizes:
                setattr(VisionConfig, name, sizes[name])

    def pixels(self, image: Image.Image) -> np.ndarray:
        found = self.processor.image_processor.preprocess([image])["pixel_values"]
        return found.transpose(0, 2, 3, 1)

    def tower(self, pixels: np.ndarray) -> None:
        import mlx.core as mx

        mx.eval(self.model.vision_tower(mx.array(pixels))[1])
        mx.synchronize()

    def answer(
        self, task: Task, on_token: Callable, pixels: np.ndarray | None = None
    ) -> None:
        import mlx.core as mx
        from mlx_vlm.generate import generation_stream, stream_generate

        given = {"image": [task.image]}
        if pixels is not None:
            inputs = self.processor(text=task.chat)
            given = {
                "input_ids": mx.array(inputs["input_ids"]),
                "mask": mx.array(inputs["attention_mask"]),
                "pixel_values": mx.array(pixels.transpose(0, 3, 1, 2)),
            }
        given |= {"max_tokens": task.tokens, "temperature": 0.0}
        pieces = stream_generate(self.model, self.processor, task.chat, **given)
        for piece in pieces:
            if piece.finish_reason is None:  # the last piece repeats the last token
                on_token(piece.token)
        mx.synchronize(generation_stream)


def _as_float32(model):
    import mlx.core as mx
    from mlx.utils import tree_map

    def cast(a):
        return a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a

    return tree_map(cast, model.parameters())


class Transformers:
    """FastVLM of transformers around timm's tower, from a folder in that layout."""

    name = "transformers"

    def __init__(self, folder: Path):
        import torch
        from torchvision_stub import repair_torchvision

        repair_torchvision()
        from transformers import FastVlmForConditionalGeneration as Model
        from transformers import LlavaImageProcessor, PreTrainedTokenizerFast
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        mps = torch.backends.mps.is_available()
        self.device, dtype = ("mps", "auto") if mps else ("cpu", torch.float32)
        self.model, report = Model.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
        missing = [k for k in report["missing_keys"] if "num_batches_tracked" not in k]
        if missing or report["unexpected_keys"]:
            raise Unfit(f"its weights have other names, such as {missing[:1]}")
        self.model.to(self.device).eval()
        self.processor = LlavaImageProcessor.from_pretrained(folder)
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def pixels(self, image: Image.Image) -> np.ndarray:
        return self._pixels(image).permute(0, 2, 3, 1).numpy()

    def _pixels(self, image: Image.Image):
        return self.processor(images=image, return_tensors="pt")["pixel_values"]

    def tower(self, pixels: np.ndarray) -> None:
        import torch

        pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2)).to(self.device)
        with torch.inference_mode():
            self.model.model.vision_tower(pixels).last_hidden_state.cpu()

    def _prompt(self, chat: str) -> list[int]:
        config, encode = self.model.config, self.tokenizer.encode
        before, after = (
            encode(part, add_special_tokens=False) for part in chat.split(IMAGE_TOKEN)
        )
        if config.image_token_index in before + after:
            raise Unfit("the prompt has the id that stands for a picture")
        picture = [config.image_token_index] * config.image_seq_length
        return before + picture + after

    def answer(
        self, task: Task, on_token: Callable, pixels: np.ndarray | None = None
    ) -> None:
        import torch

        if pixels is None:
            pixels = self._pixels(task.image)
        else:
            pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2))
        ids = torch.tensor([self._prompt(task.chat)], device=self.device)
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels.to(self.device),
            max_new_tokens=task.tokens,
            do_sample=False,
            streamer=Streamer(on_token),
        )

    def peak_memory(self, run: Callable) -> None:
        """Run without a measurement: torch reports no memory on CPU.

        RSS is that of the whole process.
        """
        run()


class Streamer:
    """Streamer for `generate` that calls back with each new id, without the prompt."""

    def __init__(self, on_token: Callable):
        self.on_token, self.started = on_token, False

    def put(self, ids) -> None:
        if self.started:
            self.on_token(int(ids[0]))
        self.started = True

    def end(self) -> None:
        pass


# The checkpoint as transformers stores it -------------------------------------------


def write_transformers(ours: Ours, folder: Path, target: Path) -> None:
    """Write the weights of `folder` to `target` as transformers and timm name them."""
    import mlx.core as mx

    from mlx_tokprune.checkpoints.family import identify
    from mlx_tokprune.checkpoints.shards import Checkpoint

    family, checkpoint = identify(Checkpoint.open(folder))
    if checkpoint.config.get("quantization"):
        raise Unfit("it does not read MLX's quantized weights")
    layout = dict(family.to_mlx_layout(checkpoint.load()))
    downsamplings = sorted(
        int(name.split(".")[3]) for name in layout if name.endswith("lkb_reparam.bias")
    )
    tensors = {
        rename(name, downsamplings): _channels_first(name, array)
        for name, array in layout.items()
        if ".vision_model.head." not in name
    }
    config = _transformers_config(ours)
    mx.save_safetensors(
        str(target / "model.safetensors"), tensors, metadata={"format": "pt"}
    )
    (target / "config.json").write_text(json.dumps(config))
    size = ours.model.image_size
    pixels = {
        "do_pad": True,
        "size": {"height": size, "width": size},
        "do_center_crop": False,
        "image_mean": [0.0] * 3,
        "image_std": [1.0] * 3,
    }
    (target / "preprocessor_config.json").write_text(json.dumps(pixels))
    for name in folder.glob("tokenizer*"):
        shutil.copy(name, target)


def rename(name: str, downsamplings: list[int]) -> str:
    """Return transformers' name of a tensor in MLX layout.

    downsamplings: layer numbers in the tower's network that start a stage.
    """
    for ours, theirs in {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "mm_projector.0.": "model.multi_modal_projector.linear_1.",
        "mm_projector.2.": "model.multi_modal_projector.linear_2.",
    }.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    first, *rest = name.removeprefix("vision_tower.vision_model.").split(".")
    if first == "network":
        number, part, *rest = rest
        stage = f"stages.{sum(n <= int(number) for n in downsamplings)}."
        named = {"proj": "downsample.proj", "reparam_conv": "pos_emb.reparam_conv"}
        rest = [stage + named.get(part, f"blocks.{part}"), *rest]
    elif first == "patch_embed":
        rest = ["stem", *rest[1:]]
    else:
        rest = ["final_conv", *rest]
    changed = {"convffn": "mlp", "lkb_reparam": "reparam_conv"}
    changed |= {"reduce": "fc1", "expand": "fc2"}
    if rest[-1].startswith("layer_scale"):
        rest.append("gamma")
    path = ".".join(changed.get(part, part) for part in rest)
    return f"model.vision_tower.timm_model.{path}"


def _channels_first(name: str, array):
    if array.ndim == 4:
        return array.transpose(0, 3, 1, 2)
    return array.transpose(2, 0, 1) if array.ndim == 3 else array


def _transformers_config(ours: Ours) -> dict:
    vision, text = ours.model.args.vision, ours.model.language_model.args
    names = ("layers", "embed_dims", "mlp_ratios", "cls_ratio")
    tower = {name: getattr(vision, name) for name in names}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    names += ("vocab_size", "tie_word_embeddings")
    return {
        "model_type": "fast_vlm",
        "architectures": ["FastVlmForConditionalGeneration"],
        "image_token_index": text.vocab_size - 1,
        "image_seq_length": (vision.image_size // 64) ** 2,
        "tie_word_embeddings": text.tie_word_embeddings,
        "text_config": {name: getattr(text, name) for name in names}
        | {
            "model_type": "qwen2",
            "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        },
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "hidden_size": vision.output_dim,
            "model_args": {"inference_mode": True, "global_pool": "avg"} | tower,
        },
    }

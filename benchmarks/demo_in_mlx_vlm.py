"""Write the demo model as a folder that mlx-vlm loads, and evaluate both.

    pip install -e '.[mlx-vlm]'
    python benchmarks/demo_in_mlx_vlm.py FOLDER [FUSED]
    python examples/lmms_eval/make_questions.py 128      # writes ./questions
    mlx_tokprune evaluate --runtime mlx-vlm --model FOLDER \
        --data questions/all.jsonl --methods norm --keep-ratios 0.25 \
        [--positions original]
    mlx_tokprune evaluate --model demo \
        --data questions/all.jsonl --prune norm:0.25@prompt \
        [--positions contiguous]

mlx-vlm's FastVLM has the sizes of Apple's tower in its code; the folder's `model_file`
has the demo's sizes. The chat template is FastVLM's. Each of 128 held-out images has
one question, because mlx-vlm encodes the image again for each answer. FUSED is a folder
that `mlx_tokprune train fuse` wrote; it replaces the demo.
"""

import json
import sys
from pathlib import Path

import mlx_tokprune  # noqa: F401  # isort: skip  (loads the BLAS before MLX)

import mlx.core as mx

from mlx_tokprune.convert import convert
from mlx_tokprune.models.fastvlm import FastVLM

CODE = '''"""FastVLM of mlx-vlm, with the tower of mlx_tokprune's demo."""

from mlx_vlm.models import fastvlm
from mlx_vlm.models.fastvlm import LanguageModel, Model, ModelConfig, TextConfig
from mlx_vlm.models.fastvlm import VisionModel


class VisionConfig(fastvlm.VisionConfig):
    layers = {layers}
    embed_dims = {embed_dims}
    mlp_ratios = {mlp_ratios}
'''
UNUSED = "vision_tower.vision_model.head.proj"  # unused, but mlx-vlm requires it


def main() -> None:
    target, *fused = sys.argv[1:]
    folder = convert(*fused or ["demo"], target)
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"]
    side = vision["image_size"]
    (folder / "model.py").write_text(CODE.format(**vision))
    width = int(vision["embed_dims"][-1] * vision["cls_ratio"])
    unused = {UNUSED: mx.zeros((width, 768))}
    mx.save_safetensors(str(folder / "unused.safetensors"), unused)
    config["model_file"] = "model.py"
    config["vision_config"] = {"model_type": "llava_qwen2", "image_size": side}
    sizes = {"size": {"shortest_edge": side}}
    sizes["crop_size"] = {"height": side, "width": side}
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    prefix, suffix = FastVLM.prompt_prefix, FastVLM.prompt_suffix
    turns = "{%- for m in messages -%}{{ m['content'] }}{%- endfor -%}"
    tokens["chat_template"] = f"{{{{ {prefix!r} }}}}{turns}{{{{ {suffix!r} }}}}"
    for name, value in (
        ("config.json", config),
        ("preprocessor_config.json", sizes),
        ("tokenizer_config.json", tokens),
    ):
        Path(folder / name).write_text(json.dumps(value, indent=2) + "\n")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()

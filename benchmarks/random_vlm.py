"""Write a mid-size Qwen2.5-VL with random weights in mlx-vlm's layout, for timing.

    pip install -e '.[test]'
    python benchmarks/random_vlm.py /tmp/qwen
    mlx_tokprune bench --runtime mlx-vlm --model /tmp/qwen --image PICTURE \
        --methods norm --keep-ratios 0.5 0.25 --tokens 4 --runs 5

The language model has the layers of Qwen2.5-0.5B (24 x 896) and a small vocabulary. The
tower is 12 x 640 with windows; its patches of 14 px are merged two by two, as in
Qwen2.5-VL.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from vlm.qwen import QWEN2_5, ROPE

PATCH, SIDE = 14, 28
TEXT = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_scaling": ROPE | {"mrope_section": [8, 12, 12]},
}
VISION = {
    "depth": 12,
    "hidden_size": 640,
    "num_heads": 10,
    "intermediate_size": 1728,
    "out_hidden_size": 896,
    "patch_size": PATCH,
    "spatial_patch_size": PATCH,
    "window_size": 4 * SIDE,
    "fullatt_block_indexes": [3, 7, 11],
}


def main() -> None:
    config = QWEN2_5.config | TEXT
    config["vision_config"] = config["vision_config"] | VISION
    files = {
        name: content
        | {"patch_size": PATCH, "min_pixels": SIDE**2, "max_pixels": 4096 * SIDE**2}
        for name, content in QWEN2_5.files.items()
    }
    family = dataclasses.replace(QWEN2_5, config=config, files=files)
    family.write(Path(sys.argv[1]))
    print(f"wrote {sys.argv[1]}")


if __name__ == "__main__":
    main()

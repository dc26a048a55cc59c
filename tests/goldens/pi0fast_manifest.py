"""The manifest of pi0-FAST: names and shapes of lerobot's own module, without weights.

    LEROBOT=... python tests/goldens/pi0fast_manifest.py pi0_fast.json.gz

The setup is that of `pi0fast.py`, including `LEROBOT`.
"""

import gzip
import json
import sys
from pathlib import Path

import torch
from pi0fast import CAMERAS, ROOT, import_lerobot


def main(file: Path) -> None:
    lerobot = import_lerobot()
    with torch.device("meta"):
        sizes = lerobot.get_gemma_config("gemma_2b")
        module = lerobot.PI0FastPaliGemma(sizes, [False, True], "bfloat16")
    tensors = {
        f"{ROOT}{name}": list(tensor.shape)
        for name, tensor in module.paligemma.state_dict().items()
    }
    inputs = {f"observation.images.{c}": {"type": "VISUAL"} for c in CAMERAS}
    inputs = {name: entry | {"shape": [3, 224, 224]} for name, entry in inputs.items()}
    inputs["observation.state"] = {"type": "STATE", "shape": [32]}
    config = {"type": "pi0_fast", "paligemma_variant": "gemma_2b", "chunk_size": 50}
    config |= {"input_features": inputs}
    config |= {"output_features": {"action": {"type": "ACTION", "shape": [32]}}}
    text = json.dumps({"config": config, "tensors": tensors}, sort_keys=True)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

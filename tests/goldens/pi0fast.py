"""Golden folders of pi0-FAST: a tiny random checkpoint and lerobot's values for it.

    python3 -m venv /tmp/reference
    /tmp/reference/bin/pip install torch==2.13.0 transformers==5.5.4 pillow scipy
    git clone https://github.com/huggingface/lerobot /tmp/lerobot
    git -C /tmp/lerobot checkout 7427f31801f944f5ec9ce53cda02862ce7d1638b
    export LEROBOT=/tmp/lerobot/src
    /tmp/reference/bin/python tests/goldens/pi0fast.py --seed 7 --output FOLDER
    /tmp/reference/bin/python tests/goldens/pi0fast.py --check tests/data/pi0fast-tiny

The reference is lerobot's own module in float32: `PI0FastPytorch` on its
`PaliGemmaForConditionalGenerationWithPiGemma` at tiny sizes, its resizing, and its
decoding of answers; mlx_tokprune is not used. Only lerobot's model files are imported.
Stand-ins replace its configs and training, so that their dependencies need no install.
FAST's code is trained and used as published, by tokenizers and scipy. openpi's
positions come from the same module, one token at a time.
"""

import os
import sys
import types
from pathlib import Path

import numpy as np
import torch
from command import as_arrays, read_json, run, write_expected, write_json
from PIL import Image
from recipe import draw_picture, draw_weights
from safetensors.torch import load_file, save_file
from scipy.fft import dct
from tokenizers import (
    AddedToken,
    ByteLevelBPETokenizer,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.models.auto import CONFIG_MAPPING

INSTRUCTION = "Pick up_the cup"
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
SIZES = ((56, 56), (80, 60), (50, 70))  # of the pictures
HORIZON, NUMBERS, STATE, STEPS = 4, 3, 5, 20
CODES, SKIPPED = 160, 128  # tokens of FAST, and behind them
VISION = {"image_size": 56, "patch_size": 14, "hidden_size": 32}
VISION |= {"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}
ROOT = "model.paligemma_with_expert.paligemma."


# lerobot ------------------------------------------------------------------------------


def import_lerobot() -> types.ModuleType:
    """Import lerobot's `modeling_pi0_fast` without lerobot's other dependencies."""
    source = Path(os.environ["LEROBOT"]) / "lerobot"
    policies = source / "policies"
    for name, path in (
        ("lerobot", source),
        ("lerobot.policies", policies),
        ("lerobot.policies.pi0_fast", policies / "pi0_fast"),
        ("lerobot.policies.rtc", policies / "rtc"),
        ("lerobot.policies.common", policies / "common"),
        ("lerobot.utils", source / "utils"),
    ):
        _module(name, __path__=[str(path)])
    _module("lerobot.configs", PreTrainedConfig=object)
    _module("lerobot.policies.pretrained", PreTrainedPolicy=nn.Module, T=object)
    _module("lerobot.policies.rtc.modeling_rtc", RTCProcessor=object)
    _module("lerobot.policies.pi0_fast.configuration_pi0_fast", PI0FastConfig=object)
    import lerobot.policies.pi0_fast.modeling_pi0_fast as modeling

    return modeling


def _module(name: str, **names) -> None:
    module = types.ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module


class Reference:
    """lerobot's policy at tiny sizes, with its initial weights."""

    def __init__(self, folder: Path):
        self.lerobot = import_lerobot()
        self.config = read_json(folder / "config.json")
        self.text = PreTrainedTokenizerFast.from_pretrained(folder)
        rows = self.text.vocab_size
        sizes = CONFIG_MAPPING["paligemma"](
            text_config=TEXT | {"model_type": "gemma", "vocab_size": rows},
            vision_config=VISION
            | {"model_type": "siglip_vision_model", "vision_use_head": False},
            projection_dim=TEXT["hidden_size"],
            image_token_index=rows,
        )
        self.inner = _plain(self.lerobot.PI0FastPaliGemma)
        self.inner.paligemma = (
            self.lerobot.PaliGemmaForConditionalGenerationWithPiGemma(sizes)
        )
        self.model = _plain(self.lerobot.PI0FastPytorch)
        self.model.paligemma_with_expert = self.inner
        self.model.gradient_checkpointing_enabled = False
        self.model._paligemma_tokenizer = self.text
        self.model.eval()
        self.policy = _plain(self.lerobot.PI0FastPolicy)
        self.policy.config = types.SimpleNamespace(
            fast_skip_tokens=SKIPPED,
            validate_action_token_prefix=False,
            image_features=dict.fromkeys(f"observation.images.{c}" for c in CAMERAS),
            image_resolution=(VISION["image_size"],) * 2,
        )
        self.policy._paligemma_tokenizer = self.text
        self.policy.weight = nn.Parameter(torch.zeros(1))  # says the device
        settings = read_json(folder / "fast" / "processor_config.json")
        code = PreTrainedTokenizerFast.from_pretrained(folder / "fast")
        self.policy.action_tokenizer = types.SimpleNamespace(
            bpe_tokenizer=code, **{k: settings[k] for k in ("scale", "min_token")}
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the model's own tensors under lerobot's names."""
        found = self.inner.paligemma.state_dict()
        return {f"{ROOT}{name}": tensor for name, tensor in found.items()}


def _plain(kind: type) -> nn.Module:
    """Return a module of this class without the parts that its `__init__` makes."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module


# Values -------------------------------------------------------------------------------


def read_pictures(folder: Path, present: tuple[int, ...]) -> dict[str, torch.Tensor]:
    found = {}
    for number in present:
        picture = Image.open(folder / f"image_{number}.png").convert("RGB")
        pixels = torch.from_numpy(np.asarray(picture, np.float32) / 255)
        name = f"observation.images.{CAMERAS[number]}"
        found[name] = pixels.permute(2, 0, 1)[None]
    return found


def prompt_ids(reference: Reference, state: list[float], stats: dict) -> list[int]:
    """Return ids of lerobot's prompt: task, and state in 256 bins of [-1, 1]."""
    low, high = (stats[f"observation.state.{q}"] for q in ("q01", "q99"))
    normal = 2.0 * (torch.tensor(state) - low) / (high - low) - 1.0
    bins = np.digitize(normal.numpy(), bins=np.linspace(-1, 1, 256 + 1)[:-1]) - 1
    task = INSTRUCTION.strip().replace("_", " ").replace("\n", " ")
    text = f"Task: {task}, State: {' '.join(map(str, bins))};\n"
    return reference.text(text)["input_ids"]


def describe(reference: Reference, folder: Path, present: tuple[int, ...]) -> dict:
    """Return the values that lerobot computes from the images of these cameras."""
    stats = load_file(folder / reference.config["statistics"])
    state = reference.config["state"]
    ids = prompt_ids(reference, state, stats)
    longest = reference.config["tokenizer_max_length"]
    tokens = torch.tensor([ids + [0] * (longest - len(ids))])
    masks = torch.arange(longest)[None] < len(ids)
    batch = read_pictures(folder, present)
    pictures, seen = reference.policy._preprocess_images(batch)
    towers = [reference.inner.paligemma.model.vision_tower(p) for p in pictures]
    projected = [reference.inner.embed_image(p) for p in pictures]
    count = len(present)
    values = {
        "input_ids": torch.tensor(ids),
        "pixels": torch.cat(pictures[:count])[:, :, ::8, ::8],
        "features": torch.cat([t.last_hidden_state for t in towers[:count]]),
        "projected": torch.cat(projected[:count]),
    }
    told = (pictures, seen, tokens, masks)
    hidden, logits = read_prefix(reference, *told)
    said = reference.model.sample_actions_fast_kv_cache(*told, STEPS)
    plain = reference.model.sample_actions_fast(*told, STEPS)
    stop = reference.text.convert_tokens_to_ids("|")
    until = plain[0].tolist()
    until = until[: until.index(stop) + 1] if stop in until else until
    assert said[0, : len(until)].tolist() == until, "lerobot's two ways disagree"
    chunk = reference.policy.detokenize_actions(said, HORIZON, NUMBERS)[0]
    low, high = (stats[f"action.{q}"] for q in ("q01", "q99"))
    units = (chunk + 1.0) * (high - low) / 2.0 + low
    values |= {"hidden": hidden, "logits": logits, "greedy_ids": torch.tensor(until)}
    return values | {"normalized": chunk, "action": units}


def read_prefix(reference: Reference, pictures, seen, tokens, masks):
    """Return (T, D) states of the present tokens, and (V,) logits of the last <bos>."""
    start = torch.tensor([[reference.text.bos_token_id]])
    tokens = torch.cat([tokens, start], dim=1)
    masks = torch.cat([masks, torch.ones_like(start, dtype=torch.bool)], dim=1)
    embedded, there, attention, _, _ = reference.model.embed_prefix_fast(
        pictures, seen, tokens, masks
    )
    attention = reference.lerobot.prepare_attention_masks_4d(attention, torch.float32)
    (hidden, _), _ = reference.inner(
        attention_mask=attention,
        position_ids=torch.cumsum(there, dim=1) - 1,
        inputs_embeds=[embedded, None],
        use_cache=False,
    )
    logits = reference.inner.paligemma.lm_head(hidden[:, -1])
    return hidden[0][there[0]], logits[0]


def openpi_ids(reference: Reference, folder: Path) -> torch.Tensor:
    """Return openpi's greedy ids: no <bos> behind the prompt, positions one later.

    Prompt and answer are read anew for each token, under the mask of openpi's
    decoding: the prompt attends to itself, the answer to all earlier tokens.
    """
    ids = reference.text(reference.config["openpi_prompt"])["input_ids"]
    pictures, _ = reference.policy._preprocess_images(read_pictures(folder, (0, 1)))
    parts = [reference.inner.embed_image(p) for p in pictures[:2]]
    parts.append(reference.inner.embed_language_tokens(torch.tensor([ids])))
    prefix = torch.cat(parts, dim=1)
    size, said = prefix.shape[1], []
    while len(said) < STEPS and reference.text.eos_token_id not in said:
        more = reference.inner.embed_language_tokens(torch.tensor([said]).long())
        whole = torch.cat([prefix, more], dim=1) if said else prefix
        total = whole.shape[1]
        seen = torch.ones(total, total).tril().bool() | (torch.arange(total) < size)
        where = torch.arange(total) + (torch.arange(total) >= size)
        attention = reference.lerobot.prepare_attention_masks_4d(
            seen[None], torch.float32
        )
        (hidden, _), _ = reference.inner(
            attention_mask=attention,
            position_ids=where[None],
            inputs_embeds=[whole, None],
            use_cache=False,
        )
        said.append(int(reference.inner.paligemma.lm_head(hidden[0, -1]).argmax()))
    return torch.tensor(said)


@torch.no_grad()
def compute(folder: Path) -> dict[str, np.ndarray]:
    reference = Reference(folder)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in reference.tensors().items():
        tensor.copy_(weights.pop(name))
    assert not weights, f"{sorted(weights)[0]} is unknown"
    found = {"openpi_ids": openpi_ids(reference, folder)}
    for present in ((0,), (0, 1, 2), (0, 2)):
        case = "".join(map(str, present))
        values = describe(reference, folder, present)
        found |= {f"{case}_{name}": value for name, value in values.items()}
    for name in ("features", "projected", "pixels"):  # the same in the other cases
        del found[f"0_{name}"], found[f"02_{name}"]
    return as_arrays(found)


# The folder ---------------------------------------------------------------------------


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and a few words, with FAST's codes at the end."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>")
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in ("Action", "Task", "State"):
        merges += [(word[:n], word[n]) for n in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    tokens += [a + b for a, b in merges]
    behind = [f"<code{number}>" for number in range(CODES + SKIPPED)]
    table = {token: number for number, token in enumerate([*tokens, *behind])}
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", table["<bos>"])]
    )
    names = {"bos_token": "<bos>", "eos_token": "<eos>"}
    names |= {"unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def draw_chunks(seed: int, count: int) -> np.ndarray:
    """Return (count, horizon, numbers) smooth actions around [-1, 1]."""
    random = np.random.default_rng(seed)
    steps = random.normal(0, 0.3, (count, HORIZON, NUMBERS)).cumsum(axis=1)
    return np.clip(steps + random.uniform(-0.7, 0.7, (count, 1, NUMBERS)), -1.5, 1.5)


def write_fast(folder: Path) -> None:
    """Train FAST's code by the published procedure and write it."""
    found = np.around(dct(draw_chunks(0, 4000), axis=1, norm="ortho") * 10)
    least, most = int(found.min()), int(found.max())
    texts = ["".join(map(chr, (c.flatten() - least).astype(int))) for c in found]
    code = ByteLevelBPETokenizer()
    trainer = BpeTrainer(
        vocab_size=CODES,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=[chr(number) for number in range(most - least + 1)],
        max_token_length=10000,
    )
    code._tokenizer.train_from_iterator(texts, trainer=trainer)
    code = PreTrainedTokenizerFast(tokenizer_object=code)
    code.save_pretrained(folder)
    settings = {"scale": 10, "min_token": least, "vocab_size": CODES}
    settings |= {"processor_class": "UniversalActionProcessor"}
    write_json(settings, folder / "processor_config.json")


def write_settings(seed: int, folder: Path) -> None:
    """Write config, input state and statistics as lerobot saves them."""
    random = np.random.default_rng([seed, 1])
    low = {"action": random.uniform(-2, -0.5, NUMBERS)}
    low["observation.state"] = random.uniform(-2, -0.5, STATE)
    stats = {}
    for name, values in low.items():
        above = values + random.uniform(0.5, 3, len(values))
        stats |= {f"{name}.q01": values, f"{name}.q99": above}
        stats |= {f"{name}.mean": (values + above) / 2, f"{name}.std": above - values}
    file = "policy_preprocessor_step_3_normalizer_processor.safetensors"
    tensors = {k: torch.tensor(v, dtype=torch.float32) for k, v in stats.items()}
    save_file(tensors, folder / file)
    norms = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
    step = {"registry_name": "normalizer_processor", "state_file": file}
    step["config"] = {"eps": 1e-8, "features": {}, "norm_map": norms}
    steps = {"name": "policy_preprocessor", "steps": [step]}
    write_json(steps, folder / "policy_preprocessor.json")
    shape = [3, VISION["image_size"], VISION["image_size"]]
    inputs = {f"observation.images.{c}": {"type": "VISUAL"} for c in CAMERAS}
    inputs = {name: entry | {"shape": shape} for name, entry in inputs.items()}
    inputs["observation.state"] = {"type": "STATE", "shape": [STATE]}
    state = (low["observation.state"] + [0.1, 0.9, -0.4, 4.0, 0.3]).round(3)
    config = {
        "type": "pi0_fast",
        "paligemma_variant": "gemma_2b",
        "chunk_size": HORIZON,
        "n_action_steps": HORIZON,
        "max_decoding_steps": STEPS,
        "tokenizer_max_length": 80,
        "fast_skip_tokens": SKIPPED,
        "validate_action_token_prefix": False,
        "input_features": inputs,
        "output_features": {"action": {"type": "ACTION", "shape": [NUMBERS]}},
        "normalization_mapping": norms,
        "vision_config": {"num_attention_heads": VISION["num_attention_heads"]},
        "state": state.tolist(),
        "statistics": file,
        "openpi_prompt": "Task: pick up the cup, State: 1 -1 255;\n",
    }
    write_json(config, folder / "config.json")


def make(seed: int, folder: Path) -> None:
    (folder / "fast").mkdir()
    text_tokenizer().save_pretrained(folder)
    write_fast(folder / "fast")
    write_settings(seed, folder)
    reference = Reference(folder)
    shapes = {name: tuple(t.shape) for name, t in reference.tensors().items()}
    weights, gemma = draw_weights(seed, shapes), f"{ROOT}model.language_model."
    for name, array in weights.items():
        if name.startswith(gemma) and array.ndim == 1:
            array -= 1  # Gemma's norms multiply by one more
        if name == f"{ROOT}lm_head.weight":  # answers are mostly codes
            array[-SKIPPED - CODES : -SKIPPED] *= 1.5
            array[reference.text.convert_tokens_to_ids("|")] *= 3  # and end
    half = {name: torch.from_numpy(array).half() for name, array in weights.items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    for number, size in enumerate(SIZES):
        draw_picture(seed, number, *size).save(folder / f"image_{number}.png")
    write_expected(compute(folder), folder)


if __name__ == "__main__":
    run(__doc__.splitlines()[0], make, compute)

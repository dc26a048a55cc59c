"""OpenVLA and OpenVLA-OFT in torch, timm and transformers, for `parity_openvla.py`."""

import argparse
from itertools import pairwise

import numpy as np
import torch
from torch import nn

PATCHES, CHUNK, NUMBERS, STATE, STOP = 256, 8, 7, 8, 2
SLOTS = CHUNK * NUMBERS


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Fill a module with random parameters that keep activations near 1.

    Embeddings are near 0.02, as in trained models, so that the epsilon of each norm
    has an effect.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            value = 0.1 + 0.9 * value.abs().clamp(max=1)
        elif parameter.ndim == 1:
            value = 1 + 0.1 * value if name.endswith("weight") else 0.02 * value
        elif "proj" in name or "fc" in name or "qkv" in name or "lm_head" in name:
            value /= parameter[0].numel() ** 0.5
        if "embed" in name or "token" in name:
            value *= 0.02
        parameter.copy_(value)
    return module.eval()


class Tower:
    """Vision tower of timm with Prismatic's normalization.

    act: the activation layer; `None` for timm's default.
    """

    def __init__(self, timm_id: str, mean: list, std: list, act: str | None = None):
        import timm

        extra = {"act_layer": act} if act else {}
        sizes = {"img_size": 224, "num_classes": 0}
        model = timm.create_model(timm_id, **sizes, **extra)
        self.model, self.id, self.act = randomize(model, len(timm_id)), timm_id, act
        self.mean, self.std = mean, std

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return normalized pixels (B, 3, S, S) from pixels in [0, 1]."""
        from torchvision.transforms import functional

        return functional.normalize(pixels, self.mean, self.std)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return patch tokens of the second to last block, without the final norm."""
        last = len(self.model.blocks) - 2
        pixels = self.normalize(pixels)
        return self.model.get_intermediate_layers(pixels, n={last})[0]


class Projector(nn.Module):
    def __init__(self, inputs: int, hidden: int, fused: bool):
        super().__init__()
        sizes = [inputs, *([4 * inputs] if fused else []), hidden, hidden]
        for i, (before, after) in enumerate(pairwise(sizes)):
            setattr(self, f"fc{i + 1}", nn.Linear(before, after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = self.children()
        x = first(x)
        for layer in rest:
            x = layer(nn.functional.gelu(x))
        return x


class Residual(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(x)


class MLPResNet(nn.Module):
    """Action head of OpenVLA-OFT."""

    def __init__(self, hidden: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(NUMBERS * hidden)
        self.fc1 = nn.Linear(NUMBERS * hidden, hidden)
        self.mlp_resnet_blocks = nn.ModuleList([Residual(hidden), Residual(hidden)])
        self.layer_norm2 = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, NUMBERS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


def make_language(args: argparse.Namespace) -> nn.Module:
    """Return a Llama that prefers action tokens, the last 256 before the padding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32064,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 43 // 16,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        attn_implementation="eager",
    )
    language = randomize(LlamaForCausalLM(config), 1)
    language.lm_head.weight[31744:32000] *= 2
    return language


def hidden_states(language, embeddings, positions, full: bool) -> torch.Tensor:
    """Return (1, T, D) states after the final norm; full: without a causal mask."""
    size = embeddings.shape[1]
    # Without any mask, transformers takes gaps in the positions for packed sequences.
    mask = torch.zeros(1, 1, size, size) if full else torch.ones(1, size)
    return language.model(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=positions[None],
        use_cache=False,
    ).last_hidden_state


def places(kept: torch.Tensor, total: int, after: int) -> torch.Tensor:
    """Return positions: `<s>`, the kept of `total` tokens, and `after` more tokens."""
    return torch.cat([torch.zeros(1).long(), 1 + kept, 1 + total + torch.arange(after)])


def embed(language, ids) -> torch.Tensor:
    return language.model.embed_tokens(torch.tensor([list(ids)]))


def act(language, start: int, prompt, visual, kept) -> tuple[torch.Tensor, list[int]]:
    """Return logits after the prompt and seven greedy ids, without a cache."""
    ids, logits = [], None
    for _ in range(NUMBERS):
        after = embed(language, [*prompt, *ids])
        x = torch.cat([embed(language, [start]), visual[:, kept], after], dim=1)
        positions = places(kept, PATCHES, after.shape[1])
        state = hidden_states(language, x, positions, full=False)[:, -1]
        scores = language.lm_head(state)
        logits = scores if logits is None else logits
        ids.append(int(scores.argmax()))
    return logits, ids


def regress(language, head, start: int, prompt, visual, kept, state) -> torch.Tensor:
    """Return OpenVLA-OFT's (8, 7) chunk of normalized actions; `state` is one token."""
    prompt, stop = embed(language, prompt), embed(language, [STOP])
    slots = torch.zeros(1, SLOTS, prompt.shape[-1])
    tail = torch.cat([state[:, None], prompt, slots, stop], dim=1)
    x = torch.cat([embed(language, [start]), visual[:, kept], tail], dim=1)
    positions = places(kept, visual.shape[1], tail.shape[1])
    states = hidden_states(language, x, positions, full=True)
    first = 1 + len(kept) + 1 + prompt.shape[1] - 1  # one before the first slot
    return head(states[:, first : first + SLOTS].reshape(CHUNK, -1))


def largest(features: torch.Tensor, keep: int) -> torch.Tensor:
    """Return indices of the `keep` tokens of largest norm of each image, in order.

    features: (n, N, C). Indices count over the n * N tokens of all images.
    """
    chosen = features.norm(dim=-1).topk(keep).indices.sort().values
    return (chosen + features.shape[1] * torch.arange(len(features))[:, None]).ravel()


def to_units(values, entry: dict, epsilon: float = 0) -> np.ndarray:
    low, high = np.array(entry["q01"]), np.array(entry["q99"])
    scaled = 0.5 * (values + 1) * (high - low + epsilon) + low
    return np.where(entry["mask"], scaled, values)


def bins(ids: list[int]) -> np.ndarray:
    """Return the values in [-1, 1] of OpenVLA's action tokens."""
    edges = np.linspace(-1, 1, 256)
    centers = (edges[:-1] + edges[1:]) / 2
    return centers[np.clip(32000 - np.array(ids) - 1, 0, 254)]

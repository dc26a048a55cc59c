"""PyTorch twin of the small pi0-FAST and its losses, with the tensor names of MLX.

The MLX form is `recipes/policy/pi0fast.py`. `recipes/policy/chunks_in_torch.py` trains
the twin and compares both (`check`). Functions import torch when they are called.
"""

WIDTH, HEADS, SIZE = 192, 6, 32  # language model: width, heads, width of a head
TOWER, PATCHES = 128, 64


def build(weights: dict):
    """Return the policy as a torch module, from MLX-layout arrays."""
    import torch
    from torch import nn

    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            arrays = {k: torch.from_numpy(v).float() for k, v in weights.items()}
            self.all = nn.ParameterDict(
                {k.replace(".", "/"): nn.Parameter(v) for k, v in arrays.items()}
            )

        def get(self, name: str):
            return self.all[name.replace(".", "/")]

        def linear(self, x, name: str):
            bias = f"{name}.bias".replace(".", "/")
            bias = self.all[bias] if bias in self.all else None
            return nn.functional.linear(x, self.get(f"{name}.weight"), bias)

        def forward(self, batch: dict):
            return losses(self, batch)

    return Twin()


def encode(twin, pixels):
    import torch.nn.functional as functional

    size = len(pixels)
    kernel = twin.get("vision_tower.patch_embed.proj.weight").flatten(1)
    x = (pixels * 2 - 1).reshape(size, 8, 14, 8, 14, 3).transpose(2, 3)
    bias = twin.get("vision_tower.patch_embed.proj.bias")
    x = functional.linear(x.reshape(size, PATCHES, -1), kernel, bias)
    x = x + twin.get("vision_tower.pos_embed")

    def norm(x, name):
        about = twin.get(f"{name}.weight"), twin.get(f"{name}.bias")
        return functional.layer_norm(x, (TOWER,), *about, 1e-6)

    for number in range(4):
        root = f"vision_tower.blocks.{number}."
        y = norm(x, f"{root}norm1")
        parts = [twin.linear(y, f"{root}attn.{part}") for part in "qkv"]
        parts = [p.reshape(size, PATCHES, 4, 32).transpose(1, 2) for p in parts]
        y = functional.scaled_dot_product_attention(*parts).transpose(1, 2)
        x = x + twin.linear(y.reshape(size, PATCHES, TOWER), f"{root}attn.proj")
        y = twin.linear(norm(x, f"{root}norm2"), f"{root}mlp.fc1")
        y = functional.gelu(y, approximate="tanh")
        x = x + twin.linear(y, f"{root}mlp.fc2")
    x = norm(x, "vision_tower.norm")
    return twin.linear(x, "multi_modal_projector.linear")


def embed(twin, ids):
    import torch.nn.functional as functional

    table = twin.get("language_model.model.embed_tokens.weight")
    return functional.embedding(ids, table) * WIDTH**0.5


def rms(twin, x, name: str):
    y = x.float()
    y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return (y * (1 + twin.get(f"{name}.weight").float())).to(x.dtype)


def heads(twin, x, name: str):
    return twin.linear(x, name).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)


def scores_of(twin, visual, text, asked):
    """Return trimvla's scores (B, K) of visual tokens (B, K, D)."""
    import torch

    def norm(x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    root = "language_model.model.layers.0.self_attn."
    queries = heads(twin, norm(visual), f"{root}q_proj")
    keys = heads(twin, norm(text), f"{root}k_proj")
    found = (queries @ keys.transpose(-1, -2)).float() * SIZE**-0.5
    found = torch.where(asked[:, None, None], found, -1e9)
    return torch.logsumexp(found, -1).mean(1)


def losses(twin, batch: dict):
    """Return the summed cross-entropy, its token count, and the scores' divergence.

    The divergence is from trimvla's scores to the attention of the answers; 0 where the
    batch is not scored. Returns logits (B, T, V) where the batch has `raw`.
    """
    import torch
    import torch.nn.functional as functional

    visual = encode(twin, batch["pixels"])
    (size, total, _), keep, device = visual.shape, batch["keep"], visual.device
    prompts, lengths, answers = (batch[n] for n in ("prompts", "lengths", "answers"))
    asked = torch.arange(prompts.shape[1], device=device) < lengths[:, None]
    places = torch.arange(total, device=device).expand(size, total)
    if keep < total:
        scores = batch["noise"]
        if batch["scored"]:
            with torch.no_grad():
                found = scores_of(twin, visual, embed(twin, prompts), asked)
                scores = found + 0.5 * scores
        places = scores.argsort(1, descending=True)[:, :keep].sort(1).values
    visual = visual.gather(1, places[..., None].expand(-1, -1, WIDTH))
    said = answers[:, :-1].clamp_min(0)
    where = lengths[:, None] + torch.arange(said.shape[1], device=device)
    ids = torch.cat([prompts, torch.zeros_like(said)], 1).scatter(1, where, said)
    x = torch.cat([visual, embed(twin, ids).to(visual.dtype)], 1)
    length = x.shape[1]
    rest = (total + torch.arange(ids.shape[1], device=device)).expand(size, -1)
    angles = torch.cat([places, rest], 1)[:, None, :, None].float()
    angles = angles * 10000.0 ** (-torch.arange(SIZE // 2, device=device) / SIZE * 2)
    turn = angles.cos(), angles.sin()
    order = torch.arange(length, device=device)
    mask = (order <= order[:, None])[None] | (order < (keep + lengths)[:, None, None])
    rows = torch.arange(answers.shape[1], device=device)
    rows = keep + lengths[:, None] - 1 + rows
    known, received = (answers >= 0).float(), 0
    watched = batch["scored"] and not batch.get("raw")
    for number in range(4):
        root = f"language_model.model.layers.{number}."
        y = rms(twin, x, f"{root}input_layernorm")
        q, k, v = (heads(twin, y, f"{root}self_attn.{part}_proj") for part in "qkv")
        q, k = rotate(q, *turn), rotate(k, *turn)
        if number and watched:
            with torch.no_grad():
                asking = q.gather(2, rows[:, None, :, None].expand(-1, HEADS, -1, SIZE))
                seen = mask.gather(1, rows[..., None].expand(-1, -1, length))[:, None]
                found = (asking @ k.transpose(-1, -2)).float() * SIZE**-0.5
                found = torch.where(seen, found, -1e9).softmax(-1).mean(1)
                received = received + (found[..., :keep] * known[..., None]).sum(1)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        y = y.transpose(1, 2).reshape(size, length, WIDTH)
        x = x + twin.linear(y, f"{root}self_attn.o_proj")
        y = rms(twin, x, f"{root}post_attention_layernorm")
        gate, up = (twin.linear(y, f"{root}mlp.{part}_proj") for part in ("gate", "up"))
        y = functional.gelu(gate, approximate="tanh") * up
        x = x + twin.linear(y, f"{root}mlp.down_proj")
    x = rms(twin, x, "language_model.model.norm")
    x = x.gather(1, rows[..., None].expand(-1, -1, WIDTH))
    table = twin.get("language_model.model.embed_tokens.weight")
    logits = functional.linear(x, table).float()
    if batch.get("raw"):
        return logits
    wrong = functional.cross_entropy(
        logits.flatten(0, 1), answers.clamp_min(0).flatten(), reduction="none"
    )
    off = torch.zeros((), device=device)
    if watched:
        target = received / received.sum(-1, keepdim=True)
        scores = scores_of(twin, visual.detach(), embed(twin, prompts).detach(), asked)
        alike = target.clamp_min(1e-9).log() - scores.log_softmax(-1)
        off = (target * alike).sum(-1).mean()
    return (wrong * known.flatten()).sum(), known.sum(), off


def rotate(x, cosine, sine):
    import torch

    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1).to(x.dtype)

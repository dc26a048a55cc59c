"""ResNet-50 (arXiv 1512.03385), up to its last feature map.

For inference: batch norms are folded into the convolutions. The stride of a stage is in
the first convolution of its first block, as in the paper.
"""

import mlx.core as mx
import mlx.nn as nn

STRIDE = 32
CHANNELS = 2048
STAGES = (3, 4, 6, 3)
# Mean pixel of ImageNet: blue, green and red, out of 255.
MEANS = (103.939, 116.779, 123.68)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, widens: bool):
        super().__init__()
        self.reduce = nn.Conv2d(inputs, width, 1, stride)
        self.spatial = nn.Conv2d(width, width, 3, padding=1)
        self.expand = nn.Conv2d(width, 4 * width, 1)
        if widens:
            self.shortcut = nn.Conv2d(inputs, 4 * width, 1, stride)

    def __call__(self, x: mx.array) -> mx.array:
        """Return (B, H', W', 4 * width)."""
        inner = nn.relu(self.spatial(nn.relu(self.reduce(x))))
        beside = self.shortcut(x) if "shortcut" in self else x
        return nn.relu(self.expand(inner) + beside)


class ResNet50(nn.Module):
    """Stem and four stages of bottleneck blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, 2, padding=3)
        self.stages, inputs = [], 64
        for number, depth in enumerate(STAGES):
            width = 64 << number
            blocks = []
            for place in range(depth):
                stride = 2 if number and not place else 1
                blocks.append(Bottleneck(inputs, width, stride, not place))
                inputs = 4 * width
            self.stages.append(blocks)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Encode pixels (B, S, S, 3) in [0, 1] as (B, S / 32, S / 32, 2048) >= 0."""
        dtype = self.stem.weight.dtype
        x = (pixels[..., ::-1] * 255 - mx.array(MEANS)).astype(dtype)
        x = nn.relu(self.stem(x))
        x = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])  # max pooling: values are >= 0
        x = nn.MaxPool2d(3, 2)(x)
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        return x

"""The embedded demo: small models that we trained, and pictures.

A FastVLM, an OpenVLA and a pi0-FAST.

`python -m mlx_tokprune.demo` runs the whole path on them. The checkpoints are stored as
their families are published, so that the demo converts them like anybody's;
`hub.EMBEDDED` says where.
"""

from dataclasses import dataclass
from pathlib import Path

from ..files import DEMO


@dataclass(frozen=True)
class Picture:
    """A stored picture, a question about it, and the right answer."""

    path: Path
    question: str
    answer: str


# Meta-World's drawer, seed 7, after six steps of the expert, and what it does next.
POLICY_FRAME = Picture(DEMO / "frame.png", "open the drawer", "-0.09 +0.10 -0.58 -1.00")
# Where the hand is in it, and how far its fingers are apart, which demo-pi0 reads.
POLICY_STATE = (-0.0325, 0.6186, 0.2156, 1.0)
PICTURES = (
    Picture(DEMO / "scene_0.png", "What does the sign say?", "EAST"),
    Picture(DEMO / "scene_1.png", "Is the blue square above the cross?", "yes"),
)

"""The embedded demo: a small FastVLM and a small OpenVLA that we trained, and pictures.

`python -m mlx_tokprune.demo` runs the whole path on them. The checkpoints are stored as
their families are published, so that the demo converts them like anybody's;
`hub.EMBEDDED` says where.
"""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Picture:
    """A stored picture, a question about it, and the right answer."""

    path: Path
    question: str
    answer: str


# Meta-World's drawer, seed 7, after six steps of the expert, and what it does next.
POLICY_FRAME = Picture(
    FOLDER / "frame.png", "open the drawer", "-0.09 +0.10 -0.58 -1.00"
)
PICTURES = (
    Picture(FOLDER / "scene_0.png", "What does the sign say?", "EAST"),
    Picture(FOLDER / "scene_1.png", "Is the blue square above the cross?", "yes"),
)

"""Embedded demo: three small trained models (FastVLM, OpenVLA, pi0-FAST) and images.

`python -m mlx_tokprune.demo` runs the whole path on them. The checkpoints are stored in
the layouts in which their families are published, so that the demo converts them like
any other checkpoint. `hub.EMBEDDED` holds their folders.
"""

from dataclasses import dataclass
from pathlib import Path

from ..files import DEMO


@dataclass(frozen=True)
class Picture:
    """Stored image, a question about it, and the correct answer."""

    path: Path
    question: str
    answer: str


# Meta-World drawer task, seed 7, after six expert steps; the answer is the next action.
POLICY_FRAME = Picture(DEMO / "frame.png", "open the drawer", "-0.09 +0.10 -0.58 -1.00")
# Robot state in that frame, read by demo-pi0: hand position (x, y, z), finger gap.
POLICY_STATE = (-0.0325, 0.6186, 0.2156, 1.0)
PICTURES = (
    Picture(DEMO / "scene_0.png", "What does the sign say?", "EAST"),
    Picture(DEMO / "scene_1.png", "Is the blue square above the cross?", "yes"),
)

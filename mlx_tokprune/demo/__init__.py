"""The embedded demo: a small FastVLM that we trained, and two pictures to ask about.

`python -m mlx_tokprune.demo` runs the whole path on it. The checkpoint is stored as
Apple stores FastVLM, so that the demo converts it like anybody's.
"""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER / "checkpoint"
POLICY = FOLDER / "policy"


@dataclass(frozen=True)
class Picture:
    """A stored picture, a question about it, and the right answer."""

    path: Path
    question: str
    answer: str


POLICY_FRAME = Picture(FOLDER / "frame.png", "open the drawer", "")
PICTURES = (
    Picture(FOLDER / "scene_0.png", "What does the sign say?", "EAST"),
    Picture(FOLDER / "scene_1.png", "Is the blue square above the cross?", "yes"),
)

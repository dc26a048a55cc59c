"""Drafts of variable-length answers: equal tokens in fewer calls."""

import json

import numpy as np
import pytest
from conftest import TINY_CHUNKS
from PIL import Image

from mlx_tokprune import Policy, Pruner
from mlx_tokprune.act.__main__ import main
from mlx_tokprune.act.action_drafts import draft_chunk
from mlx_tokprune.act.heads import head_of
from mlx_tokprune.act.inputs import check_images, observe, tell
from mlx_tokprune.errors import InputError
from mlx_tokprune.models.speculative import continued
from mlx_tokprune.pipeline.planning import plan_for
from mlx_tokprune.processing.image import load_image

STATE = json.loads((TINY_CHUNKS / "config.json").read_text())["state"]
IMAGES = [load_image(TINY_CHUNKS / f"image_{i}.png") for i in range(3)]
PLANS = {
    "none": (),
    "norm": (Pruner("norm", 0.5),),
    "trimvla": (Pruner("trimvla", 0.5),),
    "layers": (Pruner("norm", 0.5), Pruner("attention", 0.5, at=1)),
}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([], []),
        ([9], []),
        ([3], [4, 1, 2, 5]),
        ([1, 2], [3, 4, 1, 2, 5]),  # of two places that match, the nearest
        ([0, 0, 0, 0, 1, 2], [5]),
        ([4, 1, 2], [5]),  # the longest match wins
        ([5], []),
    ],
)
def test_a_draft_is_what_followed_in_the_last_answer(said, expected):
    assert continued([1, 2, 3, 4, 1, 2, 5], said) == expected


def test_every_token_of_a_match_is_compared():
    """Three equal tokens far away beat one, with a gap behind it, at the same place."""
    assert continued([7, 5, 3, 8, 7, 2, 3, 9], [7, 2, 3]) == [9]


class Case:
    """Scene of two images, its answer, and answers with drafts."""

    def __init__(self, tiny_chunks, plan, positions="original"):
        self.model, processor = tiny_chunks
        head = head_of(self.model, processor, 3)
        told = tell(head, self.model, "Pick up the cup", [STATE], None)
        images = check_images(self.model, [IMAGES[0], IMAGES[2]])
        self.scene = observe(processor, [images], *told)
        self.head = head
        self.plan = plan_for(self.model, plan)
        self.how = {"positions": positions}
        about = (self.model, self.scene, self.plan)
        parts, _ = self.head.decode(*about, **self.how)
        self.answer = np.array(self.head.joined(parts))[0].tolist()

    def drafted(self, last: list[int]) -> int:
        """Return the number of calls of a drafted answer with equal tokens."""
        about = (self.head, self.model, self.scene, self.plan, last)
        said, calls = draft_chunk(*about, **self.how)
        assert said == self.answer
        return calls


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_any_draft_gives_the_same_answer(tiny_chunks, plan, positions):
    case = Case(tiny_chunks, PLANS[plan], positions)
    answer = case.answer
    assert len(answer) > 3
    assert case.drafted(answer) == 1
    cut, swapped = answer[:2], [*answer[:2], 40, *answer[3:]]
    longer, other = [*answer[:-1], *answer], [41]
    for draft in (cut, swapped, longer, other, answer[1:], answer * 9):
        assert case.drafted(draft) <= len(answer)
    assert case.drafted(swapped) <= 3
    random = np.random.default_rng(0)
    for _ in range(10):
        draft = random.integers(0, 560, random.integers(1, 30)).tolist()
        case.drafted(draft)


@pytest.mark.parametrize("plan", PLANS)
def test_a_policy_acts_the_same_with_drafts(tiny_chunks, plan):
    plain = Policy(*tiny_chunks, pruner=PLANS[plan])
    policy = Policy(*tiny_chunks, pruner=PLANS[plan], draft=True)
    again = 0
    for number in range(6):
        frame = IMAGES[0] if number < 3 else IMAGES[0].rotate(number)
        images = {"base": frame, "right": IMAGES[2]}
        if number == 4:  # a camera is gone
            images = {"base": frame}
        state = [value + 0.01 * (number == 5) for value in STATE]
        expected = plain(images, "Pick up the cup", state)
        action = policy(images, "Pick up the cup", state)
        np.testing.assert_allclose(action, expected, atol=1e-12)
        assert policy.calls <= plain.calls
        assert (policy.wrong, policy.kept) == (plain.wrong, plain.kept)
        again += number in (1, 2) and policy.calls == 1
    assert again == 2
    policy.reset()
    policy(images, "Pick up the cup", state)
    assert policy.calls == plain.calls


def test_a_draft_is_of_one_robot(tiny_chunks):
    policy = Policy(*tiny_chunks, draft=True)
    batch = [[Image.new("RGB", (8, 8))]] * 2
    with pytest.raises(InputError, match="a Policy of its own"):
        policy.act_on_batch(batch, "go", [STATE, STATE])


def test_command_line_counts_calls(capsys):
    asked = ["--model", str(TINY_CHUNKS), "--instruction", "Pick up the cup", "--json"]
    asked += ["--image", f"base={TINY_CHUNKS}/image_0.png", "--state"]
    asked += list(map(str, STATE))
    records = []
    for more in (["--runs", "1"], ["--runs", "1", "--draft"]):
        main([*asked, *more])
        records.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    plain, drafted = records
    assert plain["calls"] == len(plain["token_ids"]) > 1
    assert drafted["calls"] == 1
    assert drafted["action"] == plain["action"]
    with pytest.raises(SystemExit):
        main([*asked, "--draft"])
    assert "say --runs" in capsys.readouterr().err

"""One model in several threads and interleaved streams: calls share no state.

Positions were once state of the model, and answers of two threads were wrong then.
"""

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlx_tokprune import Memory, Policy, Pruner, generate, predict_action
from mlx_tokprune import stream_generate as stream
from mlx_tokprune.checkpoints.embedded import PICTURES, POLICY_FRAME
from mlx_tokprune.processing.image import load_image

WAYS = {
    "unpruned": None,
    "norm 25 %": Pruner("norm", 0.25),
    "attention 50 %": Pruner("attention", 0.5),
    "prompt": Pruner("trimvla", 0.5),
    "layer 2": Pruner("attention", 0.25, at=2),
}
ACTING = {**WAYS, "own count": Pruner("trimvla"), "votes": Pruner("lightvla")}
QUESTIONS = (
    "What does the sign say?",
    "How many shapes are there in the picture?",
    "Is the blue square above the cross?",
)


@pytest.fixture(scope="module")
def images():
    return [load_image(picture.path) for picture in PICTURES]


def together(jobs, threads: int) -> list:
    """Return the results of jobs run in `threads` threads, in their order."""
    with ThreadPoolExecutor(threads) as pool:
        return [job.result() for job in [pool.submit(job) for job in jobs]]


@pytest.mark.parametrize("threads", [2, 4])
def test_answers_of_threads(demo, images, threads):
    model, processor = demo

    def ask(way, question, image):
        return lambda: generate(
            model, processor, [image], question, pruner=WAYS[way], max_tokens=4
        )

    cases = list(itertools.product(WAYS, QUESTIONS[:2], images[:1]))
    alone = [ask(*case)() for case in cases]
    jobs = [ask(*case) for case in cases] * 2
    np.random.default_rng(threads).shuffle(order := list(range(len(jobs))))
    found = together([jobs[i] for i in order], threads)
    wrong = [
        cases[i % len(cases)]
        for i, text in zip(order, found, strict=True)
        if text != alone[i % len(cases)]
    ]
    assert not wrong


def test_interleaved_streams(demo, images):
    """Interleaved streams of unequal prompts give the tokens of each alone."""
    model, processor = demo
    pairs = [("unpruned", way) for way in WAYS] + [("norm 25 %", "layer 2")]
    for first, second in pairs:
        cases = [(first, QUESTIONS[0]), (second, QUESTIONS[1])]

        def begin(way, question):
            pruner = WAYS[way]
            return stream(
                model, processor, [images[0]], question, pruner=pruner, max_tokens=8
            )

        alone = [[piece.token for piece in begin(*case)] for case in cases]
        found = [[], []]
        for pieces in itertools.zip_longest(*(begin(*case) for case in cases)):
            for tokens, piece in zip(found, pieces, strict=True):
                tokens += [piece.token] if piece else []
        assert found == alone, (first, second)


def test_streams_that_are_left_open(demo, images):
    model, processor = demo
    asked = (model, processor, [images[0]], QUESTIONS[0])
    alone = generate(*asked)
    left = stream(*asked, pruner=WAYS["norm 25 %"])
    next(left)
    assert generate(*asked) == alone
    del left
    assert generate(*asked) == alone


def test_one_memory_for_each_thread(demo, images):
    model, processor = demo

    def ask(way):
        memory = Memory()
        return [
            generate(
                model,
                processor,
                [images[0]],
                question,
                pruner=WAYS[way],
                memory=memory,
                max_tokens=6,
            )
            for question in QUESTIONS[:2]
        ]

    alone = {way: ask(way) for way in WAYS}
    ways = list(WAYS) * 2
    found = together([lambda way=way: ask(way) for way in ways], 2)
    assert found == [alone[way] for way in ways]


@pytest.mark.parametrize("threads", [2, 4])
def test_actions_of_threads(demo_policy, threads):
    model, processor = demo_policy
    image = load_image(POLICY_FRAME.path)
    asked = ([image], POLICY_FRAME.question)

    def act(way):
        return predict_action(model, processor, *asked, pruner=ACTING[way]).values

    alone = {way: act(way) for way in ACTING}
    ways = list(ACTING) * 3
    for way, values in zip(
        ways, together([lambda way=way: act(way) for way in ways], threads), strict=True
    ):
        np.testing.assert_array_equal(values, alone[way], err_msg=way)


@pytest.mark.parametrize("compiled", [True, False])
def test_policies_of_threads(demo_policy, compiled):
    """Policies in threads on one model give the actions of each alone."""
    model, processor = demo_policy
    image = load_image(POLICY_FRAME.path)

    def control(way, robots):
        policy = Policy(model, processor, pruner=ACTING[way], compile=compiled)
        batch = [[image]] * robots
        return [policy.act_on_batch(batch, POLICY_FRAME.question) for _ in range(3)]

    cases = [("unpruned", 1), ("norm 25 %", 2), ("layer 2", 1), ("own count", 2)]
    alone = {case: control(*case) for case in cases}
    found = together([lambda case=case: control(*case) for case in cases], 2)
    for case, values in zip(cases, found, strict=True):
        np.testing.assert_array_equal(values, alone[case], err_msg=str(case))


def test_an_interpreter_whose_threads_computed_ends_well():
    """An interpreter exits cleanly after `generate` in threads."""
    code = """
from concurrent.futures import ThreadPoolExecutor
from mlx_tokprune import generate, load
from mlx_tokprune.checkpoints.embedded import PICTURES
asked = (*load("demo"), [PICTURES[0].path], PICTURES[0].question)
with ThreadPoolExecutor(2) as pool:
    print([job.result() for job in [pool.submit(generate, *asked) for _ in range(4)]])
"""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode().strip() == str(["EAST"] * 4)

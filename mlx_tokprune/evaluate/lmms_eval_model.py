"""Model `mlx_tokprune` of lmms-eval; only lmms-eval imports this module."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..errors import InputError
from .lmms_eval import open_runtime, read_generation_options, seed_of, until


class MlxTokprune(lmms):
    """Checkpoint under pruning; arguments are those of `open_runtime`.

    Questions are asked one by one at any `batch_size`, so that answers do not depend on
    it. `device` has no effect: MLX has its own.
    """

    is_simple = True

    def __init__(
        self,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        **arguments: Any,
    ):
        super().__init__()
        self.device = "cpu"  # of the harness, to gather the counts of several processes
        self._seed = seed
        self._runtime = open_runtime(**arguments, seed=seed)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return an answer to each request."""
        repeats: Counter = Counter()  # a question that is repeated gets another seed

        def answer(text: str, kwargs: Mapping, pictures: Callable, *where: Any) -> str:
            options = read_generation_options(kwargs)
            repeats[where] += 1
            seed = seed_of(self._seed, *where, repeats[where])
            images = self._pictures(pictures, *where)
            pieces = self._runtime.answer(images, text, options, seed)
            return until(pieces, options.stop)

        return self._each(requests, answer)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Return the loss of each request; in spite of its name, no likelihood.

        lmms-eval takes the smallest of the choices.
        """

        def judge(
            text: str, target: Any, pictures: Callable, *where: Any
        ) -> tuple[float, bool]:
            images = self._pictures(pictures, *where)
            words: Any = target(self._doc(*where)) if callable(target) else target
            return self._runtime.loss(images, text, words)

        return self._each(requests, judge)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raise `InputError`: tasks of several rounds are not supported."""
        raise InputError(
            "tasks of several rounds are not supported; choose one that generates once"
        )

    def _each(self, requests: Sequence[Instance], answer: Callable) -> list:
        answers = []
        for request in tqdm(requests, disable=self.rank != 0, desc="mlx_tokprune"):
            try:
                answers.append(answer(*request.args))
            except InputError as error:
                number, task = request.doc_id, request.task_name
                raise InputError(f"question {number} of {task}: {error}") from None
        return answers

    def _doc(self, number: int, task: str, split: str) -> dict:
        return self.task_dict[task][split][number]

    def _pictures(
        self, pictures: Callable[[dict], Iterable | None], *where: Any
    ) -> list:
        return list(pictures(self._doc(*where)) or ())

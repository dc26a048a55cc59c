"""The model `mlx_tokprune` of lmms-eval, which alone imports this file."""

from collections import Counter

from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..errors import InputError
from .lmms_eval import open_runtime, read_wanted, seed_of, until


class MlxTokprune(lmms):
    """A checkpoint under pruning; arguments are those of `open_runtime`.

    Questions are asked one by one, whatever `batch_size` says, so that answers do not
    depend on it. `device` says nothing here: MLX has its own.
    """

    is_simple = True

    def __init__(
        self, batch_size=1, max_batch_size=None, device=None, seed: int = 0, **told
    ):
        super().__init__()
        self.device = "cpu"  # where the harness gathers counts of several processes
        self._seed = seed
        self._runtime = open_runtime(**told, seed=seed)

    def generate_until(self, requests) -> list[str]:
        asked: Counter = Counter()

        def answer(text, how, pictures, *where) -> str:
            wanted = read_wanted(how)
            asked[where] += 1
            seed = seed_of(self._seed, *where, asked[where])
            seen = self._pictures(pictures, *where)
            pieces = self._runtime.answer(seen, text, wanted, seed)
            return until(pieces, wanted.stops)

        return self._each(requests, answer)

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """Losses, of which lmms-eval takes the smallest, whatever their name says."""

        def judge(text, target, pictures, *where) -> tuple[float, bool]:
            seen, given = self._pictures(pictures, *where), target
            continuation = given(self._doc(*where)) if callable(given) else given
            return self._runtime.loss(seen, text, continuation)

        return self._each(requests, judge)

    def generate_until_multi_round(self, requests) -> list[str]:
        raise InputError(
            "tasks of several rounds are not known here; choose one that generates once"
        )

    def _each(self, requests, answer) -> list:
        found = []
        for request in tqdm(requests, disable=self.rank != 0, desc="mlx_tokprune"):
            try:
                found.append(answer(*request.args))
            except InputError as error:
                number, task = request.doc_id, request.task_name
                raise InputError(f"question {number} of {task}: {error}") from None
        return found

    def _doc(self, number, task, split) -> dict:
        return self.task_dict[task][split][number]

    def _pictures(self, pictures, *where) -> list:
        return list(pictures(self._doc(*where)) or ())

"""Command line flags of speculative decoding for answers."""

import argparse

from ..checkpoints.loading import load
from ..cli import Flags, add_drafts, draft_plan
from ..errors import InputError
from ..processing.processor import check_answers
from .drafts import Drafts, ModelDrafts, NgramDrafts, SelfDrafts


def add_answer_drafts(parser: Flags) -> None:
    """Add the draft flags, with `--num-draft-tokens` named as in mlx-lm."""
    help_ = "draft by n-grams or by the pruned model itself"
    add_drafts(parser, ("ngram", "self"), help_)
    help_ = "tokens drafted at once (default: 8, a model: 3)"
    parser.add_argument("--num-draft-tokens", type=int, metavar="N", help=help_)


def make_drafts(args: argparse.Namespace) -> Drafts | None:
    """Return the drafts that the command line chooses, if any.

    Raises `InputError` for flags that do not fit each other.
    """
    plan, count = draft_plan(args), args.num_draft_tokens
    options = {} if count is None else {"tokens": count}
    if args.draft_model:
        model, processor = load(args.draft_model)
        return ModelDrafts(model, check_answers(processor), pruner=plan, **options)
    if args.draft == "ngram":
        return NgramDrafts(**options)
    if args.draft == "self":
        if plan and len(plan) > 1:
            raise InputError("a model's own drafts have one pruner, at the prompt")
        return SelfDrafts(plan[0], **options) if plan else SelfDrafts(**options)
    if count is not None:
        raise InputError("--num-draft-tokens requires --draft or --draft-model")
    return None

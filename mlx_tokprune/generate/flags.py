"""Flags of speculative decoding: what drafts, and how that is pruned."""

from ..checkpoints.loading import load
from ..cli import add_drafts, draft_plan
from ..errors import InputError
from .drafts import Drafts, ModelDrafts, NgramDrafts, SelfDrafts


def add_answer_drafts(parser) -> None:
    """`--draft` and what belongs to it, with `--num-draft-tokens` of mlx-lm."""
    help_ = "draft by n-grams or by the pruned model itself"
    add_drafts(parser, ("ngram", "self"), help_)
    help_ = "tokens drafted at once (default: 8, a model: 3)"
    parser.add_argument("--num-draft-tokens", type=int, metavar="N", help=help_)


def make_drafts(args) -> Drafts | None:
    """What drafts an answer, from command line options."""
    plan, count = draft_plan(args), args.num_draft_tokens
    how = {} if count is None else {"tokens": count}
    if args.draft_model:
        return ModelDrafts(*load(args.draft_model), pruner=plan, **how)
    if args.draft == "ngram":
        return NgramDrafts(**how)
    if args.draft == "self":
        if plan and len(plan) > 1:
            raise InputError("a model's own drafts have one pruner, at the prompt")
        return SelfDrafts(*(plan or ()), **how)
    if count is not None:
        raise InputError("--num-draft-tokens is of a draft; say --draft, too")
    return None

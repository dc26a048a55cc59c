"""Flags of speculative decoding: what drafts, and how that is pruned."""

from collections.abc import Sequence

from ..answer.drafts import Drafts, ModelDrafts, NgramDrafts, SelfDrafts
from ..errors import InputError, Parser
from ..loading import load
from ..pruners import Plan
from .options import read_plans


def add_drafts(parser: Parser, words: Sequence[str], help_: str) -> None:
    """`--draft`, and another model that drafts, with pruners of its own."""
    parser.add_argument("--draft", nargs="?", const=words[0], choices=words, help=help_)
    help_ = "a smaller model of the same family, which drafts; output stays the same"
    parser.add_argument("--draft-model", metavar="MODEL", help=help_)
    metavar = "METHOD[:BUDGET][@PLACE]"
    help_ = "how what drafts is pruned, such as norm:0.25; repeat"
    parser.add_argument(
        "--draft-prune", action="append", default=[], metavar=metavar, help=help_
    )


def draft_plan(args) -> Plan | None:
    """What prunes a draft; `None` where nobody says."""
    if args.draft and args.draft_model:
        raise InputError("--draft and --draft-model both draft; give one of them")
    if args.draft_prune and not (args.draft_model or args.draft == "self"):
        raise InputError(
            "--draft-prune prunes what a model drafts from; say --draft-model, too, "
            "or, of a model that answers, --draft self"
        )
    return read_plans(args.draft_prune, {}) if args.draft_prune else None


def add_answer_drafts(parser: Parser) -> None:
    """The same for models that answer, and `--num-draft-tokens`, as in mlx-lm."""
    help_ = (
        "draft tokens by an n-gram of the prompt, or by the model itself with fewer "
        "visual tokens; answers stay the same"
    )
    add_drafts(parser, ("ngram", "self"), help_)
    help_ = "tokens that are drafted at once (default: 8 of an n-gram, 3 of a model)"
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

"""Command line flags of `generate` and `chat`: images, generation, sampling, drafts."""

import argparse
import dataclasses
from typing import Any

from ..checkpoints.loading import load
from ..cli import Flags, Parser, add_drafts, draft_plan
from ..errors import InputError
from ..models.language import PREFILL_STEP
from ..processing.processor import check_answers
from .drafts import Drafts, ModelDrafts, NgramDrafts, SelfDrafts
from .settings import Settings

# Lines of help that several flags share.
_SHARED = """\
--temp T, --seed N, --top-p P, --top-k N, --min-p P    (default: 0)
--min-tokens-to-keep N, --xtc-probability P, --xtc-threshold P
--repetition-penalty X, --repetition-context-size N; presence-*, frequency-*
--logit-bias ID=BIAS: added to the logit of a token; repeatable
--kv-bits 4|8, --kv-group-size N, --quantized-kv-start N: quantized cache"""


def add_images(parser: Flags) -> None:
    """Add `--image`, with several values or repeated."""
    help_ = "files, folders, URLs, or - for stdin; repeatable"
    many: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    many["metavar"] = "FILE"
    parser.add_argument("--image", help=help_, **many)


def add_system_prompt(parser: Flags) -> None:
    """Add `--system-prompt`, which mlx-vlm calls `--system`."""
    add, help_ = parser.add_argument, "system prompt in the chat template"
    add("--system-prompt", metavar="TEXT", help=help_)
    _add_hidden(parser, "--system", dest="system_prompt")


def _add_hidden(parser: Flags, *names: str, **options: Any) -> None:
    """Add another name of a flag, or a flag that a shared line of help describes."""
    options.setdefault("default", argparse.SUPPRESS)
    parser.add_argument(*names, help=argparse.SUPPRESS, **options)


def add_generation(parser: Parser) -> Flags:
    """Add the flags of `Settings`; return their group."""
    group = parser.add_argument_group("generation (as in mlx-lm)", _SHARED)
    add = group.add_argument
    help_ = "tokens at most (default: 256)"
    add("--max-tokens", "-m", type=int, metavar="N", default=256, help=help_)
    many: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    add("--stop", metavar="TEXT", help="end the answer before these texts", **many)
    help_ = f"prompt tokens read at once (default: {PREFILL_STEP})"
    add("--prefill-step-size", type=int, metavar="N", default=PREFILL_STEP, help=help_)
    help_ = "tokens in the cache at most (default: all)"
    add("--max-kv-size", type=int, metavar="N", help=help_)
    _add_hidden(group, "--temp", "--temperature", type=float, default=0.0)
    _add_hidden(group, "--seed", type=int, default=0)
    kinds = {"top_p": float, "top_k": int, "min_p": float, "min_tokens_to_keep": int}
    kinds |= {"xtc_probability": float, "xtc_threshold": float}
    kinds |= {"kv_bits": int, "kv_group_size": int, "quantized_kv_start": int}
    for name in ("repetition", "presence", "frequency"):
        kinds |= {f"{name}_penalty": float, f"{name}_context_size": int}
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    for name, kind in kinds.items():
        flag = f"--{name.replace('_', '-')}"
        _add_hidden(group, flag, type=kind, default=defaults[name])
    _add_hidden(group, "--logit-bias", action="append", default=[])
    return group


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the settings of the flags; `InputError` for values out of range."""
    names = [field.name for field in dataclasses.fields(Settings)]
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    options["logit_bias"] = {}
    for text in args.logit_bias:
        token, _, bias = text.partition("=")
        try:
            options["logit_bias"][int(token)] = float(bias)
        except ValueError:
            raise InputError(
                f"--logit-bias is ID=BIAS, such as 42=-10, not {text!r}"
            ) from None
    return Settings(**options)


def add_answer_drafts(parser: Flags) -> None:
    """Add the draft flags, with `--num-draft-tokens` named as in mlx-lm."""
    help_ = "draft by n-grams or by the pruned model itself"
    add_drafts(parser, ("ngram", "self"), help_)
    help_ = "tokens drafted at once (default: 8; by a model: 3)"
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

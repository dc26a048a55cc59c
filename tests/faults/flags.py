"""Group 3: odd values of flags, odd prompts, and custom methods."""

from random import Random

from .asks import CHECKS, pick, right
from .case import Outcome, Place, flags_of, perform

ODD = (
    *("-1", "0", "1", "2", "0.5", "1.5", "1e308", "-1e-3", "1e-320", "nan", "inf"),
    *("-inf", "", " ", "x", "9" * 30, "1_0", "0x10", "٣", "½", "\x1b[31mred", "a\nb"),
    *("\udc80", "x" * 5000, "tower", "prompt", "norm", "none", "trimvla", "lightvla"),
    *("demo", "nowhere", "no/where", "/dev/null", "../nowhere/x", ".", "coverage=nan"),
    *("coverage=0.2", "temperature=-1", "=1", "a=", "a=b=c", "groups=1e30", "--", "-x"),
)
FEW = ("-1", "0", "1", "2", "3", "-9", "", "x", "1.5", "nan", "1e3", "²")
SIZES = ("0", "-64", "1", "63", "64", "128", "448", "9" * 30, "4097", "x", "1e3", "")
# Large valid values would only take long.
OWN = dict.fromkeys(("runs", "tokens", "max_tokens", "pictures"), FEW)
OWN |= dict.fromkeys(("steps", "batch", "questions", "accumulate", "rank"), FEW)
OWN |= dict.fromkeys(("layers", "imitate", "num_draft_tokens", "first"), FEW)
OWN |= {"workers": ("-1", "0", "1", "x", ""), "actions_per_chunk": FEW}
OWN |= dict.fromkeys(("image_size", "image_sizes"), SIZES)
PLANS = (
    *("norm:0.5", "norm:0.5@tower+attention:0.5@1", "fastv:0.5", "norm:3@tower"),
    *(
        "norm@tower",
        "norm:",
        ":0.5",
        "@",
        "+",
        "",
        "norm:0.5@",
        "norm:0.5@99",
        "trimvla",
    ),
    *("pyramiddrop:0.5", "norm:0.5+norm:0.5", "cdpruner:1e400", "norm:nan", "norm:-1"),
    *("os:system:0.5", "norm:0.5@\n", "\x1b[2J:0.5@tower", "norm:" + "9" * 5000),
)
OWN |= dict.fromkeys(("prune", "plans", "draft_prune"), PLANS)
METHODS = (
    *("attention", "mean_similarity", "similarity", "spatial", "random", "uniform"),
    *("divprune", "cdpruner", "dart", "visionzip", "prumerge", "hiprune", "sparsevlm"),
    *("fastv", "pyramiddrop", "vlapruner", ".", "/"),
    *("trimvla", "lightvla", "learned", "none", "norm", "nrm", "NORM"),
    *("os:system", "json:nothing", "nowhere:f", "os:nothing", ":", "a:", ":b", "a:b:c"),
    *("os.path:join", "..x:y", ".x:y", "x" * 5000 + ":y", "\n:\n", "é:é", "\udc80:x"),
    *("builtins:print", "sys:exit", "mlx_tokprune.pruners.saliency:norm", "a b:c"),
)
PROMPTS = (
    *("", " ", "\n", "<image>", "<image>" * 500, "\udc80", "\x1b[2J", "{}%s"),
    *("word " * 200_000, "x" * 10**6, "\u202e" * 10**5, "<|im_end|>" * 9999, "<PAD>"),
    *("</s>", "<image><image>", "Out: ", "e\u0301" * 9999, "\U0001f600" * 9999),
)
MINE = {
    "raises on import": "raise RuntimeError('boom')",
    "is no Python": "def f(:",
    "exits on import": "raise SystemExit(0)",
    "takes nothing": "def f(): return 1",
    "is a number": "f = 3",
    "gives nothing": "def f(features, *, keep): return None",
    "gives too few": "import mlx.core as mx\nfrom mlx_tokprune import Selection\n"
    "def f(features, *, keep): return Selection(mx.zeros((1, 0), mx.int32))",
    "gives too many": "import mlx.core as mx\nfrom mlx_tokprune import Selection\n"
    "def f(features, *, keep): return Selection(mx.full((1, keep), 9999, mx.int32))",
}


def run(rng: Random, place: Place) -> Outcome:
    kind = rng.choices((_flags, _prompt, _method), (10, 2, 3))[0]
    command, more = kind(rng, place)
    argv = [*right(command, place), *more]
    return perform(command, argv, place, CHECKS.get(command))


def _flags(rng: Random, place: Place) -> tuple[str, list[str]]:
    """Return a command and odd values of up to three of its parser's flags."""
    command = pick(rng)
    actions = flags_of(command)
    chosen = rng.sample(actions, min(len(actions), rng.choice((1, 1, 2, 3))))
    more = []
    for action in chosen:
        more += _spoken(rng, action)
    return command, more


def _spoken(rng: Random, action) -> list[str]:
    values = OWN.get(action.dest, ODD)
    if action.choices and rng.random() < 0.7:
        values = tuple(map(str, action.choices))
    if action.dest in ("method", "methods"):
        values = METHODS
    if action.nargs == 0:
        return [rng.choice(action.option_strings)]
    many = rng.choice((0, 1, 1, 2, 7)) if action.nargs == "+" else 1
    words = [rng.choice(values) for _ in range(many)]
    if not action.option_strings:
        return words
    name = rng.choice(action.option_strings)
    if many == 1 and name.startswith("--") and rng.random() < 0.5:
        return [f"{name}={words[0]}"]
    return [name, *words]


def _prompt(rng: Random, place: Place) -> tuple[str, list[str]]:
    command = rng.choice(("generate", "generate", "act", "bench"))
    name = "--instruction" if command == "act" else "--prompt"
    return command, [f"{name}={rng.choice(PROMPTS)}"]


def _method(rng: Random, place: Place) -> tuple[str, list[str]]:
    """Return a command and a method, by name or from a module in the working folder."""
    command = rng.choice(("generate", "act", "generate", "act", "evaluate", "report"))
    name = rng.choice(METHODS)
    if rng.random() < 0.4:
        module = f"mine_{rng.getrandbits(60)}"
        (place.out / f"{module}.py").write_text(rng.choice(list(MINE.values())))
        name = f"{module}:f"
    if command == "evaluate":
        return command, ["--methods", name]
    budget = rng.choice(([], ["--keep-ratio=0.5"], ["--keep-tokens=3"], ["--at=1"]))
    budget = [] if command == "report" else budget
    return command, [f"--method={name}", *budget]

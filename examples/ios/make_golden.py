"""Make the golden questions of PrunedAnswerTests from the demo model.

    python examples/ios/make_golden.py --pictures 28 --output FOLDER

The answers are MLX's, greedy and in float32, to features that are rounded to float16.
Each held-out picture is pruned by each of two methods; it is stored where the answer to
one of its questions depends on the positions of the kept visual tokens.
"""

import argparse
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

import mlx_tokprune
from mlx_tokprune import Pruner
from mlx_tokprune.coreml.describe import PROMPT_KEY, prompt_settings
from mlx_tokprune.features import Selection
from mlx_tokprune.pipeline import Scene, VisualTokens, look, run
from mlx_tokprune.pruners import as_plan
from mlx_tokprune.scenes.held_out import held_out

KEEP = 16  # of the demo's 64 visual tokens
METHODS = ("norm", "uniform")
BITS, GROUP = (8, 4), 64
MOST = 12  # tokens of an answer


def load_demo(bits: int | None = None):
    """Return the demo model in float32 and its processor. bits: of its weights."""
    model, processor = mlx_tokprune.load("demo", mx.float32)
    if bits:
        nn.quantize(model.language_model, GROUP, bits)
    return model, processor


def answers(model, processor, visual, questions, positions="original") -> list:
    """Return the token ids of the answers to successive questions about a picture."""
    cache, found, ids = model.decoder.make_cache(), [], []
    for number, question in enumerate(questions):
        if number == 0:
            scene = Scene(None, processor.prompt(question, 1))
            vision = {"positions": positions, "vision": lambda *_: visual}
            read, _ = run(model, scene, cache=cache, **vision)
            hidden, cache = read.hidden, read.cache
        else:
            ids += processor.continued(question)
            hidden = model.decoder.follow(mx.array([ids]), cache)
        found.append([])
        while True:
            logits = model.decoder.logits(hidden[:, -1:])
            ids = [int(mx.argmax(logits[0, -1]))]
            found[-1] += ids
            if ids[0] in processor.tokenizer.eos_token_ids:
                ids = []
            if not ids or len(found[-1]) == MOST:
                break
            hidden = model.decoder.follow(mx.array([ids]), cache)
    return found


def visual_tokens(features: mx.array, kept: list) -> VisualTokens:
    """Return stored features (K, D) as the visual tokens of one picture."""
    indices = mx.array([kept], mx.int32)
    selection = Selection(indices)
    return VisualTokens(features.astype(mx.float32)[None], indices, selection, (8, 8))


def make(pictures: int) -> tuple[dict, mx.array]:
    """Return the questions with their answers, and the features (pictures, K, D)."""
    model, processor = load_demo()
    questions, kept, features = [], [], []
    for image, drawn in held_out(pictures):
        texts = [question.prompt for question in drawn if question]
        scene = Scene(mx.array(processor.pixels([image])), processor.prompt("?", 1))
        for method in METHODS:
            found = look(model, scene, as_plan(Pruner(method, keep_tokens=KEEP)))
            indices, rounded = found.indices[0].tolist(), found.embeddings[0]
            rounded = rounded.astype(mx.float16)
            visual = visual_tokens(rounded, indices)
            rows = [row_of(model, processor, visual, len(kept), text) for text in texts]
            if all(row["original"] == row["contiguous"] for row in rows):
                continue
            for row, ids in zip(
                rows, answers(model, processor, visual, texts), strict=True
            ):
                questions.append(row | {"in_chat": ids})
            kept.append(indices)
            features.append(rounded)
    for bits in BITS:
        packed, _ = load_demo(bits)
        for row in questions:
            visual = visual_tokens(features[row["picture"]], kept[row["picture"]])
            row[f"bits_{bits}"] = answers(packed, processor, visual, [row["question"]])[
                0
            ]
    return as_golden(model, processor, questions, kept), mx.stack(features)


def row_of(model, processor, visual, picture: int, question: str) -> dict:
    """Return a question with its answers at both kinds of positions."""
    row = {"picture": picture, "question": question}
    for name in ("original", "contiguous"):
        row[name] = answers(model, processor, visual, [question], name)[0]
    return row


def as_golden(model, processor, questions: list, kept: list) -> dict:
    """Return the golden file: prompt, token ids of all texts, pictures, questions."""
    prompt = json.loads(prompt_settings(model, processor)[PROMPT_KEY])
    asked = {row["question"] for row in questions}
    texts = {prompt["prefix"]}
    for start in ("separator", "turn"):
        texts |= {prompt[start] + text + prompt["suffix"] for text in asked}
    encode = processor.tokenizer.encode
    ids = {text: encode(text, add_special_tokens=False) for text in sorted(texts)}
    facts = {"total": 64, "group": GROUP, "most": MOST, "kept": kept}
    return {"prompt": prompt, "texts": ids, **facts, "questions": questions}


def as_text(golden: dict) -> str:
    """Return the golden file as JSON with one text, picture or question per line."""
    parts = []
    for name, value in golden.items():
        text = json.dumps(value)
        if name in ("kept", "questions"):
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        elif name == "texts":
            text = json.dumps(value, indent=0).replace(",\n", ", ").replace("[\n", "[")
            text = text.replace("\n]", "]").replace('], "', '],\n"')
        parts.append(f'"{name}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    help_ = "held-out pictures to look at (default: 28)"
    parser.add_argument("--pictures", type=int, default=28, help=help_)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    golden, features = make(args.pictures)
    args.output.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(
        str(args.output / "features.safetensors"), {"features": features}
    )
    (args.output / "answers.json").write_text(as_text(golden))
    rows = golden["questions"]
    differ = sum(row["original"] != row["contiguous"] for row in rows)
    print(f"{len(rows)} questions, {differ} of which depend on positions")


if __name__ == "__main__":
    main()

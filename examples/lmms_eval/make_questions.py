"""Questions about the demo's held-out pictures, in ./questions.

    python make_questions.py [COUNT]

One about each picture (96 unless you say otherwise), of another kind each time.
"""

import json
import sys
from pathlib import Path

from mlx_tokprune.evaluate.items import read_questions


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 96
    folder, asked = Path("questions"), {}
    for item in read_questions("demo", count, None).items:
        asked.setdefault(item.picture, []).append(item)
    folder.mkdir()
    lines = []
    for number, items in enumerate(asked.values()):
        item = items[number % len(items)]
        item.load().save(folder / f"{number:03d}.png")
        line = {"image": f"{number:03d}.png", "question": item.question}
        lines.append(json.dumps(line | {"answer": item.answers[0]}) + "\n")
    (folder / "all.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()

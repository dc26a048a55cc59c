"""Load on `mlx_tokprune serve`: mixed requests of several clients, and wrong ones.

    python benchmarks/serve_load.py --requests 500 --clients 4

Starts the server as a process with a tiny random Qwen2-VL (`tests/vlm`). Requests have
no picture, one, three, or a video; streams or not; other budgets; clients that go away
in the middle; damaged and huge pictures; wrong budgets. Each good one is asked alone
first, and under load has to be answered equally; wrong ones with status 400 and a
sentence. Memory is the server's resident memory, from `ps`.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import mlx_tokprune  # noqa: F401  # isort: skip  (loads the BLAS before MLX)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from serving import (
    API,
    Server,
    counts_of,
    data_url,
    request,
    streamed_text,
    text_of,
)

QUESTION = "what is in the picture ?"
BUDGETS = [{}, {"keep_ratio": 0.2}, {"keep_ratio": 1}, {"visual_tokens": 7}]
WRONG = [{"keep_ratio": 0}, {"visual_tokens": "x"}]
WRONG += [{"keep_ratio": 1, "visual_tokens": 1}]
KINDS = ("text", "one", "three", "video", "one", "leaves", "damaged", "huge", "wrong")
GOOD = KINDS[:4]


@dataclass(frozen=True)
class Job:
    """One request: `kind` says what is expected of it."""

    kind: str
    api: str
    body: dict = field(compare=False)
    key: str = ""


def write_files(folder: Path, good: str, size: tuple[int, int]) -> dict[str, str]:
    """Write a video, and pictures that cannot be read; return their paths by name."""
    from PIL import Image

    paths = {name: str(folder / f"{name}.png") for name in ("damaged", "huge")}
    Path(paths["damaged"]).write_bytes(Path(good).read_bytes()[:-40])
    Image.new("1", (20_000, 20_000)).save(paths["huge"])  # Pillow refuses to unpack it
    with contextlib.suppress(ImportError):
        import cv2
        import numpy as np

        paths["video"] = str(folder / "video.mp4")
        code = cv2.VideoWriter_fourcc(*"mp4v")
        writer = cv2.VideoWriter(paths["video"], code, 2.0, size)
        for number in range(4):
            colours = np.random.default_rng(number).integers(
                0, 256, (4, 6, 3), np.uint8
            )
            writer.write(cv2.resize(colours, size, interpolation=cv2.INTER_NEAREST))
        writer.release()
    return paths


def jobs_of(files: list[str], paths: dict[str, str], seed: int = 0):
    """Yield jobs without end: the kinds in turn, all else drawn."""
    draw = random.Random(seed)
    kinds = [kind for kind in KINDS if kind != "video" or "video" in paths]
    while True:
        for kind in kinds:
            api = "chat" if kind == "video" else draw.choice([*API])
            fields = dict(draw.choice(WRONG if kind == "wrong" else BUDGETS))
            fields["stream"] = kind == "leaves" or draw.random() < 0.5
            pictures = {"text": 0, "three": 3, "video": 0}.get(kind, 1)
            chosen = draw.sample(files, pictures)
            if kind in ("damaged", "huge"):
                chosen = [paths[kind]]
            if api != "messages" and kind == "three" and draw.random() < 0.5:
                fields = {"stream": fields["stream"], "detail": ["low", "auto", "high"]}
            if api == "chat" and fields["stream"]:
                fields["stream_options"] = {"include_usage": True}
            if kind == "leaves":
                fields |= {"max_tokens": 200, "max_output_tokens": 200}
            body = request(api, QUESTION, *chosen, **fields)
            if kind == "video":
                part = {"type": "video_url", "video_url": {"url": paths["video"]}}
                body["messages"][0]["content"].insert(0, part)
            key = json.dumps([kind, api, chosen, fields], sort_keys=True)
            yield Job(kind, api, body, key)


def ask(server: Server, job: Job) -> tuple[int, object]:
    """Return the status, and the answer with its counts or the error's sentence."""
    path = API[job.api]
    if not job.body["stream"]:
        status, payload = server.ask(path, job.body)
        if status != 200:
            return status, payload["error"]["message"]
        return status, (text_of(payload), *counts_of(payload))
    status, headers, events = server.stream(path, job.body)
    if status != 200:
        return status, events[0]["error"]["message"]
    counts = [int(headers[f"x-visual-tokens{end}"]) for end in ("", "-kept")]
    last = next(
        e.get("response", e)
        for e in reversed(events)
        if e.get("usage") or e.get("response")
    )
    assert counts_of(last) == tuple(counts)
    return status, (streamed_text(job.api, events), *counts)


def leave(server: Server, job: Job) -> int:
    """Begin to read a stream and go away in its middle; return the status."""
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    body = json.dumps({"model": server.model} | job.body)
    link.request("POST", API[job.api], body, {"Content-Type": "application/json"})
    reply = link.getresponse()
    reply.read(10)
    link.sock.close()
    reply.close()
    return reply.status


def run(
    server: Server, jobs: list[Job], clients: int, notice=lambda done: None
) -> dict:
    """Ask each good job alone, then all jobs by several clients; return the outcome."""
    wanted = {}
    for job in jobs:
        if job.kind in GOOD and job.key not in wanted:
            wanted[job.key] = ask(server, job)
    outcome, failures = Counter(), []

    def work(item: tuple[int, Job]) -> None:
        number, job = item
        notice(number)
        if job.kind == "leaves":
            correct = leave(server, job) == 200
        elif job.key in wanted:
            answer = ask(server, job)
            correct = answer == wanted[job.key] and answer[0] == 200
        else:
            status, sentence = ask(server, job)
            correct = (
                status == 400 and isinstance(sentence, str) and "\n" not in sentence
            )
        outcome[job.kind, correct] += 1
        if not correct:
            failures.append(job.key)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, enumerate(jobs)))
    return {"alone": len(wanted), "outcome": outcome, "failures": failures}


def in_flight(server: Server, seconds: float = 30) -> int:
    """Return mlx-vlm's requests in flight, once there are none or time is up."""
    deadline = time.monotonic() + seconds
    while True:
        metrics = json.loads(server.call("GET", "/v1/metrics")[2])
        count = metrics["summary"]["in_flight"]
        if not count or time.monotonic() > deadline:
            return count
        time.sleep(0.2)


@contextlib.contextmanager
def started(model: str, log: Path):
    """Start `mlx_tokprune serve` as a process; yield its `Server` and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_tokprune", "serve", "--model", model]
    command += ["--port", str(port), "--keep-ratio", "0.5", "--detail-low", "4"]
    env = os.environ | {"MLX_DISABLE_COMPILE": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file)
    server = Server(port, model)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                server.call("GET", "/health")
                break
            time.sleep(0.5)
        yield server, process
    finally:
        process.terminate()
        process.wait(60)


def resident(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    text = subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)], text=True)
    return int(text) / 1024


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--family", default="qwen2_vl")
    parser.add_argument("--rounds", type=int, default=1, help="times all is asked")
    return parser


def main() -> None:
    from vlm.families import FAMILIES, picture

    args = build_parser().parse_args()
    family = FAMILIES[args.family]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "m"
        family.write(folder)
        files = [str(folder / f"{seed}.png") for seed in range(3)]
        for seed, file in enumerate(files):
            picture(family, seed).save(file)
        paths = write_files(folder, files[0], family.size)
        files[2] = data_url(files[2])
        source = jobs_of(files, paths)
        jobs = [next(source) for _ in range(args.requests)]
        with started(str(folder), Path(name) / "log") as (server, process):
            for number in range(args.rounds):
                memory: list[float] = []

                def notice(done: int, memory=memory, pid=process.pid) -> None:
                    if done % 50 == 0:
                        memory.append(resident(pid))

                begun = time.monotonic()
                result = run(server, jobs, args.clients, notice)
                seconds = time.monotonic() - begun
                memory.append(resident(process.pid))
                print(f"round {number}: {args.requests} requests, {seconds:.0f} s")
                print(f"  asked alone: {result['alone']}")
                for (kind, correct), count in sorted(result["outcome"].items()):
                    print(f"  {kind}: {count} {'right' if correct else 'WRONG'}")
                print("  failures:", result["failures"][:5])
                print("  resident MB:", " ".join(f"{mb:.0f}" for mb in memory))
            print("in flight at the end:", in_flight(server))
            status = server.call("GET", "/health")[0]
            print("health:", status, "process:", process.poll() or "runs")


if __name__ == "__main__":
    main()

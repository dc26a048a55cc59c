"""mlx-vlm's server with budgets, in this process: uvicorn on loopback, and clients."""

import base64
import contextlib
import gc
import http.client
import json
import threading
import time
from pathlib import Path

import uvicorn
from mlx_vlm.server import app, generation, unload_model_sync

from mlx_tokprune.attach.server import install
from mlx_tokprune.attach.server_settings import Settings


class Server:
    """Running server: `ask` returns a reply of JSON, `stream` the events of one."""

    def __init__(self, port: int, model: str):
        self.port, self.model = port, model

    def call(self, method: str, path: str, body=None, headers=None):
        """Return the status, the headers and the content of a reply."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | (headers or {})
        link.request(method, path, None if body is None else content, headers)
        reply = link.getresponse()
        content = reply.read()
        link.close()
        return reply.status, dict(reply.getheaders()), content

    def ask(self, path: str, body: dict) -> tuple[int, dict]:
        """Return the status and the JSON of a reply."""
        status, _, content = self.call("POST", path, {"model": self.model} | body)
        return status, json.loads(content)

    def stream(self, path: str, body: dict) -> tuple[int, dict, list[dict]]:
        """Return the status, the headers and the events of a reply."""
        body = {"model": self.model, "stream": True} | body
        status, headers, content = self.call("POST", path, body)
        if status != 200:
            return status, headers, [json.loads(content)]
        lines = content.decode().splitlines()
        data = [line[6:] for line in lines if line.startswith("data: {")]
        return status, headers, [json.loads(text) for text in data]


@contextlib.contextmanager
def served(pruner, model: str, **details):
    """Serve in a thread, with what `install` hooks restored at the end."""
    before = _hooks()
    _set_hooks(*_STOCK)
    install(Settings(pruner, **details))
    config = uvicorn.Config(app, port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    gc.freeze()  # mlx-vlm collects garbage behind each answer
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Server(port, model)
    finally:
        server.should_exit = True
        thread.join()
        gc.unfreeze()
        unload_model_sync()
        _set_hooks(*before)


def _hooks() -> tuple:
    """Return what `install` replaces or adds to."""
    worker = generation.ResponseGenerator
    own = (generation.load_model_resources, worker._cpu_preprocess)
    return (*own, list(app.user_middleware), app.middleware_stack)


def _set_hooks(load, prepare, layers, stack) -> None:
    generation.load_model_resources = load
    generation.ResponseGenerator._cpu_preprocess = prepare
    app.user_middleware, app.middleware_stack = list(layers), stack


_STOCK = _hooks()


def data_url(file: str) -> str:
    """Return a picture, or the `data:` URL that it is, as one."""
    if file.startswith("data:"):
        return file
    content = base64.b64encode(Path(file).read_bytes()).decode()
    return f"data:image/png;base64,{content}"


API = {
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}


def request(api: str, text: str, *files: str, detail=None, **fields) -> dict:
    """Return the body of a request about pictures; `detail`: one, or one for each."""
    details = detail if isinstance(detail, list) else [detail] * len(files)
    parts = [
        picture_part(api, file, {"detail": level} if level else {})
        for file, level in zip(files, details, strict=True)
    ]
    words = {"type": "input_text" if api == "responses" else "text", "text": text}
    turns = [{"role": "user", "content": [*parts, words]}]
    if api == "responses":
        return {"input": turns, "max_output_tokens": 8, "temperature": 0} | fields
    return {"messages": turns, "max_tokens": 8, "temperature": 0} | fields


def picture_part(api: str, file: str, level: dict) -> dict:
    if api == "chat":
        return {"type": "image_url", "image_url": {"url": file} | level}
    if api == "responses":
        return {"type": "input_image", "image_url": file} | level
    data = data_url(file).partition(",")[2]
    source = {"type": "base64", "media_type": "image/png", "data": data}
    return {"type": "image", "source": source}


def text_of(payload: dict) -> str:
    """Return the answer in a reply of any of the APIs."""
    if "choices" in payload:
        return payload["choices"][0]["message"]["content"] or ""
    if "output_text" in payload:
        return payload["output_text"]
    return "".join(part["text"] for part in payload["content"])


def counts_of(payload: dict) -> tuple[int, int]:
    """Return the visual tokens before and after, from the usage of a reply."""
    usage = payload["usage"]
    names = ("prompt_tokens_details", "input_tokens_details")
    counts = next((usage[name] for name in names if name in usage), usage)
    return counts["visual_tokens"], counts["visual_tokens_kept"]


def streamed_text(api: str, events: list[dict]) -> str:
    """Return the answer in the events of a stream."""
    if api == "chat":
        deltas = (e["choices"][0]["delta"] for e in events if e.get("choices"))
        return "".join(delta.get("content") or "" for delta in deltas)
    if api == "responses":
        return text_of(events[-1]["response"])
    deltas = (e["delta"] for e in events if e["type"] == "content_block_delta")
    return "".join(delta["text"] for delta in deltas)

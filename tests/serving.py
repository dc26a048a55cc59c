"""mlx-vlm's server with budgets, in this process: uvicorn on loopback, and clients."""

import base64
import contextlib
import http.client
import json
import threading
import time
from pathlib import Path

import uvicorn
from mlx_vlm.server import app, generation

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
    load = generation.load_model_resources
    prepare = generation.ResponseGenerator._cpu_preprocess
    layers, stack = list(app.user_middleware), app.middleware_stack
    app.middleware_stack = None
    install(Settings(pruner, **details))
    config = uvicorn.Config(app, port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Server(port, model)
    finally:
        server.should_exit = True
        thread.join()
        generation.load_model_resources = load
        generation.ResponseGenerator._cpu_preprocess = prepare
        app.user_middleware, app.middleware_stack = layers, stack
        unload()


def unload() -> None:
    from mlx_vlm.server import unload_model_sync

    unload_model_sync()


def data_url(file: str) -> str:
    """Return a picture as a `data:` URL."""
    content = base64.b64encode(Path(file).read_bytes()).decode()
    return f"data:image/png;base64,{content}"


def chat(text: str, *files: str, detail=None, **fields) -> dict:
    """Return the body of a chat completion about pictures."""
    details = detail if isinstance(detail, list) else [detail] * len(files)
    parts = []
    for file, level in zip(files, details, strict=True):
        url = {"url": file} | ({"detail": level} if level else {})
        parts.append({"type": "image_url", "image_url": url})
    parts.append({"type": "text", "text": text})
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8}
    return body | {"temperature": 0} | fields

"""Pruning in mlx-vlm's server: a budget for each request.

A layer around the application, not a copy of it. Requests are read before mlx-vlm
reads them, and their budget travels in a context variable to the thread that prepares
the prompt; usage, settings and metrics get their fields on the way back.
"""

import inspect
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

from ..errors import InputError, printable
from .budgets import KEEP_ALL, REQUEST, PromptRequest, with_budget
from .mlx_vlm import attach
from .server_settings import HELP, Settings, details_of

_ANSWERS = ("/chat/completions", "/responses", "/messages")
_PATHS = (*_ANSWERS, "/responses/input_tokens", "/responses/compact")
_PATHS += ("/messages/count_tokens",)
_USAGE = re.compile(rb'"usage":\s*\{')
_OPENING = re.compile(rb"event: response\.(created|in_progress)\n")
_METRIC = """\
# HELP mlx_tokprune_visual_tokens_{0}_total Visual tokens of answered prompts: {0}.
# TYPE mlx_tokprune_visual_tokens_{0}_total counter
mlx_tokprune_visual_tokens_{0}_total {1}
"""


class VisualBudgets:
    """Layer that gives each request its budget, and reports what was kept.

    Requests and replies are Starlette's.
    """

    def __init__(self, settings: Settings):
        from mlx_vlm.server import RESPONSE_STORE_LIMIT

        self._settings, self._most_responses = settings, RESPONSE_STORE_LIMIT
        self._counts = {"seen": 0, "kept": 0, "dropped": 0}
        self._details: dict[str, list[str]] = {}

    async def dispatch(self, request: Any, go_on: Callable) -> Any:
        """Return the reply to a request; `go_on` returns mlx-vlm's."""
        path = request.url.path.removeprefix("/v1")
        if request.method == "POST" and path in _PATHS:
            return await self._answer(request, go_on, path)
        if path == "/settings":
            await request.body()  # kept for `_change` too
        reply = await go_on(request)
        add = {"/settings": self._change, "/metrics": self._report}.get(path)
        if add is None or reply.status_code != 200:
            return reply
        content = b"".join([chunk async for chunk in reply.body_iterator])
        return _with_content(reply, await add(request, reply, json.loads(content)))

    async def _answer(self, request: Any, go_on: Callable, path: str) -> Any:
        """Return the reply to a request that has a prompt, under its budget.

        It begins once the prompt was prepared: one that could not be prepared is then
        an error of status 400, in a stream too.
        """
        try:
            body = await request.json()
            if not isinstance(body, dict):
                raise ValueError
            previous = str(body.get("previous_response_id"))
            details = [*self._details.get(previous, []), *details_of(body)]
            prompt = PromptRequest(self._settings.budgets(body, details))
        except InputError as error:
            return _refusal(path, str(error))
        except (ValueError, RecursionError):
            sentence = "the body of the request is no JSON; expected an object"
            return _refusal(path, sentence)
        REQUEST.set(prompt)
        reply = await go_on(request)
        chunks, start = reply.body_iterator, b""
        stream = reply.headers.get("content-type", "").startswith("text/event-stream")
        async for chunk in chunks:
            start += chunk
            if stream and not all(map(_OPENING.match, start.split(b"\n\n")[:-1])):
                break
        if prompt.error and (stream or reply.status_code >= 500):
            return _refusal(path, prompt.error)
        if reply.status_code != 200 or path not in _ANSWERS:
            return _with_content(reply, start)
        self._counts["seen"] += prompt.total
        self._counts["kept"] += prompt.keep
        self._counts["dropped"] += prompt.total - prompt.keep
        counts = {"visual_tokens": prompt.total, "visual_tokens_kept": prompt.keep}
        for name, count in counts.items():
            reply.headers[f"x-{name.replace('_', '-')}"] = str(count)
        if not stream:
            return _with_content(reply, self._annotated(start, counts, details))
        reply.body_iterator = self._events(start, chunks, counts, details)
        return reply

    async def _events(
        self, start: bytes, chunks: AsyncIterator[bytes], *fields: Any
    ) -> AsyncIterator[bytes]:
        """Yield the events of a stream that has begun with `start`."""
        chunk: bytes | None = b""
        while chunk is not None:
            *events, start = (start + chunk).split(b"\n\n")
            for event in events:
                yield self._annotated(event, *fields) + b"\n\n"
            chunk = await anext(chunks, None)
        yield start

    def _annotated(self, event: bytes, counts: dict, details: list[str]) -> bytes:
        """Return JSON, or an event of a stream, with the counts in its usage."""
        if not _USAGE.search(event):
            return event
        before, text = event[: event.index(b"{")], event[event.index(b"{") :]
        payload = json.loads(text)
        holder = payload.get("response") or payload.get("message") or payload
        usage = holder.get("usage")
        if not isinstance(usage, dict):
            return event
        names = ("prompt_tokens_details", "input_tokens_details")
        next((usage[name] for name in names if name in usage), usage).update(counts)
        if holder.get("object") == "response":
            self._details[holder["id"]] = details
            while len(self._details) > self._most_responses:
                del self._details[next(iter(self._details))]
        return before + json.dumps(payload, ensure_ascii=False).encode()

    async def _change(self, request: Any, _: Any, payload: dict) -> bytes:
        """Return mlx-vlm's settings together with ours, which a PATCH changes."""
        if request.method == "PATCH":
            body = await request.json()
            values = body["values"] if "values" in body else body
            replace = body.get("op") == "replace"
            applied, rejected = self._settings.change(values, replace)
            others = [row for row in payload["rejected"] if row["name"] not in HELP]
            payload["applied"] |= applied
            payload["rejected"] = others + rejected
        else:
            payload["schema"] += self._settings.schema()
        payload["current"] |= self._settings.current()
        return json.dumps(payload).encode()

    async def _report(self, request: Any, reply: Any, payload: dict) -> bytes:
        """Return mlx-vlm's metrics with our counters; for Prometheus these, as text."""
        content = json.dumps(payload | {"visual_tokens": self._counts})
        if re.search("text/plain|openmetrics", request.headers.get("accept", "")):
            content = "".join(_METRIC.format(*pair) for pair in self._counts.items())
            reply.headers["content-type"] = "text/plain; version=0.0.4"
        return content.encode()


def _with_content(reply: Any, content: bytes) -> Any:
    """Return a whole reply with the status and headers of another."""
    from starlette.responses import Response

    reply.headers["content-length"] = str(len(content))
    return Response(content, reply.status_code, dict(reply.headers))


def _refusal(path: str, sentence: str) -> Any:
    """Return status 400 with one sentence, in the form of the API of `path`."""
    from starlette.responses import JSONResponse

    error = {"type": "invalid_request_error", "message": printable(sentence)}
    payload = {"detail": error["message"], "error": error}
    if path.startswith("/messages"):
        payload = {"type": "error", "error": error}
    return JSONResponse(payload, 400)


# mlx-vlm ----------------------------------------------------------------------------


def install(settings: Settings) -> None:
    """Prune every model that mlx-vlm's server loads in this process.

    Raises `InputError` for a server of mlx-vlm that has not the seams of 0.7.10.
    """
    from fastapi import HTTPException
    from mlx_vlm.server import app, generation
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware

    _check_seams(app, generation)
    pruner = with_budget(settings.pruner, KEEP_ALL)  # outside of requests
    load = generation.load_model_resources
    prepare = generation.ResponseGenerator._cpu_preprocess

    def load_and_attach(model_path: str, adapter_path: str | None) -> tuple:
        model, processor, config = load(model_path, adapter_path)
        try:
            attach(model, processor, pruner)
        except InputError as error:
            raise HTTPException(status_code=400, detail=str(error)) from None
        return model, processor, config

    def cpu_preprocess(self: Any, *args: Any, **named: Any) -> dict:
        request = REQUEST.get()
        if request is None:  # another version may prepare prompts elsewhere
            raise InputError("a prompt was prepared outside of its request")
        request.error = None
        try:
            return prepare(self, *args, **named)
        except Exception as error:  # a picture or a prompt that cannot be read
            if not isinstance(error, MemoryError):
                request.error = " ".join(str(error).split()) or type(error).__name__
            raise

    generation.load_model_resources = load_and_attach
    generation.ResponseGenerator._cpu_preprocess = cpu_preprocess
    # Innermost: mlx-vlm's own layers add their headers to refusals too.
    dispatch = VisualBudgets(settings).dispatch
    app.user_middleware.append(Middleware(BaseHTTPMiddleware, dispatch=dispatch))


def _check_seams(app: Any, generation: Any) -> None:
    """Raise `InputError` unless the server's seams are those of mlx-vlm 0.7.10."""
    from mlx_vlm.version import __version__

    paths = {path.removeprefix("/v1") for path in app.openapi()["paths"]}
    missing = [path for path in (*_PATHS, "/settings", "/metrics") if path not in paths]
    load = getattr(generation, "load_model_resources", len)
    if [*inspect.signature(load).parameters] != ["model_path", "adapter_path"]:
        missing.append("load_model_resources(model_path, adapter_path)")
    worker = getattr(generation, "ResponseGenerator", None)
    if not hasattr(worker, "_cpu_preprocess"):
        missing.append("ResponseGenerator._cpu_preprocess")
    if missing:
        raise InputError(
            f"mlx-vlm {__version__} has no {missing[0]} in its server; expected "
            "0.7.10, or another version with the same interface"
        )

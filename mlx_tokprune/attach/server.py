"""Pruning in mlx-vlm's server: a budget for each request.

A layer around the application, not a copy of it. Requests are read before mlx-vlm
reads them, and their budget travels in a context variable to the thread that prepares
the prompt; usage, settings and metrics get their fields on the way back.
"""

import functools
import inspect
import json
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, printable
from ..pruners import Pruner
from .budgets import REQUEST, PromptRequest, with_budget
from .mlx_vlm import attach
from .server_settings import HELP, Settings, details_of

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_ANSWERS = ("/chat/completions", "/responses", "/messages")
_PATHS = (*_ANSWERS, "/responses/input_tokens", "/responses/compact")
_PATHS += ("/messages/count_tokens",)
_USAGE = re.compile(rb'"usage":\s*\{')
_OPENING = re.compile(rb"event: response\.(created|in_progress)\n")
_REMEMBERED = 1024  # responses whose pictures a later request goes on from
_ALL = 1 << 31  # tokens; a budget that keeps all, of a pruner that could prune


class VisualBudgets:
    """ASGI layer that gives each request its budget, and reports what was kept."""

    def __init__(self, app: Callable, settings: Settings):
        self.app, self.settings = app, settings
        self.total = self.keep = 0
        self.details: OrderedDict[str, list[str]] = OrderedDict()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path, method = str(scope.get("path")).removeprefix("/v1"), scope.get("method")
        call: Callable = self.app
        if method == "POST" and path in _PATHS:
            call = functools.partial(self._answer, path)
        elif path == "/settings" and method in ("GET", "PATCH"):
            call = self._change
        elif path == "/metrics" and method == "GET":
            call = self._report
        await call(scope, receive, send)

    async def _answer(
        self, path: str, scope: Message, receive: Receive, send: Send
    ) -> None:
        """Answer a request that has a prompt, under its budget."""
        content = await _read(receive)
        try:
            body = json.loads(content)
            if not isinstance(body, dict):
                raise ValueError
            previous = str(body.get("previous_response_id"))
            details = [*self.details.get(previous, []), *details_of(body)]
            request = PromptRequest(self.settings.budgets(body, details))
        except InputError as error:
            return await _refuse(send, path, str(error))
        except (ValueError, RecursionError):
            reason = "the body of the request is no JSON; expected an object"
            return await _refuse(send, path, reason)
        REQUEST.set(request)
        reply = _Reply(self, send, path, request, details)
        await self.app(scope, _replay(content, receive), reply.send)

    async def _change(self, scope: Message, receive: Receive, send: Send) -> None:
        """Show or change mlx-vlm's settings together with ours."""
        content, changes, replace = await _read(receive), {}, False
        try:
            body = json.loads(content)
            values = body.get("values") if {"op", "values"} & {*body} else body
            changes = {name: values.pop(name) for name in HELP if name in values}
            replace, content = body.get("op") == "replace", json.dumps(body).encode()
        except (ValueError, TypeError, AttributeError):
            pass  # mlx-vlm refuses it
        start, payload = await self._call(scope, _replay(content, receive))
        if "applied" in payload:
            applied, rejected = self.settings.change(changes, replace)
            payload["applied"] |= applied
            payload["rejected"] += rejected
        if "schema" in payload:
            payload["schema"] += self.settings.schema()
        if "current" in payload:
            payload["current"] |= self.settings.current()
        await _send(send, start, json.dumps(payload).encode())

    async def _report(self, scope: Message, receive: Receive, send: Send) -> None:
        """Add the counters to mlx-vlm's metrics; Prometheus gets them as text."""
        start, payload = await self._call(scope, receive)
        counts = {"seen": self.total, "kept": self.keep}
        counts["dropped"] = self.total - self.keep
        content = json.dumps(payload | {"visual_tokens": counts}).encode()
        accepted = dict(scope["headers"]).get(b"accept", b"")
        if start["status"] != 200:
            content = json.dumps(payload).encode()
        elif b"text/plain" in accepted or b"openmetrics" in accepted:
            name = "mlx_tokprune_visual_tokens_{}_total"
            lines = (
                f"# HELP {name} Visual tokens of answered prompts: {{}}.\n"
                f"# TYPE {name} counter\n{name} {count}\n".format(*[kind] * 4)
                for kind, count in counts.items()
            )
            content = "".join(lines).encode()
            start["headers"] = [(b"content-type", b"text/plain; version=0.0.4")]
        await _send(send, start, content)

    async def _call(self, scope: Message, receive: Receive) -> tuple[Message, dict]:
        """Return the start of mlx-vlm's answer, and its JSON."""
        messages: list[Message] = []

        async def collect(message: Message) -> None:
            messages.append(message)

        await self.app(scope, receive, collect)
        start, *parts = messages
        return start, json.loads(b"".join(part.get("body", b"") for part in parts))


@dataclass
class _Reply:
    """Answer of mlx-vlm on its way back, to which the counts are added.

    It begins once the prompt was prepared: one that could not be prepared is then an
    error of status 400, in a stream too.
    """

    layer: VisualBudgets
    target: Send
    path: str
    request: PromptRequest
    details: list[str]
    start: Message | None = None
    held: bytes = b""
    state: str = "waiting"

    async def send(self, message: Message) -> None:
        """Pass on one message of mlx-vlm's answer."""
        if message["type"] == "http.response.start":
            self.start = message
            return
        if self.state == "refused" or self.start is None:
            return
        self.held += message.get("body", b"")
        last = not message.get("more_body", False)
        kind, status = dict(self.start["headers"]), self.start["status"]
        stream = kind.get(b"content-type", b"").startswith(b"text/event-stream")
        events = self.held.split(b"\n\n") if stream else [self.held]
        if self.state == "waiting":
            if not last and all(map(_OPENING.match, filter(None, events[:-1]))):
                return
            if self.request.error is not None and (stream or status >= 500):
                self.state = "refused"
                return await _refuse(self.target, self.path, self.request.error)
        content = b"".join(self._annotated(e) + b"\n\n" for e in events[:-1])
        content += self._annotated(events[-1]) if last else b""
        self.held = b"" if last else events[-1]
        if self.state == "waiting":
            self.state = "begun"
            self._begin(None if stream else len(content))
            await self.target(self.start)
        body = {"type": "http.response.body", "body": content, "more_body": not last}
        await self.target(body)

    def _begin(self, length: int | None) -> None:
        """Count the visual tokens, and write them into the headers."""
        headers = [h for h in self.start["headers"] if h[0] != b"content-length"]
        headers += [] if length is None else [(b"content-length", b"%d" % length)]
        if self.start["status"] == 200 and self.path in _ANSWERS:
            self.layer.total += self.request.total
            self.layer.keep += self.request.keep
            for name, count in self._counts().items():
                key = b"x-" + name.replace("_", "-").encode()
                headers.append((key, b"%d" % count))
        self.start["headers"] = headers

    def _counts(self) -> dict[str, int]:
        request = self.request
        return {"visual_tokens": request.total, "visual_tokens_kept": request.keep}

    def _annotated(self, event: bytes) -> bytes:
        """Return JSON, or an event of a stream, with the counts in its usage."""
        if not _USAGE.search(event) or self.path not in _ANSWERS:
            return event
        before, text = event[: event.index(b"{")], event[event.index(b"{") :]
        payload = json.loads(text)
        holder = payload.get("response") or payload.get("message") or payload
        usage = holder["usage"]
        names = ("prompt_tokens_details", "input_tokens_details")
        next((usage[n] for n in names if n in usage), usage).update(self._counts())
        if holder.get("object") == "response":
            self.layer.details[holder["id"]] = self.details
            while len(self.layer.details) > _REMEMBERED:
                self.layer.details.popitem(last=False)
        return before + json.dumps(payload, ensure_ascii=False).encode()


# Messages of ASGI -------------------------------------------------------------------


async def _read(receive: Receive) -> bytes:
    """Return the body of a request, as much as a client sent before it went away."""
    content, more = b"", True
    while more:
        message = await receive()
        content += message.get("body", b"")
        more = message.get("more_body", False)
    return content


def _replay(content: bytes, receive: Receive) -> Receive:
    """Return a `receive` that has the body whole, and then what follows it."""
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _refuse(send: Send, path: str, reason: str) -> None:
    """Send status 400 with one sentence, in the form of the API of `path`."""
    error = {"type": "invalid_request_error", "message": printable(reason)}
    payload: dict[str, Any] = {"detail": error["message"]}
    payload = {"type": "error"} if path.startswith("/messages") else payload
    headers = [(b"content-type", b"application/json")]
    start = {"type": "http.response.start", "status": 400, "headers": headers}
    await _send(send, start, json.dumps(payload | {"error": error}).encode())


async def _send(send: Send, start: Message, content: bytes) -> None:
    """Send a whole answer, of the length of `content`."""
    headers = [h for h in start["headers"] if h[0] != b"content-length"]
    start["headers"] = [*headers, (b"content-length", b"%d" % len(content))]
    await send(start)
    await send({"type": "http.response.body", "body": content})


# mlx-vlm ----------------------------------------------------------------------------


def install(settings: Settings) -> None:
    """Prune every model that mlx-vlm's server loads in this process.

    Raises `InputError` for a server of mlx-vlm that has not the seams of 0.7.10.
    """
    from fastapi import HTTPException
    from mlx_vlm.server import app, generation
    from starlette.middleware import Middleware

    _check_seams(app, generation)
    pruner, load = attached(settings.pruner), generation.load_model_resources
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
        try:
            inputs = prepare(self, *args, **named)
        except MemoryError:
            raise
        except Exception as error:  # a picture or a prompt that cannot be read
            request.error = " ".join(str(error).split()) or type(error).__name__
            raise
        request.error = None
        return inputs

    generation.load_model_resources = load_and_attach
    generation.ResponseGenerator._cpu_preprocess = cpu_preprocess
    # Innermost: mlx-vlm's own layers add their headers to refusals too.
    app.user_middleware.append(Middleware(VisualBudgets, settings=settings))


def attached(pruner: Pruner) -> Pruner:
    """Return the pruner to attach, which keeps all tokens outside of requests."""
    return with_budget(pruner, (None, _ALL))


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

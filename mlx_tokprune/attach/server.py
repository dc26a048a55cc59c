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
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..errors import InputError, printable
from ..pruners import Pruner
from .budgets import REQUEST, PromptRequest, with_budget
from .mlx_vlm import attach
from .server_settings import HELP, Settings, details_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_ANSWERS = ("/chat/completions", "/responses", "/messages")
_PATHS = (*_ANSWERS, "/responses/input_tokens", "/responses/compact")
_PATHS += ("/messages/count_tokens",)
_USAGE = re.compile(rb'"usage":\s*\{')
_OPENING = re.compile(rb"^event: response\.(created|in_progress)\n")
_REMEMBERED = 1024  # responses whose pictures a later request goes on from
_ALL = 1 << 31  # tokens; a budget that keeps all, of a pruner that could prune


class VisualBudgets:
    """ASGI layer that gives each request its budget, and reports what was kept."""

    def __init__(self, app: Callable, settings: Settings):
        self.app, self.settings = app, settings
        self.total = self.kept = 0
        self._details: OrderedDict[str, list[str]] = OrderedDict()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = str(scope.get("path")).removeprefix("/v1")
        method = scope.get("method")
        call: Callable = self.app
        if method == "POST" and path in _PATHS:
            call = functools.partial(self._answer, path)
        elif path == "/settings" and method in ("GET", "PATCH"):
            call = self._change
        elif path == "/metrics" and method == "GET":
            call = self._metrics
        await call(scope, receive, send)

    # Requests that answer

    async def _answer(
        self, path: str, scope: Message, receive: Receive, send: Send
    ) -> None:
        """Answer a request with a prompt, under its budget."""
        content = await _read(receive)
        if content is None:
            return
        try:
            body = _as_object(content)
            previous = str(body.get("previous_response_id"))
            details = [*self._details.get(previous, []), *details_of(body)]
            request = PromptRequest(self.settings.budgets(body, details))
        except InputError as error:
            await _refuse(send, path, str(error))
            return
        REQUEST.set(request)
        reply = _Reply(self, send, path, request, details)
        await self.app(scope, _replay(content, receive), reply.send)

    def note(self, path: str, request: PromptRequest) -> None:
        """Count the visual tokens of an answered prompt."""
        if path in _ANSWERS:
            self.total += request.total
            self.kept += request.keep

    def remember(self, payload: Message, details: list[str]) -> None:
        """Remember the details of a response's pictures, for requests behind it."""
        if payload.get("object") == "response" and details:
            self._details[str(payload.get("id"))] = details
            while len(self._details) > _REMEMBERED:
                self._details.popitem(last=False)

    # Settings and metrics

    async def _change(self, scope: Message, receive: Receive, send: Send) -> None:
        """Show or change mlx-vlm's settings together with ours."""
        content = await _read(receive) if scope["method"] == "PATCH" else b""
        if content is None:
            return
        changes, replace = {}, False
        try:
            body = _as_object(content) if content else {}
            replace = body.get("op") == "replace"
            nested = "op" in body or "values" in body
            values = body.get("values") if nested else body
            if isinstance(values, dict):
                changes = {n: values.pop(n) for n in HELP if n in values}
                content = json.dumps(body).encode()
        except InputError:
            pass  # mlx-vlm refuses it
        start, answer = await self._call(scope, _replay(content, receive))
        if start["status"] == 200:
            payload = json.loads(answer)
            if scope["method"] == "PATCH":
                applied, rejected = self.settings.change(changes, replace)
                payload["applied"] |= applied
                payload["rejected"] += rejected
            else:
                payload["schema"] += self.settings.schema()
            payload["current"] |= self.settings.current()
            answer = json.dumps(payload).encode()
        await _reply(send, start, answer)

    async def _metrics(self, scope: Message, receive: Receive, send: Send) -> None:
        """Add the counters to mlx-vlm's metrics; Prometheus gets them as text."""
        start, answer = await self._call(scope, receive)
        dropped = self.total - self.kept
        counts = {"total": self.total, "kept": self.kept, "dropped": dropped}
        accepted = dict(scope["headers"]).get(b"accept", b"")
        if start["status"] == 200 and re.search(rb"text/plain|openmetrics", accepted):
            names = {name: f"mlx_tokprune_visual_tokens_{name}" for name in counts}
            names["total"] = "mlx_tokprune_visual_tokens"
            answer = "".join(
                f"# HELP {names[n]}_total Visual tokens of answered prompts"
                f"{'' if n == 'total' else ', ' + n}.\n"
                f"# TYPE {names[n]}_total counter\n{names[n]}_total {count}\n"
                for n, count in counts.items()
            ).encode()
            start["headers"] = [(b"content-type", b"text/plain; version=0.0.4")]
        elif start["status"] == 200:
            answer = json.dumps(json.loads(answer) | {"visual_tokens": counts}).encode()
        await _reply(send, start, answer)

    async def _call(self, scope: Message, receive: Receive) -> tuple[Message, bytes]:
        """Return the start and the whole body of mlx-vlm's answer."""
        messages: list[Message] = []

        async def collect(message: Message) -> None:
            messages.append(message)

        await self.app(scope, receive, collect)
        start, *parts = messages
        return start, b"".join(part.get("body", b"") for part in parts)


class _Reply:
    """Answer of mlx-vlm on its way back, to which the counts are added.

    It begins once the prompt was prepared: a prompt that could not be is then an error
    of status 400, in a stream too.
    """

    def __init__(
        self,
        layer: VisualBudgets,
        send: Send,
        path: str,
        request: PromptRequest,
        details: list[str],
    ):
        self._layer, self._send, self._path = layer, send, path
        self._request, self._details = request, details
        self._start: Message | None = None
        self._begun = self._ended = False
        self._held = b""

    async def send(self, message: Message) -> None:
        """Pass on one message of mlx-vlm's answer."""
        if self._ended:
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._held += message.get("body", b"")
        last = not message.get("more_body", False)
        kind = dict(self._start["headers"]).get(b"content-type", b"")
        if not kind.startswith(b"text/event-stream"):
            if last:
                await self._whole()
            return
        *events, self._held = self._held.split(b"\n\n")
        if last and self._held:
            events, self._held = [*events, self._held], b""
        if not self._begun and not last and all(map(_OPENING.match, events)):
            self._held = b"".join(e + b"\n\n" for e in events) + self._held
            return
        if not self._begun and self._request.error is not None:
            await self._fail()
            return
        if not self._begun:
            await self._begin()
        content = b"".join(self._event(event) + b"\n\n" for event in events)
        body = {"type": "http.response.body", "body": content, "more_body": not last}
        await self._send(body)

    async def _fail(self) -> None:
        self._ended = True
        await _refuse(self._send, self._path, str(self._request.error))

    async def _begin(self) -> None:
        """Send the status and headers, which have the counts too."""
        self._begun = True
        request = self._request
        if self._start["status"] == 200:
            self._layer.note(self._path, request)
            counts = {b"total": request.total, b"kept": request.keep}
            for name, count in counts.items():
                header = (b"x-visual-tokens-" + name, b"%d" % count)
                self._start["headers"] = [*self._start["headers"], header]
        await self._send(self._start)

    async def _whole(self) -> None:
        """Send an answer that is no stream."""
        status, content = self._start["status"], self._held
        if status >= 500 and self._request.error is not None:
            await self._fail()
            return
        if status == 200 and self._path in _ANSWERS:
            content = self._annotated(content)
        headers = [h for h in self._start["headers"] if h[0] != b"content-length"]
        length = (b"content-length", b"%d" % len(content))
        self._start["headers"] = [*headers, length]
        await self._begin()
        await self._send({"type": "http.response.body", "body": content})

    def _event(self, event: bytes) -> bytes:
        """Return an event of a stream with the counts in its usage."""
        if not _USAGE.search(event):
            return event
        before, data, text = event.partition(b"data: ")
        return before + data + self._annotated(text)

    def _annotated(self, content: bytes) -> bytes:
        """Return JSON with the counts in its usage."""
        payload = json.loads(content)
        holder = payload.get("response") or payload.get("message") or payload
        usage = holder.get("usage")
        if not isinstance(usage, dict):
            return content
        self._layer.remember(holder, self._details)
        names = ("prompt_tokens_details", "input_tokens_details")
        counts = next((usage[n] for n in names if usage.get(n) is not None), usage)
        counts["visual_tokens"] = self._request.total
        counts["visual_tokens_kept"] = self._request.keep
        return json.dumps(payload, ensure_ascii=False).encode()


# Messages of ASGI -------------------------------------------------------------------


async def _read(receive: Receive) -> bytes | None:
    """Return the body of a request; `None` if the client went away."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(content: bytes, receive: Receive) -> Receive:
    """Return a `receive` that has the body whole, and then what follows it."""
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _as_object(content: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; raise `InputError` for anything else."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise InputError("the body of the request is not JSON; expected an object")
    return body


async def _refuse(send: Send, path: str, reason: str) -> None:
    """Send status 400 with one sentence, in the form of the API of `path`."""
    error = {"type": "invalid_request_error", "message": printable(reason)}
    payload: dict[str, Any] = {"detail": error["message"], "error": error}
    if path.startswith("/messages"):
        payload = {"type": "error", "error": error}
    start = {"type": "http.response.start", "status": 400}
    start["headers"] = [(b"content-type", b"application/json")]
    await _reply(send, start, json.dumps(payload).encode())


async def _reply(send: Send, start: Message, content: bytes) -> None:
    """Send a whole answer of the length of `content`."""
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

    _check_seams(app, generation)
    pruner = attached(settings.pruner)
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
        if request is None:
            raise InputError("this prompt is prepared outside of its request")
        try:
            inputs = prepare(self, *args, **named)
        except MemoryError:
            raise
        except Exception as error:  # a picture or prompt that cannot be read
            request.error = " ".join(str(error).split()) or type(error).__name__
            raise
        request.error = None
        return inputs

    generation.load_model_resources = load_and_attach
    generation.ResponseGenerator._cpu_preprocess = cpu_preprocess
    app.add_middleware(VisualBudgets, settings=settings)


def attached(pruner: Pruner) -> Pruner:
    """Return the pruner to attach, which keeps all tokens outside of requests."""
    return with_budget(pruner, (None, _ALL))


def _check_seams(app: Any, generation: Any) -> None:
    """Raise `InputError` unless the server's seams are those of mlx-vlm 0.7.10."""
    from mlx_vlm.version import __version__

    load = getattr(generation, "load_model_resources", None)
    worker = getattr(generation, "ResponseGenerator", None)
    paths = {path.removeprefix("/v1") for path in app.openapi()["paths"]}
    missing = [path for path in (*_PATHS, "/settings", "/metrics") if path not in paths]
    if not callable(load) or [*inspect.signature(load).parameters] != [
        *("model_path", "adapter_path"),
    ]:
        missing.append("load_model_resources(model_path, adapter_path)")
    if not hasattr(worker, "_cpu_preprocess"):
        missing.append("ResponseGenerator._cpu_preprocess")
    if missing:
        raise InputError(
            f"mlx-vlm {__version__} has no {missing[0]} in its server; expected "
            "0.7.10, or another version with the same interface"
        )

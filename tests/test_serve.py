"""`mlx_tokprune serve`: mlx-vlm's server with a budget for each request."""

import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

mlx_vlm = pytest.importorskip("mlx_vlm")

from mlx_vlm.prompt_utils import apply_chat_template  # noqa: E402
from mlx_vlm.server import app, generation  # noqa: E402
from serving import (  # noqa: E402
    API,
    counts_of,
    data_url,
    request,
    served,
    streamed_text,
    text_of,
)
from vlm.families import FAMILIES  # noqa: E402
from vlm.loaded import HALF, MORE, QUESTION, Loaded, masked  # noqa: E402

from mlx_tokprune import InputError, Pruner  # noqa: E402
from mlx_tokprune.attach import server as layer  # noqa: E402
from mlx_tokprune.attach.budgets import share_out  # noqa: E402
from mlx_tokprune.attach.serve_command import main  # noqa: E402
from mlx_tokprune.attach.server_settings import Settings  # noqa: E402

pytestmark = [pytest.mark.usefixtures("not_compiled"), pytest.mark.enable_socket]
LOW = 4  # visual tokens of detail low, here
CHAT = API["chat"]


@pytest.fixture(scope="module")
def server(qwen):
    with served(HALF, str(qwen.folder), low=LOW) as running:
        yield running


@pytest.fixture
def settings(server):
    """Return a function that changes settings; they are restored at the end."""

    def change(**values) -> dict:
        status, _, content = server.call("PATCH", "/v1/settings", values)
        assert status == 200
        return json.loads(content)

    yield change
    change(op="replace", values={})


def alone(loaded, pruner: Pruner, text: str, *files: str) -> tuple[str, int]:
    """Return the answer of `attach` in Python, and the length of the prompt."""
    content = [*[{"type": "image"}] * len(files), {"type": "text", "text": text}]
    prompt = apply_chat_template(
        loaded.processor,
        loaded.model.config,
        [{"role": "user", "content": content}],
        num_images=len(files),
    )
    with loaded.pruned(pruner):
        ids, length = loaded.ask(prompt, image=list(files))
    return loaded.processor.tokenizer.decode(ids), length


def length_of(payload: dict) -> int:
    usage = payload["usage"]
    return usage.get("prompt_tokens", usage.get("input_tokens"))


BUDGETS = [
    ({}, HALF),
    ({"keep_ratio": 0.2}, Pruner("norm", 0.2)),
    ({"keep_ratio": 1}, Pruner("norm", 1.0)),
    ({"visual_tokens": 7}, Pruner("norm", keep_tokens=7)),
    ({"visual_tokens": 1000}, Pruner("norm", 1.0)),
    ({"detail": "auto"}, HALF),
    ({"detail": "low"}, Pruner("norm", keep_tokens=LOW)),
    ({"detail": "high"}, Pruner("norm", 1.0)),
]


@pytest.mark.parametrize("api", [*API])
@pytest.mark.parametrize(("fields", "pruner"), BUDGETS)
def test_each_request_has_its_budget(server, qwen, api, fields, pruner):
    """The answer and the prompt's length are those of `attach` with that budget."""
    if api == "messages" and "detail" in fields:
        pytest.skip("Anthropic's pictures have no detail")
    wanted, length = alone(qwen, pruner, QUESTION, qwen.files[0])
    body = request(api, QUESTION, qwen.files[0], **fields)
    status, payload = server.ask(API[api], body)
    assert status == 200
    assert (text_of(payload), length_of(payload)) == (wanted, length)
    total, kept = counts_of(payload)
    assert (total, kept) == (30, min(30, pruner.keep_tokens or pruner.count(30)))
    assert length == alone(qwen, Pruner("norm", 1.0), QUESTION, qwen.files[0])[1] - (
        total - kept
    )


def test_each_picture_has_the_budget_of_its_detail(server, qwen):
    """Greedy answers equal the full prompt with the dropped columns masked."""
    from mlx_vlm.utils import prepare_inputs

    files = qwen.files[:2]
    budgets = [Pruner("norm", keep_tokens=LOW), HALF]
    kept = []
    for file, pruner in zip(files, budgets, strict=True):
        with qwen.pruned(pruner) as handle:
            qwen.ask(file=file)
            kept.append(handle.last[0].indices)
    content = [*[{"type": "image"}] * 2, {"type": "text", "text": QUESTION}]
    turns = [{"role": "user", "content": content}]
    text = apply_chat_template(qwen.processor, qwen.model.config, turns, num_images=2)
    ids = prepare_inputs(qwen.processor, images=files, prompts=text)["input_ids"]
    columns = [
        i for i, n in enumerate(ids[0].tolist()) if n == qwen.family.image_token_id
    ]
    left = {*kept[0].tolist(), *(30 + kept[1]).tolist()}
    dropped = [column for i, column in enumerate(columns) if i not in left]
    with masked(qwen.model, dropped):
        answer, _ = qwen.ask(text, image=files, prefill_step_size=None)
    wanted = qwen.processor.tokenizer.decode(answer)
    for api in ("chat", "responses"):
        body = request(api, QUESTION, *files, detail=["low", "auto"])
        _, payload = server.ask(API[api], body)
        assert (text_of(payload), counts_of(payload)) == (wanted, (60, LOW + 15))


def test_a_response_goes_on_with_the_details_of_its_pictures(server, qwen):
    body = request("responses", QUESTION, *qwen.files[:2], detail=["low", "high"])
    _, first = server.ask(API["responses"], body)
    assert counts_of(first) == (60, LOW + 30)
    more = request("responses", MORE) | {"previous_response_id": first["id"]}
    _, second = server.ask(API["responses"], more)
    assert counts_of(second) == (60, LOW + 30)
    more = request("responses", MORE, qwen.files[2], detail="low")
    more["previous_response_id"] = second["id"]
    assert counts_of(server.ask(API["responses"], more)[1]) == (90, 2 * LOW + 30)


@pytest.mark.parametrize("api", [*API])
def test_streams_tell_what_was_kept(server, qwen, api):
    wanted, _ = alone(qwen, Pruner("norm", 0.2), QUESTION, qwen.files[0])
    more = {"stream_options": {"include_usage": True}} if api == "chat" else {}
    body = request(api, QUESTION, qwen.files[0], keep_ratio=0.2, **more)
    status, headers, events = server.stream(API[api], body)
    assert status == 200
    assert streamed_text(api, events) == wanted
    last = events[-1] if api == "chat" else events[-1].get("response")
    if api == "messages":
        last = next(e for e in events if e["type"] == "message_delta")
        assert counts_of(events[0]["message"]) == (30, 6)
    assert counts_of(last) == (30, 6)
    assert headers["x-visual-tokens"] == "30"
    assert headers["x-visual-tokens-kept"] == "6"


def test_prompts_are_counted_under_their_budget(server, qwen):
    for api, path in (
        ("responses", "/v1/responses/input_tokens"),
        ("messages", "/v1/messages/count_tokens"),
    ):
        counts = [
            server.ask(path, request(api, QUESTION, qwen.files[0], **fields))[1]
            for fields in ({"keep_ratio": 1}, {"visual_tokens": 7})
        ]
        assert counts[0]["input_tokens"] - counts[1]["input_tokens"] == 23


WRONG = [
    ({"keep_ratio": 0}, "keep ratio 0 is outside (0, 1]"),
    ({"keep_ratio": 1.5}, "keep ratio 1.5 is outside (0, 1]"),
    ({"keep_ratio": "half"}, "keep ratio 'half' is outside (0, 1]"),
    ({"keep_ratio": True}, "keep ratio True is outside (0, 1]"),
    ({"keep_ratio": float("nan")}, "keep ratio nan is outside (0, 1]"),
    ({"keep_ratio": [0.5]}, "keep ratio [0.5] is outside (0, 1]"),
    ({"visual_tokens": 0}, "cannot keep 0 visual tokens"),
    ({"visual_tokens": 2.5}, "cannot keep 2.5 visual tokens"),
    ({"visual_tokens": "7"}, "expected a whole number from 1"),
    ({"keep_ratio": 0.5, "visual_tokens": 7}, "not both"),
    ({"detail": "lo"}, "detail 'lo' is none of a picture's; expected low, high or"),
    ({"detail": ["low"]}, "expected low, high or auto"),
    ({"detail": "low", "keep_ratio": 0.5}, "keep_ratio and detail 'low' both set"),
    ({"detail": "high", "visual_tokens": 9}, "visual_tokens and detail 'high' both"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "sentence"), WRONG)
def test_a_wrong_budget_is_refused_in_one_sentence(
    server, qwen, fields, sentence, stream
):
    detail = fields.get("detail")
    fields = {n: v for n, v in fields.items() if n != "detail"} | {"stream": stream}
    for api in API:
        if api == "messages" and detail is not None:
            continue
        levels = [detail] if isinstance(detail, list) else detail
        body = request(api, QUESTION, qwen.files[0], detail=levels, **fields)
        status, payload = server.ask(API[api], body)
        assert status == 400
        assert sentence in payload["error"]["message"]
        assert (
            payload.get("detail", payload["error"]["message"])
            == (payload["error"]["message"])
        )
        assert payload["error"]["type"] == "invalid_request_error"
        assert payload.get("type") == ("error" if api == "messages" else None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", [*API])
def test_a_picture_that_cannot_be_read_is_refused(
    server, qwen, api, stream, tmp_path, monkeypatch
):
    from PIL import Image

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG but no picture")
    huge = tmp_path / "huge.png"
    Image.new("1", (2000, 2000)).save(huge)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    for file in (broken, huge):
        body = request(api, QUESTION, str(file), keep_ratio=0.5, stream=stream)
        status, payload = server.ask(API[api], body)
        assert status == 400
        assert "mage" in payload["error"]["message"]
    status, payload = server.ask(API[api], request(api, QUESTION))
    assert (status, counts_of(payload)) == (200, (0, 0))


@pytest.mark.parametrize("content", [b"{", b"[]", b"", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(server, content):
    for path in API.values():
        status, _, reply = server.call("POST", path, content)
        assert status == 400
        assert "expected an object" in json.loads(reply)["error"]["message"]


def test_budgets_at_once_give_what_each_gives_alone(server, qwen, monkeypatch):
    """Requests of different budgets, batched by the server."""
    step, most = generation.ResponseGenerator._step, []

    def watched(self, batch_gen, active, *args):
        most.append(len(active))
        return step(self, batch_gen, active, *args)

    monkeypatch.setattr(generation.ResponseGenerator, "_step", watched)
    jobs = [
        (api, fields, pruner, file)
        for api in API
        for fields, pruner in BUDGETS[:4]
        for file in qwen.files[:2]
    ]
    answers = {
        (pruner, file): alone(qwen, pruner, QUESTION, file)
        for _, _, pruner, file in jobs
    }
    assert len({answer for answer, _ in answers.values()}) > 4

    def ask(job) -> tuple[str, int]:
        api, fields, _, file = job
        _, payload = server.ask(API[api], request(api, QUESTION, file, **fields))
        return text_of(payload), length_of(payload)

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, jobs))
    assert replies == [answers[pruner, file] for _, _, pruner, file in jobs]
    assert max(most) > 1


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_5"])
def test_the_prefix_cache_never_mixes_budgets(name, tmp_path):
    """Blocks (`qwen2_vl`), and whole prompts (`qwen3_5`), which hit behind pictures."""
    loaded = Loaded(FAMILIES[name], tmp_path / "m")
    files, more = loaded.files[:2], {"apc_disk_enabled": False, "apc_block_size": 4}
    # The last two keep as many tokens, of other pictures: equal ids.
    asked = [{"keep_ratio": ratio} for ratio in (0.5, 0.2, 0.5, 0.2, 0.9)]
    asked += [{"detail": ["low", "high"]}, {"detail": ["high", "low"]}]
    with served(HALF, str(loaded.folder), low=4, high=0.5) as running:

        def answers() -> list[tuple[str, int]]:
            bodies = [request("chat", QUESTION, *files, **fields) for fields in asked]
            replies = [running.ask(CHAT, body)[1] for body in bodies]
            details = (reply["usage"]["prompt_tokens_details"] for reply in replies)
            cached = (detail["cached_tokens"] for detail in details)
            return list(zip(map(text_of, replies), cached, strict=True))

        cold = answers()
        assert all(cached == 0 for _, cached in cold)
        assert len({text for text, _ in cold}) == 5
        running.call("PATCH", "/v1/settings", {"apc_enabled": True} | more)
        try:
            warm = answers()
        finally:
            running.call("PATCH", "/v1/settings", {"op": "replace", "values": {}})
    assert [text for text, _ in warm] == [text for text, _ in cold]
    hits = [cached > 0 for _, cached in warm]
    again = [name == "qwen3_5"] * 2
    assert hits == [False, False, *again, False, False, False]


def test_settings_are_live(server, qwen, settings):
    def kept(**fields) -> int:
        body = request("chat", QUESTION, qwen.files[0], **fields)
        return counts_of(server.ask(CHAT, body)[1])[1]

    assert kept() == 15
    kept_model = generation.runtime.response_generator
    reply = settings(keep_ratio=0.2, detail_low=0.5)
    assert reply["applied"] == {"keep_ratio": 0.2, "detail_low": 0.5}
    assert (reply["rejected"], reply["reload_kinds"]) == ([], [])
    assert (kept(), kept(detail="low"), kept(detail="auto")) == (6, 15, 6)
    reply = settings(op="merge", values={"visual_tokens": 9, "max_pixels": 4096})
    assert reply["applied"] == {"visual_tokens": 9, "max_pixels": 4096}
    assert reply["current"]["keep_ratio"] is None
    assert reply["current"]["max_pixels"] == 4096
    assert kept() == 9
    shown = json.loads(server.call("GET", "/v1/settings")[2])
    names = {"keep_ratio", "visual_tokens", "detail_low", "detail_high"}
    assert names <= {row["name"] for row in shown["schema"]}
    assert shown["current"]["visual_tokens"] == 9
    reply = settings(keep_ratio=2, detail_low="x", detail_high=1.5)
    assert {row["name"] for row in reply["rejected"]} == {
        *("keep_ratio", "detail_low", "detail_high"),
    }
    assert reply["applied"] == {}
    assert kept() == 9
    reply = settings(keep_ratio=0.5, visual_tokens=3)
    assert "not both" in reply["rejected"][0]["reason"]
    settings(visual_tokens=None)
    assert kept() == 30
    assert server.call("PATCH", "/v1/settings", b"[]")[0] == 400
    settings(op="replace", values={"detail_high": 0.5})
    assert (kept(), kept(detail="low"), kept(detail="high")) == (15, LOW, 15)
    assert generation.runtime.response_generator is kept_model


def test_counters(server, qwen):
    def read() -> dict:
        return json.loads(server.call("GET", "/v1/metrics")[2])

    before = read()["visual_tokens"]
    server.ask(CHAT, request("chat", QUESTION, qwen.files[0], keep_ratio=0.2))
    server.ask(CHAT, request("chat", QUESTION, qwen.files[0], keep_ratio=7))
    server.ask("/v1/messages/count_tokens", request("messages", MORE, qwen.files[0]))
    after = read()
    assert "summary" in after
    rise = {name: after["visual_tokens"][name] - before[name] for name in before}
    assert rise == {"seen": 30, "kept": 6, "dropped": 24}
    accept = {"Accept": "application/openmetrics-text,text/plain;version=0.0.4"}
    _, headers, content = server.call("GET", "/metrics", headers=accept)
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = content.decode().splitlines()
    for kind, count in after["visual_tokens"].items():
        name = f"mlx_tokprune_visual_tokens_{kind}_total"
        assert f"# TYPE {name} counter" in lines
        assert f"{name} {count}" in lines


def test_a_key_is_asked_for_as_in_mlx_vlm(server, monkeypatch):
    monkeypatch.setenv("MLX_VLM_SERVER_API_KEY", "secret")
    before = json.loads(
        server.call("GET", "/settings", headers={"Authorization": "Bearer secret"})[2]
    )
    assert server.call("GET", "/metrics", headers={"Accept": "text/plain"})[0] == 401
    assert server.call("PATCH", "/settings", {"keep_ratio": 0.1})[0] == 401
    key = {"Authorization": "Bearer secret"}
    after = json.loads(server.call("GET", "/settings", headers=key)[2])
    assert after["current"] == before["current"]


def test_runs_and_pictures():
    """Equal budgets of pictures are pooled where a picture has several runs."""
    low, high = Pruner("norm", keep_tokens=3), Pruner("norm", 1.0)
    runs = [(4, None)] * 4
    assert share_out(runs, [low, low]) == [
        (16, None, Pruner("norm", keep_tokens=6)),
    ]
    assert share_out(runs[:2], [low, high]) == [(4, None, low), (4, None, high)]
    with pytest.raises(InputError, match="2 pictures have 4 runs"):
        share_out(runs, [low, high])
    with pytest.raises(InputError, match="expected one budget"):
        share_out([(4, (2, 2))] * 4, [low, low])
    assert share_out([], [low, high]) == []


def test_a_short_load(server, qwen, tmp_path):
    """`benchmarks/serve_load.py`, shortened: all kinds of requests, four clients."""
    from benchmarks.serve_load import in_flight, jobs_of, run, write_files

    paths = write_files(tmp_path, qwen.files[0], qwen.family.size)
    source = jobs_of(qwen.files, paths, seed=1)
    result = run(server, [next(source) for _ in range(18)], clients=4)
    assert not result["failures"]
    assert {kind for kind, _ in result["outcome"]} >= {"leaves", "damaged", "wrong"}
    assert in_flight(server) == 0


@pytest.mark.parametrize("name", ["idefics3", "fastvlm", "gemma3"])
def test_other_families(name, tmp_path):
    """Tiles pool equal details; placeholders of several tokens, and grids."""
    loaded = Loaded(FAMILIES[name], tmp_path / "m")
    method = "uniform" if name == "gemma3" else "norm"
    with served(Pruner(method, 0.5), str(loaded.folder), low=4) as running:
        for fields, pruner in (
            ({"keep_ratio": 0.3}, Pruner(method, 0.3)),
            ({"detail": "low"}, Pruner(method, keep_tokens=4)),
        ):
            body = request("chat", QUESTION, loaded.files[0], **fields)
            status, payload = running.ask(CHAT, body)
            wanted, _ = alone(loaded, pruner, QUESTION, loaded.files[0])
            assert (status, text_of(payload)) == (200, wanted)
            total, kept = counts_of(payload)
            grid = (6, 6) if name == "gemma3" else (1, total)
            assert kept == pruner.count_on(grid)
        files = loaded.files[:2]
        body = request("chat", QUESTION, *files, detail=["low", "high"])
        status, payload = running.ask(CHAT, body)
        if name == "idefics3":
            assert status == 400
            assert "expected one budget for all" in payload["error"]["message"]
        else:
            assert (status, counts_of(payload)[1]) == (200, total + 4)


def test_a_model_that_cannot_be_pruned_is_refused(server, tmp_path):
    FAMILIES["llava_next"].write(tmp_path / "m")
    body = request("chat", QUESTION) | {"model": str(tmp_path / "m")}
    status, payload = server.ask(CHAT, body)
    assert status == 400
    assert "'llava_next' cannot be pruned" in payload["detail"]


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("load_model_resources", "load_model_resources"),
        ("ResponseGenerator", "ResponseGenerator._cpu_preprocess"),
    ],
)
def test_another_server_is_refused(monkeypatch, name, missing):
    monkeypatch.delattr(generation, name)
    with pytest.raises(InputError, match=rf"mlx-vlm [\d.]+ has no {missing}"):
        layer.install(Settings(HALF))


def test_another_route_is_refused(monkeypatch):
    paths = {n: v for n, v in app.openapi()["paths"].items() if n != "/messages"}
    monkeypatch.setattr(app, "openapi", lambda: {"paths": paths})
    with pytest.raises(InputError, match="has no /messages in its server"):
        layer.install(Settings(HALF))


@pytest.fixture
def begun(monkeypatch):
    """Return the arguments that mlx-vlm's server and `install` were called with."""
    calls = {}
    cli = importlib.import_module("mlx_vlm.server.cli")
    command = "mlx_tokprune.attach.serve_command.install"
    monkeypatch.setattr(cli, "main", lambda: calls.update(argv=sys.argv))
    monkeypatch.setattr(command, lambda settings: calls.update(settings=settings))
    monkeypatch.setattr(sys, "argv", sys.argv)
    return calls


def test_the_command_passes_flags_on(qwen, begun, capsys):
    main(["--model", str(qwen.folder), "--port", "1", "--max-tokens=5"])
    argv = ["--host", "127.0.0.1", "--port", "1", "--model", str(qwen.folder)]
    assert begun["argv"][1:] == [*argv, "--max-tokens=5"]
    current = begun["settings"].current()
    assert (current["keep_ratio"], current["visual_tokens"]) == (1.0, None)
    assert (current["detail_low"], current["detail_high"]) == (85, 1)
    main(["--host", "0.0.0.0", "--prune", "dart:64", "--detail-low", "0.25"])
    assert begun["argv"][1:] == ["--host", "0.0.0.0", "--port", "8080"]
    current = begun["settings"].current()
    assert (current["keep_ratio"], current["visual_tokens"]) == (None, 64)
    assert current["detail_low"] == 0.25
    assert begun["settings"].pruner.method == "dart"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--reload"], "without pruning; leave it out"),
        (["--keep-ratio", "2"], "keep ratio 2 is outside (0, 1]"),
        (["--detail-low", "0"], "keep ratio 0 is outside (0, 1]"),
        (["--detail-high", "2.5"], "cannot keep 2.5 visual tokens"),
        (["--prune", "norm:0.5+dart:0.5"], "expected one METHOD:BUDGET"),
        (["--prune", "norm:0.5", "--keep-ratio", "0.5"], "leave out --method"),
        (["--model", "nowhere"], "nowhere does not exist"),
        (["--model", "MODEL", "--method", "trimvla"], "needs queries"),
        (["--model", "MODEL", "--method", "fastv"], "pruning is at 'prompt'"),
        (["--method", "noorm"], "Did you mean 'norm'?"),
    ],
)
def test_bad_flags_are_refused_before_the_server_starts(
    qwen, begun, capsys, options, sentence
):
    with pytest.raises(SystemExit) as stopped:
        main([str(qwen.folder) if word == "MODEL" else word for word in options])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1
    assert not begun


def test_pictures_as_data_urls(server, qwen):
    body = request("chat", QUESTION, data_url(qwen.files[0]), visual_tokens=7)
    _, payload = server.ask(CHAT, body)
    wanted, _ = alone(qwen, Pruner("norm", keep_tokens=7), QUESTION, qwen.files[0])
    assert text_of(payload) == wanted

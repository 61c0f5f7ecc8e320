"""Request ids, keys, pages, and errors of paths and methods."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from disagg.frontend import App, TextModel, create_app
from disagg.security import ApiKeys
from support.asgi import Call
from support.generator import FakeGenerator

pytestmark = pytest.mark.anyio
Body = Callable[..., dict[str, Any]]

PATHS = [
    ("GET", "/v1/models", 200),
    ("GET", "/v1/models/test-model", 200),
    ("GET", "/v1/models/other/model", 404),
    ("GET", "/health", 200),
    ("HEAD", "/health", 200),
    ("GET", "/live", 200),
    ("GET", "/metrics", 200),
    ("GET", "/disagg/workers", 200),
    ("GET", "/disagg/requests", 200),
    ("GET", "/disagg/requests?limit=5", 200),
    ("GET", "/disagg/requests?limit=x", 400),
    ("GET", "/disagg/requests?limit=0", 400),
    ("GET", "/disagg/requests/nobody", 404),
    ("GET", "/openapi.json", 200),
    ("GET", "/docs", 200),
    ("GET", "/", 404),
    ("GET", "/v1", 404),
    ("GET", "/v1/completions/", 404),
    ("POST", "/v1/embeddings", 404),
    ("GET", "/v1/completions", 405),
    ("PUT", "/v1/chat/completions", 405),
    ("DELETE", "/v1/models", 405),
    ("OPTIONS", "/v1/completions", 405),
    ("BREW", "/health", 405),
]


@pytest.mark.parametrize(("method", "path", "status"), PATHS)
async def test_every_path_answers_with_an_id_and_errors_in_openais_shape(
    http: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await http.request(method, path, headers={"x-request-id": "mine"})
    assert answer.status_code == status
    assert len(answer.headers.get_list("x-request-id")) == 1
    assert answer.headers["x-request-id"] not in ("", "mine")
    if status >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    if status == 405:
        assert answer.headers["allow"]


async def test_a_stranger_cannot_have_a_server_drained(generator: FakeGenerator, text: TextModel) -> None:
    transport = httpx.ASGITransport(create_app(generator, text, "m"), client=("10.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        answer = await http.post("/drain")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert (await http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    "key", [None, "Bearer ", "Bearer wrong", "Basic secret", "secret", "Bearer secret x"]
)
@pytest.mark.parametrize(("method", "path", "status"), [*PATHS, ("POST", "/v1/completions", 400)])
async def test_with_keys_only_probes_and_documents_are_open(
    generator: FakeGenerator, text: TextModel, method: str, path: str, status: int, key: str | None
) -> None:
    app = create_app(generator, text, "test-model", api_keys=ApiKeys(("secret", "other")))
    headers = {} if key is None else {"authorization": key}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        answer = await http.request(method, path, headers=headers)
        if not path.startswith(("/v1/", "/disagg/")):
            assert answer.status_code == status
            return
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        for good in ("Bearer secret", "bearer other"):
            answer = await http.request(method, path, headers={"authorization": good})
            assert answer.status_code == status


async def test_the_page_for_people_needs_no_key(generator: FakeGenerator, text: TextModel) -> None:
    """A browser cannot send one; the page asks for it."""
    app = create_app(generator, text, "test-model", api_keys=ApiKeys(("secret",)))
    async with Call(app, "/disagg/ui", method="GET") as call:
        await call.next_body()
    assert call.status != 401


async def test_models(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("test-model", "model", 512)
    assert (await http.get("/v1/models/test-model")).json() == model


async def test_health_follows_the_workers_and_live_does_not(
    http: httpx.AsyncClient, generator: FakeGenerator
) -> None:
    generator.is_healthy = False
    assert (await http.get("/health")).status_code == 503
    assert (await http.get("/live")).status_code == 200


async def test_live_fails_where_only_another_process_could_serve(
    generator: FakeGenerator, text: TextModel
) -> None:
    transport = httpx.ASGITransport(create_app(generator, text, "m", is_alive=lambda: False))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.get("/live")).status_code == 503


async def test_a_record_is_found_by_the_id_in_the_answer(
    http: httpx.AsyncClient, generator: FakeGenerator, completion: Body
) -> None:
    generator.reply = lambda request, index: [[9]]
    answer = await http.post("/v1/completions", json=completion())
    request_id = answer.headers["x-request-id"]
    assert (await http.get(f"/disagg/requests/{request_id}")).json() == {"request_id": request_id}
    assert (await http.get("/disagg/requests")).json() == [{"request_id": request_id}]


async def test_a_page_that_fails_is_a_500_in_shape(
    http: httpx.AsyncClient,
    generator: FakeGenerator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client sees an id alone, by which the log has the rest."""

    def fail() -> bytes:
        raise RuntimeError("secret")

    monkeypatch.setattr(generator, "metrics", fail)
    answer = await http.get("/metrics")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert f"request failed id={answer.headers['x-request-id']}" in caplog.text


async def test_a_page_that_fails_is_in_the_ledger_once(
    http: httpx.AsyncClient, generator: FakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastAPI answers it and raises it again to the edge; the count of errors must not double."""

    def fail(model: str) -> int:
        raise RuntimeError(model)

    monkeypatch.setattr(generator, "max_model_len", fail)
    assert (await http.get("/v1/models")).status_code == 500
    assert len(generator.rejected) == 1


async def test_unknown_paths_under_v1_are_in_the_ledger(
    http: httpx.AsyncClient, generator: FakeGenerator
) -> None:
    answer = await http.get("/v1/nope", headers={"x-request-id": "mine"})
    ((request_id, client_request_id, error),) = generator.rejected
    assert request_id == answer.headers["x-request-id"]
    assert client_request_id == "mine"
    assert str(error) == "unknown path /v1/nope"


async def test_websockets_are_closed(app: App) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    await app({"type": "websocket", "path": "/v1/realtime"}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1000}]


async def test_the_document_describes_the_hot_endpoints(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for path, fields in (("/v1/chat/completions", "ChatFields"), ("/v1/completions", "CompletionFields")):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert content["schema"] == {"$ref": f"#/components/schemas/{fields}"}
        assert "temperature" in schemas[fields]["properties"]

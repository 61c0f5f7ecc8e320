"""Everything but the hot endpoints: models, health, metrics, workers, the ledger, documentation."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from disagg.errors import DisaggError, InvalidRequest, ModelNotFound, RequestError
from disagg.frontend.completions import Service
from disagg.frontend.errors import Forbidden, MethodNotAllowed, NotFound, reply_to
from disagg.frontend.exchange import Exchange
from disagg.frontend.fields import ChatFields, CompletionFields
from disagg.security import is_own_call

MAX_RECORDS = 10_000
ExceptionHandler = Callable[[Request, Any], Coroutine[Any, Any, Response]]


def make_pages(service: Service) -> FastAPI:
    """Make the FastAPI part. Its errors carry the id of the `Exchange` in the scope's state."""
    pages = FastAPI(
        title="disagg",
        summary="An OpenAI-compatible API over separate prefill and decode pools",
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=_answer_errors(service),
    )
    _add_models(pages, service)
    _add_probes(pages, service)
    _add_ledger(pages, service)
    _document(pages)
    return pages


def _add_models(pages: FastAPI, service: Service) -> None:
    def model() -> dict[str, Any]:
        return {
            "id": service.model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "disagg",
            "max_model_len": service.generator.max_model_len(service.model_name),
        }

    @pages.get("/v1/models", tags=["OpenAI"])
    async def list_models() -> JSONResponse:
        """List the served models."""
        return JSONResponse({"object": "list", "data": [model()]})

    @pages.get("/v1/models/{model_id:path}", tags=["OpenAI"])
    async def get_model(model_id: str) -> JSONResponse:
        """Describe one model."""
        if model_id != service.model_name:
            raise ModelNotFound(f"the model {model_id[:200]!r} does not exist", param="model")
        return JSONResponse(model())


def _add_probes(pages: FastAPI, service: Service) -> None:
    @pages.head("/health", include_in_schema=False)
    @pages.get("/health", tags=["operation"])
    async def health() -> JSONResponse:
        """200 when a decode or unified worker can serve, else 503."""
        healthy = service.generator.healthy() and not service.retirement.has_begun
        return JSONResponse({"status": "ok" if healthy else "unavailable"}, 200 if healthy else 503)

    @pages.head("/live", include_in_schema=False)
    @pages.get("/live", tags=["operation"])
    async def live() -> JSONResponse:
        """200 while the process lives, whatever its workers do; 503 where it must be started again."""
        alive = service.is_alive()
        return JSONResponse({"status": "ok" if alive else "unavailable"}, 200 if alive else 503)

    @pages.post("/drain", tags=["operation"])
    async def drain(request: Request) -> JSONResponse:
        """Lead clients elsewhere: /health fails, each answer closes its connection; returns in 5 seconds.

        Nothing is refused meanwhile: SIGTERM does that. Answered to loopback peers only.
        """
        if not is_own_call(request.client and request.client.host, request.headers):
            raise Forbidden("drain is answered to loopback peers only")
        await service.retirement.run()
        return JSONResponse({"status": "retired"})

    @pages.get("/metrics", tags=["operation"])
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(service.generator.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_ledger(pages: FastAPI, service: Service) -> None:
    @pages.get("/disagg/workers", tags=["disagg"])
    async def workers() -> Response:
        """List the workers, their state and their pages."""
        return _json(service.generator.workers())

    @pages.get("/disagg/requests", tags=["disagg"])
    async def requests(limit: Annotated[int, Query(ge=1, le=MAX_RECORDS)] = 100) -> Response:
        """List ledger records, the newest first."""
        return _json(service.generator.records(limit))

    @pages.get("/disagg/requests/{request_id}", tags=["disagg"])
    async def request(request_id: str) -> Response:
        """Show the ledger record of one `x-request-id`."""
        record = await service.generator.record(request_id)
        if record is None:
            raise NotFound(f"no record of the request {request_id[:200]!r}")
        return _json(record)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _document(pages: FastAPI) -> None:
    """Put the hot endpoints' bodies in /openapi.json, from the structs that check them."""
    paths = {"/v1/chat/completions": ChatFields, "/v1/completions": CompletionFields}
    _, components = msgspec.json.schema_components(
        tuple(paths.values()), ref_template="#/components/schemas/{name}"
    )
    generate = pages.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        document.setdefault("components", {}).setdefault("schemas", {}).update(components)
        for path, fields in paths.items():
            schema = {"$ref": f"#/components/schemas/{fields.__name__}"}
            document["paths"].setdefault(path, {})["post"] = {
                "tags": ["OpenAI"],
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {"200": {"description": "The answer, as one object or as events"}},
            }
        return document

    pages.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend the document


def _answer_errors(service: Service) -> dict[int | type[Exception], ExceptionHandler]:
    """Put errors in OpenAI's shape, those of FastAPI's own checks and routing too."""

    async def answer(request: Request, error: Exception) -> Response:
        exchange: Exchange = request.scope["state"]["exchange"]
        ours = _translate(request, error)
        service.note(exchange, ours)
        reply = reply_to(ours, exchange.request_id)
        response = Response(reply.body, reply.status, media_type="application/json")
        response.raw_headers.extend(reply.headers)
        return response

    # The last one is answered, and raised again to the edge, which logs it.
    return dict.fromkeys((HTTPException, RequestValidationError, DisaggError, Exception), answer)


def _translate(request: Request, error: Exception) -> Exception:
    method, path = request.method, request.url.path[:200]
    match error:
        case HTTPException(status_code=404):
            return NotFound(f"unknown path {path}")
        case HTTPException(status_code=405):
            return MethodNotAllowed(f"{path} does not take {method}", (error.headers or {}).get("Allow", ""))
        case HTTPException():
            return RequestError(str(error.detail))
        case RequestValidationError():
            first = error.errors()[0]
            param = str(first["loc"][-1])
            return InvalidRequest(f"{param}: {first['msg']}", param=param)
        case _:
            return error

"""The ASGI application: request ids, keys and errors around two hot endpoints and FastAPI.

The hot endpoints are raw ASGI and are reached without FastAPI's middleware, which costs more than
all of ours. FastAPI serves everything else, and documents it all at /docs.
"""

import logging
import time
from collections.abc import Callable, MutableMapping
from secrets import token_hex
from typing import Any, Final

from fastapi import FastAPI

from disagg.errors import DisaggError, Unauthorized
from disagg.frontend.completions import Endpoint, Service, chat_completions, completions
from disagg.frontend.errors import BodyTooLarge, MethodNotAllowed, error_body, reply_to
from disagg.frontend.exchange import ClientLeft, Exchange, Receive, Scope, Send
from disagg.frontend.formats import error_event
from disagg.frontend.generator import Generator
from disagg.frontend.pages import make_pages
from disagg.frontend.retirement import RETIRE_S, Retirement
from disagg.frontend.text import TextModel
from disagg.security import ApiKeys

log = logging.getLogger(__name__)

ENDPOINTS: Final[dict[str, Endpoint]] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
}
_KEYED: Final = ("/v1/", "/disagg/")
_OPEN: Final = "/disagg/ui"
"""A browser opens it without a key, and what it loads then needs one."""


def create_app(
    generator: Generator,
    text: TextModel,
    model_name: str,
    *,
    api_keys: ApiKeys | None = None,
    max_body_bytes: int = 8 * 1024 * 1024,
    retire_s: float = RETIRE_S,
    is_alive: Callable[[], bool] = lambda: True,
) -> "App":
    """Make the application of one served model. It owns `text` from now on.

    Where `is_alive` is false only another process could serve: `/live` says so.
    """
    retirement = Retirement(retire_s)
    service = Service(generator, text, model_name, int(time.time()), max_body_bytes, retirement, is_alive)
    return App(service, api_keys or ApiKeys())


class App:
    """Routes, and is the edge at which every error of a request ends."""

    def __init__(self, service: Service, api_keys: ApiKeys) -> None:
        self._service = service
        self._api_keys = api_keys
        self._pages: FastAPI = make_pages(service)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection scope."""
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            raise NotImplementedError(scope["type"])  # ASGI's way to say that an app has no lifespan

    def close(self) -> None:
        """Let go of the tokenizer's threads; no request may follow."""
        self._service.text.close()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, token_hex(16))
        exchange.is_last = self._service.retirement.has_begun
        try:
            self._check_key(exchange)
            endpoint = ENDPOINTS.get(exchange.path)
            if endpoint is None:
                await self._serve_page(scope, receive, exchange)
            elif exchange.method != "POST":
                raise MethodNotAllowed(f"{exchange.path} does not take {exchange.method}", allow="POST")
            else:
                await endpoint(self._service, exchange)
        except ClientLeft:
            pass
        except DisaggError as error:
            await self._refuse(exchange, error)
        except Exception as error:
            log.exception("request failed id=%s", exchange.request_id)
            await self._refuse(exchange, error)

    async def _serve_page(self, scope: Scope, receive: Receive, exchange: Exchange) -> None:
        scope.setdefault("state", {})["exchange"] = exchange
        await self._pages(scope, receive, exchange.send_with_id)

    def _check_key(self, exchange: Exchange) -> None:
        if not self._api_keys.is_needed or not exchange.path.startswith(_KEYED) or exchange.path == _OPEN:
            return
        scheme, _, given = exchange.authorization.partition(b" ")
        if not self._api_keys.accept(given.strip()) or scheme.lower() != b"bearer":
            raise Unauthorized("a valid API key is needed: Authorization: Bearer KEY")

    async def _refuse(self, exchange: Exchange, error: Exception) -> None:
        if exchange.started:
            if exchange.streaming:
                # The status is out: the error goes where clients look for it, and no [DONE] follows.
                await exchange.end(error_event(error_body(error, exchange.request_id)))
            return  # a stream's record is the generator's, and a page has noted its own error
        self._service.note(exchange, error)
        reply = reply_to(error, exchange.request_id)
        if isinstance(error, BodyTooLarge):
            await exchange.answer_and_discard(reply.status, reply.body, reply.headers)
        else:
            await exchange.answer(reply.status, reply.body, reply.headers)

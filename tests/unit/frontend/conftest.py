from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from disagg.frontend import App, TextModel, create_app
from support.checkpoints import write_tokenizer
from support.generator import FakeGenerator

MODEL = "test-model"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with a byte-level tokenizer and a ChatML template."""
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def text(folder: Path) -> Iterator[TextModel]:
    text = TextModel.from_folder(folder)
    yield text
    text.close()


@pytest.fixture
def ids(text: TextModel) -> Callable[[str], list[int]]:
    """Tokenize, as the model would have spoken it."""
    return lambda words: text.tokenizer.encode(words, False)


@pytest.fixture
def generator() -> FakeGenerator:
    return FakeGenerator()


@pytest.fixture
def app(generator: FakeGenerator, text: TextModel) -> App:
    return create_app(generator, text, MODEL, max_body_bytes=100_000)


@pytest.fixture
async def http(app: App) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def chat() -> Callable[..., dict[str, Any]]:
    """Make the body of a chat request."""
    return lambda content="hi", **fields: {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        **fields,
    }


@pytest.fixture
def completion() -> Callable[..., dict[str, Any]]:
    """Make the body of a completion request."""
    return lambda prompt="hi", **fields: {"model": MODEL, "prompt": prompt, **fields}

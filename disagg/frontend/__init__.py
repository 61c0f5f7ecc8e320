"""The OpenAI surface: HTTP, schemas, chat templates, tokenizing, detokenizing, SSE, errors, keys.

May import `protocol`, `config`, `errors` and `checkpoint`; never torch or transformers. What runs
the models is behind `Generator`. Read `generator.py` first, then `app.py` and `completions.py`.

To serve, in a running loop (uvloop's, for its TCP_NODELAY and speed):

    text = TextModel.from_folder(files.path, chat_template=None)
    app = create_app(generator, text, "served name", api_keys=None, max_body_bytes=8 << 20)
    server = HttpServer(app, host, port)   # binds: server.port is known, connections queue
    task_group.create_task(server.run())   # until server.stop(), which lets open requests end;
                                           # server.abort() or cancelling ends them at once
"""

from disagg.frontend.app import App, create_app
from disagg.frontend.generator import DecisionOverride, Delta, GenerateRequest, Generator, Ticket
from disagg.frontend.server import HttpServer
from disagg.frontend.text import TextModel
from disagg.frontend.tokenizer import Tokenizer

__all__ = [
    "App",
    "DecisionOverride",
    "Delta",
    "GenerateRequest",
    "Generator",
    "HttpServer",
    "TextModel",
    "Ticket",
    "Tokenizer",
    "create_app",
]

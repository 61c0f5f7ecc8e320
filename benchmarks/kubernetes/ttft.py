"""Times to first token of one client, with nothing but the standard library: it runs in a pod too.

Usage: ttft.py URL REQUESTS PROMPT_TOKENS. Each prompt is new, so that each is computed and moved. Prints one
JSON line: `{"event": "ttft", "seconds": [...], "kv_bytes": the bytes that moved}`.
"""

import http.client
import json
import random
import sys
import time
from urllib.parse import urlsplit


def ask(connection: http.client.HTTPConnection, draw: random.Random, prompt_tokens: int) -> tuple[float, str]:
    """Seconds until the first token's event, and the request's id."""
    body = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "prompt": [draw.randrange(1000, 40000) for _ in range(prompt_tokens)],
        "max_tokens": 4,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{response.status}: {response.read().decode()}")
    first = next(time.perf_counter() for line in response if line.startswith(b"data: {"))
    response.read()
    return first - began, response.headers["x-request-id"]


def main() -> None:
    """Ask, one request after another over one connection."""
    url, requests, prompt_tokens = urlsplit(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    draw = random.Random(0)
    connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=120)
    for _ in range(3):
        ask(connection, draw, prompt_tokens)
    answers = [ask(connection, draw, prompt_tokens) for _ in range(requests)]
    moved = 0
    for _, request_id in answers:
        connection.request("GET", f"/disagg/requests/{request_id}")
        record = json.loads(connection.getresponse().read())
        moved += record["kv"]["bytes_received"]
    seconds = [seconds for seconds, _ in answers]
    print(json.dumps({"event": "ttft", "seconds": seconds, "kv_bytes": moved}), flush=True)


if __name__ == "__main__":
    main()

"""What `helm test` runs: a chat completion through prefill and decode, and who served it."""

import http.client
import json
import os
import ssl
from pathlib import Path

HEADERS = {"content-type": "application/json", "x-disagg-decision": "always"}
KEYS = Path("/etc/disagg/api-keys/keys")
if KEYS.exists():
    keys = [line.strip() for line in KEYS.read_text().splitlines()]
    HEADERS["authorization"] = f"Bearer {next(key for key in keys if key and not key.startswith('#'))}"

host = os.environ["ROUTER"]
if os.environ["TLS"] == "true":
    unverified = ssl._create_unverified_context()
    connection = http.client.HTTPSConnection(host, 8000, timeout=120, context=unverified)
else:
    connection = http.client.HTTPConnection(host, 8000, timeout=120)


def call(method, path, body=None):
    connection.request(method, path, body and json.dumps(body), HEADERS)
    response = connection.getresponse()
    text = response.read()
    assert response.status == 200, f"{method} {path}: {response.status} {text.decode()}"
    return response.getheader("x-request-id"), json.loads(text)


_, models = call("GET", "/v1/models")
question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
request = {"model": models["data"][0]["id"], "messages": question, "max_tokens": 16, "temperature": 0}
request_id, answer = call("POST", "/v1/chat/completions", request)
_, record = call("GET", f"/disagg/requests/{request_id}")
kv = record["kv"] or {"bytes_received": 0, "pages": 0}
said = answer["choices"][0]["message"]["content"]
prefill, decode = record["prefill_worker"], record["decode_worker"]
moved = f"{kv['bytes_received']} bytes of KV in {kv['pages']} pages"
# One line, for Helm 4 prints it as one.
print(f"{said!r} by prefill worker {prefill} and decode worker {decode}, which got {moved}")
if os.environ["DISAGGREGATED"] == "true":
    assert record["decision"] == "disaggregated", record
    assert kv["bytes_received"] == kv["bytes_expected"] > 0, record

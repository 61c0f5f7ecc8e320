"""Steady streaming load, run in a pod: every answer is compared with the one given in quiet.

Usage: load_client.py URL CLIENTS MIN_REQUESTS. Goes on until /tmp/stop exists and so many requests
have been sent; prints a JSON line for each lost request and one for the sum. A request is lost when
its connection breaks, its status is not 200, its stream does not end with `[DONE]`, or its text,
finish reason or token count is another than in quiet.
"""

import http.client
import json
import select
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

TOPICS = ["the sea", "a train", "winter", "bread", "the moon", "a library", "rain", "a bicycle"]
MAX_TOKENS = 16


class Client:
    """One connection, kept as long as the server keeps it, as OpenAI's clients do."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, topic: str) -> dict:
        """One streamed answer."""
        connection = self._connection
        if connection is None or connection.sock is None or select.select([connection.sock], [], [], 0)[0]:
            if connection is not None:
                connection.close()
            connection = http.client.HTTPConnection(self._address.hostname, self._address.port, timeout=120)
        self._connection = connection
        return ask(connection, topic)


def ask(connection: http.client.HTTPConnection, topic: str) -> dict:
    """One streamed answer; a connection that breaks is closed."""
    question = f"Write a short story about {topic}. Begin with the words: Once upon a time"
    body = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            return {"status": response.status, "body": response.read().decode()}
        text, reason, tokens, done = "", None, None, False
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if data == "[DONE]":
                done = True
            elif data:
                event = json.loads(data)
                for choice in event.get("choices", []):
                    text += choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
        return {"text": text, "finish_reason": reason, "tokens": tokens, "done": done}
    except (OSError, http.client.HTTPException, ValueError) as error:
        connection.close()
        return {"error": f"{type(error).__name__}: {error}"}


class Load:
    """The clients and what they count."""

    def __init__(self, url: str, min_requests: int) -> None:
        self._url = url
        self._min_requests = min_requests
        quiet = Client(url)
        self._expected = {topic: quiet.ask(topic) for topic in TOPICS}
        self._lock = threading.Lock()
        self.sent = 0
        self.lost = 0
        self.slowest_s = 0.0
        for topic, answer in self._expected.items():
            if not answer.get("done") or answer["tokens"] != MAX_TOKENS:
                raise SystemExit(f"no answer in quiet about {topic}: {answer}")
        print(json.dumps({"event": "started"}), flush=True)

    def run(self) -> None:
        """One client."""
        client = Client(self._url)
        while not (Path("/tmp/stop").exists() and self.sent >= self._min_requests):
            with self._lock:
                number = self.sent
                self.sent += 1
            topic = TOPICS[number % len(TOPICS)]
            began_at = time.monotonic()
            answer = client.ask(topic)
            took_s = time.monotonic() - began_at
            with self._lock:
                self.slowest_s = max(self.slowest_s, took_s)
                if answer != self._expected[topic]:
                    self.lost += 1
                    lost = {"event": "lost", "number": number, "took_s": took_s, "answer": answer}
                    print(json.dumps({**lost, "expected": self._expected[topic]}), flush=True)


def main() -> None:
    """Run the clients to the end."""
    url, clients, min_requests = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    load = Load(url, min_requests)
    threads = [threading.Thread(target=load.run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"event": "sum", "sent": load.sent, "lost": load.lost, "slowest_s": load.slowest_s}))


if __name__ == "__main__":
    main()

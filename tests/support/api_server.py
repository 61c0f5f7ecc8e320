"""The part of a Kubernetes API server that discovery sees, over real HTTP, with the faults it can have."""

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

SERVICE_LABEL = "kubernetes.io/service-name"
END = object()


def make_endpoint(
    address: str,
    *,
    pod: str | None = "pod",
    ready: bool | None = True,
    serving: bool | None = None,
    terminating: bool | None = None,
) -> dict[str, Any]:
    conditions = {"ready": ready, "serving": serving, "terminating": terminating}
    endpoint: dict[str, Any] = {
        "addresses": [address],
        "conditions": {name: value for name, value in conditions.items() if value is not None},
        "nodeName": "node",
    }
    if pod is not None:
        endpoint["targetRef"] = {"kind": "Pod", "name": pod, "uid": f"uid-{pod}", "namespace": "default"}
    return endpoint


def make_slice(
    name: str,
    endpoints: list[dict[str, Any]],
    *,
    service: str = "chat-decode",
    family: str = "IPv4",
    port: int = 5600,
) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "default", "labels": {SERVICE_LABEL: service}},
        "addressType": family,
        "endpoints": endpoints,
        "ports": [{"name": "control", "port": port, "protocol": "TCP"}],
    }


def make_pod(
    name: str,
    phase: str = "Running",
    *ips: str,
    uid: str | None = None,
    owner: str | None = "ReplicaSet",
) -> dict[str, Any]:
    status: dict[str, Any] = {"phase": phase}
    if ips:
        status |= {"podIP": ips[0], "podIPs": [{"ip": ip} for ip in ips]}
    metadata: dict[str, Any] = {"name": name, "uid": uid or f"uid-{name}", "namespace": "default"}
    if owner is not None:
        metadata["ownerReferences"] = [{"kind": owner, "name": "owner", "controller": True}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status}


def make_container_end(
    exit_code: int, message: str, container_id: str = "containerd://0123"
) -> dict[str, Any]:
    return {
        "terminated": {
            "exitCode": exit_code,
            "message": message,
            "finishedAt": "2026-01-01T00:00:00Z",
            "containerID": container_id,
            "reason": "Error",
        }
    }


class ApiServer:
    """Slices and pods, their versions and their watchers. Stop it and start it again: the port stays."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, dict[str, Any]]] = {"EndpointSlice": {}, "Pod": {}}
        """By kind and name."""
        self.version = 100
        self.oldest = 0
        """Watches from before are answered 410."""
        self.is_forbidden: set[str] = set()
        """Kinds that this account may not ask for."""
        self.silent = threading.Event()
        """Set, watches are accepted and then nothing is ever said: their connections are half dead."""
        self.events: dict[str, dict[str, Any]] = {}
        """Those that were made, by name."""
        self.expire_within = False
        """410 comes as an event of the watch, not as its status: servers do either."""
        self.list_answers: list[tuple[int, bytes]] = []
        """Answer the next lists so."""
        self.requests: queue.Queue[tuple[str, dict[str, str]]] = queue.Queue()
        """(list or watch, query), as they come."""
        self._history: list[tuple[int, str, dict[str, Any]]] = []
        self._watchers: list[tuple[str, queue.Queue[Any]]] = []
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"api": self})
        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="api-server")
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections and break those there are."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            self._thread.join()
            self.end_watches()

    @property
    def is_up(self) -> bool:
        return self._server is not None

    def num_watchers(self, kind: str = "EndpointSlice") -> int:
        return sum(watched == kind for watched, _ in self._watchers)

    def put(self, part: dict[str, Any]) -> None:
        with self._lock:
            known, name = self.objects[part["kind"]], part["metadata"]["name"]
            change = "MODIFIED" if name in known else "ADDED"
            known[name] = part
            self._tell(change, part)

    def delete(self, name: str, kind: str = "EndpointSlice") -> None:
        with self._lock:
            self._tell("DELETED", self.objects[kind].pop(name))

    def bookmark(self) -> None:
        with self._lock:
            self._tell("BOOKMARK", {"kind": "EndpointSlice", "metadata": {}})

    def forget(self) -> None:
        """Compact: no watch can follow on from a version before this one."""
        with self._lock:
            self.version += 1
            self.oldest = self.version
            self._history.clear()

    def end_watches(self) -> None:
        """End every watch, as a server does in time."""
        with self._lock:
            for _, watcher in self._watchers:
                watcher.put(END)

    def write_kubeconfig(self, path: Path, namespace: str = "default") -> Path:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [
                {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}
            ],
            "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "test", "user": {"token": "secret"}}],
        }
        path.write_text(json.dumps(config))
        return path

    def _tell(self, change: str, part: dict[str, Any]) -> None:
        self.version += 1
        part["metadata"]["resourceVersion"] = str(self.version)
        event = {"type": change, "object": json.loads(json.dumps(part))}
        self._history.append((self.version, part["kind"], event))
        for kind, watcher in self._watchers:
            if kind == part["kind"]:
                watcher.put(event)

    def listed(self, kind: str) -> tuple[int, bytes]:
        with self._lock:
            if self.list_answers:
                return self.list_answers.pop(0)
            if kind in self.is_forbidden:
                return 403, b'{"kind":"Status","message":"forbidden"}'
            items = list(self.objects[kind].values())
            metadata = {"resourceVersion": str(self.version)}
            return 200, json.dumps({"kind": f"{kind}List", "metadata": metadata, "items": items}).encode()

    def made(self, event: dict[str, Any]) -> tuple[int, bytes]:
        with self._lock:
            if "Event" in self.is_forbidden:
                return 403, b'{"kind":"Status","message":"forbidden"}'
            if event["metadata"]["name"] in self.events:
                return 409, b'{"kind":"Status","reason":"AlreadyExists"}'
            self.events[event["metadata"]["name"]] = event
            return 201, json.dumps(event).encode()

    @contextmanager
    def watching(self, kind: str, since: int) -> Iterator["queue.Queue[Any]"]:
        watcher: queue.Queue[Any] = queue.Queue()
        with self._lock:
            for version, changed, event in self._history:
                if version > since and changed == kind:
                    watcher.put(event)
            self._watchers.append((kind, watcher))
        try:
            yield watcher
        finally:
            with self._lock:
                self._watchers.remove((kind, watcher))


class _Handler(BaseHTTPRequestHandler):
    api: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if not self.api.is_up:  # a connection that was kept
            self.close_connection = True
            return
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        is_watch = query.get("watch", "").lower() == "true"
        self.api.requests.put(("watch" if is_watch else "list", query | {"path": url.path}))
        assert self.headers["Authorization"] == "Bearer secret"
        kind = "Pod" if url.path.endswith("/pods") else "EndpointSlice"
        if is_watch:
            self._watch(kind, int(query["resourceVersion"]))
        else:
            self._answer(*self.api.listed(kind))

    def do_POST(self) -> None:
        assert self.headers["Authorization"] == "Bearer secret"
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.api.requests.put(("create", {"path": urlsplit(self.path).path}))
        self._answer(*self.api.made(body))

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _watch(self, kind: str, since: int) -> None:
        expired = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
        is_old = since < self.api.oldest
        if is_old and not self.api.expire_within:
            self._answer(410, json.dumps(expired).encode())
            return
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        if is_old:
            self._chunk({"type": "ERROR", "object": expired})
            self.wfile.write(b"0\r\n\r\n")
            return
        with self.api.watching(kind, since) as watcher:
            while (event := watcher.get()) is not END:
                if not self.api.silent.is_set():
                    self._chunk(event)
        if self.api.silent.is_set():
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, event: dict[str, Any]) -> None:
        # In two parts: an event is a line, not a chunk.
        line = json.dumps(event).encode() + b"\n"
        for part in (line[:20], line[20:]):
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.flush()

"""The API server, by the official client. It shows in this file alone, and is imported late: it is large.

Bodies are decoded here into the few fields that we read; the client's own models would take longer
to build than to use. Every failure of client, connection or content is an `ApiError`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Raw, Struct

from disagg.errors import ConfigError
from disagg.kubernetes.pods import INSTANCE_LABEL, Pod
from disagg.kubernetes.refusals import Refusal
from disagg.kubernetes.slices import ROUTER_SERVICE, SERVICE_LABEL, WORKER_SERVICES, EndpointSlice
from disagg.kubernetes.watch import (
    ApiError,
    Bookmark,
    Changed,
    Event,
    Expired,
    KubeObject,
    Listed,
    Metadata,
    Removed,
)

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
ANSWER_TIMEOUT_S = 10.0
WATCH_S = 30
"""A watch is ended by the server and opened anew this often, so that silence means something."""
SILENCE_S = 40.0
"""A watch that has been silent longer than it should last is dead, whatever its connection says."""
GONE, CONFLICT = 410, 409

T = TypeVar("T")
K = TypeVar("K", bound=KubeObject)


class _WatchEvent(Struct, frozen=True):
    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"]
    object: Raw


class _Object(Struct, frozen=True):
    metadata: Metadata


class _Status(Struct, frozen=True):
    code: int | None = None
    message: str | None = None


class KubernetesApi:
    """One namespace of the cluster this process runs in, or of the current kubeconfig."""

    def __init__(self, namespace: str | None, release: str) -> None:
        """Find the cluster; nothing is asked of it yet.

        Raises:
            ConfigError: There is neither a service account nor a kubeconfig.
        """
        import kubernetes

        configuration, context_namespace = _find_cluster(kubernetes)
        # One attempt each: `Watch` tries again, and knows what it waits for.
        configuration.retries = False
        namespace = namespace or context_namespace
        self._client = kubernetes.client.ApiClient(configuration)
        slices = kubernetes.client.DiscoveryV1Api(self._client).list_namespaced_endpoint_slice
        services = ",".join(f"{release}-{name}" for name in (*WORKER_SERVICES, ROUTER_SERVICE))
        self.slices = Resource(EndpointSlice, slices, namespace, f"{SERVICE_LABEL} in ({services})")
        core = kubernetes.client.CoreV1Api(self._client)
        self.pods = Resource(Pod, core.list_namespaced_pod, namespace, f"{INSTANCE_LABEL}={release}")
        self._namespace = namespace
        self._create_event = core.create_namespaced_event
        self._api_exception = kubernetes.client.ApiException

    def post(self, refusal: Refusal) -> None:
        """Make the event that tells of it, unless another router has; raises `ApiError`."""
        event, timeout = refusal.to_event(self._namespace), (ANSWER_TIMEOUT_S, ANSWER_TIMEOUT_S)
        with _translated("Event"):
            try:
                self._create_event(self._namespace, event, _request_timeout=timeout)
            except self._api_exception as error:
                if error.status != CONFLICT:
                    raise

    def interrupt(self) -> None:
        """End the watches that other threads wait in or are about to; there will be none after it."""
        self.slices.interrupt()
        self.pods.interrupt()

    def close(self) -> None:
        """Close every connection; no other thread may be asking."""
        self._client.rest_client.close()


class Resource(Generic[K]):
    """The objects of one kind; see `Source`. `kind` is called as the API calls it."""

    def __init__(self, kind: type[K], call: Callable[..., Any], namespace: str, selector: str) -> None:
        import kubernetes

        self._kind = kind
        self._call = call
        self._namespace = namespace
        self._selector = selector
        self._api_exception = kubernetes.client.ApiException
        self._watching: Any = None
        self._is_interrupted = False

    def list(self) -> Listed[K]:
        """Return every one."""
        with _translated(self._kind.__name__):
            response = self._ask((ANSWER_TIMEOUT_S, ANSWER_TIMEOUT_S))
            try:
                body = response.read()
            finally:
                response.release_conn()
        listed: Listed[K] = _decode(body, Listed[self._kind])  # type: ignore[name-defined]
        if listed.kind != f"{self._kind.__name__}List":
            raise ApiError(f"the API server answers {listed.kind} and not {self._kind.__name__}List")
        return listed

    def watch(self, version: str) -> Iterator[Event[K]]:
        """Yield what has changed since `version`."""
        with _translated(self._kind.__name__):
            try:
                response = self._ask(
                    (ANSWER_TIMEOUT_S, SILENCE_S),
                    resource_version=version,
                    watch=True,
                    allow_watch_bookmarks=True,
                    timeout_seconds=WATCH_S,
                )
            except self._api_exception as error:
                if error.status != GONE:
                    raise
                yield Expired()
                return
            self._watching = response
            try:
                for line in () if self._is_interrupted else _lines(response):
                    yield _to_event(_decode(line, _WatchEvent), self._kind)
            finally:
                self._watching = None
                response.close()  # not to be used again: it may hold the rest of an event

    def interrupt(self) -> None:
        """End the watch that another thread waits in or is about to; there will be none after it."""
        self._is_interrupted = True
        response = self._watching
        if response is not None:
            with contextlib.suppress(*_failures()):
                response.shutdown()

    def _ask(self, timeout: tuple[float, float], **options: Any) -> Any:
        return self._call(
            self._namespace,
            label_selector=self._selector,
            _preload_content=False,
            _request_timeout=timeout,
            **options,
        )


def _failures() -> tuple[type[Exception], ...]:
    """Of client, connection or content."""
    import kubernetes
    import urllib3

    return kubernetes.client.OpenApiException, urllib3.exceptions.HTTPError, OSError, ValueError


@contextlib.contextmanager
def _translated(kind: str) -> Iterator[None]:
    import kubernetes

    try:
        yield
    except _failures() as error:
        is_answer = isinstance(error, kubernetes.client.ApiException)
        what = f"{getattr(error, 'status', None)} {getattr(error, 'reason', None)}" if is_answer else error
        raise ApiError(f"{kind}: {type(error).__name__}: {what}") from error


def _find_cluster(kubernetes: Any) -> tuple[Any, str]:
    """Return the client's configuration, and the namespace that goes with it."""
    configuration = kubernetes.client.Configuration()
    try:
        kubernetes.config.load_incluster_config(client_configuration=configuration)
        return configuration, NAMESPACE_FILE.read_text().strip()
    except (kubernetes.config.ConfigException, OSError) as in_cluster:
        try:
            # Given, for the client reads the variable only when it is imported.
            file = os.environ.get("KUBECONFIG")
            kubernetes.config.load_kube_config(file, client_configuration=configuration)
            _, context = kubernetes.config.list_kube_config_contexts(file)
        except kubernetes.config.ConfigException as error:
            raise ConfigError(
                f"discover needs a service account ({in_cluster}) or a kubeconfig ({error})"
            ) from error
        return configuration, context["context"].get("namespace", "default")


def _lines(response: Any) -> Iterator[bytes]:
    """Split a watch's body, as it comes, into its lines: one event each."""
    rest = b""
    for chunk in response.stream(None):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line for line in whole if line)


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise ApiError(f"the API server's answer is not understood: {error}") from error


def _to_event(event: _WatchEvent, kind: type[K]) -> Event[K]:
    match event.type:
        case "ERROR":
            status = _decode(bytes(event.object), _Status)
            if status.code == GONE:
                return Expired()
            raise ApiError(f"{status.code} {status.message}")
        case "BOOKMARK":
            return Bookmark(_decode(bytes(event.object), _Object).metadata.resource_version)
        case "DELETED":
            return Removed(_decode(bytes(event.object), kind))
        case _:
            return Changed(_decode(bytes(event.object), kind))

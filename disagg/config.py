"""Typed configuration: one frozen struct per process, composed of one struct per subject.

Flags, environment names, the README's table and the chart's schema are generated from these
fields, so a description is written once. Precedence: file < environment < flag. Leaf names are
unique across a composition: a leaf `lease_ttl_s` is the flag `--lease-ttl-s` and the variable
`DISAGG_LEASE_TTL_S`. Build with `msgspec.convert`, which checks; the constructor does not.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, inspect, to_builtins

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
RoleName = Literal["prefill", "decode", "unified"]
PrefixCacheName = Literal["radix", "none"]
RoutingPolicyName = Literal["cost", "prefix", "least_load", "round_robin"]
DisaggregateMode = Literal["always", "auto", "never"]
TransportBackend = Literal["auto", "nixl", "cuda_ipc", "nccl"]
Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]


class ModelConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model, and in what arithmetic."""

    model: Annotated[
        str,
        Meta(description="Hugging Face id, a directory of safetensors, or a .gguf file."),
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    served_model_name: Annotated[
        str | None, Meta(description="Name in the API; by default the model as given.")
    ] = None
    dtype: Annotated[Dtype, Meta(description="Arithmetic of weights, activations and KV.")] = "auto"
    device: Annotated[Device, Meta(description="Where the engine runs.")] = "auto"
    max_model_len: Annotated[
        Positive | None, Meta(description="Longest prompt plus output; by default the model's context.")
    ] = None
    load_format: Annotated[
        Literal["auto", "dummy"],
        Meta(description="`dummy` makes random weights of the model's shape."),
    ] = "auto"
    quantization: Annotated[
        Literal["fp8"] | None,
        Meta(
            description="`fp8` rounds the layers' matrices to eight bits as they are loaded, and what "
            "they are multiplied with; on Hopper GPUs."
        ),
    ] = None
    chat_template: Annotated[
        str | None, Meta(description="File with a Jinja chat template; by default the model's own.")
    ] = None
    seed: Annotated[
        int,
        Meta(
            ge=0, description="Seed of dummy weights and of offline draws; a served request brings its own."
        ),
    ] = 0


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scheduler, memory and kernels of one engine."""

    tensor_parallel_size: Annotated[
        int, Meta(ge=1, description="Processes one worker's model is split over.")
    ] = 1
    max_num_seqs: Annotated[int, Meta(ge=1, description="Most sequences in one step.")] = 64
    max_num_batched_tokens: Annotated[
        Positive | None,
        Meta(
            description="Token budget of one step: decodes first, prefill chunks with the rest; "
            "by default 1024 on a GPU, 256 on a CPU."
        ),
    ] = None
    block_size: Annotated[int, Meta(ge=1, le=256, description="Tokens of one KV page.")] = 16
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8"],
        Meta(
            description="Of KV pages: `auto` is dtype; `fp8` is e4m3, scaled by 1: twice the tokens in as "
            "many bytes, on a Hopper GPU."
        ),
    ] = "auto"
    kv_cache_memory_bytes: Annotated[
        Positive | None,
        Meta(description="Bytes of the KV pool of each rank; on a CPU 1 GiB by default."),
    ] = None
    gpu_memory_utilization: Annotated[
        float, Meta(gt=0, le=1, description="Share of the GPU's memory for weights, activations and KV.")
    ] = 0.9
    attention_backend: Annotated[
        str,
        Meta(
            description="`auto`, `cpu`, `cuda` (decode only), `fi` or `reference`; "
            "one for both phases, or PREFILL,DECODE."
        ),
    ] = "auto"
    prefix_cache: Annotated[PrefixCacheName, Meta(description="How computed pages are found again.")] = (
        "radix"
    )
    num_threads: Annotated[
        Positive | None, Meta(description="CPU threads of each rank; by default all cores.")
    ] = None


class LeaseConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long held pages outlive their router."""

    lease_ttl_s: Annotated[
        float, Meta(gt=0, description="Backstop: a lease that nobody renews ends after this long.")
    ] = 30.0
    transfer_timeout_s: Annotated[
        float, Meta(gt=0, description="A prefill worker posts no KV write later than this after accepting.")
    ] = 60.0
    drain_seconds: Annotated[
        float, Meta(ge=0, description="How long a stopping process lets running requests end.")
    ] = 120.0


class TransferConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How KV pages move between workers."""

    transport_backend: Annotated[
        TransportBackend,
        Meta(
            description="`nixl`; `cuda_ipc`, between GPUs of one host and nothing else; `nccl`, between "
            "GPUs, of both pools then; or `auto`: `cuda_ipc` where that is possible, else `nixl`."
        ),
    ] = "auto"


class NodesConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker whose ranks are spread over several nodes."""

    num_nodes: Annotated[
        int, Meta(ge=1, description="Nodes that one worker's ranks are spread over, as many on each.")
    ] = 1
    node_rank: Annotated[
        int, Meta(ge=0, description="This node; 0 leads, the others run ranks for it and nothing else.")
    ] = 0
    leader_address: Annotated[str | None, Meta(description="Host of node 0, for the other nodes.")] = None
    node_port: Annotated[
        int, Meta(ge=1, le=65535, description="Port on node 0 to which the other nodes connect.")
    ] = 5601


TransportKeys = Annotated[
    str | None,
    Meta(
        description="Folder with the keys that links between processes are encrypted and authenticated with: "
        "`current`, and during a rotation `next` or `previous`, of 32 random bytes each."
    ),
]
AdvertiseHost = Annotated[
    Annotated[str, Meta(min_length=1)] | None,
    Meta(
        description="Address at which routers and other workers reach this one; by default the host of "
        "`control`.",
    ),
]


class WorkerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker process."""

    role: Annotated[RoleName, Meta(description="What this worker does.")] = "unified"
    worker_id: Annotated[str | None, Meta(description="Stable name; by default the role and host.")] = None
    control: Annotated[
        str,
        Meta(
            description="Address of the control socket, tcp://HOST:PORT or ipc://PATH; other than loopback "
            "only with transport keys. tcp://*:PORT is every interface, of IPv4 and IPv6."
        ),
    ] = "tcp://127.0.0.1:5600"
    advertise_host: AdvertiseHost = None
    transport_keys: TransportKeys = None
    http_host: Annotated[
        str, Meta(description="Interface of /health, /live, /metrics and /drain; * is every one.")
    ] = "127.0.0.1"
    http_port: Annotated[int, Meta(ge=0, le=65535, description="Port of the same; 0 picks a free one.")] = (
        8080
    )
    pod_uid: Annotated[
        str | None,
        Meta(
            description="Uid of the Kubernetes pod that no other worker is in: the next worker there proves "
            "that this one has ended."
        ),
    ] = None
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    lease: LeaseConfig = LeaseConfig()
    transfer: TransferConfig = TransferConfig()
    nodes: NodesConfig = NodesConfig()


class RoutingConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests are queued and placed."""

    routing_policy: Annotated[
        RoutingPolicyName,
        Meta(description="How workers are picked; `cost` weighs prefix, queue and KV bytes."),
    ] = "cost"
    disaggregate: Annotated[
        DisaggregateMode,
        Meta(description="Prefill in the other pool: `always`, `never`, or `auto` by predicted time."),
    ] = "always"
    max_queued_tokens: Annotated[
        int,
        Meta(ge=1, description="Prompt tokens that may wait in the router; past that 429 with Retry-After."),
    ] = 262_144
    max_attempts: Annotated[int, Meta(ge=1, description="Attempts of one sequence before it fails.")] = 5
    worker_timeout_s: Annotated[
        float, Meta(gt=0, description="A worker that is silent for this long is lost.")
    ] = 2.0
    ledger_size: Annotated[int, Meta(ge=1, description="Ledger records kept in memory.")] = 10_000


ApiKey = Annotated[str, Meta(pattern=r"^[!-~]+\Z")]
"""What an `authorization` header can carry: printable ASCII without blanks."""


class RouterConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One router process."""

    host: Annotated[
        str, Meta(description="Interface of the OpenAI API; * is every one, of IPv4 and IPv6.")
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port of the same; 0 picks a free one.")] = 8000
    api_key: Annotated[
        tuple[ApiKey, ...], Meta(description="Key that clients must send; may be given several times.")
    ] = ()
    api_key_file: Annotated[
        str | None,
        Meta(description="File with more of them, one a line; read again when it changes."),
    ] = None
    tls_certificate: Annotated[
        str | None,
        Meta(description="PEM file with the certificate and what leads to its root: the port speaks HTTPS."),
    ] = None
    tls_key: Annotated[
        str | None, Meta(description="PEM file with its key. Both are read again when they change.")
    ] = None
    max_body_bytes: Annotated[int, Meta(ge=1, description="Largest request body.")] = 8 * 1024 * 1024
    workers: Annotated[
        tuple[str, ...], Meta(description="Control addresses of workers; may be given several times.")
    ] = ()
    discover: Annotated[
        str | None, Meta(description="Kubernetes release whose workers are found by its EndpointSlices.")
    ] = None
    discover_namespace: Annotated[
        str | None, Meta(description="Namespace of the release; by default this pod's own.")
    ] = None
    peer_bind: Annotated[
        str | None,
        Meta(description="Address where other routers ask for ledger records, tcp://HOST:PORT."),
    ] = None
    transport_keys: TransportKeys = None
    model: ModelConfig = ModelConfig()
    lease: LeaseConfig = LeaseConfig()
    routing: RoutingConfig = RoutingConfig()


class ServeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole system on this machine."""

    prefill: Annotated[
        Count | UnsetType, Meta(description="Prefill workers (default 1, with --unified alone 0).")
    ] = UNSET
    decode: Annotated[
        Count | UnsetType, Meta(description="Decode workers (default 1, with --unified alone 0).")
    ] = UNSET
    unified: Annotated[int, Meta(ge=0, description="Workers that do both: the aggregated baseline.")] = 0
    prefill_tp: Annotated[
        Positive | None,
        Meta(description="Tensor-parallel size of prefill workers; default --tensor-parallel-size."),
    ] = None
    decode_tp: Annotated[
        Positive | None,
        Meta(description="Tensor-parallel size of decode workers; default --tensor-parallel-size."),
    ] = None
    host: Annotated[
        str, Meta(description="Interface of the OpenAI API; * is every one, of IPv4 and IPv6.")
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port of the same; 0 picks a free one.")] = 8000
    api_key: Annotated[
        tuple[ApiKey, ...], Meta(description="Key that clients must send; may be given several times.")
    ] = ()
    max_body_bytes: Annotated[int, Meta(ge=1, description="Largest request body.")] = 8 * 1024 * 1024
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    lease: LeaseConfig = LeaseConfig()
    transfer: TransferConfig = TransferConfig()
    routing: RoutingConfig = RoutingConfig()


def leaves(kind: type[Struct], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], inspect.Field]]:
    """List the leaf fields of a composed struct with their paths."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    for field in info.fields:
        if isinstance(field.type, inspect.StructType):
            yield from leaves(field.type.cls, (*path, field.name))
        else:
            yield (*path, field.name), field


def flatten(config: Struct) -> dict[str, Any]:
    """Turn a configuration into the flat mapping that a configuration file holds."""
    flat: dict[str, Any] = {}
    for path, _ in leaves(type(config)):
        value: Any = config
        for part in path:
            value = getattr(value, part)
        if value is not None and value is not UNSET:
            flat[path[-1]] = to_builtins(value)
    return flat

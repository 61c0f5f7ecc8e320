"""Which control address a worker may have, and what others are told to reach it by."""

from disagg.config import WorkerConfig
from disagg.errors import ConfigError
from disagg.security import host_of, host_port, is_loopback, is_wildcard

_FORMS = "tcp://HOST:PORT or ipc://PATH"


def check_addresses(config: WorkerConfig) -> None:
    """Raise `ConfigError` where others could not reach this worker, or could without a key."""
    control, advertised = config.control, config.advertise_host
    host = _check_form(control)
    if host is not None and not is_loopback(host) and config.transport_keys is None:
        raise ConfigError(f"control must be a loopback address without transport_keys, got {control!r}")
    if advertised is not None and is_wildcard(advertised):
        raise ConfigError(f"advertise_host must be one address, got {advertised!r}")
    if advertised is not None and not is_loopback(advertised) and config.transport_keys is None:
        raise ConfigError(
            f"advertise_host must be a loopback address without transport_keys, got {advertised!r}"
        )
    if host is not None and is_wildcard(host) and advertised is None:
        raise ConfigError(f"advertise_host is needed where control is every interface, {control!r}")


def is_local(config: WorkerConfig) -> bool:
    """Whether all that reaches this worker is on this machine."""
    host = config.advertise_host or host_of(config.control)
    return host is None or is_loopback(host)


def advertised_address(bound: str, advertise_host: str | None) -> str:
    """Return where others reach the control socket that is bound to `bound`."""
    if advertise_host is None or host_of(bound) is None:
        return bound
    return f"tcp://{host_port(advertise_host, bound.rpartition(':')[2])}"


def http_url(host: str, port: int, advertise_host: str | None) -> str:
    """Return where others reach the http port that is bound to `host`."""
    if is_wildcard(host):
        host = advertise_host or "127.0.0.1"
    return f"http://{host_port(host, port)}"


def _check_form(control: str) -> str | None:
    """Return the host, or None for ipc."""
    scheme, separator, rest = control.partition("://")
    if not separator or not rest:
        raise ConfigError(f"control must be {_FORMS}, got {control!r}")
    if scheme == "ipc":
        return None
    if scheme != "tcp":
        raise ConfigError(f"control must be {_FORMS}, got scheme {scheme!r} in {control!r}")
    _, separator, port = rest.rpartition(":")
    if not separator or not (port == "*" or (port.isdigit() and int(port) <= 65535)):
        raise ConfigError(f"control must end in a port from 0 to 65535, got {control!r}")
    return host_of(control)

"""Write docs/configuration.md from the configuration structs: `make docs`."""

import sys
from pathlib import Path

from msgspec import NODEFAULT, UNSET, Struct

from disagg.cli.options import ENVIRONMENT_PREFIX, describe
from disagg.config import RouterConfig, ServeConfig, WorkerConfig, leaves

HEAD = """# Configuration

Every value can be set by a flag, by an environment variable and by a key of the file named with
`--config` (TOML or JSON). A flag wins over the environment, the environment over the file. This page is
generated from the code: `make docs`.
"""
COMMANDS: dict[str, tuple[type[Struct], str]] = {
    "serve [MODEL]": (ServeConfig, "A whole system on this machine. `MODEL` takes the place of `--model`."),
    "router": (RouterConfig, "One router."),
    "worker": (WorkerConfig, "One worker of either role."),
}


def configuration_page() -> str:
    """Return the whole page, Markdown."""
    return HEAD + "".join(_section(name, *about) for name, about in COMMANDS.items())


def _section(command: str, kind: type[Struct], summary: str) -> str:
    descriptions = describe(kind)
    rows = ["| flag | variable | default | meaning |", "| --- | --- | --- | --- |"]
    for path, field in leaves(kind):
        name = path[-1]
        default = "" if field.default in (None, (), UNSET, NODEFAULT) else f"`{field.default}`"
        rows.append(
            f"| `--{name.replace('_', '-')}` | `{ENVIRONMENT_PREFIX}{name.upper()}` "
            f"| {default} | {descriptions[path]} |"
        )
    return f"\n## disagg {command}\n\n{summary}\n\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(configuration_page())

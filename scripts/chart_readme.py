"""Write the chart's table of values and its schema from the comments in values.yaml.

Usage: chart_readme.py [--check]. A comment `# -- …` above a key describes it, as helm-docs reads it;
lines between two `# @schema` are merged into the key's JSON schema. Types come from the defaults,
and every map of ours has its keys, all of them and no others. `--check` writes nothing and fails where a
file is out of date.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent.parent / "charts" / "disagg"
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
ITEMS = {"extraArgs": "string", "apiKeys": "string", "capabilities": "string", "hostnames": "string"}
KUBERNETES = {"labels", "annotations", "nodeSelector", "affinity", "resources"}
"""Maps that are Kubernetes' own or the user's: any key."""
COMPLETE = "complete: helm upgrade to another chart takes --reset-then-reuse-values, not --reuse-values"
"""Helm prints it after "value must be". `--reuse-values` leaves a new chart's values without a default."""

OPENING = """# disagg

Serve large language models with prefill and decode in separate pools.

```
helm install chat charts/disagg
helm test chat
kubectl port-forward svc/chat-router 8000
```

One router, one prefill and one decode worker with the model that is in the image, on any cluster and
without a GPU. [docs/kubernetes.md](../../docs/kubernetes.md) has installing, sizing, upgrades, RDMA and
troubleshooting. This page is generated from `values.yaml`: `make chart-docs`.

| value | default | meaning |
| --- | --- | --- |
"""


class Comment:
    """What stands above a key."""

    def __init__(self, lines: list[str]) -> None:
        texts = [line.strip().removeprefix("#").strip() for line in lines]
        marks = [i for i, text in enumerate(texts) if text == "@schema"]
        first, last = (marks[0], marks[1]) if marks else (0, -1)
        self.schema: dict[str, Any] = yaml.safe_load("\n".join(texts[first + 1 : last])) if marks else {}
        self.text = " ".join(texts[last + 1 :]).removeprefix("-- ")


def comments(lines: list[str]) -> dict[str, Comment]:
    """Comments by dotted key."""
    found: dict[str, Comment] = {}
    path: list[tuple[int, str]] = []
    pending: list[str] = []
    for line in lines:
        text = line.strip()
        if text.startswith("#"):
            pending.append(line)
        elif text and not text.startswith("- ") and ":" in text:
            indent = len(line) - len(line.lstrip())
            path = [(at, key) for at, key in path if at < indent] + [(indent, text.partition(":")[0])]
            if pending:
                found[".".join(key for _, key in path)] = Comment(pending)
            pending = []
    return found


def schema(value: Any, path: str, notes: dict[str, Comment]) -> dict[str, Any]:
    """JSON schema of one value."""
    note = notes.get(path)
    own = note.schema if note else {}
    if "$ref" in own:
        return own
    result: dict[str, Any] = {"type": TYPES[type(value)]}
    name = path.rpartition(".")[2]
    if isinstance(value, dict) and name not in KUBERNETES and value:
        properties = {key: schema(below, f"{path}.{key}".lstrip("."), notes) for key, below in value.items()}
        result |= {"additionalProperties": False, "properties": properties, "required": list(properties)}
        result |= {"if": {"minProperties": len(properties)}, "else": {"const": COMPLETE}}
    elif isinstance(value, list):
        result["items"] = {"type": ITEMS.get(name, "object")}
    return result | own


def rows(value: dict[str, Any], path: str, notes: dict[str, Comment]) -> Iterator[str]:
    """Lines of the table."""
    for key, below in value.items():
        name = f"{path}.{key}".lstrip(".")
        note = notes.get(name)
        refers = note is not None and "$ref" in note.schema
        if isinstance(below, dict) and below and not refers:
            yield from rows(below, name, notes)
        else:
            if note is None or not note.text:
                raise SystemExit(f"values.yaml: {name} has no comment `# -- …`")
            default = "" if refers else f"`{json.dumps(below)}`"
            yield f"| `{name}` | {default} | {note.text} |"


def generated() -> dict[Path, str]:
    """What the files should hold."""
    text = (CHART / "values.yaml").read_text()
    values, notes = yaml.safe_load(text), comments(text.splitlines())
    # `global` is what charts above ours may set.
    whole = {"$schema": "http://json-schema.org/draft-07/schema#", **schema(values, "", notes)}
    whole["properties"]["global"] = {"type": "object"}
    return {
        CHART / "README.md": OPENING + "\n".join(rows(values, "", notes)) + "\n",
        CHART / "values.schema.json": json.dumps(whole, indent=2) + "\n",
    }


def main() -> None:
    """Write, or check."""
    for path, text in generated().items():
        if "--check" not in sys.argv:
            path.write_text(text)
        elif path.read_text() != text:
            raise SystemExit(f"{path} is out of date: make chart-docs")


if __name__ == "__main__":
    main()

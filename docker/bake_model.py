"""Put a model into a Hugging Face cache, dequantized, so that no pod downloads or converts at start.

Usage: bake_model.py [MODEL]. What `resolve` finds or converts is copied to `$HF_HUB_CACHE`.
"""

import os
import shutil
import sys
from pathlib import Path

from disagg.checkpoint import cache, resolve
from disagg.checkpoint.resolve import DEFAULT_MODEL

REVISION = "0" * 40
"""Of no commit: the files are ours."""


def main() -> None:
    """Convert and copy."""
    model = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_MODEL
    files = resolve(model)
    folder = Path(os.environ["HF_HUB_CACHE"]) / f"models--{model.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    shutil.copytree(files.path, snapshot, ignore=shutil.ignore_patterns(cache.MANIFEST_NAME))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)


if __name__ == "__main__":
    main()

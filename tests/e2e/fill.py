"""Puts the image's model on a claim, run in a pod that mounts it at /claim."""

import shutil
from pathlib import Path

(snapshot,) = Path("/opt/models").glob("models--*/snapshots/*")
shutil.copytree(snapshot, "/claim/smol")
Path("/claim").chmod(0o755)
print('{"event": "filled"}')

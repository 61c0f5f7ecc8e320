"""The worker process: one engine of any role, its leases, its KV transfers and its control socket.

May import everything below it: `engine`, `kv`, `links`, `models`, `parallel`, `transfer`, `protocol`,
`config`, `errors`; never `router` or `frontend`. Read `service.py` first (what is done with each message),
then `leases.py` (who may touch which pages), `main.py` (threads and their lives) and `ranks.py` (tensor
parallel).
"""

from disagg.worker.main import run_worker

__all__ = ["run_worker"]

"""Discovery: which workers and routers a release has, as the API server's EndpointSlices tell.

May import `errors` and `telemetry`. The official client shows in `client.py` alone and is imported
when a release is followed, never before. Read `slices.py` first, which turns slices into members,
then `watch.py`, which keeps the slices; `discovery.py` is the thread.
"""

from disagg.kubernetes.discovery import Discovery, follow_release
from disagg.kubernetes.slices import Condition, Member

__all__ = ["Condition", "Discovery", "Member", "follow_release"]

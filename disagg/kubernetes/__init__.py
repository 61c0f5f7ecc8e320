"""Discovery: which members a release has and which of its pods have ended, as the API server tells.

It is told one thing: why a pod's configuration cannot work.

May import `errors`, `security` and `telemetry`. The official client shows in `client.py` alone and is
imported when a release is followed, never before. Read `slices.py` first, which turns EndpointSlices into
members, `pods.py`, which finds the pods that have ended, and `refusals.py`, which finds those that cannot
start; then `watch.py`, which keeps objects of either kind; `discovery.py` is the threads.
"""

from disagg.kubernetes.discovery import Discovery, follow_release
from disagg.kubernetes.pods import PodEnd
from disagg.kubernetes.slices import Condition, Member

__all__ = ["Condition", "Discovery", "Member", "PodEnd", "follow_release"]

"""Processes of one system on this machine: start, watch, restart, stop.

May import `config`, `errors`, `checkpoint` and `security`; never torch. Read `supervisor.py` first.
`serve.py`, the view from the terminal, is imported by its command alone: every process of ours imports this
package.
"""

from disagg.supervisor.parent import die_with_parent
from disagg.supervisor.plan import ProcessSpec, plan_processes
from disagg.supervisor.supervisor import Supervisor

__all__ = ["ProcessSpec", "Supervisor", "die_with_parent", "plan_processes"]

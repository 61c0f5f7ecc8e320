"""Clients of any OpenAI server: the terminal chat and the load generator.

Imports `errors` alone of ours: what it talks to may be somebody else's server. Read `chat.py` for
the one, and for the other `workload.py` (what is asked, and when), `load.py` (asking) and
`report.py` (what came of it).
"""

from disagg.client.bench import run_benchmark
from disagg.client.chat import ChatServer, Conversation, run_chat
from disagg.client.load import Load, Outcome, run_load
from disagg.client.report import Goals, make_report, table_lines
from disagg.client.server import ServerError, ServerUnreachable, base_url, bearer, first_model
from disagg.client.workload import Workload, plan_arrivals, plan_prompts

__all__ = [
    "ChatServer",
    "Conversation",
    "Goals",
    "Load",
    "Outcome",
    "ServerError",
    "ServerUnreachable",
    "Workload",
    "base_url",
    "bearer",
    "first_model",
    "make_report",
    "plan_arrivals",
    "plan_prompts",
    "run_benchmark",
    "run_chat",
    "run_load",
    "table_lines",
]

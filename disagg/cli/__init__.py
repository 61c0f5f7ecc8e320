"""The `disagg` command: one module a subcommand, argument parsing and nothing else."""

from disagg.cli.main import main

__all__ = ["main"]

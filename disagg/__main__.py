"""`python -m disagg` is the `disagg` command."""

from disagg.cli import main

main()

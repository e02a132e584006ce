"""Entry point of `python -m worker`."""

from worker.cli import main

main()

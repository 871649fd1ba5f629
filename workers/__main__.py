"""`python -m workers`: the worker role."""

from relay.cli.main import main

main(["worker"])

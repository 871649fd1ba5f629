"""`python -m workers`: the worker role."""

from relay.cli import main

main(["worker"])

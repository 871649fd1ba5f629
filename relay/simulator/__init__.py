"""Well-behaved fake providers and a verifying subscriber, for `relay demo` and `python -m relay.simulator`."""

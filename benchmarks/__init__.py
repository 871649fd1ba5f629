"""How fast, how small: figures that are measured, each a ratio or a limit in one run. `python -m benchmarks` prints them."""

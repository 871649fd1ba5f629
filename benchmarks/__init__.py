"""How fast, how small: measured, each figure in one run. `python -m benchmarks` prints them."""

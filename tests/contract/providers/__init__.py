"""One suite for every provider, run on each against its simulator."""

"""Providers that can misbehave and a subscriber that verifies: for `relay demo` and the tests."""

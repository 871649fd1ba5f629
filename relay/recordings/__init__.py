"""Recordings: fetched from the provider, stored whole or not at all, served over signed links."""

"""The arq worker: hosts the runners, hears wake-ups, does the operator's long work."""

EXTRA_OFF_S = 900
"""An extra (contacts, recordings) that the provider refuses is left alone for this long; calls go on without it."""

"""The arq worker: hosts the runners, hears wake-ups, does the operator's long work."""

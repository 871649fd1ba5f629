"""The work of every lane, the operator's jobs and the sweep, hosted by an arq worker."""

# When the provider rejects an extra (contacts, recordings), it is paused for this long; calls go on without it.
EXTRA_PAUSE_S = 900

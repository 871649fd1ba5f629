"""6. What we say. Promise: one change, one event, one id, whichever way and however often we got to know of it."""

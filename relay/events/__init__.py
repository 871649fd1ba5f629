"""6. What we publish. Promise: one change, one event, one id, in whatever way and however often it was seen."""

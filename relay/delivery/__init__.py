"""7. Saying it until it is heard. Promise: at least once, almost never twice, in order per call."""

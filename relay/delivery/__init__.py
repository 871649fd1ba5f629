"""7. Saying it until it is heard. Promise: at least once and almost never twice, in order per call, to nobody forbidden."""

"""7. Delivering until acknowledged. Promise: at least once, almost never twice, in order per call."""

"""Over HTTP. Promise: what comes in is hostile until parsed; what goes out has no secret in it."""

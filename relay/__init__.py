"""Call Relay: phone systems are asked, subscribers are told, nothing is lost on the way."""

__version__ = "0.1.0"

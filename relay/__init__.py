"""Call Relay polls phone-system call records and delivers signed webhooks."""

__version__ = "0.1.0"

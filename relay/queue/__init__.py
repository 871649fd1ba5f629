"""Durable lanes: due work in partitions, handed out under leases. Knows nothing about calls or events."""

"""`relay demo`: fake providers, the whole relay and a verifying subscriber, live and on loopback only.

The relay is the same `relay up` that an operator starts, in a process of its own with an embedded store in a temporary
directory. With --chaos it and its store are killed with SIGKILL now and then. What the subscriber accepted is compared
with what the providers list; the summary names what was lost.

command: the options · measure: what is listed, delivered and lost · screen: how it is shown · process: the relay ·
run: the course of the demo
"""

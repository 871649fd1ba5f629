"""The commands that talk to a running relay over its API; each module is one noun or one errand.

Importing them is cheap, so that `relay --help` is quick: what is heavy is imported where it is used.
"""

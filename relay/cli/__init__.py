"""The command line: one module for each noun or verb, imported by `main.py` when its command runs."""

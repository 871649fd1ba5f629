"""Install hashed locks into the environment that runs this, showing one line of progress instead of pip's hundreds."""

import re
import subprocess
import sys
from pathlib import Path


def main(locks: list[str]) -> int:
    """Run pip; its errors and its exit code are ours."""
    total = sum(len(re.findall(r"^[\w.-]+==", Path(lock).read_text(), re.M)) for lock in locks)
    # Without --no-compile pip spends half of its time on bytecode of modules that no one imports.
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile", "--require-hashes"]
    arguments = [argument for lock in locks for argument in ("-r", lock)]
    process = subprocess.Popen([*pip, *arguments], stdout=subprocess.PIPE, text=True)  # noqa: S603
    checked = 0
    for line in process.stdout or ():
        if line.startswith(("Collecting ", "Requirement already satisfied")):
            checked += 1
            show(f"Fetching packages: {checked} of {total}")
        elif line.startswith("Installing collected packages"):
            show("Installing packages …")
    show("Packages installed" if process.wait() == 0 else "Packages not installed", end="\n")
    return process.returncode


def show(text: str, end: str = "") -> None:
    """Rewrite the line at a terminal; elsewhere write only the last one."""
    if sys.stdout.isatty():
        sys.stdout.write(f"\r\x1b[2K{text}{end}")
    elif end:
        sys.stdout.write(text + end)
    sys.stdout.flush()


sys.exit(main(sys.argv[1:]))

"""`relay erase`: erase a person from the relay."""

from typing import Annotated, Final

import typer

from relay.cli.jobs import counts_text, follow
from relay.cli.terminal import Terminal, YesOption, command, new_app

_COUNTS: Final = ("calls", "events", "recordings", "contacts", "deliveries")

app = new_app()


@command(app, "erase")
def erase(
    term: Terminal,
    number: Annotated[str, typer.Argument(help="The phone number in E.164 form, such as +12025550123.")],
    yes: YesOption = False,
) -> None:
    """Subscribers and providers keep their own records."""
    term.confirm("Erase all calls, events, recordings and contacts of this number?", yes=yes)
    result = term.api.post("/v1/erase", {"number": number})
    if result["job"] is None:
        counts = ", ".join(f"{name} {result[name]:,}" for name in _COUNTS)
        term.out.result(result, f"erased: {counts}")
        return
    job = follow(term, result["job"]["id"])
    result |= {"state": "done", "job": job}
    result |= {name: count for name, count in job["counts"].items() if name in result}
    term.out.result(result, f"erased: {counts_text(job)}")

"""`relay completeness`: what is missing of each source, day by day, and its repair."""

from collections.abc import Sequence
from typing import Annotated, Final

import typer

from relay.cli.client import path_of
from relay.cli.jobs import follow
from relay.cli.output import Column, local_time
from relay.cli.terminal import Terminal, command, new_app
from relay.domain.json import Json
from relay.errors import RelayError

_GAPS_SHOWN: Final = 50
_MOST_SOURCES: Final = 10_000
DAY_COLUMNS: Final = (
    Column("source", "source_id"),
    Column("day", "day"),
    Column("shown", "shown"),
    Column("ingested", "ingested"),
    Column("in progress", lambda day: day["in_progress"] or ""),
    Column("before start", lambda day: day["before_start"] or ""),
    Column("erased", lambda day: day["erased"] or ""),
    Column("quarantined", lambda day: day["quarantined"] or ""),
    Column("too old", lambda day: day["too_old"] or ""),
    Column("missing", "missing"),
    Column("read completely", lambda day: local_time(day["read_at"]) or "not so far"),
)
SUBSCRIPTION_COLUMNS: Final = (
    Column("source", "source_id"),
    Column("day", "day"),
    Column("subscription", "subscription_id"),
    *(Column(name, name) for name in ("delivered", "filtered", "failed", "waiting", "disabled", "earlier", "missing")),
)
GAP_COLUMNS: Final = (
    Column("source", "source_id"),
    Column("day", "day"),
    Column("call", lambda gap: gap["provider_call_id"] or "?"),
    Column("event", "event_id"),
    Column("subscription", "subscription_id"),
    Column("what is missing", "what"),
    Column("what to do", "action"),
)

app = new_app()


class Incomplete(RelayError):
    """Something is missing."""


@command(app, "completeness")
def completeness(
    term: Terminal,
    source_id: Annotated[str | None, typer.Argument(metavar="[SOURCE]", help="ID of the source; default: all.")] = None,
    first: Annotated[
        str | None, typer.Option("--from", help="First day, by the provider's calendar: 2026-11-20.")
    ] = None,
    last: Annotated[str | None, typer.Option("--to", help="Last day; default: today.")] = None,
    heal: Annotated[bool, typer.Option("--heal", help="Repair what can be repaired, then show what is left.")] = False,
) -> None:
    """Compare what the last long-range poll listed with what was ingested, published and delivered.

    By default today and the three days before. Exit code 1 when something is missing.
    """
    days = {name: day for name, day in (("from", first), ("to", last)) if day is not None}
    source_ids = [source_id] if source_id is not None else _all_sources(term)
    if heal:
        for each in source_ids:
            follow(term, term.api.post(path_of("sources", each, "heal"), days)["id"])
    reports = [term.api.get(path_of("sources", each, "completeness"), **days) for each in source_ids]
    if term.out.as_json:
        term.out.result(reports[0] if source_id is not None else {"items": reports})
    else:
        _write(term, reports)
    missing = sum(report["missing"] for report in reports)
    if missing:
        raise Incomplete(f"{missing:,} missing" + ("" if heal else "; `relay completeness --heal` repairs what it can"))


def _all_sources(term: Terminal) -> list[str]:
    sources = term.api.newest("/v1/sources", limit=_MOST_SOURCES)["items"]
    return sorted(source["id"] for source in sources if source["state"] != "paused")


def _write(term: Terminal, reports: Sequence[Json]) -> None:
    days = [{**day, "source_id": report["source_id"]} for report in reports for day in report["days"]]
    term.out.table({"items": days}, DAY_COLUMNS, empty="No sources.")
    deliveries = [{**day, **each} for day in days for each in day["subscriptions"] if any(_counts(each))]
    if deliveries:
        term.out.table({"items": deliveries}, SUBSCRIPTION_COLUMNS, empty="")
    gaps = [{**gap, "source_id": report["source_id"]} for report in reports for gap in report["gaps"]]
    if gaps:
        term.out.table({"items": gaps[:_GAPS_SHOWN]}, GAP_COLUMNS, empty="")
    for report in reports:
        for text in report["unread"]:
            term.out.note(f"{report['source_id']}: {text}")
    hidden = max(len(gaps) - _GAPS_SHOWN, 0) + sum(report["gaps_left_out"] for report in reports)
    if hidden:
        term.out.note(f"and {hidden:,} more; --json shows up to 1,000 of each source")


def _counts(deliveries: Json) -> list[int]:
    return [value for value in deliveries.values() if isinstance(value, int)]

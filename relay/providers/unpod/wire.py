"""Unpod on the wire: requests out, rows in. Pure, and no row can make it raise.

The document (platform API v2, Call Logs) and its samples differ: `id` may be missing, and `call_duration` is text, a
whole number or a fraction. `creation_time` is when the call began, `start_time` when it was answered (null if missed).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlencode, urlsplit

from pydantic import BaseModel, ConfigDict, PlainValidator

from relay.domain.call import Direction, InvalidRow, Outcome, Record, numbered_key
from relay.domain.json import Json
from relay.domain.numbers import read_number
from relay.errors import ProviderError, UnexpectedResponse
from relay.providers import parsing
from relay.providers.base import Window
from relay.providers.parsing import ErrorResponse, OptionalTime, Text, malformed, seconds, words

NAME: Final = "Unpod"
# Raise it with every change of the mapping that changes a record's content.
MAPPING_VERSION: Final = 1

CALL_LIST: Final = "the call list"
PATH: Final = "/call-logs/"
MAX_PAGES: Final = 10_000
_DAY: Final = timedelta(days=1)
_DAYS: Final = re.compile(r"([0-9]{1,2}) days?, (.*)")

# The open server writes `both` for calls whose direction it does not know.
_DIRECTIONS: Final[Mapping[str, Direction]] = {
    "inbound": Direction.INBOUND,
    "incoming": Direction.INBOUND,
    "outbound": Direction.OUTBOUND,
    "outgoing": Direction.OUTBOUND,
}

# In the open server, `REJECTED` is a call that the carrier refused, not one that a person declined.
_OUTCOMES: Final[Mapping[str, Outcome]] = {
    spelling: outcome
    for outcome, spellings in {
        Outcome.ANSWERED: ("ANSWERED", "COMPLETED", "COMPLETE", "SUCCESS", "CONNECTED"),
        Outcome.NO_ANSWER: ("MISSED", "NO ANSWER", "NOT ANSWERED", "UNANSWERED", "TIMEOUT"),
        Outcome.FAILED: ("FAILED", "FAILURE", "REJECTED", "ERROR"),
        Outcome.BUSY: ("BUSY", "USER BUSY"),
        Outcome.CANCELLED: ("CANCELLED", "CANCELED", "CANCEL"),
        Outcome.VOICEMAIL: ("VOICEMAIL", "VOICE MAIL"),
    }.items()
    for spelling in spellings
}


# -- requests ---------------------------------------------------------------------------------------------------------


def list_path(window: Window, *, page: int, page_size: int, margin_days: int, form: Literal["date", "datetime"]) -> str:
    """Build the path and query of one page. The server filters by whole days, so the range exceeds the window."""
    first = window.since.astimezone(UTC).date() - margin_days * _DAY
    last = window.until.astimezone(UTC).date() + (margin_days + 1) * _DAY
    tail = "" if form == "date" else "T00:00:00Z"
    query = {"page": page, "page_size": page_size, "start_date": f"{first}{tail}", "end_date": f"{last}{tail}"}
    return f"{PATH}?{urlencode(query)}"


def next_path(link: str | None, *, base_url: str, seen: set[str]) -> str | None:
    """Return the path of a `next` link; None unless it leads on, at the very same server.

    A link to another server would receive the token, and one that was followed already leads in a circle.
    """
    if not link or len(link) > 4096 or not link.isascii() or not link.isprintable() or " " in link:
        return None
    try:
        base, target = urlsplit(base_url), urlsplit(link)
        same_server = (target.scheme, target.hostname, target.port) == (base.scheme, base.hostname, base.port)
    except ValueError:
        return None
    if (target.scheme or target.netloc) and (not same_server or target.username is not None):
        return None
    if not target.path.startswith(f"{base.path}/") or ".." in target.path:
        return None
    path = target.path.removeprefix(base.path) + (f"?{target.query}" if target.query else "")
    return None if path in seen else path


# -- the call list ----------------------------------------------------------------------------------------------------


class UnpodCallList(BaseModel):
    """`GET /call-logs/`; rows are validated one by one."""

    count: int | None = None
    status_code: int | None = None
    message: Text = None
    data: list[Any]
    next: Annotated[str | None, PlainValidator(lambda value: value if isinstance(value, str) else None)] = None


def read_list(document: object) -> UnpodCallList:
    """Validate a page; raises UnexpectedResponse when the response contradicts itself."""
    listed = parsing.validate_response(UnpodCallList, document, name=NAME, what=CALL_LIST)
    if listed.status_code not in (None, 200):
        raise malformed(NAME, CALL_LIST, f"status_code is {listed.status_code}")
    if listed.count is not None and not 0 <= listed.count < 2**31:
        raise malformed(NAME, CALL_LIST, "count is out of range")
    return listed


@dataclass(slots=True)
class UnpodPaging:
    """What was read of one window so far, and whether that is all of it.

    The open server sorts by newest first. The document does not state an order, so it is checked here.
    """

    since: datetime
    page_size: int
    first_count: int | None = None
    pages: int = 0
    rows: int = 0
    longest_page: int = 0
    last_page: int = 0
    count: int | None = None
    count_moved: bool = False
    newest_first: bool = True
    oldest: datetime | None = None

    def add(self, listed: UnpodCallList, records: Sequence[Record | InvalidRow]) -> None:
        self.pages += 1
        self.rows += len(listed.data)
        self.last_page = len(listed.data)
        self.longest_page = max(self.longest_page, self.last_page)
        if self.pages == 1:
            self.first_count = listed.count
        self.count_moved = self.count_moved or listed.count != self.first_count
        self.count = listed.count
        for record in records:
            if isinstance(record, Record):
                self.newest_first = self.newest_first and (self.oldest is None or record.started_at <= self.oldest)
                self.oldest = record.started_at

    @property
    def past_the_window(self) -> bool:
        """Whether everything that follows is older than the window."""
        return self.newest_first and self.oldest is not None and self.oldest < self.since

    @property
    def complete(self) -> bool:
        if self.last_page == 0:
            return True
        # A server may return fewer rows than requested (the open one at most 100): a short page alone proves nothing.
        if self.count is None:
            return self.last_page < self.longest_page or self.last_page < self.page_size
        return self.rows >= self.count and (self.last_page < self.page_size or self.count > self.last_page)

    @property
    def ended_early(self) -> bool:
        """Whether the list ended although `count` had announced at least another page."""
        return self.count is not None and self.count - self.rows >= max(self.last_page, 1) and self.pages > 0


def incomplete(paging: UnpodPaging) -> UnexpectedResponse:
    return UnexpectedResponse(
        f"{NAME} announced {paging.count} calls and ended the list after {paging.rows}. The request will be retried."
    )


def past_the_end(status: int, page: int) -> bool:
    """Whether an error only means that the page does not exist; the first one always does.

    The open server answers 400 for a page behind the last one.
    """
    return page > 1 and status in (400, 404)


# -- rows -------------------------------------------------------------------------------------------------------------


def _duration(value: object) -> float | None:
    """Read a duration; the server writes a day and more as `1 day, 2:03:04`."""
    if isinstance(value, str) and (match := _DAYS.fullmatch(value.strip())):
        rest = seconds(match.group(2))
        return None if rest is None else seconds(int(match.group(1)) * 86_400 + rest)
    return seconds(value)


class UnpodRow(BaseModel):
    """One row of the call list. Only `creation_time`, or no identity at all, can invalidate it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: Text = None
    source_number: Text = None
    destination_number: Text = None
    call_type: Text = None
    call_status: Text = None
    creation_time: Annotated[datetime, parsing.required_utc_time("creation_time")]
    start_time: OptionalTime = None
    end_time: OptionalTime = None
    call_duration: Annotated[float | None, PlainValidator(_duration)] = None
    end_reason: Text = None
    bridge: Text = None


def parse_row(row: object, *, org: str, region: str, natural: bool, seen_at: datetime) -> Record | InvalidRow:
    """Parse one row. `natural` ignores its id and identifies the call by its time and numbers."""
    parsed = _parse(row, org, region, natural)
    return parsing.finished_by_age(parsed, seen_at) if isinstance(parsed, Record) else parsed


@parsing.memoise_rows
def _parse(row: Any, org: str, region: str, natural: bool) -> Record | InvalidRow:
    valid = parsing.validate_row(UnpodRow, row, key="id", start="creation_time")
    if isinstance(valid, InvalidRow):
        return valid
    if valid.id is None and valid.source_number is None and valid.destination_number is None:
        return parsing.invalid_row("the row has neither an id nor a number", row)
    return _record(valid, org, region, natural, parsing.raw_row(row, UnpodRow.model_fields))


def natural_key(org: str, row: UnpodRow) -> str:
    """Identify a call without an id by who called whom at which moment."""
    moment = row.creation_time.isoformat(timespec="microseconds")
    parts = (org, moment, row.source_number or "", row.destination_number or "")
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:32]


def number_calls(
    rows: Sequence[Record | InvalidRow], assigned: dict[str, dict[str, str]], *, natural: bool
) -> list[Record | InvalidRow]:
    """Give calls that share their time and numbers keys of their own, in the order of their content.

    `assigned` is what this reading has assigned so far: the keys by natural key and content hash. Rows in progress are
    left alone, because they are about a call that is listed again when it ends.
    """

    def is_unnamed(record: Record) -> bool:
        return record.finished and (natural or parsing.text(record.raw.get("id")) is None)

    unnamed = [row for row in rows if isinstance(row, Record) and is_unnamed(row)]
    for record in sorted(unnamed, key=lambda record: record.content_hash()):
        keys = assigned.setdefault(record.key, {})
        keys.setdefault(record.content_hash(), numbered_key(record.key, len(keys) + 1) if keys else record.key)
    numbered: list[Record | InvalidRow] = []
    for row in rows:
        key = assigned.get(row.key, {}).get(row.content_hash()) if isinstance(row, Record) else None
        numbered.append(replace(row, key=key) if isinstance(row, Record) and key else row)
    return numbered


def _record(row: UnpodRow, org: str, region: str, natural: bool, raw: Json) -> Record:
    direction = _DIRECTIONS.get((row.call_type or "").lower(), Direction.UNKNOWN)
    outbound = direction is Direction.OUTBOUND
    caller = read_number(row.source_number, region, internal=outbound)
    callee = read_number(row.destination_number, region, internal=direction is Direction.INBOUND)
    external = internal = None
    if direction is not Direction.UNKNOWN:
        external, internal = (callee, caller) if outbound else (caller, callee)
    status = words(row.call_status)
    answered_at = _not_before(row.start_time, row.creation_time)
    ended_at = _not_before(row.end_time, row.creation_time)
    duration: float | None = row.call_duration
    derived: tuple[str, ...] = ()
    # The open server writes 0 for a duration that it does not know.
    if not duration and answered_at and ended_at and ended_at > answered_at:
        duration, derived = seconds((ended_at - answered_at).total_seconds()), ("duration_seconds",)
    return Record(
        key=natural_key(org, row) if natural or row.id is None else row.id,
        started_at=row.creation_time,
        local_date=row.creation_time.date().isoformat(),
        direction=direction,
        outcome=_OUTCOMES.get(status, Outcome.UNKNOWN),
        finished=not parsing.in_progress(status, ended_at, duration),
        status_raw=row.call_status,
        end_reason=row.end_reason,
        caller=caller,
        callee=callee,
        external=external,
        internal=internal,
        answered_at=answered_at,
        ended_at=ended_at,
        duration_seconds=duration,
        derived=derived,
        custom={"bridge": row.bridge} if row.bridge else {},
        raw=raw,
    )


def _not_before(time: datetime | None, started_at: datetime) -> datetime | None:
    """Drop a time well before the start; a little before is the clock of another server."""
    return time if time is not None and time >= started_at - timedelta(seconds=60) else None


# -- errors -----------------------------------------------------------------------------------------------------------


def error_of(response: ErrorResponse) -> ProviderError:
    # The open server answers 400 when Org-Handle is missing, and 206 with a message in sibling views.
    if response.status in (206, 400) and b"org" in response.body.lower():
        return UnexpectedResponse(
            f"{NAME} at {response.host} answered the request for {response.what} with status {response.status} and a "
            "message about the organisation. Check org_handle."
        )
    return parsing.provider_error(response, name=NAME)

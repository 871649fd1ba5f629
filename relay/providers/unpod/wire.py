"""Unpod on the wire: requests out, rows in. Pure, and no row can make it raise.

The document (platform API v2, call logs) and its samples differ: `id` may be missing, `call_duration` is text, a whole
number or a fraction. `creation_time` is when the call began, `start_time` when it was answered (null when it was not).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlencode, urlsplit

import orjson
from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError

from relay.domain.call import Direction, Outcome, Record
from relay.domain.json import Json
from relay.domain.numbers import read_number
from relay.errors import ProviderError, UnexpectedResponse
from relay.providers import parsing
from relay.providers.base import InvalidRow, Window, excerpt
from relay.providers.parsing import MaybeStamp, Text, complaint, dumped, given_up, kept, seconds, shrunk, shrunk_row

NAME: Final = "Unpod"
MAPPING_VERSION: Final = 1
"""Raise it with every change of the mapping that changes a row's content."""

PATH: Final = "/call-logs/"
MOST_PAGES: Final = 10_000
_LARGEST_CACHED_ROW_BYTES: Final = 2048
_CACHED_ROWS: Final = 8192
_DAY: Final = timedelta(days=1)
_NOT_LETTERS: Final = re.compile(r"[^A-Z]+")
_DAYS: Final = re.compile(r"([0-9]{1,2}) days?, (.*)")

_DIRECTIONS: Final[Mapping[str, Direction]] = {
    "inbound": Direction.INBOUND,
    "incoming": Direction.INBOUND,
    "outbound": Direction.OUTBOUND,
    "outgoing": Direction.OUTBOUND,
}
"""`both` is the server's word for calls that it could not tell: unknown."""

_OUTCOMES: Final[Mapping[str, Outcome]] = {
    word: outcome
    for outcome, words in {
        Outcome.ANSWERED: ("ANSWERED", "COMPLETED", "COMPLETE", "SUCCESS", "CONNECTED"),
        Outcome.NO_ANSWER: ("MISSED", "NO ANSWER", "NOT ANSWERED", "UNANSWERED", "TIMEOUT"),
        Outcome.FAILED: ("FAILED", "FAILURE", "REJECTED", "ERROR"),
        Outcome.BUSY: ("BUSY", "USER BUSY"),
        Outcome.CANCELLED: ("CANCELLED", "CANCELED", "CANCEL"),
        Outcome.VOICEMAIL: ("VOICEMAIL", "VOICE MAIL"),
    }.items()
    for word in words
}
"""`REJECTED` is how the server writes a call that the carrier refused, so it is no decline by a person."""


# -- asking -----------------------------------------------------------------------------------------------------------


def list_path(window: Window, *, page: int, page_size: int, margin_days: int, form: Literal["date", "datetime"]) -> str:
    """Build the path and query of one page. The filter knows whole days only, so it is wider than the window."""
    first = window.since.astimezone(UTC).date() - margin_days * _DAY
    last = window.until.astimezone(UTC).date() + (margin_days + 1) * _DAY
    tail = "" if form == "date" else "T00:00:00Z"
    query = {"page": page, "page_size": page_size, "start_date": f"{first}{tail}", "end_date": f"{last}{tail}"}
    return f"{PATH}?{urlencode(query)}"


def next_path(link: str | None, *, base_url: str, seen: set[str]) -> str | None:
    """Take the path of `next` when it leads on at the very same server; None otherwise.

    A link elsewhere would be given the token, and one that was followed already leads in a circle.
    """
    if not link or len(link) > 4096 or not link.isascii() or not link.isprintable() or " " in link:
        return None
    try:
        here, there = urlsplit(base_url), urlsplit(link)
        same = (there.scheme, there.hostname, there.port) == (here.scheme, here.hostname, here.port)
    except ValueError:
        return None
    if (there.scheme or there.netloc) and (not same or there.username is not None):
        return None
    if not there.path.startswith(f"{here.path}/") or ".." in there.path:
        return None
    path = there.path.removeprefix(here.path) + (f"?{there.query}" if there.query else "")
    return None if path in seen else path


# -- the call list ----------------------------------------------------------------------------------------------------


class ListAnswer(BaseModel):
    """`GET /call-logs/`. The rows are checked one by one, later."""

    count: int | None = None
    status_code: int | None = None
    message: Text = None
    data: list[Any]
    next: Text = None


def read_list(answer: object) -> ListAnswer:
    """Take the rows and what leads on out of an answer; raises UnexpectedResponse when it contradicts itself."""
    try:
        read = ListAnswer.model_validate(answer)
    except ValidationError:
        raise UnexpectedResponse(
            "Unpod sent a call list without a list of calls; nothing of it was taken over"
        ) from None
    if read.status_code not in (None, 200):
        raise UnexpectedResponse(
            f"Unpod says that listing the calls failed ({read.status_code}); it will be asked again"
        )
    if read.count is not None and not 0 <= read.count < 2**31:
        raise UnexpectedResponse("Unpod sent a call list with an impossible count; nothing of it was taken over")
    next_link = answer.get("next") if isinstance(answer, dict) else None
    return read.model_copy(update={"next": next_link if isinstance(next_link, str) else None})


@dataclass(slots=True)
class Progress:
    """What was read so far of one window, and when that is all. The list is said to be newest first; it is checked."""

    since: datetime
    page_size: int
    first_count: int | None = None
    pages: int = 0
    rows: int = 0
    longest_page: int = 0
    last_page: int = 0
    count: int | None = None
    count_moved: bool = False
    in_order: bool = True
    oldest: datetime | None = None

    def add(self, answer: ListAnswer, records: Sequence[Record | InvalidRow]) -> None:
        """Take a page into account."""
        self.pages += 1
        self.rows += len(answer.data)
        self.last_page = len(answer.data)
        self.longest_page = max(self.longest_page, self.last_page)
        if self.pages == 1:
            self.first_count = answer.count
        self.count_moved = self.count_moved or answer.count != self.first_count
        self.count = answer.count
        for record in records:
            if isinstance(record, Record):
                self.in_order = self.in_order and (self.oldest is None or record.started_at <= self.oldest)
                self.oldest = record.started_at

    @property
    def past_the_window(self) -> bool:
        """All that follows is older: the rows came newest first, and the last one began before the window."""
        return self.in_order and self.oldest is not None and self.oldest < self.since

    @property
    def complete(self) -> bool:
        """Nothing can follow. A server may give fewer rows than asked for, so a short page alone is no proof."""
        if self.last_page == 0:
            return True
        if self.count is None:
            return self.last_page < self.longest_page or self.last_page < self.page_size
        return self.rows >= self.count and (self.last_page < self.page_size or self.count > self.last_page)

    def ended_early(self) -> bool:
        """Whether the list ended though it had announced at least another page: rows are missing."""
        return self.count is not None and self.count - self.rows >= max(self.last_page, 1) and self.pages > 0


def past_the_end(status: int, page: int) -> bool:
    """Whether a refusal only says that there is no such page: the first page always is."""
    return page > 1 and status in (400, 404)


# -- rows -------------------------------------------------------------------------------------------------------------


def _duration(value: object) -> float | None:
    """Read a duration; a day and more is written `1 day, 2:03:04`."""
    if isinstance(value, str) and (split := _DAYS.fullmatch(value.strip())):
        rest = seconds(split.group(2))
        return None if rest is None else seconds(int(split.group(1)) * 86_400 + rest)
    return seconds(value)


def _created(value: object) -> datetime:
    return parsing.stamp(value, "creation_time")


class CallRow(BaseModel):
    """One row of the call list. Only `creation_time`, and no identity at all, can make a row bad."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: Text = None
    source_number: Text = None
    destination_number: Text = None
    call_type: Text = None
    call_status: Text = None
    creation_time: Annotated[datetime, PlainValidator(_created)]
    start_time: MaybeStamp = None
    end_time: MaybeStamp = None
    call_duration: Annotated[float | None, PlainValidator(_duration)] = None
    end_reason: Text = None
    bridge: Text = None


def parse_rows(
    rows: Sequence[object], *, org: str, region: str, natural: bool, seen_at: datetime
) -> list[Record | InvalidRow]:
    """Read rows, most of which were there in the last poll too: an unchanged row is looked up, not read again."""
    return [_parse(row, org, region, natural, seen_at) for row in rows]


def _parse(row: object, org: str, region: str, natural: bool, seen_at: datetime) -> Record | InvalidRow:
    again = dumped(row)
    if again is None or len(again) > _LARGEST_CACHED_ROW_BYTES:
        read = _read(row, org, region, natural)
    else:
        read = _read_once(again, org, region, natural)
    return given_up(read, seen_at) if isinstance(read, Record) else read


@lru_cache(maxsize=_CACHED_ROWS)
def _read_once(row: bytes, org: str, region: str, natural: bool) -> Record | InvalidRow:
    return _read(orjson.loads(row), org, region, natural)


def _read(row: object, org: str, region: str, natural: bool) -> Record | InvalidRow:
    if not isinstance(row, dict):
        return InvalidRow("the row is not a JSON object", excerpt=excerpt({"row": shrunk(row)}))
    try:
        parsed = CallRow.model_validate(row)
    except ValidationError as error:
        return InvalidRow(complaint(error), key=parsing.text(row.get("id")), excerpt=excerpt(shrunk_row(row)))
    if parsed.id is None and parsed.source_number is None and parsed.destination_number is None:
        return InvalidRow("the row has neither an id nor a number", excerpt=excerpt(shrunk_row(row)))
    return _record(parsed, org, region, natural, kept(row, CallRow.model_fields))


def natural_key(org: str, row: CallRow) -> str:
    """Make an identity of what a call cannot share with another one: who called whom at which moment."""
    moment = row.creation_time.isoformat(timespec="microseconds")
    parts = (org, moment, row.source_number or "", row.destination_number or "")
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:32]


def _record(row: CallRow, org: str, region: str, natural: bool, raw: Json) -> Record:
    direction = _DIRECTIONS.get((row.call_type or "").lower(), Direction.UNKNOWN)
    outbound = direction is Direction.OUTBOUND
    caller = read_number(row.source_number, region, internal=outbound)
    callee = read_number(row.destination_number, region, internal=direction is Direction.INBOUND)
    external = internal = None
    if direction is not Direction.UNKNOWN:
        external, internal = (callee, caller) if outbound else (caller, callee)
    said = _NOT_LETTERS.sub(" ", (row.call_status or "").upper()).strip()
    answered_at = _not_before(row.start_time, row.creation_time)
    ended_at = _not_before(row.end_time, row.creation_time)
    duration: float | None = row.call_duration
    derived: tuple[str, ...] = ()
    if not duration and answered_at and ended_at and ended_at > answered_at:
        duration, derived = seconds((ended_at - answered_at).total_seconds()), ("duration_seconds",)
    under_way = ended_at is None and (parsing.under_way(said) or (not said and not duration))
    return Record(
        key=natural_key(org, row) if natural or row.id is None else row.id,
        started_at=row.creation_time,
        local_date=row.creation_time.date().isoformat(),
        direction=direction,
        outcome=_OUTCOMES.get(said, Outcome.UNKNOWN),
        finished=not under_way,
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


def _not_before(moment: datetime | None, began: datetime) -> datetime | None:
    """A moment of the call, when it can be one: clocks of two servers may differ by a little."""
    return moment if moment is not None and moment >= began - timedelta(seconds=60) else None


# -- errors -----------------------------------------------------------------------------------------------------------


def refusal(
    status: int, body: bytes, headers: Mapping[str, str], *, what: str, host: str, now: datetime
) -> ProviderError:
    """Turn an unwanted answer into the error that says so. A missing Org-Handle may come back as 400 or as 206."""
    if status in (206, 400) and b"org" in body.lower():
        return UnexpectedResponse(
            f"Unpod at {host} answered {what} with status {status} and speaks of the organisation; check org_handle"
        )
    return parsing.refusal(status, headers, name=NAME, what=what, host=host, now=now)

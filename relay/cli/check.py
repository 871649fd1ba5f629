"""`relay check`: everything a relay depends on, and what to fix.

Sends at most three requests to each provider and none to subscribers, whose addresses are only resolved and vetted.
Works next to a running relay, and then uses its store as it is.
"""

import asyncio
import contextlib
import json
import os
import secrets as chance
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Final, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import aiohttp
import typer

from relay import secrets
from relay.cli.terminal import ConfigOption, JsonOption, new_app
from relay.delivery.guard import ForbiddenAddress, Guard, NoAddress, special_purpose
from relay.domain.call import Record
from relay.domain.json import Json
from relay.domain.time import format_duration
from relay.errors import OverBudget, RateLimited, RelayError, SettingsError, StorageError, StoreInUse, StoreTooNew
from relay.log import configure
from relay.polling.clock_skew import apparent_zone
from relay.polling.window import SEED_DEPTH
from relay.processes import require_connection
from relay.providers import PROVIDERS
from relay.providers.base import CallPage, Purpose, RequestBudget, SourceOptions, Window
from relay.providers.source import source_budget
from relay.recordings.links import LINK_TTL_S
from relay.recordings.storage import Discarded, RecordingStorage, open_storage
from relay.secrets import SecretBox
from relay.settings import Settings, SubscriptionOptions, load
from relay.store.connection import STORE_ERRORS
from relay.store.database import unsuitable
from relay.store.embedded import COMPACT_BYTES, EmbeddedStore
from relay.store.lanes import LaneName
from relay.store.store import Store, open_store

Severity = Literal["ok", "warn", "fail"]

MARKS: Final[dict[Severity, str]] = {"ok": "✓", "warn": "!", "fail": "✗"}

_DAY_S: Final = 86_400
_MAX_REQUESTS: Final = 3
_SOURCE_TIMEOUT_S: Final = 75
_SKEW_WARN_S: Final = 5.0
# Subscribers refuse signatures that are more than five minutes off.
_SKEW_FAIL_S: Final = 240.0
_REASONS_SHOWN: Final = 3
_ZONES: Final = (
    "UTC",
    "America/New_York",
    "America/Chicago",
    "America/Denver",
    "America/Los_Angeles",
    "America/Anchorage",
    "Pacific/Honolulu",
    "America/Halifax",
    "America/Sao_Paulo",
    "Europe/London",
    "Europe/Berlin",
    "Europe/Athens",
    "Europe/Moscow",
    "Asia/Dubai",
    "Asia/Kolkata",
    "Asia/Bangkok",
    "Asia/Singapore",
    "Asia/Tokyo",
    "Australia/Sydney",
    "Pacific/Auckland",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: of what, how it is, and how to fix it."""

    what: str
    status: Severity
    text: str
    fix: str = ""

    def line(self) -> str:
        return f"{MARKS[self.status]} {self.what}: {self.text}" + (f"\n    → {self.fix}" if self.fix else "")

    def to_json(self) -> Json:
        return asdict(self)


def report(findings: Sequence[Finding]) -> Json:
    return {
        "ok": all(finding.status != "fail" for finding in findings),
        "findings": [finding.to_json() for finding in findings],
    }


async def check_all(settings: Settings) -> AsyncIterator[Finding]:
    """Yield findings as they are made, in the order in which calls flow."""
    if not settings.sources:
        yield Finding("sources", "warn", "none are configured, so nothing is polled", "add an account under sources:")
    async with AsyncExitStack() as stack:
        opened = await stack.enter_async_context(_store(settings))
        for finding in opened.findings:
            yield finding
        http = await stack.enter_async_context(
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)
        )
        sources = settings.sources.items()
        checks = [asyncio.create_task(_source(sid, options, http, opened.store)) for sid, options in sources]
        stack.push_async_callback(_cancel, checks)
        for task in checks:
            for finding in await task:
                yield finding
        for finding in await _storage(settings):
            yield finding
        yield links(settings)
        if not settings.subscriptions:
            yield Finding(
                "subscriptions", "warn", "none are configured, so nothing is delivered", "add one under subscriptions:"
            )
        guard = Guard(tuple(settings.delivery.allowed_networks))
        stack.push_async_callback(guard.close)
        for sub, subscription in settings.subscriptions.items():
            yield await _subscription(sub, subscription, guard, opened.store)


async def _cancel(tasks: Sequence["asyncio.Task[list[Finding]]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# -- the store --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _OpenedStore:
    """The store and what was found there; None when it cannot be used."""

    store: Store | None
    findings: tuple[Finding, ...]


@contextlib.asynccontextmanager
async def _store(settings: Settings) -> AsyncIterator[_OpenedStore]:
    """Open the configured Redis, the embedded store of a running relay, or else start the embedded store."""
    async with AsyncExitStack() as stack:
        if settings.redis_url is not None:
            url, secret_keys = require_connection(settings)
            where = f"Redis at {_redis_host(url)}"
        else:
            secret_keys = [key.get_secret_value() for key in settings.secret_key]
            secret_keys = secret_keys or secrets.load_or_create(settings.data_dir).keys
            embedded = EmbeddedStore(settings.data_dir)
            url = embedded.url
            holder = await _holder(embedded, settings)
            where = f"the embedded store in {settings.data_dir}, {holder or 'started for this check'}"
            if holder is None:
                try:
                    await stack.enter_async_context(embedded)
                except StoreInUse:
                    text = f"the store of the relay that runs in {settings.data_dir} does not answer"
                    fix = "see its log and store/valkey.log; is the disk full?"
                    yield _OpenedStore(None, (Finding("store", "fail", text, fix),))
                    return
                except (RelayError, OSError) as error:
                    yield _OpenedStore(None, (Finding("store", "fail", f"the embedded store does not start: {error}"),))
                    return
        retention = settings.retention
        opening = open_store(
            url,
            SecretBox(secret_keys),
            calls_ttl_s=retention.calls_days * _DAY_S,
            events_ttl_s=retention.events_days * _DAY_S,
        )
        store = await stack.enter_async_context(opening)
        try:
            findings = await _look_at_store(store, where, outside=settings.redis_url is not None)
        except STORE_ERRORS as error:
            fix = "start it, or correct RELAY_REDIS_URL" if settings.redis_url else "see store/valkey.log"
            yield _OpenedStore(None, (Finding("store", "fail", f"{where}: {error}", fix),))
            return
        usable = all(finding.status != "fail" for finding in findings)
        yield _OpenedStore(store if usable else None, tuple(findings))


async def _holder(store: EmbeddedStore, settings: Settings) -> str | None:
    """Describe the process that runs the store in this directory; None when it is not running."""
    if await asyncio.to_thread(store.running_pid) is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        pid = int((settings.data_dir / "relay.lock").read_text())
        os.kill(pid, 0)
        return f"opened by the running relay (process {pid})"
    return "left running by a relay that has exited"


async def _look_at_store(store: Store, where: str, *, outside: bool) -> list[Finding]:
    try:
        await store.verify()
    except StoreInUse:
        text = f"{where} belongs to another relay: it was started with another RELAY_SECRET_KEY"
        fix = "give this relay a database of its own, or the same key (after a rotation: new,old)"
        return [Finding("store", "fail", text, fix)]
    except StoreTooNew:
        text = f"{where} was written by a newer release"
        return [Finding("store", "fail", text, "start that release, or use another database")]
    server = durability(await store.server_info()) if outside else []
    if any(finding.status == "fail" for finding in server):
        return server
    await store.test_write()
    findings = [Finding("store", "ok", f"{where}: reads and writes")]
    before = datetime.now(UTC)
    ahead_s = await store.wall_ms() / 1000 - (before.timestamp() + datetime.now(UTC).timestamp()) / 2
    findings += skew("store clock", "the store's clock", ahead_s)
    findings += server
    sources = await store.declarations.count("source")
    subscriptions = await store.declarations.count("subscription")
    if sources or subscriptions:
        text = f"{sources} sources and {subscriptions} subscriptions were created through the API"
        findings.append(
            Finding("created at run time", "ok", f"{text}; only those in the configuration are checked here")
        )
    findings += await _quarantined(store)
    return findings


def durability(info: Json) -> list[Finding]:
    """Check what an external Redis reports of itself: eviction, role, persistence, encodings."""
    findings: list[Finding] = []
    if problem := unsuitable(info):
        findings.append(Finding("store", "fail", f"cannot be used: {problem.reason}", problem.action))
    if info.get("aof_enabled") == 0:
        text = "has no append-only file: after a crash data is lost, and events are delivered again"
        findings.append(Finding("store durability", "warn", text, "set appendonly yes, appendfsync everysec or always"))
    if int(info.get("hash-max-listpack-value", COMPACT_BYTES)) < COMPACT_BYTES:
        text = "stores calls and events in an encoding that needs nearly twice the memory"
        findings.append(Finding("store compactness", "warn", text, f"set hash-max-listpack-value {COMPACT_BYTES}"))
    return findings


async def _quarantined(store: Store) -> list[Finding]:
    """Report work items in quarantine, where a process died each time."""
    findings: list[Finding] = []
    for lane in LaneName:
        count = await store.upkeep.quarantined_items(lane)
        if count:
            text = f"{count} items are quarantined: the process died at each of five attempts"
            fix = "search the log for work_failed"
            fix += {"enrich": "; they are retried after an hour", "deliver": "; `relay replay` delivers them"}.get(
                lane, ""
            )
            findings.append(Finding(f"{lane} lane", "warn", text, fix))
    return findings


def skew(what: str, whose: str, ahead_s: float) -> list[Finding]:
    """Compare a clock with ours; a small difference is not reported."""
    if abs(ahead_s) < _SKEW_WARN_S:
        return []
    text = f"{whose} is {format_duration(ahead_s)} {'ahead of' if ahead_s > 0 else 'behind'} this machine's"
    status: Severity = "fail" if abs(ahead_s) > _SKEW_FAIL_S else "warn"
    return [
        Finding(
            what,
            status,
            text,
            "synchronise the clocks with NTP; subscribers reject signatures that are five minutes off",
        )
    ]


def _redis_host(url: str) -> str:
    parts = urlsplit(url)
    return parts.hostname or parts.path


# -- sources ----------------------------------------------------------------------------------------------------------


async def _source(sid: str, options: SourceOptions, http: aiohttp.ClientSession, store: Store | None) -> list[Finding]:
    what = f"source {sid}"
    if not options.enabled:
        return [Finding(what, "warn", "is not polled (enabled: false)")]
    try:
        async with asyncio.timeout(_SOURCE_TIMEOUT_S):
            findings = await _ask(sid, options, http, store)
    except TimeoutError:
        findings = [Finding(what, "fail", f"the provider took longer than {_SOURCE_TIMEOUT_S} s to answer")]
    except STORE_ERRORS as error:
        findings = [Finding(what, "fail", f"could not be checked: {type(error).__name__}")]
    if store is not None:
        with contextlib.suppress(*STORE_ERRORS):
            findings += await _recorded_state(sid, options, store)
    return findings


async def _ask(sid: str, options: SourceOptions, http: aiohttp.ClientSession, store: Store | None) -> list[Finding]:
    """Request the provider's health and newest call: three requests, within the budget like any others."""
    what = f"source {sid}"
    kind = PROVIDERS[options.provider]
    budget = source_budget(options, store.budget) if store is not None else None
    requests = _CheckBudget(budget)
    provider = kind.connect(options, http, requests, store.credentials(sid) if store is not None else None)
    findings: list[Finding] = []
    try:
        kind.credential(options)  # raises SettingsError for an unreadable key file
        health = await provider.health()
        if requests.exhausted is not None:
            raise requests.exhausted
        status: Severity = "ok" if health.ok else "fail"
        findings.append(Finding(what, status, "; ".join(health.lines), "" if health.ok else _fix_of(health.lines)))
        since = datetime.now(UTC) - SEED_DEPTH
        pages: list[CallPage] = []
        try:
            async with aclosing(provider.calls.pages(Window(since, datetime.now(UTC)))) as asking:  # type: ignore[type-var]  # a generator
                async for page in asking:
                    pages.append(page)
        except OverBudget:
            if not pages:
                raise
        findings += newest_call(what, pages, options, now=datetime.now(UTC))
        if budget is not None and (limit := budget.limit) is not None:
            left = await budget.requests_left()
            most = f"{limit.requests * limit.share:.0f} of {limit.requests} in {format_duration(limit.window_s)}"
            findings.append(Finding(f"{what} budget", "ok", f"{left} requests available now; our share is {most}"))
    except OverBudget as error:
        findings.append(
            Finding(what, "warn", str(error), "wait, or raise budget_share if nothing else uses this account")
        )
    except RelayError as error:
        if all(finding.status == "ok" for finding in findings):  # otherwise the reason is already reported
            findings.append(Finding(what, "fail", str(error), _fix_of([str(error)])))
    return findings


class _CheckBudget:
    """The source's budget, limited to three requests; remembers when it was exhausted."""

    def __init__(self, budget: RequestBudget | None) -> None:
        self._budget = budget
        self._requests = 0
        self.exhausted: OverBudget | None = None

    async def spend(self, purpose: Purpose) -> None:
        if self._requests == _MAX_REQUESTS:
            raise OverBudget(0)
        self._requests += 1
        try:
            if self._budget is not None:
                await self._budget.spend(purpose)
        except OverBudget as error:
            self.exhausted = error
            raise

    async def close(self, refusal: RateLimited, purpose: Purpose) -> None:
        if self._budget is not None:
            await self._budget.close(refusal, purpose)


def _fix_of(lines: Sequence[str]) -> str:
    if any("rejected the key" in line for line in lines):
        return "set a valid api_key, or put one into the source's api_key_file"
    if any("connection" in line or "took too long" in line for line in lines):
        return "check base_url, proxy_url, and that this machine can reach it"
    return ""


def newest_call(what: str, pages: Sequence[CallPage], options: SourceOptions, *, now: datetime) -> list[Finding]:
    """Report the age of the newest call, which shows a wrong zone, and the provider's clock."""
    findings: list[Finding] = []
    server_time = next((page.server_time for page in pages if page.server_time is not None), None)
    if server_time is not None:
        findings += skew(f"{what} clock", "the provider's clock", (server_time - now).total_seconds())
    starts = sorted(row.started_at for page in pages for row in page.rows if isinstance(row, Record))
    invalid = sum(not isinstance(row, Record) for page in pages for row in page.rows)
    if invalid:
        findings.append(Finding(f"{what} rows", "warn", f"{invalid} rows just read are invalid"))
    if not starts:
        depth = format_duration(SEED_DEPTH.total_seconds())
        text = f"no call in the last {depth}, so the zone {options.timezone} cannot be verified"
        findings.append(Finding(f"{what} zone", "warn", text, "make a call and check again"))
        return findings
    findings.append(zone(f"{what} zone", starts, options.timezone, now=server_time or now))
    return findings


def zone(what: str, starts: Sequence[datetime], name: str, *, now: datetime) -> Finding:
    """Check a source's zone against the sorted starts of its calls.

    A newest call in the future is wrong; one that is whole half-hours old is suspicious where calls are frequent.
    """
    age_s = (now - starts[-1]).total_seconds()
    if age_s < -120:
        text = f"the newest call starts in {format_duration(age_s)}, in the future"
        return Finding(what, "fail", text, _suggestion(name, now, -age_s))
    text = f"the newest call started {format_duration(age_s)} ago, read as {name}"
    if age_s >= 1800 - 300 and len(starts) >= 5:
        gaps = [(later - former).total_seconds() for former, later in zip(starts[-21:], starts[-20:], strict=False)]
        usual_s = statistics.median(gaps)
        off_s = round(age_s / 1800) * 1800
        if usual_s <= 300 and abs(age_s - off_s) <= 300 + usual_s:
            text += f", although calls start about every {format_duration(max(usual_s, 1))}"
            return Finding(what, "warn", text, "if there were calls since then: " + _suggestion(name, now, -off_s))
    return Finding(what, "ok", text)


def _suggestion(name: str, now: datetime, ahead_s: float) -> str:
    off_s = -round(ahead_s / 1800) * 1800
    configured = now.astimezone(ZoneInfo(name)).utcoffset() or timedelta()
    offset = configured - timedelta(seconds=off_s)
    same_offset = [zone for zone in _ZONES if now.astimezone(ZoneInfo(zone)).utcoffset() == offset]
    example = f", for example {same_offset[0]}" if same_offset else ""
    seems = apparent_zone(configured, off_s)
    return f"the rows look like {seems}; set the source's timezone to the account's own{example}"


async def _recorded_state(sid: str, options: SourceOptions, store: Store) -> list[Finding]:
    """Report what the relay has recorded about a source: errors, disabled extras, invalid rows."""
    what = f"source {sid}"
    state = await store.sources.read(sid)
    findings: list[Finding] = []
    if state.error:
        since = ""
        if state.error_since_ms:
            since = f" for {format_duration(datetime.now(UTC).timestamp() - state.error_since_ms / 1000)}"
        text = f"polling has been failing{since}: {state.error}"
        findings.append(
            Finding(f"{what} polls", "fail", text, "it is retried automatically, and immediately with a new key")
        )
    elif state.last_poll is not None:
        ago = format_duration((datetime.now(UTC) - state.last_poll).total_seconds())
        findings.append(Finding(f"{what} polls", "ok", f"the last successful poll was {ago} ago"))
    for gap in state.poll_state.gaps:
        fix = "it is retried automatically, with shorter and longer looks; new calls are not affected"
        findings.append(Finding(f"{what} history", "warn", gap.text, fix))
    if state.zone_off_s:
        text = f"calls are first seen {format_duration(state.zone_off_s)} {'late' if state.zone_off_s > 0 else 'early'}"
        fix = _suggestion(options.timezone, datetime.now(UTC), -state.zone_off_s)
        findings.append(Finding(f"{what} delays", "warn", text, fix))
    if state.quiet_since:
        quiet = format_duration((datetime.now(UTC) - state.quiet_since).total_seconds())
        text = f"no calls for {quiet}; in each of the last weeks there were more than three in the same period"
        findings.append(
            Finding(f"{what} calls", "warn", text, "check that the key still has access to the account's calls")
        )
    for extra, why in (("contacts", state.contacts_off), ("recordings", state.recordings_off)):
        if why:
            text = f"are disabled: {why}"
            fix = f"grant the key access to them, or set {extra}: false"
            findings.append(Finding(f"{what} {extra}", "warn", text, fix))
    quarantined = await store.sources.quarantined(sid)
    if quarantined:
        reasons = list(dict.fromkeys(entry.reason for entry in reversed(quarantined)))[:_REASONS_SHOWN]
        count = f"{len(quarantined)} rows" if len(quarantined) != 1 else "1 row"
        text = f"{count} of the last 7 days are invalid and in quarantine: {'; '.join(reasons)}"
        findings.append(
            Finding(f"{what} rows", "warn", text, "report them to the provider; other rows are not affected")
        )
    return findings


# -- recordings -------------------------------------------------------------------------------------------------------


async def _storage(settings: Settings) -> list[Finding]:
    """Write a few bytes, read them back and delete them."""
    what = "recording storage"
    try:
        storage = open_storage(settings.storage_url)
    except SettingsError as error:
        return [Finding(what, "fail", str(error), "correct storage_url")]
    try:
        return await _try_storage(storage, settings, what)
    except StorageError as error:
        return [Finding(what, "fail", str(error), "grant the relay permission to write, read and delete there")]
    finally:
        await storage.aclose()


async def _try_storage(storage: RecordingStorage, settings: Settings, what: str) -> list[Finding]:
    probe = b"call relay check"
    alphabet = "abcdefghijklmnopqrstuvwxyz234567"
    call_id = "call_" + "".join(chance.choice(alphabet) for _ in range(26))
    stored = await storage.put(
        call_id, _once(probe), started_on=datetime.now(UTC).date(), expected_size_bytes=len(probe)
    )
    if isinstance(stored, Discarded):
        return [Finding(what, "fail", stored.reason)]
    try:
        read = b"".join([block async for block in storage.read(stored.path, 0, stored.size_bytes)])
        signed = await storage.presign(stored.path, LINK_TTL_S) if settings.recording_links == "presigned" else ""
    finally:
        await storage.delete(stored.path)
    if read != probe:
        return [Finding(what, "fail", "returned other bytes than were written")]
    findings = [Finding(what, "ok", f"{_place(settings.storage_url)}: writes, reads and deletes")]
    if signed is None:
        text = "recording_links is presigned, but a directory cannot sign links"
        fix = "use s3://, gs:// or az:// as storage_url, or recording_links: relay with a public_url"
        findings.append(Finding("presigned links", "fail", text, fix))
    return findings


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def _place(storage_url: str) -> str:
    return storage_url.split("?")[0]


def links(settings: Settings) -> Finding:
    """Report how recording links are made; whether they can be reached from outside is not tried."""
    what = "recording links"
    if settings.recording_links == "presigned":
        return Finding(what, "ok", "signed by the object store, valid for 7 days")
    if settings.public_url is None:
        text = "are null in every event, because public_url is not set"
        return Finding(what, "warn", text, "set public_url, or use recording_links: presigned with an object store")
    host = urlsplit(settings.public_url).hostname or ""
    text = (
        f"start with {settings.public_url}, valid for 7 days; it must lead to {settings.api.host}:{settings.api.port}"
    )
    if host == "localhost" or _is_special(host):
        return Finding(
            what, "warn", f"{text}, and cannot be reached from outside", "set public_url to a public address"
        )
    return Finding(what, "ok", text)


def _is_special(host: str) -> bool:
    try:
        return special_purpose(ip_address(host)) is not None
    except ValueError:
        return False


# -- subscribers ------------------------------------------------------------------------------------------------------


async def _subscription(sub: str, options: SubscriptionOptions, guard: Guard, store: Store | None) -> Finding:
    """Resolve and vet a subscriber's address; nothing is sent."""
    what = f"subscription {sub}"
    if not options.enabled:
        return Finding(what, "warn", "is disabled (enabled: false)")
    try:
        target = guard.vet_url(options.url.get_secret_value())
        if target.address is None:
            await guard.addresses(target.host, plain=target.plain)
    except ForbiddenAddress as error:
        reason, _, fix = str(error).partition("; to allow it: ")
        return Finding(what, "fail", reason, f"to allow it: {fix}" if fix else "")
    except NoAddress as error:
        return Finding(what, "fail", str(error), "correct the url, or this machine's DNS")
    off = ""
    if store is not None:
        with contextlib.suppress(*STORE_ERRORS):
            off = (await store.subscriptions.health(sub)).disabled_reason
    if off:
        return Finding(
            what, "fail", f"{target.host} is disabled: {off}", "fix the endpoint, then run `relay subscriptions enable`"
        )
    return Finding(what, "ok", f"{target.host} is an allowed address; nothing was sent")


def summary(findings: Sequence[Finding]) -> str:
    failed, warnings = (sum(finding.status == status for finding in findings) for status in ("fail", "warn"))
    result = f"{failed} failed" if failed else "all checks passed"
    return f"{result}, {warnings} warning{'' if warnings == 1 else 's'}" if warnings else result


# -- the command ------------------------------------------------------------------------------------------------------

app = new_app()


@app.command()
def check(
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Works next to a running relay. Exits with 1 when a check failed."""
    settings = load(config, os.environ)
    findings = run(settings, lambda finding: None if as_json else typer.echo(finding.line()))
    typer.echo(json.dumps(report(findings), indent=2) if as_json else summary(findings))
    if not report(findings)["ok"]:
        raise typer.Exit(1)


def run(settings: Settings, show: Callable[[Finding], None]) -> list[Finding]:
    """Run all checks, show each finding as it is made, and return them."""
    configure("error", settings.log.format)

    async def collect() -> list[Finding]:
        findings = []
        async for finding in check_all(settings):
            findings.append(finding)
            show(finding)
        return findings

    return asyncio.run(collect())

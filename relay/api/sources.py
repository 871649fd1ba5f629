"""Sources: accounts at providers.

The options of one that is created here are untrusted: they read no file and dial no forbidden address.
"""

import asyncio
import copy
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, WithJsonSchema

from relay.api.auth import Caller
from relay.api.context import ApiContext, tenant_of_new
from relay.api.fields import Id, Instant, check_id, instant, new_id
from relay.api.jobs import JobView
from relay.api.jobs import view as view_job
from relay.api.options import (
    MASK,
    check_url,
    inlined,
    masked,
    merge_patch_schema,
    merge_patched,
    origin,
    require_secrets,
    unmasked,
)
from relay.api.paging import Page, PageQuery, page_of_items
from relay.api.problems import Problem, changed_meanwhile, id_not_available, invalid
from relay.api.route import ApiResponse, invalid_input
from relay.delivery.guard import Guard
from relay.domain.json import Json
from relay.domain.time import iso
from relay.errors import ForeignId, RelayError
from relay.privacy.erase import Erased
from relay.providers import PROVIDERS
from relay.providers.base import SourceOptions
from relay.providers.source import Source
from relay.registry import parse_source
from relay.settings import ID_PATTERN, reveal
from relay.store.declarations import Declaration
from relay.store.lanes import LaneName
from relay.store.listings import Entry

# In a store with at most this many keys, a removed source's data is erased within the request; else by a job.
MAX_INLINE_KEYS: Final = 20_000
_MAX_TRIES: Final = 5
_CHECK_TIMEOUT_S: Final = 30
_NOT_OPTIONS: Final = ("id", "tenant")
_OPTIONAL_ID: Final[TypeAdapter[str | None]] = TypeAdapter(Id | None)


def _options_schema(kind_name: str, *, named: bool) -> Json:
    """Build the schema of a source's options in a request: without `…_file`, which only the configuration may set."""
    schema = copy.deepcopy(inlined(PROVIDERS[kind_name].options.model_json_schema(by_alias=True)))
    _omit_files(schema)
    schema["properties"]["provider"] = {"const": kind_name, "type": "string"}
    schema["required"] = sorted({"provider", *schema.get("required", ())})
    named_id = {"type": "string", "pattern": ID_PATTERN}
    schema["properties"]["tenant"] = {"anyOf": [named_id, {"type": "null"}], "description": "owner"}
    if named:
        schema["properties"]["id"] = {"anyOf": [named_id, {"type": "null"}], "description": "an id of your own"}
    schema["additionalProperties"] = False
    schema["title"] = f"{kind_name} source"
    return schema


def _omit_files(node: Any) -> None:
    if isinstance(node, dict):
        if isinstance(node.get("properties"), dict):
            node["properties"] = {k: v for k, v in node["properties"].items() if not k.endswith("_file")}
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            _omit_files(child)


def _any_options_schema(*, named: bool) -> Json:
    return {"oneOf": [_options_schema(name, named=named) for name in sorted(PROVIDERS)]}


def _any_changes_schema() -> Json:
    properties: Json = {}
    for kind in PROVIDERS.values():
        for name, field in merge_patch_schema(kind.options)["properties"].items():
            if not name.endswith("_file") and name != "provider":
                properties.setdefault(name, {"description": field.get("description", "")})
    return {"type": "object", "additionalProperties": False, "properties": properties}


CreateSource = Annotated[dict[str, Any], WithJsonSchema(_any_options_schema(named=True))]
ReplaceSource = Annotated[dict[str, Any], WithJsonSchema(_any_options_schema(named=False))]
UpdateSource = Annotated[dict[str, Any], WithJsonSchema(_any_changes_schema())]


class QuarantinedRow(BaseModel):
    """An invalid row of the provider."""

    reason: str
    key: str | None
    excerpt: str = Field(description="beginning of the row, digits masked")


class SourceGap(BaseModel):
    """Calls that the provider could not be made to list. Newer calls are not affected."""

    since: AwareDatetime = Field(description="start of the oldest call that may be missing")
    until: AwareDatetime
    error: str
    failing_since: AwareDatetime
    next_attempt_at: AwareDatetime


class SourceHealth(BaseModel):
    """The health of a source."""

    cursor: AwareDatetime | None = Field(description="newest call start seen")
    started_at: AwareDatetime | None = Field(description="since when events are published for its calls")
    last_poll_at: AwareDatetime | None
    next_poll_at: AwareDatetime | None
    error: str | None = Field(description="current error")
    error_since: AwareDatetime | None
    failures: int = Field(description="consecutive failed polls")
    contacts_off: str | None = Field(description="why contact lookups are paused")
    recordings_off: str | None = Field(description="why recordings are paused")
    quiet_since: AwareDatetime | None = Field(description="start of its newest call, if it usually has some by now")
    gaps: list[SourceGap] = Field(description="what deeper looks could not read so far; it is retried")
    budget_closed_until: AwareDatetime | None = Field(description="no requests until then, after the provider's 429")
    requests_left: int | None = Field(description="remaining requests within our share of the provider's limit")
    quarantined: int = Field(description="number of quarantined rows")


class SourceView(BaseModel):
    """A source. Its `options` can be sent back with PUT: masked values then keep the secrets."""

    id: str
    provider: str
    origin: Literal["configuration", "api"]
    tenant: str | None
    options: dict[str, Any] = Field(description="with secrets masked")
    state: Literal["working", "failing", "paused"]
    health: SourceHealth
    created_at: AwareDatetime | None = Field(description="null for a source of the configuration")
    updated_at: AwareDatetime | None


class SourceDetail(SourceView):
    """A source with its quarantined rows."""

    quarantine: list[QuarantinedRow]


class ListSources(PageQuery):
    """Filters of sources."""

    provider: str | None = Field(None, max_length=64)


class CheckResult(BaseModel):
    """The provider's response to the credentials."""

    ok: bool
    lines: list[str]


class Queued(BaseModel):
    """Confirms that the work was queued."""

    queued: Literal[True] = True


class BackfillRequest(BaseModel):
    """Which calls to read, by their start."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    from_: Instant = Field(alias="from")
    to: Instant | None = Field(None, description="now if omitted")
    force: bool = Field(False, description="also calls too old for duplicate detection")


# --- reading ---------------------------------------------------------------------------------------------------------


async def views(context: ApiContext, sources: Sequence[Source]) -> list[SourceView]:
    summaries = await context.store.sources.summaries([source.id for source in sources])
    budgets = await asyncio.gather(*(_budget(source) for source in sources))
    rendered: list[SourceView] = []
    for source, summary, (requests, closed_until) in zip(sources, summaries, budgets, strict=True):
        state = summary.state
        declaration = context.created("source", source.id)
        health = SourceHealth(
            cursor=state.poll_state.cursor,
            started_at=state.poll_state.started_at,
            last_poll_at=state.last_poll,
            next_poll_at=instant(summary.next_poll_ms),
            error=state.error or None,
            error_since=instant(state.error_since_ms) if state.error else None,
            failures=state.failures,
            contacts_off=state.contacts_off or None,
            recordings_off=state.recordings_off or None,
            quiet_since=state.quiet_since,
            gaps=[
                SourceGap(
                    since=gap.since,
                    until=gap.until,
                    error=gap.error,
                    failing_since=gap.failing_since,
                    next_attempt_at=gap.next_attempt,
                )
                for gap in state.poll_state.gaps
            ],
            budget_closed_until=closed_until,
            requests_left=requests,
            quarantined=summary.quarantined,
        )
        rendered.append(
            SourceView(
                id=source.id,
                provider=source.kind.name,
                origin="api" if declaration else "configuration",
                tenant=source.tenant,
                options=masked(source.options),
                state="paused" if source.paused else "failing" if state.error else "working",
                health=health,
                created_at=instant(declaration.created_ms) if declaration else None,
                updated_at=instant(declaration.updated_ms) if declaration else None,
            )
        )
    return rendered


async def _view(context: ApiContext, caller: Caller, source_id: str) -> SourceView:
    return (await views(context, [await context.source(caller, source_id)]))[0]


async def _budget(source: Source) -> tuple[int | None, datetime | None]:
    try:
        return await source.budget.requests_left(), await source.budget.closed_until()
    except RelayError:  # the file of its API key is unreadable
        return None, None


async def list_sources(context: ApiContext, caller: Caller, query: ListSources) -> Page[SourceView]:
    """List sources."""

    def entry_of(source: Source) -> Entry:
        declaration = context.created("source", source.id)
        return (declaration.created_ms if declaration else 0), source.id

    sources = [source for source in context.sources(caller) if query.provider in (None, source.kind.name)]
    page = page_of_items(sources, entry_of, query)
    return Page(items=await views(context, page.items), next_cursor=page.next_cursor)


async def read_source(context: ApiContext, caller: Caller, source_id: str) -> SourceDetail:
    """Read a source with its quarantined rows."""
    view = await _view(context, caller, source_id)
    rows = await context.store.sources.quarantined(source_id)
    quarantine = [QuarantinedRow(reason=row.reason, key=row.key, excerpt=row.excerpt) for row in rows]
    return SourceDetail(**dict(view), quarantine=quarantine)


# --- creating and changing -------------------------------------------------------------------------------------------


async def create_source(context: ApiContext, caller: Caller, body: CreateSource) -> SourceView:
    """Add an account at a provider. Events are published for calls that start from now on."""
    source_id, tenant = _id_and_tenant(body, caller)
    options = await _checked(context, caller, tenant, body)
    view = await _create(context, source_id or new_id("src"), options, tenant)
    if view is None:
        raise id_not_available()
    return view


async def put_source(context: ApiContext, caller: Caller, source_id: str, body: ReplaceSource) -> ApiResponse:
    """Add an account under an id of your own, or replace its options."""
    if "id" in body:
        raise invalid("id", "is part of the path")
    for _ in range(_MAX_TRIES):
        _, tenant = _id_and_tenant(body, caller)
        current = await context.declaration(caller, "source", source_id, hidden=id_not_available())
        if current is None:
            options = await _checked(context, caller, tenant, body)
            view = await _create(context, source_id, options, tenant)
            if view is not None:
                return ApiResponse(view, HTTPStatus.CREATED)
            continue  # a concurrent request created it first
        if tenant not in (None, current.tenant):
            raise invalid("tenant", "cannot be changed; delete the source and create it again")
        before = parse_source(current.document)
        document = unmasked(body, masked(before), current.document)
        options = await _checked(context, caller, current.tenant, document, before=before, body=body)
        if await _replace(context, current, options):
            return ApiResponse(await _view(context, caller, source_id))
    raise changed_meanwhile()


async def patch_source(context: ApiContext, caller: Caller, source_id: str, body: UpdateSource) -> SourceView:
    """Change some options; null resets one to its default."""
    for name in ("provider", *_NOT_OPTIONS):
        if name in body:
            raise invalid(name, "cannot be changed")
    for _ in range(_MAX_TRIES):
        current = await context.existing_declaration(caller, "source", source_id)
        before = parse_source(current.document)
        document = merge_patched(current.document, unmasked(body, masked(before), current.document))
        options = await _checked(context, caller, current.tenant, document, before=before, body=body)
        if await _replace(context, current, options):
            return await _view(context, caller, source_id)
    raise changed_meanwhile()


async def pause_source(context: ApiContext, caller: Caller, source_id: str) -> SourceView:
    """Stop polling a source. Events of calls that were ingested before are still published."""
    return await patch_source(context, caller, source_id, {"enabled": False})


async def resume_source(context: ApiContext, caller: Caller, source_id: str) -> SourceView:
    """Resume polling from the cursor: calls of the meantime are published, as far as the provider still has them."""
    return await patch_source(context, caller, source_id, {"enabled": True})


def _id_and_tenant(body: Mapping[str, Any], caller: Caller) -> tuple[str | None, str | None]:
    values: list[str | None] = []
    for name in _NOT_OPTIONS:
        try:
            values.append(_OPTIONAL_ID.validate_python(body.get(name)))
        except ValidationError:
            raise invalid(name, "must have lower-case letters, digits, - and _, at most 63") from None
    source_id, tenant = values
    return source_id, tenant_of_new(caller, tenant)


async def _checked(
    context: ApiContext,
    caller: Caller,
    tenant: str | None,
    options_document: Json,
    *,
    before: SourceOptions | None = None,
    body: Json | None = None,
) -> Json:
    """Validate options and the URLs in them; return the document to store. `body` is the request that changes them."""
    document = {name: value for name, value in options_document.items() if name not in _NOT_OPTIONS}
    _refuse_files_and_masks(document, "")
    kind = PROVIDERS.get(str(document.get("provider")))
    if kind is None:
        raise invalid("provider", f"must be one of {', '.join(sorted(PROVIDERS))}")
    try:
        options: SourceOptions = TypeAdapter(kind.options).validate_python(document)
    except ValidationError as error:
        raise invalid_input(error, kind.options) from None
    if before is not None and body is not None and _destinations(options) != _destinations(before):
        require_secrets(body, options)
    guard = context.runtime.egress.guard(tenant)
    await _check_urls(guard, caller, options, dict(_urls(before)) if before is not None else {})
    return reveal(options)


def _destinations(options: SourceOptions) -> tuple[str, Mapping[str, object]]:
    """The provider, and the servers that get its secrets; a proxy is none: it sees only encrypted connections."""
    return options.provider, {name: origin(url) for name, url in _urls(options) if name != "proxy_url"}


def _refuse_files_and_masks(document: Json, prefix: str) -> None:
    for name, value in document.items():
        path = f"{prefix}{name}"[:200]
        if name.endswith("_file") and value is not None:
            raise invalid(path, "is only allowed in the configuration; send the value itself")
        if value == MASK:
            raise invalid(path, "is the mask and not the value")
        if isinstance(value, dict):
            _refuse_files_and_masks(value, f"{path}.")


async def _check_urls(guard: Guard, caller: Caller, options: SourceOptions, before: Mapping[str, str]) -> None:
    for name, url in _urls(options):
        # An unchanged URL is not checked again: a DNS outage must not prevent pausing a source.
        if before.get(name) == url:
            continue
        if name == "proxy_url":
            # A proxy is dialled without TLS and tunnels: its address is checked like one that is dialled with TLS.
            url = "https://" + url.partition("://")[2]
        elif options.proxy_url is not None and not url.lower().startswith("https://"):
            raise invalid(name, "must be https behind a proxy")
        await check_url(guard, caller, name, url)


def _urls(options: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name in type(options).model_fields:
        value = getattr(options, name)
        if isinstance(value, BaseModel):
            yield from _urls(value, f"{prefix}{name}.")
        elif name.endswith("_url") and value is not None:
            yield f"{prefix}{name}", str(value)


async def _create(context: ApiContext, source_id: str, document: Json, tenant: str | None) -> SourceView | None:
    """Create a source; None when a concurrent request created one with this id."""
    runtime = context.runtime
    check_id(source_id)
    if runtime.registry.configured("source", source_id) or await context.store.sources.being_removed(source_id):
        raise id_not_available()
    try:
        declaration = await context.store.declarations.create("source", source_id, document, tenant=tenant)
    except ForeignId:
        raise id_not_available() from None
    if declaration is None:
        return None
    await runtime.registry.apply("source", declaration)
    await runtime.reconciler.source(source_id)
    return (await views(context, [runtime.sources[source_id]]))[0]


async def _replace(context: ApiContext, current: Declaration, document: Json) -> bool:
    runtime = context.runtime
    declaration = await context.store.declarations.replace("source", current, document)
    if declaration is None:
        return False
    if _destinations(parse_source(document)) != _destinations(parse_source(current.document)):
        await context.store.credentials(current.id).forget()  # handed out by the former server
    await runtime.registry.apply("source", declaration)
    await runtime.reconciler.source(current.id)
    return True


# --- removing --------------------------------------------------------------------------------------------------------


async def delete_source(context: ApiContext, caller: Caller, source_id: str) -> None:
    """Remove a source and all its data: calls, events, recordings, contacts and its cursor.

    Pending deliveries end as expired. The id is available again once all is erased. Also 204 without such a source.
    """
    runtime, store = context.runtime, context.store
    declaration = await context.declaration(caller, "source", source_id)
    if declaration is None:
        return
    # First: from here on ingest refuses the source, so a running poll or backfill adds nothing behind the erasure.
    await store.sources.begin_removal(source_id, tenant=declaration.tenant)
    await runtime.lanes[LaneName.POLL].drop(source_id, source_id)
    if await store.size() > MAX_INLINE_KEYS:
        await context.start_job("forget_source", source_id, caller=caller, source=source_id)
        await _undeclare(context, source_id)
        return

    async def step(_: Erased) -> None:
        await store.sources.continue_removal(source_id)

    await _undeclare(context, source_id)
    await context.eraser.source(source_id, step=step)
    await runtime.markers.delete(source_id)
    await store.sources.end_removal(source_id)


async def _undeclare(context: ApiContext, source_id: str) -> None:
    await context.store.declarations.remove("source", source_id)
    await context.runtime.registry.drop("source", source_id)


# --- polling ---------------------------------------------------------------------------------------------------------


async def check_source(context: ApiContext, caller: Caller, source_id: str) -> CheckResult:
    """Check the credentials, with at most two requests to the provider."""
    source = await context.source(caller, source_id)
    try:
        async with asyncio.timeout(_CHECK_TIMEOUT_S):
            health = await source.provider.health()
    except TimeoutError:
        return CheckResult(ok=False, lines=[f"the provider did not respond within {_CHECK_TIMEOUT_S} s"])
    return CheckResult(ok=health.ok, lines=list(health.lines))


async def poll_source(context: ApiContext, caller: Caller, source_id: str) -> Queued:
    """Poll a source now."""
    source = await _active_source(context, caller, source_id)
    await context.runtime.lanes[LaneName.POLL].put(source.id, source.id)
    context.runtime.wake_ups(LaneName.POLL)
    return Queued()


async def backfill(context: ApiContext, caller: Caller, source_id: str, body: BackfillRequest) -> JobView:
    """Read a range of calls again and publish those that are missing, under the ids they would always have had."""
    source = await _active_source(context, caller, source_id)
    now = context.now()
    until = min(body.to or now, now)
    if body.from_ >= until:
        raise invalid("from", "must be before `to`, and in the past")
    start, end = iso(body.from_), iso(until)
    job = await context.start_job(
        "backfill", source.id, start, end, caller=caller, after=(body.force,), source=source.id, since=start, until=end
    )
    return view_job(job)


async def _active_source(context: ApiContext, caller: Caller, source_id: str) -> Source:
    source = await context.source(caller, source_id)
    if source.paused:
        raise Problem("source_paused", "The source is paused; resume it first.")
    return source

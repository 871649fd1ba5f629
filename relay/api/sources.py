"""Sources over HTTP. One that comes in here is a stranger's: it reads no file and dials no forbidden address."""

import asyncio
import copy
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, WithJsonSchema

from relay.api.auth import Caller
from relay.api.context import Api, Id, Instant, check_id, fresh_id, instant, own, own_tenant
from relay.api.jobs import JobView, start_backfill
from relay.api.options import MASK, changes_schema, inlined, masked, patched, unmasked, vet
from relay.api.paging import Page, PageQuery, after, read_cursor
from relay.api.problems import Problem, changed, configured, invalid, taken
from relay.api.route import Reply, invalid_input
from relay.domain.json import Json
from relay.domain.time import iso
from relay.errors import OverBudget, ProviderError, RelayError
from relay.privacy.erase import FORGOTTEN_TTL_S, REMEMBERED_S, Erased
from relay.providers import PROVIDERS
from relay.providers.base import SourceOptions
from relay.providers.source import Source
from relay.queue import keys as queue_keys
from relay.registry import parse_source
from relay.settings import ID_PATTERN, reveal
from relay.store import keys
from relay.store.declarations import Declaration
from relay.store.lanes import LaneName

INLINE_KEYS: Final = 20_000
"""A store with at most so many keys is cleared up at once; a larger one by a job."""
_TRIES: Final = 5
_CHECK_S: Final = 30
_ENVELOPE: Final = ("id", "tenant")


def _options_schema(kind_name: str, *, named: bool) -> Json:
    """Write the schema of a source's options as the API takes them: without the files, which are the operator's."""
    schema = copy.deepcopy(inlined(PROVIDERS[kind_name].options.model_json_schema(by_alias=True)))
    _leave_files_out(schema)
    schema["properties"]["provider"] = {"const": kind_name, "type": "string"}
    schema["required"] = sorted({"provider", *schema.get("required", ())})
    named_id = {"type": "string", "pattern": ID_PATTERN}
    schema["properties"]["tenant"] = {"anyOf": [named_id, {"type": "null"}], "description": "whose it is"}
    if named:
        schema["properties"]["id"] = {"anyOf": [named_id, {"type": "null"}], "description": "an id of your own"}
    schema["additionalProperties"] = False
    schema["title"] = f"{kind_name} source"
    return schema


def _leave_files_out(node: Any) -> None:
    if isinstance(node, dict):
        if isinstance(node.get("properties"), dict):
            node["properties"] = {k: v for k, v in node["properties"].items() if not k.endswith("_file")}
        for each in node.values():
            _leave_files_out(each)
    elif isinstance(node, list):
        for each in node:
            _leave_files_out(each)


def _any_options_schema(*, named: bool) -> Json:
    return {"oneOf": [_options_schema(name, named=named) for name in sorted(PROVIDERS)]}


def _any_changes_schema() -> Json:
    properties: Json = {}
    for kind in PROVIDERS.values():
        for name, each in changes_schema(kind.options)["properties"].items():
            if not name.endswith("_file") and name != "provider":
                properties.setdefault(name, {"description": each.get("description", "")})
    return {"type": "object", "additionalProperties": False, "properties": properties}


NewSource = Annotated[dict[str, Any], WithJsonSchema(_any_options_schema(named=True))]
PutSource = Annotated[dict[str, Any], WithJsonSchema(_any_options_schema(named=False))]
SourceChanges = Annotated[dict[str, Any], WithJsonSchema(_any_changes_schema())]


class QuarantinedRow(BaseModel):
    """A row of the provider that could not be believed."""

    reason: str
    key: str | None
    excerpt: str = Field(description="a piece of it, digits masked")


class SourceHealth(BaseModel):
    """How a source is."""

    cursor: AwareDatetime | None = Field(description="the newest call start that was seen")
    started_at: AwareDatetime | None = Field(description="since when its calls are told")
    last_poll_at: AwareDatetime | None
    next_poll_at: AwareDatetime | None
    error: str | None = Field(description="what is wrong now")
    error_since: AwareDatetime | None
    failures: int = Field(description="failed polls in a row")
    contacts_off: str | None = Field(description="why nobody is looked up for a while")
    recordings_off: str | None = Field(description="why no audio is fetched for a while")
    quiet_since: AwareDatetime | None = Field(description="its newest call, where it always has calls at this time")
    requests_left: int | None = Field(description="what is left of our share of the provider's limit right now")
    quarantined: int = Field(description="rows that were put aside")


class SourceView(BaseModel):
    """A source. Its `options` can be given back with PUT: masked values then keep what they stand for."""

    id: str
    provider: str
    origin: Literal["configuration", "api"]
    tenant: str | None
    options: dict[str, Any] = Field(description="as given, secrets masked")
    state: Literal["working", "failing", "paused"]
    health: SourceHealth
    created_at: AwareDatetime | None = Field(description="null for those of the configuration")
    updated_at: AwareDatetime | None


class SourceDetail(SourceView):
    """A source with the rows that were put aside."""

    quarantine: list[QuarantinedRow]


class ListSources(PageQuery):
    """Which sources."""

    provider: str | None = Field(None, max_length=64)


class CheckResult(BaseModel):
    """What the provider said."""

    ok: bool
    lines: list[str]


class Queued(BaseModel):
    """It is going to happen."""

    queued: Literal[True] = True


class BackfillRequest(BaseModel):
    """Which calls to read again, by their start."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    from_: Instant = Field(alias="from")
    to: Instant | None = Field(None, description="absent: now")
    force: bool = Field(False, description="also what is too old to be told apart from known calls")


# --- looking ---------------------------------------------------------------------------------------------------------


async def views(api: Api, found: Sequence[Source]) -> list[SourceView]:
    """Show sources with their health."""
    runtime = api.runtime
    async with runtime.redis.pipeline(transaction=False) as pipe:
        for source in found:
            pipe.zscore(queue_keys.waiting(LaneName.POLL, ""), source.id)
            pipe.hlen(keys.quarantine(source.id))
        rows = await pipe.execute()
    states = await asyncio.gather(*(runtime.states.read(source.id) for source in found))
    left = await asyncio.gather(*(_requests_left(source) for source in found))
    shown: list[SourceView] = []
    for source, state, requests, due, aside in zip(found, states, left, rows[::2], rows[1::2], strict=True):
        configured = runtime.registry.configured("source", source.id)
        made = None if configured else runtime.registry.made["source"].get(source.id)
        health = SourceHealth(
            cursor=state.poll_state.cursor,
            started_at=state.poll_state.started_at,
            last_poll_at=state.last_poll,
            next_poll_at=instant(due or 0),
            error=state.error or None,
            error_since=instant(state.error_since_ms) if state.error else None,
            failures=state.failures,
            contacts_off=state.contacts_off or None,
            recordings_off=state.recordings_off or None,
            quiet_since=state.quiet_since,
            requests_left=requests,
            quarantined=aside,
        )
        shown.append(
            SourceView(
                id=source.id,
                provider=source.kind.name,
                origin="configuration" if configured else "api",
                tenant=source.tenant,
                options=masked(source.options),
                state="paused" if source.paused else "failing" if state.error else "working",
                health=health,
                created_at=instant(made.created_ms) if made else None,
                updated_at=instant(made.updated_ms) if made else None,
            )
        )
    return shown


async def _requests_left(source: Source) -> int | None:
    try:
        return await source.requests_left()
    except RelayError:  # its key file cannot be read just now
        return None


async def list_sources(api: Api, caller: Caller, query: ListSources) -> Page[SourceView]:
    """List the sources."""
    made = api.runtime.registry.made["source"]

    def place(each: Source) -> tuple[int, str]:
        return (made[each.id].created_ms if each.id in made else 0), each.id

    visible = [
        each
        for each in api.runtime.sources.values()
        if caller.sees(each.tenant) and query.provider in (None, each.kind.name)
    ]
    try:
        part = after(sorted(visible, key=place, reverse=True), place, read_cursor(query.cursor), query.limit)
    except ValueError as error:
        raise invalid("cursor", str(error)) from None
    return Page(items=await views(api, part.found), next_cursor=part.next_cursor)


async def read_source(api: Api, caller: Caller, source_id: str) -> SourceDetail:
    """Read a source, with the rows that were put aside."""
    source = await api.source(caller, source_id)
    rows = await api.runtime.states.quarantined(source_id)
    view = (await views(api, [source]))[0]
    return SourceDetail(**dict(view), quarantine=[QuarantinedRow.model_validate(row) for row in rows])


# --- making and changing ---------------------------------------------------------------------------------------------


async def create_source(api: Api, caller: Caller, body: NewSource) -> SourceView:
    """Add an account at a provider. Calls that start from now on are told."""
    wanted, tenant = _envelope(body, caller)
    options = await _checked(api, caller, body)
    made = await _create(api, wanted or fresh_id("src"), options, tenant)
    if made is None:
        raise taken()
    return made


async def put_source(api: Api, caller: Caller, source_id: str, body: PutSource) -> Reply:
    """Add an account under an id of your own, or replace its options."""
    if "id" in body:
        raise invalid("id", "stands in the address")
    for _ in range(_TRIES):
        _, tenant = _envelope(body, caller)
        stands = await own(api, caller, "source", source_id, missing_ok=True)
        if stands is None:
            options = await _checked(api, caller, body)
            made = await _create(api, source_id, options, tenant)
            if made is not None:
                return Reply(made, HTTPStatus.CREATED)
            continue  # somebody was quicker, perhaps the same caller
        if tenant not in (None, stands.tenant):
            raise invalid("tenant", "cannot be changed; delete the source and make it again")
        current = parse_source(stands.document)
        options = await _checked(api, caller, unmasked(body, masked(current), stands.document), before=current)
        if await _replace(api, stands, options):
            return Reply((await views(api, [await api.source(caller, source_id)]))[0])
    raise changed()


async def patch_source(api: Api, caller: Caller, source_id: str, body: SourceChanges) -> SourceView:
    """Change some options; null gives one back to its default."""
    for name in ("provider", *_ENVELOPE):
        if name in body:
            raise invalid(name, "cannot be changed")
    for _ in range(_TRIES):
        stands = await own(api, caller, "source", source_id)
        assert stands is not None  # noqa: S101 - a Problem otherwise
        current = parse_source(stands.document)
        wanted = patched(stands.document, unmasked(body, masked(current), stands.document))
        options = await _checked(api, caller, wanted, before=current)
        if await _replace(api, stands, options):
            return (await views(api, [await api.source(caller, source_id)]))[0]
    raise changed()


async def pause_source(api: Api, caller: Caller, source_id: str) -> SourceView:
    """Ask the provider nothing more; what was admitted before is told all the same."""
    return await patch_source(api, caller, source_id, {"enabled": False})


async def resume_source(api: Api, caller: Caller, source_id: str) -> SourceView:
    """Ask the provider again, from where the relay stands: what happened meanwhile is told, as far as it has it."""
    return await patch_source(api, caller, source_id, {"enabled": True})


def _envelope(body: Mapping[str, Any], caller: Caller) -> tuple[str | None, str | None]:
    names = TypeAdapter(Id | None)
    found: list[str | None] = []
    for name in _ENVELOPE:
        try:
            found.append(names.validate_python(body.get(name)))
        except ValidationError:
            raise invalid(name, "has lower-case letters, digits, - and _, at most 63") from None
    return found[0], own_tenant(caller, found[1])


async def _checked(api: Api, caller: Caller, body: Json, *, before: SourceOptions | None = None) -> Json:
    """Check options that came in, and the addresses in them; gives what is kept.

    An address that stays as it was is not judged anew: a name that cannot be resolved just now must not keep anybody
    from pausing a source.
    """
    document = {name: value for name, value in body.items() if name not in _ENVELOPE}
    _refuse_unusable(document, "")
    kind = PROVIDERS.get(str(document.get("provider")))
    if kind is None:
        raise invalid("provider", f"must be one of {', '.join(sorted(PROVIDERS))}")
    try:
        options: SourceOptions = TypeAdapter(kind.options).validate_python(document)
    except ValidationError as error:
        raise invalid_input(error, kind.options) from None
    await _vet_addresses(api, caller, options, dict(_addresses(before)) if before is not None else {})
    return reveal(options)


def _refuse_unusable(document: Json, under: str) -> None:
    """Refuse files, which are the operator's, and masks that stand for nothing."""
    for name, value in document.items():
        where = f"{under}{name}"[:200]
        if name.endswith("_file") and value is not None:
            raise invalid(where, "the relay reads no files for the API; give the value itself")
        if value == MASK:
            raise invalid(where, "is the mask and not the value")
        if isinstance(value, dict):
            _refuse_unusable(value, f"{where}.")


async def _vet_addresses(api: Api, caller: Caller, options: SourceOptions, before: Mapping[str, str]) -> None:
    guard = api.runtime.sender.guard
    for name, url in _addresses(options):
        if before.get(name) == url:
            continue
        if name == "proxy_url":
            # A proxy is dialled without TLS and tunnels: its address is judged as one that is dialled with TLS.
            url = "https://" + url.partition("://")[2]
        elif options.proxy_url is not None and not url.lower().startswith("https://"):
            raise invalid(name, "must be https behind a proxy")
        await vet(guard, caller, name, url)


def _addresses(options: BaseModel, under: str = "") -> Iterator[tuple[str, str]]:
    """List every address that a source would dial, with the name of its setting."""
    for name in type(options).model_fields:
        value = getattr(options, name)
        if isinstance(value, BaseModel):
            yield from _addresses(value, f"{under}{name}.")
        elif name.endswith("_url") and value is not None:
            yield f"{under}{name}", str(value)


async def _create(api: Api, sid: str, document: Json, tenant: str | None) -> SourceView | None:
    """Make a source; None when somebody has just made one with this id."""
    runtime = api.runtime
    check_id(sid)
    if runtime.registry.configured("source", sid) or await runtime.redis.exists(keys.forgotten(sid)):
        raise taken()
    made = await runtime.registry.declarations.create("source", sid, document, tenant=tenant)
    if made is None:
        return None
    await runtime.registry.take("source", made)
    await runtime.reconciler.source(sid)
    return (await views(api, [runtime.sources[sid]]))[0]


async def _replace(api: Api, stands: Declaration, document: Json) -> bool:
    runtime = api.runtime
    made = await runtime.registry.declarations.replace("source", stands, document)
    if made is None:
        return False
    await runtime.registry.take("source", made)
    await runtime.reconciler.source(stands.id)
    return True


# --- ending ----------------------------------------------------------------------------------------------------------


async def delete_source(api: Api, caller: Caller, source_id: str) -> None:
    """Remove a source with all that came from it: calls, events, audio, contacts, and where it stood.

    What still waits to be delivered ends as expired. The id can be used again when all is cleared up. 204 also when it
    is gone already.
    """
    runtime = api.runtime
    if runtime.registry.configured("source", source_id):
        if caller.tenant is None:
            raise configured(source_id)
        return
    stands = await runtime.registry.declarations.get("source", source_id)
    if stands is None or not caller.sees(stands.tenant):
        return
    await runtime.redis.set(keys.forgotten(source_id), stands.tenant or "", ex=FORGOTTEN_TTL_S)
    await runtime.lanes[LaneName.POLL].drop("", source_id)
    if await runtime.redis.dbsize() > INLINE_KEYS:
        await api.start("forget_source", source_id, caller=caller, source=source_id)
        await _undeclare(api, source_id)
        return
    await _undeclare(api, source_id)
    await api.eraser.source(source_id, step=_no_step)
    await runtime.markers.delete(source_id)
    await runtime.redis.expire(keys.forgotten(source_id), REMEMBERED_S)


async def _undeclare(api: Api, sid: str) -> None:
    await api.runtime.registry.declarations.remove("source", sid)
    await api.runtime.registry.drop("source", sid)


async def _no_step(_: Erased) -> None:
    return


# --- asking ----------------------------------------------------------------------------------------------------------


async def check_source(api: Api, caller: Caller, source_id: str) -> CheckResult:
    """Try the credentials: at most two requests."""
    source = await api.source(caller, source_id)
    try:
        async with asyncio.timeout(_CHECK_S), source.asking() as provider:
            health = await provider.health()
    except (ProviderError, OverBudget) as error:
        return CheckResult(ok=False, lines=[str(error)])
    except TimeoutError:
        return CheckResult(ok=False, lines=[f"the provider took longer than {_CHECK_S} s"])
    return CheckResult(ok=health.ok, lines=list(health.lines))


async def poll_source(api: Api, caller: Caller, source_id: str) -> Queued:
    """Poll now."""
    source = await api.source(caller, source_id)
    if source.paused:
        raise _paused()
    await api.runtime.lanes[LaneName.POLL].put("", source_id)
    api.runtime.wake_ups(LaneName.POLL)
    return Queued()


async def backfill(api: Api, caller: Caller, source_id: str, body: BackfillRequest) -> JobView:
    """Read a range again and tell what was never told, under the ids that it has always had."""
    source = await api.source(caller, source_id)
    if source.paused:
        raise _paused()
    now = api.now()
    until = min(body.to or now, now)
    if body.from_ >= until:
        raise invalid("from", "must be before `to`, and in the past")
    return await start_backfill(api, caller, source_id, iso(body.from_) or "", iso(until) or "", force=body.force)


def _paused() -> Problem:
    return Problem("source_paused", "The source is paused; resume it first.")

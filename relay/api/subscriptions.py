"""Subscriptions over HTTP, REST hooks among them: POST subscribes, DELETE unsubscribes, as often as one likes."""

from collections.abc import Sequence
from datetime import timedelta
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal
from uuid import uuid4

from aiohttp import web
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, WithJsonSchema
from yarl import URL

from relay.api.auth import Caller
from relay.api.context import (
    EVENT_ID,
    Api,
    Id,
    Instant,
    check_id,
    fresh_id,
    instant,
    own,
    own_tenant,
    subject_of,
    to_ms,
)
from relay.api.options import changes_schema, inlined, masked, patched, unmasked, vet
from relay.api.paging import Page, PageQuery, after, page_of, read_cursor
from relay.api.problems import Problem, changed, configured, invalid, taken
from relay.api.route import Reply, invalid_input
from relay.delivery import filters, signature
from relay.delivery.replay import ReplayStatus
from relay.delivery.subscriptions import Subscription
from relay.domain.json import Json
from relay.domain.time import from_iso, iso
from relay.events import payload
from relay.events.render import check_map, render_json
from relay.queue import keys as queue_keys
from relay.queue.changes import DisablePartition
from relay.settings import SubscriptionOptions, reveal
from relay.settings.values import SigningSecret
from relay.store import keys
from relay.store.database import is_durable
from relay.store.declarations import Declaration
from relay.store.lanes import LaneName

DELETED: Final = "deleted"
DISABLED_BY_HAND: Final = "disabled through the API"
FORMER_SECRET_FOR: Final = timedelta(hours=24)
_FORMER_MOST: Final = 3
_TOMBSTONE_S: Final = 60
_SAMPLE_SCAN: Final = 500
_TRIES: Final = 5
_OPTIONS: Final = TypeAdapter(SubscriptionOptions)


class PutSubscription(SubscriptionOptions):
    """What a subscriber wants to hear, and where. Without a secret one is made, and shown once."""

    secret: SigningSecret | None = Field(None, description="whsec_…, which signs every event; made when left out")  # type: ignore[assignment]  # filled in before it is kept
    tenant: Id | None = Field(None, description="whose it is; only the operator may say so")


class CreateSubscription(PutSubscription):
    """A subscription to be made."""

    id: Id | None = Field(None, description="an id of your own; made when left out")


SubscriptionWish = Annotated[dict[str, Any], WithJsonSchema(inlined(PutSubscription.model_json_schema()))]
SubscriptionChanges = Annotated[dict[str, Any], WithJsonSchema(changes_schema(SubscriptionOptions))]


class SubscriptionView(BaseModel):
    """A subscription. Its `options` can be given back with PUT: masked values then keep what they stand for."""

    id: str
    origin: Literal["configuration", "api"]
    tenant: str | None
    host: str = Field(description="host of the url; more of it is not shown")
    options: dict[str, Any] = Field(description="as given, secrets masked")
    state: Literal["enabled", "disabled"]
    disabled_reason: str | None
    failing_since: AwareDatetime | None = Field(description="since when nothing was heard by it")
    resting: bool = Field(description="whether attempts are held back for some minutes, because it looks unwell")
    last_heard_at: AwareDatetime | None
    created_at: AwareDatetime | None = Field(description="null for those of the configuration")
    updated_at: AwareDatetime | None
    warnings: list[str] = Field(default_factory=list)


class SubscriptionWithSecret(SubscriptionView):
    """A subscription that was just made."""

    secret: str = Field(description="signs every event; shown this once")


class RotatedSecret(BaseModel):
    """A fresh secret."""

    id: str
    secret: str = Field(description="shown this once")
    former_valid_until: AwareDatetime = Field(description="until then both secrets sign")


class RotateSecretRequest(BaseModel):
    """A secret of your own, or none to have one made."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    secret: SigningSecret | None = None


class DisableRequest(BaseModel):
    """Why it is switched off."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: str | None = Field(None, min_length=1, max_length=200)


class ReplayRequest(BaseModel):
    """Which events to deliver again: one, or those since a time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    event_id: str | None = Field(None, pattern=EVENT_ID)
    since: Instant | None = None
    status: ReplayStatus = Field("exhausted", description="which of them, with `since`; any: all it would want now")
    force: bool = Field(False, description="also those that were delivered")


class ReplayResult(BaseModel):
    """What became of a replay: of one event at once, of many as a job."""

    result: Literal["queued", "waiting_already", "delivered_already", "job"]
    job: str | None = None


class TestResult(BaseModel):
    """A test event is on its way."""

    event_id: str


class SampleQuery(BaseModel):
    """How many samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: int = Field(3, ge=1, le=20)


class UnsubscribeQuery(BaseModel):
    """Who unsubscribes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unsubscribed_by: Literal["hook"] | None = Field(
        None, description="`hook`: the subscriber itself, which then needs no reverse unsubscribe"
    )


class ListSubscriptions(PageQuery):
    """Which subscriptions."""

    state: Literal["enabled", "disabled"] | None = None


# --- looking ---------------------------------------------------------------------------------------------------------


async def views(api: Api, found: Sequence[Subscription]) -> list[SubscriptionView]:
    """Show subscriptions, with their health in one round trip."""
    names = ["disabled", "failing_since", "circuit_opened_at", "succeeded_at"]
    async with api.runtime.redis.pipeline(transaction=False) as pipe:
        for each in found:
            pipe.hmget(queue_keys.partition(LaneName.DELIVER, each.id), names)
        rows = await pipe.execute()
    directory = api.runtime.registry
    shown: list[SubscriptionView] = []
    for each, (off, failing, opened, heard) in zip(found, rows, strict=True):
        configured = directory.configured("subscription", each.id)
        made = None if configured else directory.made["subscription"].get(each.id)
        reason = off.decode() if off else None if each.options.enabled else "enabled: false"
        shown.append(
            SubscriptionView(
                id=each.id,
                origin="configuration" if configured else "api",
                tenant=each.tenant,
                host=each.host,
                options=masked(each.options),
                state="disabled" if reason else "enabled",
                disabled_reason=reason,
                failing_since=instant(int(failing or 0)),
                resting=opened is not None,
                last_heard_at=instant(int(heard or 0)),
                created_at=instant(made.created_ms) if made else None,
                updated_at=instant(made.updated_ms) if made else None,
                warnings=warnings_of(api, each),
            )
        )
    return shown


def warnings_of(api: Api, subscription: Subscription) -> list[str]:
    """Say what will surprise whoever made it."""
    found: list[str] = []
    if "/webhook-test/" in URL(subscription.url).path:
        found.append(
            "This is a test URL of n8n: it hears one event after each click on “Listen for test event” and answers 404 "
            "otherwise. Use the production URL (/webhook/) once the workflow is active."
        )
    for sid in subscription.options.sources or ():
        source = api.runtime.sources.get(sid)
        if source is None or subscription.tenant not in (None, source.tenant):
            found.append(f"There is no source {sid} so far: nothing is heard of it until it is made.")
    return found


async def list_subscriptions(api: Api, caller: Caller, query: ListSubscriptions) -> Page[SubscriptionView]:
    """List the subscriptions."""
    made = api.runtime.registry.made["subscription"]

    def place(each: Subscription) -> tuple[int, str]:
        return (made[each.id].created_ms if each.id in made else 0), each.id

    visible = sorted(
        (each for each in api.runtime.subscriptions.values() if caller.sees(each.tenant)), key=place, reverse=True
    )
    part = after(visible, place, _cursor(query), query.limit)
    shown = await views(api, part.found)
    if query.state is not None:
        shown = [each for each in shown if each.state == query.state]
    return Page(items=shown, next_cursor=part.next_cursor)


async def read_subscription(api: Api, caller: Caller, subscription_id: str) -> SubscriptionView:
    """Read a subscription."""
    return (await views(api, [await api.subscription(caller, subscription_id)]))[0]


# --- making and changing ---------------------------------------------------------------------------------------------


async def create_subscription(api: Api, caller: Caller, body: CreateSubscription) -> SubscriptionWithSecret:
    """Subscribe. No challenge is sent; several subscriptions may have the same url."""
    tenant = own_tenant(caller, body.tenant)
    document = _document(body)
    await _vet(api, caller, document)
    made = await _create(api, body.id or fresh_id("sub"), document, tenant)
    if made is None:
        raise taken()
    return made


async def put_subscription(api: Api, caller: Caller, subscription_id: str, body: SubscriptionWish) -> Reply:
    """Make a subscription under an id of your own, or replace it. Without a secret the present one stays."""
    for _ in range(_TRIES):
        stands = await own(api, caller, "subscription", subscription_id, missing_ok=True)
        shown, plain = _shown_and_plain(stands)
        wish = _checked(PutSubscription, unmasked(body, shown, plain))
        if stands is None:
            document = _document(wish)
            await _vet(api, caller, document)
            made = await _create(api, subscription_id, document, own_tenant(caller, wish.tenant))
            if made is not None:
                return Reply(made, HTTPStatus.CREATED)
            continue  # somebody was quicker, perhaps the same caller
        if wish.tenant not in (None, stands.tenant):
            raise invalid("tenant", "cannot be changed; delete the subscription and make it again")
        document = _document(wish, secret=plain["secret"])
        if await _replace(api, caller, stands, document):
            return Reply(await read_subscription(api, caller, subscription_id))
    raise changed()


async def patch_subscription(
    api: Api, caller: Caller, subscription_id: str, body: SubscriptionChanges
) -> SubscriptionView:
    """Change some options; null gives one back to its default."""
    for _ in range(_TRIES):
        stands = await own(api, caller, "subscription", subscription_id)
        assert stands is not None  # noqa: S101 - a Problem otherwise
        shown, plain = _shown_and_plain(stands)
        document = reveal(_checked(SubscriptionOptions, patched(plain, unmasked(body, shown, plain))))
        if await _replace(api, caller, stands, document):
            return await read_subscription(api, caller, subscription_id)
    raise changed()


async def rotate_secret(api: Api, caller: Caller, subscription_id: str, body: RotateSecretRequest) -> RotatedSecret:
    """Make a fresh secret; for 24 hours the former one signs too."""
    secret = body.secret.get_secret_value() if body.secret else signature.new_secret()
    for _ in range(_TRIES):
        stands = await own(api, caller, "subscription", subscription_id)
        assert stands is not None  # noqa: S101 - a Problem otherwise
        _, plain = _shown_and_plain(stands)
        if plain["secret"] == secret:
            raise invalid("secret", "is the present one")
        if await _replace(api, caller, stands, {**plain, "secret": secret}):
            return RotatedSecret(id=subscription_id, secret=secret, former_valid_until=api.now() + FORMER_SECRET_FOR)
    raise changed()


async def _create(api: Api, sub: str, document: Json, tenant: str | None) -> SubscriptionWithSecret | None:
    """Make a subscription; None when somebody has just made one with this id."""
    runtime = api.runtime
    check_id(sub)
    if not await runtime.store.subscriptions.reuse(sub, tenant=tenant):
        raise taken()  # another tenant's until every process knows of the removal
    if runtime.registry.configured("subscription", sub):
        raise taken()
    made = await runtime.registry.declarations.create("subscription", sub, document, tenant=tenant)
    if made is None:
        return None
    await runtime.registry.take("subscription", made)
    await runtime.reconciler.subscription(sub)
    view = (await views(api, [runtime.subscriptions[sub]]))[0]
    return SubscriptionWithSecret(**dict(view), secret=document["secret"])


async def _replace(api: Api, caller: Caller, stands: Declaration, document: Json) -> bool:
    """Keep a changed document; False when somebody was quicker. A secret that changes signs for another 24 hours."""
    await _vet(api, caller, document, before=stands.document)
    former = list(stands.document.get("former_secrets", []))
    if document["secret"] != stands.document["secret"]:
        former.append({"secret": stands.document["secret"], "until": iso(api.now() + FORMER_SECRET_FOR)})
    former = [each for each in former if from_iso(each["until"]) > api.now()][-_FORMER_MOST:]
    runtime = api.runtime
    made = await runtime.registry.declarations.replace(
        "subscription", stands, {**document, "former_secrets": former} if former else document
    )
    if made is None:
        return False
    await runtime.registry.take("subscription", made)
    await runtime.reconciler.subscription(stands.id)
    return True


def _shown_and_plain(stands: Declaration | None) -> tuple[Json, Json]:
    """Give the options as they are shown, and as they are."""
    if stands is None:
        return {}, {}
    document = {name: value for name, value in stands.document.items() if name != "former_secrets"}
    options = _OPTIONS.validate_python(document)
    return masked(options), reveal(options)


def _checked(model: type[Any], document: Any) -> Any:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise invalid_input(error, model) from None


def _document(wish: PutSubscription, *, secret: str | None = None) -> Json:
    """Write what is kept: the options, with a secret."""
    document = {name: value for name, value in reveal(wish).items() if name not in ("id", "tenant")}
    document["secret"] = document["secret"] or secret or signature.new_secret()
    return document


async def _vet(api: Api, caller: Caller, document: Json, *, before: Json | None = None) -> None:
    """Refuse what could never be delivered. What stays as it was is not judged anew: a name that cannot be resolved
    just now must not keep anybody from switching a subscription off."""
    changed = {name: value for name, value in document.items() if before is None or before.get(name) != value}
    if "url" in changed:
        await vet(api.runtime.sender.guard, caller, "url", document["url"])
    wanted = changed.get("payload")
    if isinstance(wanted, dict):
        problems = check_map(wanted["map"], payload.sample("call.completed", now=api.now()))
        if problems:
            raise invalid("payload.map", "; ".join(problems[:10]))
    if changed.get("delivery") == "at_most_once" and not await is_durable(api.runtime.redis):
        raise invalid(
            "delivery",
            "at_most_once needs a store that keeps every answered write (appendonly yes, appendfsync always)",
        )


# --- ending and pausing ----------------------------------------------------------------------------------------------


async def delete_subscription(
    api: Api, caller: Caller, subscription_id: str, query: UnsubscribeQuery, request: web.Request
) -> None:
    """Unsubscribe: nothing more is sent, what waited is dropped. 204 also when it is gone already.

    A hook of Zapier's is told with one DELETE to its URL, unless the hook itself asks: with `unsubscribed_by=hook`, or
    with Zapier's own User-Agent.
    """
    runtime = api.runtime
    if runtime.registry.configured("subscription", subscription_id):
        if caller.tenant is None:
            raise configured(subscription_id)
        return
    stands = await runtime.registry.declarations.get("subscription", subscription_id)
    if stands is None or not caller.sees(stands.tenant):
        return
    await runtime.lanes[LaneName.DELIVER].apply(DisablePartition(subscription_id, DELETED))
    subscription = runtime.subscriptions.get(subscription_id)
    by_hook = query.unsubscribed_by == "hook" or request.headers.get("User-Agent", "").startswith("Zapier")
    if subscription is not None and not by_hook:
        await runtime.lifecycle.unsubscribe_hook(subscription)
    await api.eraser.subscription(subscription_id)
    await runtime.registry.declarations.remove("subscription", subscription_id)
    await runtime.registry.drop("subscription", subscription_id)
    await runtime.store.subscriptions.mark_removed(subscription_id, tenant=stands.tenant)


async def disable_subscription(
    api: Api, caller: Caller, subscription_id: str, body: DisableRequest
) -> SubscriptionView:
    """Switch a subscription off: what waits is kept; what happens meanwhile is listed as missing, to be replayed."""
    await api.subscription(caller, subscription_id)
    await api.runtime.lifecycle.disable(subscription_id, body.reason or DISABLED_BY_HAND)
    return await read_subscription(api, caller, subscription_id)


async def enable_subscription(api: Api, caller: Caller, subscription_id: str) -> SubscriptionView:
    """Switch a subscription on again; its health is forgotten."""
    subscription = await api.subscription(caller, subscription_id)
    if not subscription.options.enabled:
        await patch_subscription(api, caller, subscription_id, {"enabled": True})
    await api.runtime.lifecycle.enable(subscription_id)
    api.runtime.wake_ups(LaneName.DELIVER)
    return await read_subscription(api, caller, subscription_id)


# --- sending ---------------------------------------------------------------------------------------------------------


async def test_subscription(api: Api, caller: Caller, subscription_id: str) -> TestResult:
    """Send `webhook.test` to it, whatever it subscribed to."""
    subscription = await _enabled(api, caller, subscription_id)
    data = {"message": "A test from Call Relay.", "subscription": {"id": subscription_id}}
    eid = await api.runtime.operations.publish(
        "webhook.test",
        data,
        about=subscription_id,
        occurrence=uuid4().hex,
        to=subscription_id,
        tenant=subscription.tenant,
    )
    api.runtime.wake_ups(LaneName.DELIVER)
    return TestResult(event_id=eid)


async def replay(api: Api, caller: Caller, subscription_id: str, body: ReplayRequest) -> ReplayResult:
    """Deliver again, in the old place of each call's order: one event at once, those since a time as a job."""
    subscription = await _enabled(api, caller, subscription_id)
    if (body.event_id is None) == (body.since is None):
        raise invalid("", "give either event_id or since")
    if body.event_id is not None:
        document = await api.event(caller, body.event_id)
        return await replay_one(api, subscription, document, force=body.force)
    job = await api.start(
        "replay",
        subscription_id,
        to_ms(body.since),
        body.status,
        body.force,
        caller=caller,
        subscription=subscription_id,
    )
    return ReplayResult(result="job", job=job)


async def replay_one(api: Api, subscription: Subscription, document: Json, *, force: bool) -> ReplayResult:
    """Queue one event again for one subscription."""
    if subscription.tenant not in (None, api.event_tenant(document)):
        raise Problem("not_for_this_subscription", "This event belongs to another tenant than the subscription.")
    at_ms = api.runtime.lanes[LaneName.DELIVER].store_now_ms
    letter = await api.runtime.ledger.replay(
        document["id"], subject_of(document), [subscription.id], at_ms=at_ms, force=force
    )
    match letter:
        case "q":
            api.runtime.wake_ups(LaneName.DELIVER)
            return ReplayResult(result="queued")
        case "w":
            return ReplayResult(result="waiting_already")
        case "d":
            return ReplayResult(result="delivered_already")
        case "o":
            raise _disabled()
        case _:
            raise Problem("event_gone", "The event is not kept any more.")


async def sample_subscription(
    api: Api, caller: Caller, subscription_id: str, query: SampleQuery
) -> list[dict[str, Any]]:
    """Show what a hook would carry, newest first: real events where there are some, made-up ones otherwise."""
    subscription = await api.subscription(caller, subscription_id)
    runtime = api.runtime
    tenant_sources = (
        None
        if subscription.tenant is None
        else [sid for sid, each in runtime.sources.items() if each.tenant == subscription.tenant]
    )
    indexes = [keys.EVENTS] if tenant_sources is None else [keys.events_of(sid) for sid in tenant_sources]

    async def keep(entries: Sequence[tuple[int, str]]) -> list[Json | None]:
        documents = await runtime.ledger.events([eid for _, eid in entries])
        return [document if document and _wanted(api, subscription, document) else None for document in documents]

    part = await page_of(runtime.redis, indexes, keep, limit=query.limit, cursor=None, scan_most=_SAMPLE_SCAN)
    found = list(part.found)
    if not found:
        made_up = payload.samples(subscription.options.events, query.limit, now=api.now())
        options = subscription.options
        raw = {"sample": True} if options.include_raw else None
        return [render_json(each, subscription.payload, include_raw=options.include_raw, raw=raw) for each in made_up]
    return [await _as_sent(api, subscription, document) for document in found]


def _wanted(api: Api, subscription: Subscription, document: Json) -> bool:
    if subscription.tenant not in (None, api.event_tenant(document)):
        return False
    return filters.mismatch(subscription.options, document, subscription_id=subscription.id) is None


async def _as_sent(api: Api, subscription: Subscription, document: Json) -> Json:
    raw = None
    if subscription.options.include_raw and "call" in document["data"]:
        call = await api.runtime.ledger.call(document["data"]["call"]["id"])
        raw = call.raw if call else None
    return render_json(
        document,
        subscription.payload,
        include_raw=subscription.options.include_raw,
        raw=raw,
        recording_link=await api.runtime.links.for_event(document),
    )


async def _enabled(api: Api, caller: Caller, sub: str) -> Subscription:
    subscription = await api.subscription(caller, sub)
    off = await api.runtime.redis.hget(queue_keys.partition(LaneName.DELIVER, sub), "disabled")  # type: ignore[misc]
    if off or not subscription.options.enabled:
        raise _disabled()
    return subscription


# --- problems --------------------------------------------------------------------------------------------------------


def _cursor(query: PageQuery) -> tuple[int, str] | None:
    try:
        return read_cursor(query.cursor)
    except ValueError as error:
        raise invalid("cursor", str(error)) from None


def _disabled() -> Problem:
    return Problem("subscription_disabled", "The subscription is switched off; enable it first.")

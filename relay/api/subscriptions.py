"""Subscriptions, also as REST hooks: POST subscribes, DELETE unsubscribes and may be repeated."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal, assert_never
from uuid import uuid4

from aiohttp import web
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, WithJsonSchema
from yarl import URL

from relay.api.auth import Caller
from relay.api.context import ApiContext, tenant_of_new
from relay.api.events import SAMPLE_SCAN_LIMIT
from relay.api.fields import EVENT_ID, Id, Instant, check_id, instant, new_id, to_ms
from relay.api.options import MASK, check_url, inlined, masked, merge_patch_schema, merge_patched, origin, unmasked
from relay.api.paging import Page, PageQuery, page_of_items, page_of_listing
from relay.api.problems import Problem, changed_meanwhile, id_not_available, invalid
from relay.api.route import ApiResponse, invalid_input
from relay.delivery import filters, signature
from relay.delivery.replay import ReplayStatus, ordering_key
from relay.delivery.subscriptions import Subscription
from relay.domain.json import Json
from relay.domain.time import from_iso, iso
from relay.errors import ForeignId
from relay.events.render import MapTooCostly, RecordingLink, check_map, render_json
from relay.events.samples import sample, samples
from relay.queue.changes import DisablePartition
from relay.settings import SubscriptionOptions, reveal
from relay.settings.values import SigningSecret
from relay.store.codes import ReplayOutcome
from relay.store.declarations import Declaration
from relay.store.lanes import LaneName
from relay.store.listings import Entry
from relay.store.subscriptions import REMOVED, SubscriptionHealth

DEFAULT_DISABLED_REASON: Final = "disabled through the API"
FORMER_SECRET_VALID_FOR: Final = timedelta(hours=24)
# Each one adds a signature to the header of every request for a day.
_MAX_FORMER_SECRETS: Final = 3
# Concurrent changes of one subscription; more than this many in a row is a client that fights another.
_MAX_TRIES: Final = 5
_OPTIONS: Final = TypeAdapter(SubscriptionOptions)


class PutSubscription(SubscriptionOptions):
    """Options of a subscription. Without a secret one is generated, and shown only once."""

    secret: SigningSecret | None = Field(None, description="whsec_…, signs every event; generated if omitted")  # type: ignore[assignment]  # set before it is stored
    tenant: Id | None = Field(None, description="owner; only the operator may set it")


class CreateSubscription(PutSubscription):
    """A new subscription."""

    id: Id | None = Field(None, description="an id of your own; generated if omitted")


ReplaceSubscription = Annotated[dict[str, Any], WithJsonSchema(inlined(PutSubscription.model_json_schema()))]
UpdateSubscription = Annotated[dict[str, Any], WithJsonSchema(merge_patch_schema(SubscriptionOptions))]

SubscriptionStatus = Literal["ok", "failing", "circuit_open", "disabled"]


class SubscriptionView(BaseModel):
    """A subscription. Its `options` can be sent back with PUT: masked values then keep the secrets."""

    id: str
    origin: Literal["configuration", "api"]
    tenant: str | None
    host: str = Field(description="host of the URL; the rest is not shown")
    options: dict[str, Any] = Field(description="with secrets masked")
    state: Literal["enabled", "disabled"]
    status: SubscriptionStatus = Field(
        description="ok, failing (no successful delivery since `failing_since`), circuit_open (attempts are suspended "
        "for some minutes, because the subscriber keeps failing) or disabled"
    )
    disabled_reason: str | None
    failing_since: AwareDatetime | None = Field(description="since when no delivery has succeeded")
    resting: bool = Field(description="whether the circuit is open, like status circuit_open")
    last_heard_at: AwareDatetime | None = Field(description="last successful delivery")
    created_at: AwareDatetime | None = Field(description="null for a subscription of the configuration")
    updated_at: AwareDatetime | None
    warnings: list[str] = Field(default_factory=list)


class SubscriptionWithSecret(SubscriptionView):
    """A new subscription, with its secret."""

    secret: str = Field(description="signs every event; shown only once")


class RotatedSecret(BaseModel):
    """A new secret."""

    id: str
    secret: str = Field(description="shown only once")
    former_valid_until: AwareDatetime = Field(description="until then the previous secret signs too")


class RotateSecretRequest(BaseModel):
    """A secret of your own, or none to have one generated."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    secret: SigningSecret | None = None


class DisableRequest(BaseModel):
    """Why it is disabled."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: str | None = Field(None, min_length=1, max_length=200)


class ReplayRequest(BaseModel):
    """Which events to deliver again: one, or those since a time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    event_id: str | None = Field(None, pattern=EVENT_ID)
    since: Instant | None = None
    status: ReplayStatus = Field(
        "exhausted", description="with `since`: deliveries with this status; any: events that match now"
    )
    force: bool = Field(False, description="also those that were delivered already")


class ReplayResult(BaseModel):
    """The result of a replay: of one event at once, of many as a job."""

    result: Literal["queued", "waiting_already", "delivered_already", "job"]
    job: str | None = None


class TestResult(BaseModel):
    """The test event that was queued."""

    event_id: str


class SampleQuery(BaseModel):
    """Number of samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: int = Field(3, ge=1, le=20)


class UnsubscribeQuery(BaseModel):
    """Who unsubscribes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unsubscribed_by: Literal["hook"] | None = Field(
        None, description="`hook`: the subscriber itself, which then is not notified"
    )


class ListSubscriptions(PageQuery):
    """Filters of subscriptions."""

    state: Literal["enabled", "disabled"] | None = None


# --- reading ---------------------------------------------------------------------------------------------------------


async def views(context: ApiContext, subscriptions: Sequence[Subscription]) -> list[SubscriptionView]:
    healths = await context.store.subscriptions.healths([subscription.id for subscription in subscriptions])
    rendered: list[SubscriptionView] = []
    for subscription, health in zip(subscriptions, healths, strict=True):
        declaration = context.created("subscription", subscription.id)
        disabled_reason = health.disabled_reason or (None if subscription.options.enabled else "enabled: false")
        rendered.append(
            SubscriptionView(
                id=subscription.id,
                origin="api" if declaration else "configuration",
                tenant=subscription.tenant,
                host=subscription.host,
                options=masked(subscription.options),
                state="disabled" if disabled_reason else "enabled",
                status=_status(health, disabled=disabled_reason is not None),
                disabled_reason=disabled_reason,
                failing_since=instant(health.failing_since_ms),
                resting=health.circuit_open,
                last_heard_at=instant(health.delivered_ms),
                created_at=instant(declaration.created_ms) if declaration else None,
                updated_at=instant(declaration.updated_ms) if declaration else None,
                warnings=_warnings(context, subscription),
            )
        )
    return rendered


def _status(health: SubscriptionHealth, *, disabled: bool) -> SubscriptionStatus:
    if disabled:
        return "disabled"
    if health.circuit_open:
        return "circuit_open"
    return "failing" if health.failing_since_ms else "ok"


def _warnings(context: ApiContext, subscription: Subscription) -> list[str]:
    warnings: list[str] = []
    if "/webhook-test/" in URL(subscription.url).path:
        warnings.append(
            "This is a test URL of n8n: it accepts one event after each click on “Listen for test event” and answers "
            "404 otherwise. Use the production URL (/webhook/) once the workflow is active."
        )
    for source_id in subscription.options.sources or ():
        source = context.runtime.sources.get(source_id)
        if source is None or subscription.tenant not in (None, source.tenant):
            warnings.append(f"Source {source_id} not found: it has no events until it is created.")
    return warnings


async def list_subscriptions(context: ApiContext, caller: Caller, query: ListSubscriptions) -> Page[SubscriptionView]:
    """List subscriptions."""

    def entry_of(subscription: Subscription) -> Entry:
        declaration = context.created("subscription", subscription.id)
        return (declaration.created_ms if declaration else 0), subscription.id

    page = page_of_items(context.subscriptions(caller), entry_of, query)
    items = [view for view in await views(context, page.items) if query.state in (None, view.state)]
    return Page(items=items, next_cursor=page.next_cursor)


async def read_subscription(context: ApiContext, caller: Caller, subscription_id: str) -> SubscriptionView:
    """Read a subscription."""
    return (await views(context, [await context.subscription(caller, subscription_id)]))[0]


# --- creating and changing -------------------------------------------------------------------------------------------


async def create_subscription(context: ApiContext, caller: Caller, body: CreateSubscription) -> SubscriptionWithSecret:
    """Subscribe. No challenge is sent; several subscriptions may have the same URL."""
    tenant = tenant_of_new(caller, body.tenant)
    document = _document(body)
    await _check(context, caller, tenant, document)
    view = await _create(context, body.id or new_id("sub"), document, tenant)
    if view is None:
        raise id_not_available()
    return view


async def put_subscription(
    context: ApiContext, caller: Caller, subscription_id: str, body: ReplaceSubscription
) -> ApiResponse:
    """Create a subscription under an id of your own, or replace it. Without a secret the current one stays."""
    for _ in range(_MAX_TRIES):
        current = await context.declaration(caller, "subscription", subscription_id, hidden=id_not_available())
        masked_options, options = _masked_and_plain(current)
        requested = _validated(PutSubscription, unmasked(body, masked_options, options))
        if current is None:
            document = _document(requested)
            tenant = tenant_of_new(caller, requested.tenant)
            await _check(context, caller, tenant, document)
            view = await _create(context, subscription_id, document, tenant)
            if view is not None:
                return ApiResponse(view, HTTPStatus.CREATED)
            continue  # a concurrent request created it first
        if requested.tenant not in (None, current.tenant):
            raise invalid("tenant", "cannot be changed; delete the subscription and create it again")
        document = _document(requested, secret=options["secret"])
        _require_headers(body, document, options)
        if await _replace(context, caller, current, document):
            return ApiResponse(await read_subscription(context, caller, subscription_id))
    raise changed_meanwhile()


async def patch_subscription(
    context: ApiContext, caller: Caller, subscription_id: str, body: UpdateSubscription
) -> SubscriptionView:
    """Change some options; null resets one to its default."""
    for _ in range(_MAX_TRIES):
        current = await context.existing_declaration(caller, "subscription", subscription_id)
        masked_options, options = _masked_and_plain(current)
        changes = unmasked(body, masked_options, options)
        document = reveal(_validated(SubscriptionOptions, merge_patched(options, changes)))
        _require_headers(body, document, options)
        if await _replace(context, caller, current, document):
            return await read_subscription(context, caller, subscription_id)
    raise changed_meanwhile()


async def rotate_secret(
    context: ApiContext, caller: Caller, subscription_id: str, body: RotateSecretRequest
) -> RotatedSecret:
    """Rotate the secret. For 24 hours the previous one signs too."""
    secret = body.secret.get_secret_value() if body.secret else signature.new_secret()
    for _ in range(_MAX_TRIES):
        current = await context.existing_declaration(caller, "subscription", subscription_id)
        _, options = _masked_and_plain(current)
        if options["secret"] == secret:
            raise invalid("secret", "is the current one")
        if await _replace(context, caller, current, {**options, "secret": secret}):
            valid_until = context.now() + FORMER_SECRET_VALID_FOR
            return RotatedSecret(id=subscription_id, secret=secret, former_valid_until=valid_until)
    raise changed_meanwhile()


async def _create(
    context: ApiContext, subscription_id: str, document: Json, tenant: str | None
) -> SubscriptionWithSecret | None:
    """Create a subscription; None when a concurrent request created one with this id."""
    runtime, store = context.runtime, context.store
    check_id(subscription_id)
    if not await store.subscriptions.reuse(subscription_id, tenant=tenant):
        raise id_not_available()
    if runtime.registry.configured("subscription", subscription_id):
        raise id_not_available()
    try:
        declaration = await store.declarations.create("subscription", subscription_id, document, tenant=tenant)
    except ForeignId:
        raise id_not_available() from None
    if declaration is None:
        return None
    await runtime.registry.apply("subscription", declaration)
    await runtime.reconciler.subscription(subscription_id)
    view = (await views(context, [runtime.subscriptions[subscription_id]]))[0]
    return SubscriptionWithSecret(**dict(view), secret=document["secret"])


async def _replace(context: ApiContext, caller: Caller, current: Declaration, document: Json) -> bool:
    """Replace the options; False when they were changed concurrently."""
    await _check(context, caller, current.tenant, document, before=current.document)
    now = context.now()
    former = list(current.document.get("former_secrets", []))
    if document["secret"] != current.document["secret"]:
        former.append({"secret": current.document["secret"], "until": iso(now + FORMER_SECRET_VALID_FOR)})
    former = [secret for secret in former if from_iso(secret["until"]) > now][-_MAX_FORMER_SECRETS:]
    if former:
        document = {**document, "former_secrets": former}
    runtime = context.runtime
    declaration = await context.store.declarations.replace("subscription", current, document)
    if declaration is None:
        return False
    await runtime.registry.apply("subscription", declaration)
    await runtime.reconciler.subscription(current.id)
    return True


def _require_headers(body: Json, document: Json, before: Json) -> None:
    """Require the headers, which may hold a credential, anew when the events go to another server. The signing secret
    stays: no server receives it."""
    if not document["headers"] or origin(document["url"]) == origin(before["url"]):
        return
    headers = body.get("headers")
    if not isinstance(headers, dict) or any(MASK in str(value) for value in headers.values()):
        raise invalid("headers", "must be sent again, because the host or port of the URL changes")


def _masked_and_plain(current: Declaration | None) -> tuple[Json, Json]:
    """Return the current options as they are shown, and as they are."""
    if current is None:
        return {}, {}
    document = {name: value for name, value in current.document.items() if name != "former_secrets"}
    options = _OPTIONS.validate_python(document)
    return masked(options), reveal(options)


def _validated(model: type[Any], document: Any) -> Any:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise invalid_input(error, model) from None


def _document(requested: PutSubscription, *, secret: str | None = None) -> Json:
    document = {name: value for name, value in reveal(requested).items() if name not in ("id", "tenant")}
    document["secret"] = document["secret"] or secret or signature.new_secret()
    return document


async def _check(
    context: ApiContext, caller: Caller, tenant: str | None, document: Json, *, before: Json | None = None
) -> None:
    # Unchanged options are not checked again: a DNS outage must not prevent disabling a subscription.
    changed = {name: value for name, value in document.items() if before is None or before.get(name) != value}
    if "url" in changed:
        await check_url(context.runtime.egress.guard(tenant), caller, "url", document["url"])
    if isinstance(form := changed.get("payload"), dict):
        errors = await asyncio.to_thread(check_map, form["map"], sample("call.completed", now=context.now()))
        if errors:
            raise invalid("payload.map", "; ".join(errors[:10]))
    if changed.get("delivery") == "at_most_once" and not await context.store.is_durable():
        raise invalid(
            "delivery",
            "at_most_once needs a store that persists every acknowledged write (appendonly yes, appendfsync always)",
        )


# --- removing, disabling, enabling -----------------------------------------------------------------------------------


async def delete_subscription(
    context: ApiContext, caller: Caller, subscription_id: str, query: UnsubscribeQuery, request: web.Request
) -> None:
    """Unsubscribe: nothing more is sent, pending deliveries are dropped. Also 204 without such a subscription.

    A Zapier hook is notified with one DELETE to its URL, unless the hook itself unsubscribes: with
    `unsubscribed_by=hook`, or with Zapier's own User-Agent.
    """
    runtime, store = context.runtime, context.store
    declaration = await context.declaration(caller, "subscription", subscription_id)
    if declaration is None:
        return
    # Disabled first, so that nothing is queued while its deliveries are dropped.
    await runtime.lanes[LaneName.DELIVER].apply(DisablePartition(subscription_id, REMOVED))
    subscription = runtime.subscriptions.get(subscription_id)
    by_hook = query.unsubscribed_by == "hook" or request.headers.get("User-Agent", "").startswith("Zapier")
    if subscription is not None and not by_hook:
        await runtime.lifecycle.unsubscribe_hook(subscription)
    await context.eraser.subscription(subscription_id)
    await store.declarations.remove("subscription", subscription_id)
    await runtime.registry.drop("subscription", subscription_id)
    # A process that has not read of the removal yet must queue nothing for it either.
    await store.subscriptions.mark_removed(subscription_id, tenant=declaration.tenant)


async def disable_subscription(
    context: ApiContext, caller: Caller, subscription_id: str, body: DisableRequest
) -> SubscriptionView:
    """Disable a subscription. Pending deliveries are kept; new events are listed as missing and can be replayed."""
    await context.subscription(caller, subscription_id)
    await context.runtime.lifecycle.disable(subscription_id, body.reason or DEFAULT_DISABLED_REASON)
    return await read_subscription(context, caller, subscription_id)


async def enable_subscription(context: ApiContext, caller: Caller, subscription_id: str) -> SubscriptionView:
    """Enable a subscription and reset its health."""
    subscription = await context.subscription(caller, subscription_id)
    if not subscription.options.enabled:
        await patch_subscription(context, caller, subscription_id, {"enabled": True})
    await context.runtime.lifecycle.enable(subscription_id)
    context.runtime.wake_ups(LaneName.DELIVER)
    return await read_subscription(context, caller, subscription_id)


# --- sending ---------------------------------------------------------------------------------------------------------


async def test_subscription(context: ApiContext, caller: Caller, subscription_id: str) -> TestResult:
    """Send `webhook.test`, whatever the filters are."""
    subscription = await _enabled_subscription(context, caller, subscription_id)
    data = {"message": "A test from Call Relay.", "subscription": {"id": subscription_id}}
    event_id = await context.runtime.operations.publish(
        "webhook.test",
        data,
        about=subscription_id,
        occurrence=uuid4().hex,
        to=subscription_id,
        tenant=subscription.tenant,
    )
    context.runtime.wake_ups(LaneName.DELIVER)
    return TestResult(event_id=event_id)


async def replay(context: ApiContext, caller: Caller, subscription_id: str, body: ReplayRequest) -> ReplayResult:
    """Deliver events again, in the order of each call: one event at once, those since a time as a job."""
    subscription = await _enabled_subscription(context, caller, subscription_id)
    if (body.event_id is None) == (body.since is None):
        raise invalid("", "set either event_id or since")
    if body.event_id is not None:
        document = await context.event(caller, body.event_id)
        return await replay_event(context, subscription, document, force=body.force)
    job = await context.start_job(
        "replay",
        subscription_id,
        to_ms(body.since),
        body.status,
        body.force,
        caller=caller,
        subscription=subscription_id,
    )
    return ReplayResult(result="job", job=job.id)


async def replay_event(context: ApiContext, subscription: Subscription, document: Json, *, force: bool) -> ReplayResult:
    """Queue one event again for one subscription."""
    if subscription.tenant not in (None, context.event_tenant(document)):
        raise Problem("not_for_this_subscription", "The event belongs to another tenant than the subscription.")
    (outcome,) = await context.store.deliveries.replay(
        document["id"],
        ordering_key(document),
        [subscription.id],
        at_ms=context.runtime.lanes[LaneName.DELIVER].wall_ms,
        force=force,
    )
    match outcome:
        case ReplayOutcome.QUEUED:
            context.runtime.wake_ups(LaneName.DELIVER)
            return ReplayResult(result="queued")
        case ReplayOutcome.WAITING:
            return ReplayResult(result="waiting_already")
        case ReplayOutcome.DELIVERED:
            return ReplayResult(result="delivered_already")
        case ReplayOutcome.DISABLED:
            raise _disabled()
        case ReplayOutcome.GONE:
            raise event_gone()
        case _:
            assert_never(outcome)


async def sample_subscription(
    context: ApiContext, caller: Caller, subscription_id: str, query: SampleQuery
) -> list[dict[str, Any]]:
    """Show the payloads of a subscription, newest first: recent events if there are any, generated ones otherwise."""
    subscription = await context.subscription(caller, subscription_id)
    options = subscription.options

    async def read(entries: Sequence[Entry]) -> list[Json | None]:
        documents = await context.store.events.get_many([event_id for _, event_id in entries])
        return [
            document if document is not None and _matches(context, subscription, document) else None
            for document in documents
        ]

    page = await page_of_listing(
        context.events_of(subscription.tenant), read, PageQuery(limit=query.limit), scan_limit=SAMPLE_SCAN_LIMIT
    )
    if page.items:
        return [await _as_sent(context, subscription, document) for document in page.items]
    raw = {"sample": True} if options.include_raw else None
    return [
        await _rendered(document, subscription, raw=raw)
        for document in samples(options.events, query.limit, now=context.now())
    ]


async def _rendered(
    document: Json, subscription: Subscription, *, raw: Json | None, link: RecordingLink | None = None
) -> Json:
    """Build what the subscriber would receive, off the event loop: a field map takes its time."""
    include_raw = subscription.options.include_raw
    try:
        return await asyncio.to_thread(
            render_json, document, subscription.payload, include_raw=include_raw, raw=raw, recording_link=link
        )
    except MapTooCostly as error:
        raise invalid("payload.map", str(error)) from None


def _matches(context: ApiContext, subscription: Subscription, document: Json) -> bool:
    if subscription.tenant not in (None, context.event_tenant(document)):
        return False
    return filters.mismatch(subscription.options, document, subscription_id=subscription.id) is None


async def _as_sent(context: ApiContext, subscription: Subscription, document: Json) -> Json:
    raw = None
    if subscription.options.include_raw and "call" in document["data"]:
        call = await context.store.calls.get(document["data"]["call"]["id"])
        raw = call.raw if call else None
    return await _rendered(document, subscription, raw=raw, link=await context.runtime.links.for_event(document))


async def _enabled_subscription(context: ApiContext, caller: Caller, subscription_id: str) -> Subscription:
    subscription = await context.subscription(caller, subscription_id)
    health = await context.store.subscriptions.health(subscription_id)
    if health.disabled_reason or not subscription.options.enabled:
        raise _disabled()
    return subscription


def event_gone() -> Problem:
    return Problem("event_gone", "The event has expired or was erased.")


def _disabled() -> Problem:
    return Problem("subscription_disabled", "The subscription is disabled; enable it first.")

"""Every operation of the API, in one table."""

from http import HTTPStatus
from typing import Any, Final

from relay.api import calls, completeness, deliveries, events, explain, jobs, sources, stream, subscriptions, tokens
from relay.api.paging import Page, PageQuery
from relay.api.problems import Code
from relay.api.route import Method, Route, Scope

_OK: Final = HTTPStatus.OK
_CREATED: Final = HTTPStatus.CREATED
_ACCEPTED: Final = HTTPStatus.ACCEPTED
_NO_CONTENT: Final = HTTPStatus.NO_CONTENT
_ON_CHANGE: Final[tuple[Code, ...]] = ("declared_in_configuration", "changed_meanwhile", "address_refused")
_ON_CREATE: Final[tuple[Code, ...]] = ("id_not_available", "address_refused")


def _route(
    method: Method,
    path: str,
    handler: Any,
    tag: str,
    responses: Any,
    *problems: Code,
    scope: Scope = "viewer",
    **options: Any,
) -> Route:
    summary = (handler.__doc__ or "").strip().partition("\n")[0]
    if "{" in path and method != "DELETE":
        problems = ("not_found", *problems)
    if not isinstance(responses, dict):
        responses = {_OK: responses}
    return Route(method, path, handler, summary, tag, responses, scope=scope, problems=problems, **options)


TABLE: Final[tuple[Route, ...]] = (
    # --- sources
    _route("GET", "/v1/sources", sources.list_sources, "sources", Page[sources.SourceView], query=sources.ListSources),
    _route(
        "POST", "/v1/sources", sources.create_source, "sources", {_CREATED: sources.SourceView}, *_ON_CREATE,
        scope="admin", body=sources.CreateSource,
    ),
    _route("GET", "/v1/sources/{source_id}", sources.read_source, "sources", sources.SourceDetail),
    _route(
        "PUT", "/v1/sources/{source_id}", sources.put_source, "sources",
        {_OK: sources.SourceView, _CREATED: sources.SourceView}, "id_not_available", *_ON_CHANGE,
        scope="admin", body=sources.ReplaceSource,
    ),
    _route(
        "PATCH", "/v1/sources/{source_id}", sources.patch_source, "sources", sources.SourceView, *_ON_CHANGE,
        scope="admin", body=sources.UpdateSource,
    ),
    _route(
        "DELETE", "/v1/sources/{source_id}", sources.delete_source, "sources", {_NO_CONTENT: None},
        "declared_in_configuration", "storage_unavailable", scope="admin",
    ),
    _route(
        "POST", "/v1/sources/{source_id}/check", sources.check_source, "sources", sources.CheckResult, scope="admin"
    ),
    _route(
        "POST", "/v1/sources/{source_id}/poll", sources.poll_source, "sources", {_ACCEPTED: sources.Queued},
        "source_paused", scope="admin",
    ),
    _route(
        "POST", "/v1/sources/{source_id}/backfill", sources.backfill, "sources", {_ACCEPTED: jobs.JobView},
        "source_paused", scope="admin", body=sources.BackfillRequest,
    ),
    _route(
        "POST", "/v1/sources/{source_id}/pause", sources.pause_source, "sources", sources.SourceView, *_ON_CHANGE,
        scope="admin",
    ),
    _route(
        "POST", "/v1/sources/{source_id}/resume", sources.resume_source, "sources", sources.SourceView, *_ON_CHANGE,
        scope="admin",
    ),
    _route(
        "GET", "/v1/sources/{source_id}/completeness", completeness.read_completeness, "sources",
        completeness.Completeness, query=completeness.CompletenessQuery,
    ),
    _route(
        "POST", "/v1/sources/{source_id}/heal", completeness.heal_source, "sources", {_ACCEPTED: jobs.JobView},
        "source_paused", scope="admin", body=completeness.HealRequest, body_optional=True,
    ),
    # --- calls
    _route("GET", "/v1/calls", calls.list_calls, "calls", Page[calls.CallView], "not_found", query=calls.ListCalls),
    _route("GET", "/v1/calls/{call_id}", calls.read_call, "calls", calls.CallDetail),
    _route(
        "GET", "/v1/calls/{call_id}/recording", calls.read_recording, "calls", calls.RecordingLink,
        "no_recording_links", "storage_unavailable",
    ),
    _route(
        "POST", "/v1/erase", calls.erase, "calls", {_OK: calls.EraseResult, _ACCEPTED: calls.EraseResult},
        "storage_unavailable", scope="admin", body=calls.EraseRequest,
    ),
    _route(
        "GET", "/v1/explain", explain.explain, "calls", explain.Explanations, "not_found", query=explain.ExplainQuery
    ),
    # --- events
    _route(
        "GET", "/v1/events", events.list_events, "events", Page[events.EventDocument], "not_found",
        query=events.ListEvents,
    ),
    _route(
        "GET", "/v1/events/stream", stream.stream_events, "events", {_OK: str}, "not_found", "too_many_streams",
        query=stream.StreamEvents, media_type="text/event-stream", takes_request=True,
    ),
    _route("GET", "/v1/events/{event_id}", events.read_event, "events", events.EventDocument),
    _route("GET", "/v1/event-types", events.list_event_types, "events", list[events.EventTypeView]),
    _route(
        "GET", "/v1/event-types/{event_type}/sample", events.sample_event_type, "events", list[dict[str, Any]],
        query=events.TypeSampleQuery,
    ),
    # --- subscriptions
    _route(
        "GET", "/v1/subscriptions", subscriptions.list_subscriptions, "subscriptions",
        Page[subscriptions.SubscriptionView], query=subscriptions.ListSubscriptions,
    ),
    _route(
        "POST", "/v1/subscriptions", subscriptions.create_subscription, "subscriptions",
        {_CREATED: subscriptions.SubscriptionWithSecret}, *_ON_CREATE,
        scope="admin", body=subscriptions.CreateSubscription,
    ),
    _route(
        "GET", "/v1/subscriptions/{subscription_id}", subscriptions.read_subscription, "subscriptions",
        subscriptions.SubscriptionView,
    ),
    _route(
        "PUT", "/v1/subscriptions/{subscription_id}", subscriptions.put_subscription, "subscriptions",
        {_OK: subscriptions.SubscriptionView, _CREATED: subscriptions.SubscriptionWithSecret},
        "id_not_available", *_ON_CHANGE, scope="admin", body=subscriptions.ReplaceSubscription,
    ),
    _route(
        "PATCH", "/v1/subscriptions/{subscription_id}", subscriptions.patch_subscription, "subscriptions",
        subscriptions.SubscriptionView, *_ON_CHANGE, scope="admin", body=subscriptions.UpdateSubscription,
    ),
    _route(
        "DELETE", "/v1/subscriptions/{subscription_id}", subscriptions.delete_subscription, "subscriptions",
        {_NO_CONTENT: None}, "declared_in_configuration", scope="admin", query=subscriptions.UnsubscribeQuery,
        takes_request=True,
    ),
    _route(
        "POST", "/v1/subscriptions/{subscription_id}/test", subscriptions.test_subscription, "subscriptions",
        {_ACCEPTED: subscriptions.TestResult}, "subscription_disabled", scope="admin",
    ),
    _route(
        "POST", "/v1/subscriptions/{subscription_id}/rotate-secret", subscriptions.rotate_secret, "subscriptions",
        subscriptions.RotatedSecret, *_ON_CHANGE, scope="admin", body=subscriptions.RotateSecretRequest,
        body_optional=True,
    ),
    _route(
        "POST", "/v1/subscriptions/{subscription_id}/enable", subscriptions.enable_subscription, "subscriptions",
        subscriptions.SubscriptionView, *_ON_CHANGE, scope="admin",
    ),
    _route(
        "POST", "/v1/subscriptions/{subscription_id}/disable", subscriptions.disable_subscription, "subscriptions",
        subscriptions.SubscriptionView, scope="admin", body=subscriptions.DisableRequest, body_optional=True,
    ),
    _route(
        "POST", "/v1/subscriptions/{subscription_id}/replay", subscriptions.replay, "subscriptions",
        {_ACCEPTED: subscriptions.ReplayResult}, "subscription_disabled", "not_for_this_subscription", "event_gone",
        scope="admin", body=subscriptions.ReplayRequest,
    ),
    _route(
        "GET", "/v1/subscriptions/{subscription_id}/sample", subscriptions.sample_subscription, "subscriptions",
        list[dict[str, Any]], query=subscriptions.SampleQuery,
    ),
    # --- deliveries
    _route(
        "GET", "/v1/deliveries", deliveries.list_deliveries, "deliveries", Page[deliveries.DeliveryView], "not_found",
        query=deliveries.ListDeliveries,
    ),
    _route("GET", "/v1/deliveries/{delivery_id}", deliveries.read_delivery, "deliveries", deliveries.DeliveryDetail),
    _route(
        "POST", "/v1/deliveries/{delivery_id}/retry", deliveries.retry_delivery, "deliveries",
        {_ACCEPTED: subscriptions.ReplayResult}, "subscription_disabled", "already_delivered",
        "not_for_this_subscription", "event_gone", scope="admin", body=deliveries.RetryRequest, body_optional=True,
    ),
    # --- jobs
    _route("GET", "/v1/jobs/{job_id}", jobs.read_job, "jobs", jobs.JobView),
    _route(
        "POST", "/v1/jobs/{job_id}/cancel", jobs.cancel_job, "jobs", jobs.JobView, "already_over", scope="admin"
    ),
    # --- tokens
    _route(
        "GET", "/v1/tokens", tokens.list_tokens, "tokens", Page[tokens.TokenView], scope="operator", query=PageQuery
    ),
    _route(
        "POST", "/v1/tokens", tokens.create_token, "tokens", {_CREATED: tokens.TokenWithSecret}, scope="operator",
        body=tokens.CreateToken,
    ),
    _route(
        "DELETE", "/v1/tokens/{token_id}", tokens.revoke_token, "tokens", {_NO_CONTENT: None}, "not_found",
        scope="operator",
    ),
)  # fmt: skip

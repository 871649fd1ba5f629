"""How `explain` describes what became of an event: one sentence for each subscription, and one for all."""

from datetime import UTC, datetime, timedelta
from typing import Any

from relay.api.explain import fate_of, summarize
from relay.delivery.subscriptions import Subscription
from relay.store.deliveries import DeliveryState
from relay.store.subscriptions import SubscriptionHealth
from tests.flow.harness import SECRET, read_settings

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
EVENT: dict[str, Any] = {
    "id": "evt_1",
    "type": "call.completed",
    "timestamp": "2026-11-20T11:00:00Z",
    "data": {
        "call": {
            "source_id": "main",
            "direction": "inbound",
            "outcome": "busy",
            "duration_seconds": 3,
            "extension": None,
            "from": {"extension": None},
            "to": {"extension": None},
        }
    },
}


def subscription(**options: Any) -> Subscription:
    document = {"subscriptions": {"crm": {"url": "https://crm.example.com/x", "secret": SECRET, **options}}}
    return Subscription.of("crm", read_settings(document).subscriptions["crm"])


def fate(
    state: DeliveryState | None,
    health: SubscriptionHealth | None = None,
    *,
    options: dict[str, Any] | None = None,
    of_tenant: bool = True,
    created_at: datetime | None = None,
) -> tuple[str, str]:
    explained = fate_of(
        subscription(**options or {}),
        EVENT,
        state,
        health or SubscriptionHealth(),
        of_tenant=of_tenant,
        created_at=created_at,
        now=NOW,
    )
    return explained.fate, explained.why


def ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)


def test_every_fate_has_its_sentence() -> None:
    """Delivered, failed, filtered, created later, disabled, circuit open, due."""
    log = ({"words": "answered 500"},)
    delivered = DeliveryState("delivered", 2, ms(NOW))
    waiting = DeliveryState("waiting", 1, ms(NOW), ms(NOW + timedelta(minutes=5)), log=log)
    disabled, circuit_open = SubscriptionHealth(disabled_reason="moving"), SubscriptionHealth(circuit_opened_ms=1)

    assert fate(delivered) == ("delivered", "delivered at 2026-11-20T12:00:00Z, after 2 attempts")
    assert fate(waiting) == ("waiting", "next attempt in 5 minutes; last attempt: answered 500")
    assert fate(waiting, disabled)[1].startswith("the subscription is disabled (moving)")
    assert fate(waiting, circuit_open)[1].startswith("the circuit is open")
    assert fate(DeliveryState("waiting"))[1].startswith("due now")
    assert fate(DeliveryState("exhausted", 10, log=log)) == (
        "failed",
        "failed, retries exhausted, after 10 attempts; last attempt: answered 500",
    )
    assert fate(DeliveryState("missing"))[0] == "missing"
    assert fate(None, options={"direction": "outbound"}) == (
        "filtered",
        "filtered because direction=inbound does not match outbound",
    )
    assert fate(None, of_tenant=False)[0] == "filtered"
    assert fate(None, created_at=NOW)[1].startswith("the subscription was created later, at 2026-11-20T12:00:00Z")
    assert fate(None)[0] == "not_queued"


def test_failed_deliveries_come_before_successful_ones_in_the_summary() -> None:
    """One sentence names the subscriptions concerned."""

    def summary(*states: DeliveryState | None) -> str:
        fates = []
        for number, state in enumerate(states):
            explained = fate_of(
                subscription(direction="outbound"),
                EVENT,
                state,
                SubscriptionHealth(),
                of_tenant=True,
                created_at=None,
                now=NOW,
            )
            fates.append(explained.model_copy(update={"subscription_id": f"s{number}"}))
        return summarize(fates)[1]

    delivered, failed = DeliveryState("delivered", 1, 1), DeliveryState("exhausted", 9)

    assert summary() == "Its event was published, but there is no subscription."
    assert summary(delivered, failed, None) == "Delivery to s1 failed."
    assert summary(delivered, DeliveryState("missing")) == "s1 was disabled when its event was published."
    assert summary(delivered, DeliveryState()) == "Delivery to s1 is pending."
    assert summary(delivered, None) == "Delivered to s0."
    assert summary(None) == "The filters of s0 do not match."
    assert summary(*[delivered] * 7) == "Delivered to s0, s1, s2, s3, s4 and 2 more."

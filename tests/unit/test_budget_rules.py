"""The figures of a share: whatever the limit, no window holds more, and polls may always go further than the rest."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.providers.base import Purpose
from relay.providers.budget import Limit

limits = st.builds(
    Limit, requests=st.integers(1, 3000), window_s=st.integers(1, 3600), share=st.floats(0.01, 1.0, allow_nan=False)
)


def sent(limit: Limit, asked_ms: list[float], purpose: Purpose = Purpose.POLL) -> list[float]:
    """The rule of budget.lua for one bucket: when which of the requests are sent."""
    sent_ms: list[float] = []
    arrival_ms = 0.0
    for now_ms in asked_ms:
        next_ms = max(arrival_ms, now_ms) + limit.interval_ms
        if next_ms - now_ms <= limit.tolerance_ms(purpose):
            arrival_ms = next_ms
            sent_ms.append(now_ms)
    return sent_ms


def fullest(sent_ms: list[float], window_ms: float) -> int:
    """The most requests in any window, wherever it begins."""
    return max((sum(at <= other < at + window_ms for other in sent_ms) for at in sent_ms), default=0)


@given(
    limit=limits,
    eagerness=st.floats(0.2, 30),
    pauses=st.lists(st.tuples(st.integers(1, 80), st.floats(0, 2)), min_size=1, max_size=6),
)
def test_no_window_holds_more_than_the_share(limit: Limit, eagerness: float, pauses: list[tuple[int, float]]) -> None:
    """Bursts, pauses of any length, and a storm of rejected requests: the share holds."""
    asked_ms: list[float] = [1e12]
    for count, pause_windows in pauses:
        asked_ms.append(asked_ms[-1] + pause_windows * limit.window_s * 1000)
        for _ in range(count):
            asked_ms.append(asked_ms[-1] + limit.interval_ms / eagerness)

    sent_ms = sent(limit, asked_ms)

    assert sent_ms
    assert fullest(sent_ms, limit.window_s * 1000 * (1 - 1e-9)) <= max(limit.requests * limit.share, 1)


def test_webfones_gets_at_most_600_requests_in_15_minutes() -> None:
    """Half of the share at once, the rest evenly."""
    limit = Limit(1000, 900, 0.6)

    sent_ms = sent(limit, [1e12 + ms for ms in range(0, 900_000, 100)])

    assert (limit.burst, limit.interval_ms) == (300, 3000)
    assert len(sent_ms) == 599


@pytest.mark.parametrize("limit", [Limit(1000, 900, 0.6), Limit(60, 60, 0.25), Limit(10, 60, 0.5)])
def test_each_purpose_stops_before_the_one_that_matters_more(limit: Limit) -> None:
    """Polls use all of the burst, contacts less, then fresh recordings, retries and backfills."""
    tolerances = [limit.tolerance_ms(purpose) for purpose in sorted(Purpose)]

    assert all(more > less or less == limit.interval_ms for more, less in pairwise(tolerances))
    assert tolerances[0] <= limit.window_s * 1000


@example(limit=Limit(3, 1, 0.75), now_ms=1_795_266_393_208.123, purpose=Purpose.BACKFILL)
@given(limit=limits, now_ms=st.floats(1e12, 2e12), purpose=st.sampled_from(Purpose))
def test_every_purpose_gets_through_in_the_end(limit: Limit, now_ms: float, purpose: Purpose) -> None:
    """An unused bucket has room for one request of any purpose, however small the share."""
    assert sent(limit, [now_ms], purpose) == [now_ms]

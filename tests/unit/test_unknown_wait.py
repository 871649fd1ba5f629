"""When an item is tried again whose source or subscription this process does not know."""

import pytest

from workers.unknown import unknown_wait_ms


@pytest.mark.parametrize(
    ("waited_ms", "wait_ms"), [(-5_000, 1_000), (0, 1_000), (1_500, 1_500), (30_000, 30_000), (3_600_000, 60_000)]
)
def test_the_wait_grows_with_how_long_an_item_has_waited_from_a_second_to_a_minute(
    waited_ms: int, wait_ms: int
) -> None:
    """A worker does not spin over what it does not know, and has it within a minute of learning of it."""
    assert unknown_wait_ms(waiting_since_ms=1_000_000, now_ms=1_000_000 + waited_ms) == wait_ms

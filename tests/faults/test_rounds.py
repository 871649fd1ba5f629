"""Everything at once: calls come in, processes die at random moments, and after each round the promises are checked."""

import signal

import pytest

from tests.faults.harness import Lab, until

pytestmark = pytest.mark.faults

ROUNDS = [
    pytest.param(60, 2, id="short"),
    pytest.param(2_000, 20, id="long", marks=[pytest.mark.long, pytest.mark.timeout(3_600)]),
]


@pytest.mark.parametrize(("count", "rounds"), ROUNDS)
def test_kills_at_random_moments_lose_nothing(seed: int, count: int, rounds: int) -> None:
    """`kill -9` of worker, poller and store while calls come in for three subscriptions, one of them slow."""
    for number in range(1, rounds + 1):
        with Lab(seed=seed + number) as lab:
            kills = play_round(lab, count)
            lab.finish(f"round {number} of {rounds}, killed {', '.join(kills)}", within_s=240)


def play_round(lab: Lab, count: int) -> list[str]:
    """Let calls come in four portions; kill a process at a random moment of each of the first three."""
    poller, worker = lab.start_all("a", "b", "c", timeout_s=1)
    lab.simulator.script({"delay_s": 0.05}, hooks=["c"])
    kills = [lab.rng.choice(("worker", "poller", "store")) for _ in range(3)]
    recorded_share = 6 / count
    for victim in kills:
        before = lab.accepted()
        lab.call(count // 4, recorded_share=recorded_share)
        some = lab.rng.randrange(count // 2)
        until(lambda: lab.accepted() - before >= some, "so many are delivered")  # noqa: B023
        match victim:
            case "worker":
                lab.kill_worker(worker)
                worker = lab.start("worker")
            case "poller":
                poller.kill()
                lab.store.expire_leases("poll")
                poller = lab.start("poller")
            case _:
                lab.store.kill()
                lab.store.start()
    lab.call(count // 4, recorded_share=recorded_share)
    lab.expire_dead_claims(within_s=60 + count / 20)
    return kills


ROLLS = [
    pytest.param(45, 1, id="short"),
    pytest.param(900, 5, id="long", marks=[pytest.mark.long, pytest.mark.timeout(900)]),
]


@pytest.mark.parametrize(("count", "rounds"), ROLLS)
def test_a_rolling_restart_under_load_loses_and_repeats_nothing(lab: Lab, count: int, rounds: int) -> None:
    """Every role gets SIGTERM, its grace period and a replacement, as in Kubernetes, while calls come in."""
    lab.start_simulator("a", "b", "c")
    lab.start_store()
    lab.configure(timeout_s=2)
    roles = {role: lab.start(role) for role in ("poller", "worker", "api")}
    lab.await_first_poll()
    lab.simulator.script({"delay_s": 0.1}, hooks=["b"])
    for _ in range(rounds):
        for role, old in list(roles.items()):
            delivered = lab.delivered(hooks=["a"])
            lab.call(count // 3, recorded_share=0.05)
            until(lambda: lab.delivered(hooks=["a"]) > delivered, "calls are being delivered")  # noqa: B023
            roles[role] = lab.start(role)
            code = old.stop(within_s=30)
            assert code != -signal.SIGKILL, f"{role} needed more than its grace"
            assert code == 0

    figures = lab.finish(f"rolling restart, {rounds} times", within_s=120)

    assert figures.duplicates == 0

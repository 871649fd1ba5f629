"""The verifying subscriber catches what must never happen, and each scripted reply is one that a sender notices."""

import asyncio
import base64
import gzip
import random
import ssl
import zlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import orjson
import pytest
from standardwebhooks import Webhook

from relay.simulator.hook_log import HookReport
from relay.simulator.subscriber import VerifyingSubscriber
from tests.fakes.subscriber import ReplyKind, ScriptedReply, ScriptedSubscriber

SECRET = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes ok.").decode()
OTHER = "whsec_" + base64.b64encode(b"another secret of thirty-two by.").decode()


@pytest.fixture
def subscriber() -> ScriptedSubscriber:
    subscriber = ScriptedSubscriber(seed=3)
    subscriber.add_hook("a", SECRET)
    return subscriber


@pytest.fixture
async def http(subscriber: ScriptedSubscriber) -> AsyncIterator[aiohttp.ClientSession]:
    async with subscriber.serve() as base_url, aiohttp.ClientSession(base_url) as session:
        yield session


def _event(
    event_id: str = "evt_1", *, type_: str = "call.completed", call: str = "1", revision: int = 1, **more: Any
) -> bytes:
    content = {"id": f"call_{call}", "provider_call_id": call, "revision": revision, **more}
    return orjson.dumps({"id": event_id, "type": type_, "data": {"call": content}})


def _headers(body: bytes, *, secret: str = SECRET, at: datetime | None = None, event_id: str = "") -> dict[str, str]:
    event_id = event_id or orjson.loads(body)["id"]
    at = at or datetime.now(UTC)
    signature = Webhook(secret).sign(event_id, at, body.decode())
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": signature,
        "content-type": "application/json",
    }


async def _post(http: aiohttp.ClientSession, body: bytes, *, hook: str = "a", **headers: Any) -> int:
    async with http.post(f"/hook/{hook}", data=body, headers=_headers(body, **headers)) as answer:
        await answer.read()
        return answer.status


def _hook(subscriber: ScriptedSubscriber, name: str = "a") -> HookReport:
    return subscriber.report(name)


# What it verifies


async def test_a_good_delivery_is_accepted_and_nothing_is_wrong(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    assert await _post(http, _event()) == 204

    hook = _hook(subscriber)
    (arrival,) = subscriber.arrivals("a")
    assert (hook.received, hook.accepted, hook.events, hook.retries) == (1, 1, 1, 0)
    assert hook.completed == {"1"}
    assert subscriber.reports().problems() == ()
    assert (arrival.event_id, arrival.provider_call_id, arrival.accepted) == ("evt_1", "1", True)
    assert abs(datetime.now(UTC) - arrival.at) < timedelta(minutes=1)
    assert subscriber.events("a")[0]["type"] == "call.completed"
    assert subscriber.last_headers("a")["webhook-id"] == "evt_1"


async def test_a_signature_by_another_secret_is_caught(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    assert await _post(http, _event(), secret=OTHER) == 401

    hook = _hook(subscriber)
    assert hook.signature_reasons == {"No matching signature found": 1}
    assert (hook.received, hook.completed) == (0, frozenset())
    assert "1 signatures did not verify" in hook.problems()[0]


async def test_a_body_that_was_altered_after_signing_is_caught(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    signed = _headers(_event())

    async with http.post("/hook/a", data=_event(call="2"), headers=signed) as answer:
        assert answer.status == 401

    assert _hook(subscriber).signature_failures == 1


@pytest.mark.parametrize(("minutes", "reason"), [(-10, "Message timestamp too old"), (10, "Message timestamp too new")])
async def test_a_timestamp_far_from_now_is_caught(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession, minutes: int, reason: str
) -> None:
    assert await _post(http, _event(), at=datetime.now(UTC) + timedelta(minutes=minutes)) == 401

    assert _hook(subscriber).signature_reasons == {reason: 1}


@pytest.mark.parametrize("signature", ["", "v1", "v1,###", "v1,a,b", "v2,AAAA"])
async def test_a_malformed_signature_is_caught_and_not_a_crash(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession, signature: str
) -> None:
    headers = {**_headers(_event()), "webhook-signature": signature}

    async with http.post("/hook/a", data=_event(), headers=headers) as answer:
        assert answer.status == 401

    assert _hook(subscriber).signature_failures == 1


@pytest.mark.parametrize(
    ("changes", "secrets", "reason"),
    [
        ({}, [SECRET], ""),
        ({}, [OTHER, SECRET], ""),
        ({}, [OTHER], "No matching signature found"),
        ({"webhook-id": "evt_2"}, [SECRET], "No matching signature found"),
        ({"webhook-timestamp": "1"}, [SECRET], "Message timestamp too old"),
        ({"webhook-timestamp": "9999999999"}, [SECRET], "Message timestamp too new"),
        ({"webhook-timestamp": "soon"}, [SECRET], "Missing or invalid timestamp"),
        ({"webhook-signature": ""}, [SECRET], "No matching signature found"),
        ({"webhook-signature": "v1,###"}, [SECRET], "No matching signature found"),
        ({"webhook-signature": "v1,é"}, [SECRET], "No matching signature found"),
        ({"webhook-signature": "v1,a,b"}, [SECRET], "No matching signature found"),
    ],
)
def test_the_packaged_subscriber_verifies_as_the_independent_library_does(
    changes: dict[str, str], secrets: list[str], reason: str
) -> None:
    """The demo must not call a delivery verified that a receiver's own library refuses."""
    headers = _headers(_event()) | changes

    ours = VerifyingSubscriber().signature_error(secrets, _event(), headers)
    theirs = ScriptedSubscriber().signature_error(secrets, _event(), headers)

    assert ours == reason
    assert bool(theirs) is bool(reason)


async def test_the_packaged_subscriber_accepts_and_refuses(http: aiohttp.ClientSession) -> None:
    packaged = VerifyingSubscriber()
    packaged.add_hook("a", SECRET)

    async with packaged.serve() as base_url, aiohttp.ClientSession(base_url) as session:
        statuses = [await _post(session, _event(), secret=secret) for secret in (SECRET, OTHER)]

    assert statuses == [204, 401]
    assert (packaged.report("a").received, packaged.report("a").signature_failures) == (1, 1)


@pytest.mark.parametrize(
    "secret", ["", "bad!", "whsec_", "whsec_c2hvcnQ=", SECRET.removeprefix("whsec_"), SECRET + "!"]
)
def test_an_invalid_secret_is_refused(subscriber: ScriptedSubscriber, secret: str) -> None:
    with pytest.raises(ValueError, match="24 to 64 bytes"):
        subscriber.add_hook("b", secret)

    assert set(subscriber.reports().hooks) == {"a"}


async def test_during_a_rotation_either_secret_holds(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    subscriber.add_hook("a", OTHER, SECRET)
    assert [await _post(http, _event(), secret=secret) for secret in (SECRET, OTHER)] == [204, 204]

    subscriber.add_hook("a", OTHER)
    assert await _post(http, _event(), secret=SECRET) == 401


async def test_a_benchmark_may_check_only_some_signatures(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    subscriber.verify_every = 4

    statuses = [await _post(http, _event(f"evt_{n}", call=str(n)), secret=OTHER) for n in range(8)]

    assert statuses.count(401) == 2
    assert _hook(subscriber).signature_failures == 2


async def test_an_event_accepted_twice_is_a_duplicate(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    for _ in range(3):
        await _post(http, _event())
    await _post(http, _event("evt_2", call="2"))

    hook = _hook(subscriber)
    assert hook.duplicates == {"evt_1": 2}
    assert (hook.retries, hook.events, hook.accepted) == (0, 2, 4)
    assert subscriber.reports().duplicates == 2


async def test_an_event_sent_again_after_a_refusal_is_a_retry(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    subscriber.script("a", ScriptedReply(status=503, times=2))

    assert [await _post(http, _event()) for _ in range(3)] == [503, 503, 204]

    hook = _hook(subscriber)
    assert (hook.duplicates, hook.retries, hook.received, hook.accepted) == ({}, 2, 3, 1)
    assert hook.problems() == ()


async def test_a_call_that_was_never_accepted_is_lost(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    subscriber.add_hook("b", OTHER)
    await _post(http, _event("evt_1", call="1"))
    await _post(http, _event("evt_2", call="2", type_="call.updated"))
    subscriber.script("a", ScriptedReply(status=500))
    await _post(http, _event("evt_3", call="3"))

    report = subscriber.reports()
    assert report.hooks["a"].lost(["1", "2", "3", "4"]) == ("2", "3", "4")
    assert report.lost(iter(["1"])) == {"b": ("1",)}


async def test_an_event_before_call_completed_breaks_the_order(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    await _post(http, _event("evt_2", type_="call.recording.completed"))
    await _post(http, _event("evt_1"))

    violations = _hook(subscriber).order_violations
    assert len(violations) == 2
    assert "call_1 call.recording.completed revision 1 came before call.completed" in violations
    assert "came after later events" in violations[1]


async def test_a_revision_that_goes_back_breaks_the_order(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    await _post(http, _event("evt_1"))
    await _post(http, _event("evt_3", type_="call.updated", revision=3))
    await _post(http, _event("evt_2", type_="call.updated", revision=2))

    assert _hook(subscriber).order_violations == ("call_1 call.updated revision 2 came after revision 3",)
    assert "order per call" in _hook(subscriber).problems()[0]


async def test_the_right_order_is_not_a_violation_and_calls_do_not_mix(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    await _post(http, _event("evt_1", call="1", revision=1))
    await _post(http, _event("evt_2", call="1", revision=2, type_="call.updated"))
    await _post(http, _event("evt_3", call="2", revision=1))
    await _post(http, _event("evt_4", call="1", revision=2, type_="call.recording.completed"))
    await _post(http, _event("evt_1", call="1", revision=1))

    hook = _hook(subscriber)
    assert hook.problems() == ()
    assert hook.types == {"call.completed": 2, "call.updated": 1, "call.recording.completed": 1}
    assert hook.duplicates == {"evt_1": 1}


async def test_two_events_of_a_call_at_once_break_the_order(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    subscriber.script("a", ScriptedReply(kind=ReplyKind.ACT_THEN_HANG, times=1))
    first = asyncio.create_task(_post(http, _event("evt_1")))
    await subscriber.until(lambda: subscriber.accepted("a") == 1)
    await _post(http, _event("evt_2", type_="call.updated", revision=2))
    await _post(http, _event("evt_9", call="9"))

    first.cancel()
    hook = _hook(subscriber)
    assert len(hook.order_violations) == 1
    assert "while another event of the call was being answered" in hook.order_violations[0]
    assert hook.in_flight_peak == 2


async def test_an_event_that_overtakes_a_refused_one_is_listed(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    """It is correct only when the schedule of the first had ended, which the subscriber cannot know."""
    subscriber.script("a", ScriptedReply(status=500, times=1))
    await _post(http, _event("evt_1"))
    await _post(http, _event("evt_2", type_="call.updated", revision=2))

    hook = _hook(subscriber)
    assert hook.overtaken == ("call_1 call.updated revision 2 came while evt_1 was refused",)
    assert hook.order_violations == ()


async def test_a_second_id_for_the_same_event_is_caught(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    await _post(http, _event("evt_1"))
    await _post(http, _event("evt_x"))

    assert _hook(subscriber).changed_ids == ("call_1 call.completed revision 1: evt_1, then evt_x",)


async def test_a_body_that_changes_between_attempts_is_caught(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    await _post(http, _event("evt_1", outcome="answered"))
    await _post(http, _event("evt_1", outcome="busy"))

    assert _hook(subscriber).changed_bodies == ("evt_1",)


async def test_only_the_recording_link_may_change_between_attempts(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    def link(url: str, sha256: str = "s") -> dict[str, Any]:
        return {"recording": {"url": url, "expires_at": url, "sha256": sha256}}

    def flat(url: str) -> bytes:
        return orjson.dumps({"id": "evt_2", "type": "call.completed", "call_id": "call_2", "recording_url": url})

    for number in ("1", "2"):
        await _post(http, _event("evt_1", **link(number)))
        await _post(http, flat(number))
    assert _hook(subscriber).changed_bodies == ()

    await _post(http, _event("evt_1", **link("3", sha256="other")))
    assert _hook(subscriber).changed_bodies == ("evt_1",)


async def test_a_header_id_that_is_not_the_bodys_is_caught(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    await _post(http, _event("evt_1"), event_id="evt_other")

    assert _hook(subscriber).mismatched_ids == ("evt_other carries evt_1",)


@pytest.mark.parametrize("body", [b"[1]", b"{", b"null"])
async def test_a_body_that_is_not_an_object_is_counted(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession, body: bytes
) -> None:
    async with http.post("/hook/a", data=body, headers=_headers(body, event_id="evt_1")) as answer:
        assert answer.status == 400

    assert _hook(subscriber).unreadable == 1


async def test_flat_and_operational_events_are_understood(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    flat = {"id": "evt_1", "type": "call.completed", "call_id": "call_1", "provider_call_id": "77", "revision": 1}
    await _post(http, orjson.dumps(flat))
    await _post(http, orjson.dumps({"id": "evt_2", "type": "source.error", "data": {"source": {"id": "main"}}}))

    hook = _hook(subscriber)
    assert hook.completed == {"77"}
    assert hook.types == {"call.completed": 1, "source.error": 1}
    assert hook.problems() == ()


async def test_unknown_hooks_and_methods_are_refused(http: aiohttp.ClientSession) -> None:
    for method, path, status in (("POST", "/hook/b", 404), ("POST", "/a", 404), ("GET", "/hook/a", 405)):
        async with http.request(method, path) as answer:
            assert answer.status == status


async def test_forgetting_keeps_hooks_and_scripts(subscriber: ScriptedSubscriber, http: aiohttp.ClientSession) -> None:
    subscriber.script("a", ScriptedReply(status=500, times=2))
    await _post(http, _event())

    subscriber.forget()

    assert _hook(subscriber).received == 0
    assert [await _post(http, _event()) for _ in range(2)] == [500, 204]
    assert _hook(subscriber).retries == 1


async def test_waiting_for_something_that_never_happens_ends(subscriber: ScriptedSubscriber) -> None:
    with pytest.raises(TimeoutError):
        await subscriber.until(lambda: subscriber.received("a") > 0, timeout_s=0.05)


async def test_a_lean_subscriber_keeps_counts_only(http: aiohttp.ClientSession) -> None:
    lean = ScriptedSubscriber(keep_bodies=False, keep_arrivals=False)
    lean.add_hook("a", SECRET)

    async with lean.serve() as base_url, aiohttp.ClientSession(base_url) as session:
        await _post(session, _event())

    assert lean.received("a") == 1
    assert lean.completed("a") == {"1"}
    assert (lean.events("a"), lean.arrivals("a")) == ([], ())


# Scripted replies


async def test_it_answers_any_status_with_headers(subscriber: ScriptedSubscriber, http: aiohttp.ClientSession) -> None:
    subscriber.script(
        "a",
        ScriptedReply(status=429, headers={"Retry-After": "7"}, body="slow down", times=1),
        ScriptedReply(status=410, times=1),
        ScriptedReply(status=302, headers={"Location": "http://127.0.0.1:1/"}, times=1),
    )
    answers = []
    for _ in range(4):
        body = _event()
        async with http.post("/hook/a", data=body, headers=_headers(body), allow_redirects=False) as answer:
            answers.append((answer.status, dict(answer.headers), await answer.text()))

    assert [status for status, _, _ in answers] == [429, 410, 302, 204]
    assert (answers[0][1]["Retry-After"], answers[0][2]) == ("7", "slow down")
    assert answers[2][1]["Location"] == "http://127.0.0.1:1/"


async def test_a_reply_without_a_count_lasts_until_it_is_replaced(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    subscriber.script("a", ScriptedReply(status=500))
    assert [await _post(http, _event()) for _ in range(3)] == [500, 500, 500]

    subscriber.script("a")
    assert await _post(http, _event()) == 204


async def test_it_can_be_flaky_by_a_seed(subscriber: ScriptedSubscriber, http: aiohttp.ClientSession) -> None:
    subscriber.script("a", ScriptedReply(status=500, probability=0.3))
    rng = random.Random(3)
    expected = [500 if rng.random() < 0.3 else 204 for _ in range(40)]

    assert [await _post(http, _event()) for _ in range(40)] == expected
    assert 0 < expected.count(500) < 40


async def test_it_can_take_its_time(subscriber: ScriptedSubscriber, http: aiohttp.ClientSession) -> None:
    subscriber.script("a", ScriptedReply(delay_s=0.1))
    loop = asyncio.get_running_loop()

    started = loop.time()
    assert await _post(http, _event()) == 200

    assert loop.time() - started >= 0.1
    assert _hook(subscriber).accepted == 1


@pytest.mark.parametrize(
    ("kind", "accepted"), [(ReplyKind.HANG, 0), (ReplyKind.ACT_THEN_HANG, 1), (ReplyKind.DRIP_HEAD, 0)]
)
async def test_it_can_keep_a_sender_waiting_for_ever(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession, kind: ReplyKind, accepted: int
) -> None:
    """Acting and then never answering is how an event comes to be delivered twice."""
    subscriber.script("a", ScriptedReply(kind=kind, times=1, every_s=0.01))
    body = _event()

    with pytest.raises(TimeoutError):
        async with http.post("/hook/a", data=body, headers=_headers(body), timeout=aiohttp.ClientTimeout(total=0.15)):
            pass
    await _post(http, body)

    hook = _hook(subscriber)
    assert hook.accepted == accepted + 1
    assert sum(hook.duplicates.values()) == accepted
    assert hook.retries == 1 - accepted
    assert hook.problems() == ()


async def test_it_can_drip(subscriber: ScriptedSubscriber, http: aiohttp.ClientSession) -> None:
    subscriber.script("a", ScriptedReply(kind=ReplyKind.DRIP, every_s=0.01))
    body = _event()

    async with http.post("/hook/a", data=body, headers=_headers(body)) as answer:
        got = [await answer.content.readany() for _ in range(3)]
        answer.close()

    assert answer.status == 200
    assert b"".join(got).strip(b".") == b""
    assert sum(len(piece) for piece in got) < 10


async def _raw_answer(base_url: str, body: bytes) -> bytes:
    """Post over a bare socket and read until the other side ends."""
    host, _, port = base_url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = [f"{name}: {value}" for name, value in {**_headers(body), "content-length": str(len(body))}.items()]
    writer.write("\r\n".join(["POST /hook/a HTTP/1.1", "host: x", *lines, "", ""]).encode() + body)
    try:
        return await reader.read()
    finally:
        writer.close()


async def test_it_can_send_half_a_head(subscriber: ScriptedSubscriber) -> None:
    subscriber.script("a", ScriptedReply(kind=ReplyKind.HALF_HEAD))

    async with subscriber.serve() as base_url, aiohttp.ClientSession(base_url) as session:
        assert await _raw_answer(base_url, _event()) == b"HTTP/1.1 200 OK\r\nContent-Type: text/pl"
        with pytest.raises(aiohttp.ClientError):
            await _post(session, _event())


async def test_it_can_reset_the_connection(subscriber: ScriptedSubscriber) -> None:
    subscriber.script("a", ScriptedReply(kind=ReplyKind.RESET))

    async with subscriber.serve() as base_url, aiohttp.ClientSession(base_url) as session:
        with pytest.raises(ConnectionResetError):
            await _raw_answer(base_url, _event())
        with pytest.raises(aiohttp.ClientError):
            await _post(session, _event())

    assert _hook(subscriber).accepted == 0


async def test_it_can_send_a_body_without_end(subscriber: ScriptedSubscriber, http: aiohttp.ClientSession) -> None:
    subscriber.script("a", ScriptedReply(kind=ReplyKind.ENDLESS))
    body = _event()

    async with http.post("/hook/a", data=body, headers=_headers(body)) as answer:
        got = await answer.content.readexactly(5_000_000)
        answer.close()

    assert "Content-Length" not in answer.headers
    assert len(got) == 5_000_000


async def test_it_can_send_a_gigabyte(subscriber: ScriptedSubscriber, http: aiohttp.ClientSession) -> None:
    subscriber.script(
        "a", ScriptedReply(kind=ReplyKind.BIG, times=1), ScriptedReply(kind=ReplyKind.BIG, size_bytes=3_000_001)
    )
    body = _event()

    async with http.post("/hook/a", data=body, headers=_headers(body)) as answer:
        start = await answer.content.readexactly(1_000_000)
        answer.close()
    async with http.post("/hook/a", data=body, headers=_headers(body)) as whole:
        all_of_it = await whole.read()

    assert answer.headers["Content-Length"] == "1000000000"
    assert len(start) == 1_000_000
    assert len(all_of_it) == 3_000_001


async def test_it_can_send_a_gzip_bomb(subscriber: ScriptedSubscriber) -> None:
    """A few kilobytes that unpack to much more, and are a right gzip file."""
    subscriber.script("a", ScriptedReply(kind=ReplyKind.GZIP_BOMB, size_bytes=50_000_000))
    body = _event()

    async with (
        subscriber.serve() as base_url,
        aiohttp.ClientSession(base_url, auto_decompress=False) as session,
        session.post("/hook/a", data=body, headers=_headers(body)) as answer,
    ):
        packed = await answer.read()

    assert answer.headers["Content-Encoding"] == "gzip"
    assert len(packed) < 100_000
    unpacked = gzip.decompress(packed)
    assert len(unpacked) == 48 << 20
    assert zlib.crc32(unpacked) == zlib.crc32(bytes(48 << 20))


async def test_it_speaks_plain_text_where_tls_is_expected(subscriber: ScriptedSubscriber) -> None:
    async with subscriber.serve() as base_url, aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectorSSLError):
            await session.post(
                f"{base_url.replace('http', 'https')}/hook/a", data=b"{}", ssl=ssl.create_default_context()
            )


async def test_a_waiting_sender_does_not_hold_up_the_end(subscriber: ScriptedSubscriber) -> None:
    subscriber.script("a", ScriptedReply(kind=ReplyKind.HANG))

    async with aiohttp.ClientSession() as session:
        body = _event()
        async with subscriber.serve() as base_url:
            waiting = asyncio.create_task(
                session.post(f"{base_url}/hook/a", data=body, headers=_headers(body)).__aenter__()
            )
            await subscriber.until(lambda: subscriber.received("a") == 1)
        with pytest.raises(aiohttp.ClientError):
            await waiting


async def test_a_hook_that_hangs_does_not_slow_another(
    subscriber: ScriptedSubscriber, http: aiohttp.ClientSession
) -> None:
    subscriber.add_hook("b", OTHER)
    subscriber.script("a", ScriptedReply(kind=ReplyKind.HANG))
    bodies = [_event(f"evt_{n}", call=str(n)) for n in range(20)]
    hanging = [asyncio.create_task(_post(http, body)) for body in bodies]
    await subscriber.until(lambda: subscriber.received("a") == 20)

    assert [await _post(http, body, hook="b", secret=OTHER) for body in bodies] == [204] * 20

    for task in hanging:
        task.cancel()
    assert (_hook(subscriber).in_flight_peak, _hook(subscriber, "b").in_flight_peak) == (20, 1)


# Control from another process


async def test_the_subscriber_can_be_controlled_and_read_over_http(http: aiohttp.ClientSession) -> None:
    message = {
        "hooks": {"c": [OTHER]},
        "replies": {"c": [{"status": 503, "times": 1, "headers": {"Retry-After": "1"}}, {"status": 202}]},
        "verify_every": 2,
    }
    async with http.post("/_control", json=message) as done:
        assert done.status == 200, await done.text()
    statuses = [await _post(http, _event(), hook="c", secret=OTHER) for _ in range(3)]

    async with http.get("/_control?arrivals") as answer:
        state = await answer.json()
    async with http.post("/_control", json={"forget": True}) as forgotten:
        after = await forgotten.json()

    seen = state["hooks"]["c"]
    assert statuses == [503, 202, 202]
    assert state["verify_every"] == 2
    assert (seen["received"], seen["accepted"], seen["completed"]) == (3, 2, ["1"])
    assert seen["duplicates"] == {"evt_1": 1}
    assert [arrival["accepted"] for arrival in seen["arrivals"]] == [False, True, True]
    assert (seen["problems"], seen["in_flight"]) == ([], 0)
    assert after["hooks"]["c"]["received"] == 0
    assert "arrivals" not in after["hooks"]["c"]


@pytest.mark.parametrize(
    "message",
    [
        "nonsense",
        {"unknown": 1},
        {"replies": {"unknown": []}},
        {"replies": {"a": [{"kind": "shout"}]}},
        {"replies": {"a": [{"status": 700}]}},
        {"replies": {"a": [{"probability": 2}]}},
        {"hooks": {"d": ["whsec_not base64!"]}},
        {"verify_every": 0},
    ],
)
async def test_an_invalid_control_message_is_refused(http: aiohttp.ClientSession, message: object) -> None:
    async with http.post("/_control", json=message) as answer:
        assert answer.status == 400
        assert len((await answer.json())["error"]) > 10

"""`relay sources import`: thousands of sources, each completely or not at all, and a report of what failed."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.flow.api import SOURCE, ApiClient
from tests.flow.cli import environ_for, relay, run


def table(*rows: str) -> str:
    return "\n".join(["id,provider,base_url,api_key,contacts,recordings,enabled,poll_interval_s", *rows]) + "\n"


def row(name: str, interval: str = "60") -> str:
    return f"{name},webfones,http://127.0.0.1:9,the-key-of-{name},false,false,false,{interval}"


async def test_a_bad_entry_does_not_affect_the_others(api: ApiClient, tmp_path: Path) -> None:
    """Invalid ids and values, duplicates and ids of the configuration are listed with their lines."""
    rows = [row(f"shop-{number}") for number in range(40)]
    rows += [row("Bad Id"), row("hasty", "soon"), row("shop-3"), row("main"), row("") + ",,,", "short,webfones"]
    file = tmp_path / "shops.csv"
    file.write_text(table(*rows), encoding="utf-8-sig")

    first = await relay(api, "sources", "import", str(file), "--json")
    second = await relay(api, "sources", "import", str(file), "--json", "--at-once", "2")
    people = await relay(api, "sources", "import", str(file))

    assert first.code == 1
    assert first.err == "6 of 46 sources were not imported\n"
    assert {name: first.json[name] for name in ("total", "created", "replaced", "not_tried")} == {
        "total": 46,
        "created": 40,
        "replaced": 0,
        "not_tried": 0,
    }
    failed = {each["where"]: each for each in first.json["failed"]}
    assert failed["line 43"]["why"] == "poll_interval_s: must be a number"
    assert failed["line 44"]["why"] == "has the same id as line 5"
    assert failed["line 45"]["code"] == "declared_in_configuration"
    assert failed["line 46"]["why"] == "has 11 values for 8 columns"
    assert set(failed) == {f"line {number}" for number in range(42, 48)}
    assert (second.json["created"], second.json["replaced"]) == (0, 40)
    assert "46 sources: 0 created, 40 replaced, 6 failed" in people.out
    assert "the-key-of-" not in people.out + people.err + first.out
    listed = await api.get("/v1/sources?limit=200")
    assert len(listed["items"]) == 41


@pytest.mark.parametrize("shape", ["map", "list", "whole file"])
async def test_maps_and_lists_are_equivalent(api: ApiClient, shape: str) -> None:
    """By id, as a list, or under `sources:` as relay.yaml has them; from stdin too."""
    documents: dict[str, Any] = {
        "map": {"north": SOURCE, "south": SOURCE},
        "list": [{"id": "north", **SOURCE}, {"id": "south", **SOURCE}],
        "whole file": {"sources": {"north": SOURCE, "south": SOURCE}},
    }
    text = json.dumps(documents[shape])

    made = await relay(api, "sources", "import", "-", "--format", "yaml", stdin=text)
    again = await relay(api, "sources", "import", "-", "--format", "json", stdin=text)

    assert (made.code, made.out) == (0, "2 sources: 2 created, 0 replaced\n")
    assert (again.code, again.out) == (0, "2 sources: 0 created, 2 replaced\n")


async def test_an_unreadable_file_sends_nothing(api: ApiClient, tmp_path: Path) -> None:
    """Not YAML, no columns, no format, no entries: exit code 2 and a message."""
    files = {
        "broken.yaml": "a: [1\n",
        "scalar.yml": "42",
        "none.csv": "name,provider\nx,webfones\n",
        "empty.json": "[]",
        "twice.json": '{"a": {}, "a": {}}',
        "what.txt": "id\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = api.requests_sent

    ends = [await relay(api, "sources", "import", str(tmp_path / name)) for name in files]
    missing = await relay(api, "sources", "import", str(tmp_path / "nowhere.csv"))

    assert [each.code for each in (*ends, missing)] == [2] * 7
    assert "line 1" in ends[0].err or "line 2" in ends[0].err
    assert "`id`" in ends[2].err
    assert "'a' is given twice" in ends[4].err
    assert "--format" in ends[5].err
    assert len((await api.get("/v1/sources"))["items"]) == 1
    assert api.requests_sent == before + 1


@asynccontextmanager
async def answering(put: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    """Serve PUT as a relay would."""
    app = web.Application()
    app.router.add_put("/v1/sources/{id}", put)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def problem(status: int, code: str) -> web.Response:
    return web.json_response({"code": code, "detail": f"It is {code}.", "status": status}, status=status)


async def test_a_busy_relay_is_retried_and_concurrency_is_limited(tmp_path: Path) -> None:
    """A 503 is retried; at most --at-once requests run at the same time."""
    asked: dict[str, int] = {}
    under_way = most = 0

    async def put(request: web.Request) -> web.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)
        under_way -= 1
        name = request.match_info["id"]
        asked[name] = asked.get(name, 0) + 1
        return (
            problem(503, "store_unavailable")
            if asked[name] == 1 and name == "s1"
            else web.json_response({}, status=201)
        )

    file = tmp_path / "many.csv"
    file.write_text("id,provider\n" + "".join(f"s{number},webfones\n" for number in range(20)))
    async with answering(put) as url:
        ran = await run("sources", "import", str(file), "--at-once", "3", environ=environ_for(url, "t"))

    assert ran.code == 0, ran.err
    assert asked == {f"s{number}": 2 if number == 1 else 1 for number in range(20)}
    assert most == 3


async def test_an_error_that_every_entry_would_get_stops_the_import(tmp_path: Path) -> None:
    """A token without permission: there are no thousands of refusals, and the report says what was not tried."""

    async def put(_: web.Request) -> web.Response:
        return problem(403, "forbidden")

    file = tmp_path / "many.csv"
    file.write_text("id,provider\n" + "".join(f"s{number},webfones\n" for number in range(500)))
    async with answering(put) as url:
        ran = await run("sources", "import", str(file), "--json", environ=environ_for(url, "t"))

    assert ran.code == 1
    assert ran.json["not_tried"] == 500
    assert ran.err.startswith("It is forbidden.\n500 sources were not tried.")

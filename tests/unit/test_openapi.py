"""The document and the page are made of the table, and the table has what was promised."""

import json
import re
from typing import Any

import pytest
from pydantic import SecretStr

from relay.api import openapi
from relay.api.options import MASK, inlined, masked, merge_patched, unmasked
from relay.api.problems import STATUSES
from relay.api.routes import TABLE
from relay.delivery.filters import mismatch
from relay.domain.clock import SystemClock
from relay.events.payload import FLAT_FIELDS, model_of, schema_of
from relay.events.render import check_map, flatten
from relay.events.samples import sample, samples
from relay.events.types import DESCRIPTIONS, EVENT_TYPES
from relay.privacy.erase import mentions, spellings
from relay.providers import PROVIDERS
from relay.settings import SubscriptionOptions

DOCUMENT = openapi.document(TABLE)
NOW = SystemClock().now()


def _nodes(node: Any) -> Any:
    yield node
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _nodes(item)


def test_the_document_is_openapi_3_1() -> None:
    """With JSON Schema 2020-12, bearer tokens, and every reference resolved."""
    assert DOCUMENT["openapi"] == "3.1.0"
    assert DOCUMENT["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    for node in _nodes(DOCUMENT):
        if isinstance(node, dict) and "$ref" in node:
            name = node["$ref"].removeprefix("#/components/schemas/")
            assert name in DOCUMENT["components"]["schemas"]
    assert json.loads(json.dumps(DOCUMENT)) == DOCUMENT


def test_every_route_is_in_the_document_once() -> None:
    """Under a name of its own, with a summary, and with every problem it can answer."""
    operations = [operation for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    names = [operation["operationId"] for operation in operations]

    assert len(operations) == len(TABLE)
    assert len(set(names)) == len(names)
    for route in TABLE:
        operation = DOCUMENT["paths"][route.path][route.method.lower()]
        assert operation["summary"].endswith((".", ":")) or operation["summary"]
        for code in route.all_problems:
            response = operation["responses"][str(STATUSES[code].value)]
            assert (
                code
                in response["content"]["application/problem+json"]["schema"]["allOf"][1]["properties"]["code"]["enum"]
            )
        parts = set(re.findall(r"\{(\w+)\}", route.path))
        assert parts == {item["name"] for item in operation["parameters"] if item["in"] == "path"}


def test_every_change_requires_an_admin() -> None:
    """GET reads, everything else changes."""
    for route in TABLE:
        assert (route.method == "GET") == (route.scope == "viewer") or route.scope == "operator", route.path


def test_unknown_fields_are_refused_in_the_document_too() -> None:
    """Every body that has fields says that there are no others."""
    for route in TABLE:
        if route.body is None:
            continue
        content = DOCUMENT["paths"][route.path][route.method.lower()]["requestBody"]["content"]
        schema = content["application/json"]["schema"]
        if "$ref" in schema:
            schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        for item in schema.get("oneOf", [schema]):
            assert item["additionalProperties"] is False, route.path


def test_no_file_of_the_relays_is_offered() -> None:
    """`…_file` options belong to the configuration."""
    for path, methods in DOCUMENT["paths"].items():
        for operation in methods.values():
            body = json.dumps(operation.get("requestBody", {}))
            assert not re.search(r'_file"\s*:', body), path


def test_every_provider_can_be_added() -> None:
    """A new one is in the document without another line here."""
    body = DOCUMENT["paths"]["/v1/sources"]["post"]["requestBody"]["content"]["application/json"]["schema"]

    assert sorted(item["properties"]["provider"]["const"] for item in body["oneOf"]) == sorted(PROVIDERS)


def test_the_page_names_every_route() -> None:
    """Path by path."""
    page = openapi.page(DOCUMENT)

    for route in TABLE:
        assert f"<code>{route.path}</code>" in page


# --- event types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_type", EVENT_TYPES)
def test_a_sample_keeps_its_schema(event_type: str) -> None:
    """Strictly: nothing missing, nothing more."""
    document = sample(event_type, now=NOW)

    model_of(event_type).model_validate(document)
    assert DESCRIPTIONS[event_type]
    assert set(schema_of(event_type)["required"]) <= set(document)
    assert tuple(flatten(document)) == FLAT_FIELDS
    assert mismatch(_Everything(), document) is None


class _Everything:
    events = ("*", "webhook.*", "source.*", "subscription.*")
    sources = direction = outcome = extensions = min_duration_s = None


def test_samples_differ_in_their_ids() -> None:
    """An automation that drops duplicates keeps all of them."""
    found = samples(["call.*"], 20, now=NOW)

    assert len({item["id"] for item in found}) == 20
    assert [item["timestamp"] for item in found] == sorted((item["timestamp"] for item in found), reverse=True)


def test_a_map_can_be_checked_against_the_sample() -> None:
    """The usual fields are there."""
    fields = {"name": "data.call.contact.name", "from": 'data.call."from".number'}

    assert check_map(fields, sample("call.completed", now=NOW)) == []


# --- options ---------------------------------------------------------------------------------------------------------

SECRET = "whsec_" + "a" * 43 + "="


def test_masks_hide_and_stand_for_what_they_hide() -> None:
    """Through maps and lists; what was changed is taken, what was not is kept."""
    options = SubscriptionOptions.model_validate(
        {"url": "https://user:pw@example.com:8443/hook?x=1", "secret": SECRET, "headers": {"X-Key": "abc"}}
    )
    shown = masked(options)
    plain = {"url": options.url.get_secret_value(), "secret": SECRET, "headers": {"X-Key": "abc"}}

    assert shown["url"] == f"https://example.com:8443/{MASK}"
    assert (shown["secret"], shown["headers"]) == (MASK, {"X-Key": MASK})
    kept = unmasked({"url": shown["url"], "headers": {"X-Key": MASK, "X-New": "def"}}, shown, plain)
    assert kept == {"url": plain["url"], "headers": {"X-Key": "abc", "X-New": "def"}}
    assert isinstance(options.secret, SecretStr)


def test_a_patch_takes_null_for_the_default() -> None:
    """What is not named stays."""
    assert merge_patched({"a": 1, "b": 2}, {"b": None, "c": 3}) == {"a": 1, "c": 3}


def test_inlined_schemas_have_no_references() -> None:
    """So that they can stand anywhere."""
    assert "$ref" not in json.dumps(inlined(SubscriptionOptions.model_json_schema()))


# --- finding a number ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "+12025550123",
        "(202) 555-0123",
        "1-202-555-0123",
        "2025550123",
        "0012025550123",
        "sip:+12025550123@pbx.example.com",
        "tel:+1-202-555-0123",
        "Jo <202.555.0123>",
        "called 202-555-0123 twice",
        2025550123,
    ],
)
def test_a_number_is_found_however_it_is_written(text: object) -> None:
    """In maps and lists, at any depth."""
    assert mentions({"a": [{"b": text}]}, spellings("+12025550123"))


@pytest.mark.parametrize(
    "text",
    [
        "+12025550124",
        "5550123",
        "920255501234",
        "",
        None,
        True,
        2.5,
        "sip:jo@202.example.com",
        "sip:jo@12025550123.example",
        "x" * 10_000,
    ],
)
def test_another_number_is_not(text: object) -> None:
    """Not a part of it, not a longer one."""
    assert not mentions({"a": text}, spellings("+12025550123"))

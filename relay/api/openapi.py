"""Generates the OpenAPI 3.1 document from the routes and pydantic's JSON Schema 2020-12, and an HTML page of it."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from http import HTTPStatus
from typing import Any, Final

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

import relay
from relay.api.fields import CALL_ID, EVENT_ID
from relay.api.problems import STATUSES, Code, ProblemDocument
from relay.api.route import Route
from relay.domain.json import Json
from relay.settings import ID_PATTERN

# By method, path, and "query", "body" or the status of a response.
Schemas = Mapping[tuple[Any, ...], Json]

_REF: Final = "#/components/schemas/{model}"
_PARAMETER: Final = re.compile(r"\{(\w+)\}")
_PATTERNS: Final = {
    "source_id": ID_PATTERN,
    "subscription_id": ID_PATTERN,
    "call_id": CALL_ID,
    "event_id": EVENT_ID,
}
_TAGS: Final = {
    "sources": "Accounts at providers. Sources of the configuration can only be changed there.",
    "calls": "Calls, their recordings and contacts.",
    "events": "Published events, and the types of events.",
    "subscriptions": "Webhook subscriptions. REST hooks: subscribe with POST, unsubscribe with DELETE.",
    "deliveries": "One event for one subscription each, with its attempts.",
    "jobs": "Long-running work: backfill, replay, erasure.",
    "tokens": "Access tokens of this API.",
}
_SCOPES: Final = {
    "viewer": "Requires any token.",
    "admin": "Requires a token with the role admin.",
    "operator": "Requires a token with the role admin and without a tenant.",
}


def document(table: Sequence[Route], *, server_url: str | None = None) -> Json:
    inputs: list[tuple[tuple[Any, ...], JsonSchemaMode, TypeAdapter[Any]]] = [
        (("problem",), "serialization", TypeAdapter(ProblemDocument))
    ]
    for route in table:
        name = (route.method, route.path)
        if route.query is not None:
            inputs.append(((*name, "query"), "validation", TypeAdapter(route.query)))
        if route.body_type is not None:
            inputs.append(((*name, "body"), "validation", route.body_type))
        inputs += [((*name, status), "serialization", model) for status, model in route.response_types.items()]
    schemas, definitions = TypeAdapter.json_schemas(inputs, ref_template=_REF)
    by_key = {key: schema for (key, _), schema in schemas.items()}
    components: Json = definitions.get("$defs", {})
    paths: Json = {}
    for route in table:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_key, components)
    return {
        "openapi": "3.1.0",
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "info": {
            "title": "Call Relay",
            "version": relay.__version__,
            "summary": "Polls phone-system call records and delivers signed webhooks.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": server_url or "/"}],
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, schemas: Schemas, components: Json) -> Json:
    name = (route.method, route.path)
    operation: Json = {
        "operationId": route.operation_id,
        "tags": [route.tag],
        "summary": route.summary,
        "description": f"{_text(route)}\n\n{_SCOPES[route.scope]}",
        "parameters": [
            {"name": part, "in": "path", "required": True, "schema": {"type": "string", **_pattern(part)}}
            for part in _PARAMETER.findall(route.path)
        ],
        "responses": _responses(route, schemas),
    }
    if route.query is not None:
        schema = schemas[(*name, "query")]
        if "$ref" in schema:
            schema = components[schema["$ref"].rpartition("/")[2]]
        operation["parameters"] += [
            _parameter(field, properties, required=field in schema.get("required", ()))
            for field, properties in schema["properties"].items()
        ]
    if route.body is not None:
        content = {"application/json": {"schema": schemas[(*name, "body")]}}
        operation["requestBody"] = {"required": not route.body_optional, "content": content}
    return operation


def _parameter(name: str, schema: Json, *, required: bool) -> Json:
    # A query has no null: omitting an optional parameter is its null.
    described = {key: value for key, value in schema.items() if key not in ("anyOf", "title", "default")}
    choices = [choice for choice in schema.get("anyOf", ()) if choice.get("type") != "null"]
    if len(choices) == 1:
        described |= choices[0]
    elif choices:
        described["anyOf"] = choices
    if schema.get("default") is not None:
        described["default"] = schema["default"]
    text = described.pop("description", None)
    parameter: Json = {"name": name, "in": "query", "required": required, "schema": described}
    if text:
        parameter["description"] = text
    if described.get("type") == "array":
        parameter |= {"style": "form", "explode": True}
    return parameter


def _pattern(part: str) -> Json:
    return {"pattern": _PATTERNS[part]} if part in _PATTERNS else {"minLength": 1}


def _responses(route: Route, schemas: Schemas) -> Json:
    responses: Json = {}
    for status in route.responses:
        responses[str(status.value)] = {"description": status.phrase}
        if status.value in route.response_types:
            schema = schemas[(route.method, route.path, status.value)]
            responses[str(status.value)]["content"] = {route.media_type: {"schema": schema}}
    by_status: dict[HTTPStatus, list[Code]] = {}
    for code in route.all_problems:
        by_status.setdefault(STATUSES[code], []).append(code)
    for status, codes in sorted(by_status.items()):
        narrowed = {"allOf": [schemas[("problem",)], {"properties": {"code": {"enum": sorted(codes)}}}]}
        responses[str(status.value)] = {
            "description": f"{status.phrase}: {', '.join(sorted(codes))}",
            "content": {"application/problem+json": {"schema": narrowed}},
        }
    return responses


def _text(route: Route) -> str:
    lines = [line.strip() for line in (route.handler.__doc__ or "").strip().splitlines()]
    return " ".join(lines).replace("  ", "\n\n")


# --- the page --------------------------------------------------------------------------------------------------------

_STYLE: Final = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{margin-bottom:0}h2{margin-top:2.5rem;border-bottom:1px solid #ccc}
details{border:1px solid #ddd;border-radius:6px;margin:.4rem 0;padding:.2rem .8rem}
summary{cursor:pointer;padding:.3rem 0}code,pre{font:14px/1.45 ui-monospace,monospace}
pre{background:#f6f6f6;padding:.8rem;overflow:auto;border-radius:6px}
.m{display:inline-block;min-width:4.2rem;font-weight:700}.g{color:#555}table{border-collapse:collapse;width:100%}
td,th{text-align:left;vertical-align:top;padding:.25rem .6rem .25rem 0;border-bottom:1px solid #eee}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#161616}pre{background:#222}details{border-color:#444}
h2,td,th{border-color:#444}.g{color:#aaa}a{color:#8ab4f8}}
"""
PAGE_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"


def page(api: Json) -> str:
    """Render the document as one HTML page that loads no other resource."""
    sections = "".join(_section(api, tag) for tag in api["tags"])
    schemas = "".join(
        f"<details id='{escape(name)}'><summary><code>{escape(name)}</code></summary>{_fields(schema)}</details>"
        for name, schema in sorted(api["components"]["schemas"].items())
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>Call Relay API</title><style>{_STYLE}</style></head><body>"
        f"<h1>Call Relay API</h1><p class='g'>{escape(api['info']['version'])} · "
        "<a href='openapi.json'>openapi.json</a> (OpenAPI 3.1)</p>"
        "<p>Send <code>Authorization: Bearer …</code> with every request. Errors are "
        "<code>application/problem+json</code> with a <code>code</code>. Lists are newest first; pass "
        "<code>next_cursor</code> as <code>cursor</code> to get the next page. A page may be short, or empty, and "
        "still have a cursor.</p>"
        f"{sections}<h2>Schemas</h2>{schemas}</body></html>"
    )


def _section(api: Json, tag: Json) -> str:
    rows = "".join(
        _operation_section(method.upper(), path, operation)
        for path, methods in api["paths"].items()
        for method, operation in methods.items()
        if tag["name"] in operation["tags"]
    )
    return f"<h2>{escape(tag['name'])}</h2><p>{escape(tag['description'])}</p>{rows}"


def _operation_section(method: str, path: str, operation: Json) -> str:
    parameters = "".join(
        f"<tr><td><code>{escape(parameter['name'])}</code></td><td class='g'>{parameter['in']}</td>"
        f"<td>{_type(parameter['schema'])}</td><td>{escape(parameter.get('description', ''))}</td></tr>"
        for parameter in operation["parameters"]
    )
    responses = "".join(
        f"<tr><td><code>{status}</code></td><td>{escape(response['description'])}</td><td>{_content(response)}</td></tr>"
        for status, response in operation["responses"].items()
    )
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    text = "".join(f"<p>{escape(part)}</p>" for part in operation["description"].split("\n\n"))
    return (
        f"<details><summary><span class='m'>{method}</span> <code>{escape(path)}</code> "
        f"<span class='g'>{escape(operation['summary'])}</span></summary>{text}"
        + (f"<table>{parameters}</table>" if parameters else "")
        + (f"<p>Body: {_type(body)}</p>{_fields(body)}" if body else "")
        + f"<table>{responses}</table></details>"
    )


def _content(response: Json) -> str:
    return ", ".join(_type(media["schema"]) for media in response.get("content", {}).values())


def _fields(schema: Json) -> str:
    if "oneOf" in schema:
        return "".join(
            f"<p><b>{escape(choice.get('title', ''))}</b></p>{_fields(choice)}" for choice in schema["oneOf"]
        )
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{'' if name not in required else ' *'}</td><td>{_type(field)}</td>"
        f"<td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    )
    return f"<table>{rows}</table>" if rows else ""


def _type(schema: Json) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"<a href='#{escape(name)}'><code>{escape(name)}</code></a>"
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return " or ".join(dict.fromkeys(_type(choice) for choice in schema[word]))
    if "allOf" in schema:
        return _type(schema["allOf"][0])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"<code>{escape(str(value))}</code>" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(str(schema.get("type", "anything")))

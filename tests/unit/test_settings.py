"""Settings: file and environment are read, and every problem is reported at once, without secrets."""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, create_model

from relay.config_file import exposes_secrets
from relay.domain.call import Direction, Outcome
from relay.errors import SettingsError
from relay.events.types import EVENT_TYPES, matches
from relay.providers import PROVIDERS
from relay.providers.base import ProviderKind, SourceOptions
from relay.settings import (
    FieldMap,
    Settings,
    SubscriptionOptions,
    changed_outside_maps,
    error_messages,
    load,
    reveal,
)
from relay.settings.options import any_source
from tests.scripts import script

WHSEC = "whsec_" + base64.b64encode(bytes(range(32))).decode()
KEY = "0123456789abcdef0123456789abcdef"

MINIMAL = f"""
sources:
  main: {{provider: webfones, api_key: abc-123-def}}
subscriptions:
  crm: {{url: "https://example.test/hook", secret: {WHSEC}}}
"""

FULL = f"""
public_url: https://relay.example.com/prefix/
data_dir: ./data
storage_url: s3://bucket/prefix
recording_links: presigned
api: {{host: 0.0.0.0, port: 8081, tokens: [a-token-of-some-length]}}
internal: {{host: "::1", port: 9091}}
log: {{level: WARNING, format: json}}
delivery: {{allowed_networks: ["127.0.0.0/8", "fd00::/8", 192.0.2.1], timeout_s: 10}}
poll:
  tiers: [{{every_s: 0, depth_s: 3600}}, {{every_s: 600, depth_s: 90000}}]
retention: {{calls_days: 20, events_days: 12, recordings_days: 10}}
sources:
  main:
    provider: webfones
    base_url: https://pbx.example.com:2343
    api_key: abc-123-def
    timezone: America/New_York
    region: NO
    poll_interval_s: 20
    recordings: false
subscriptions:
  crm:
    url: https://example.test/hook?a=b
    secret: {WHSEC}
    events: [call.*, source.error]
    sources: [main]
    direction: inbound
    outcome: [answered, voicemail]
    extensions: [101, 0102, "+15"]
    min_duration_s: 3
    include_raw: true
    payload: {{map: {{id: data.call.id}}}}
    headers: {{x-key: some-value}}
    max_in_flight: 3
    rate_per_s: 0.5
    delivery: at_most_once
    description: The CRM
    enabled: false
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write_file(text: str) -> Path:
        path = tmp_path / "relay.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


Write = Callable[[str], Path]


def problems(path: Path | None, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(path, environ or {})
    return str(caught.value).splitlines()


def subscription_problems(write: Write, **options: object) -> list[str]:
    crm = {"url": "https://example.test/hook", "secret": WHSEC, **options}
    return problems(write(json.dumps({"subscriptions": {"crm": crm}})))


# ------------------------------------------------------------------------------------------------ what is read


def test_an_empty_configuration_uses_every_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare start needs no file: paths are in the working directory."""
    monkeypatch.chdir(tmp_path)
    settings = load(None, {})

    assert settings.data_dir == tmp_path / "relay-data"
    assert settings.storage_url == str(tmp_path / "relay-data" / "recordings")
    assert settings.public_url is None
    assert (settings.api.host, settings.api.port, settings.api.tokens) == ("127.0.0.1", 8080, ())
    assert (settings.internal.host, settings.internal.port) == ("127.0.0.1", 9090)
    assert [(tier.every_s, tier.depth_s) for tier in settings.poll.tiers] == [(0, 7200), (900, 93600), (21600, 280800)]
    assert (settings.retention.calls_days, settings.retention.events_days) == (30, 14)
    assert settings.delivery.timeout_s == 15
    assert dict(settings.sources) == {}
    assert settings.redis_url is None
    assert settings.secret_key == ()


def test_every_setting_in_the_file_is_read(write: Write, tmp_path: Path) -> None:
    """Each public name is read, with plain YAML 1.2 values: NO is Norway, 0102 keeps its zero."""
    settings = load(write(FULL), {})
    source, crm = settings.sources["main"], settings.subscriptions["crm"]

    assert settings.public_url == "https://relay.example.com/prefix"
    assert settings.data_dir == tmp_path / "data"
    assert settings.storage_url == "s3://bucket/prefix"
    assert settings.api.tokens[0].get_secret_value() == "a-token-of-some-length"
    assert settings.log.level == "warning"
    assert settings.delivery.allowed_networks[2] == IPv4Network("192.0.2.1/32")
    assert settings.retention.recordings_days == 10
    assert (source.timezone, source.region, source.recordings) == ("America/New_York", "NO", False)
    assert crm.url.get_secret_value() == "https://example.test/hook?a=b"
    assert crm.direction == (Direction.INBOUND,)
    assert crm.outcome == (Outcome.ANSWERED, Outcome.VOICEMAIL)
    assert crm.extensions == ("101", "0102", "+15")
    assert isinstance(crm.payload, FieldMap)
    assert dict(crm.payload.map) == {"id": "data.call.id"}
    assert crm.headers["x-key"].get_secret_value() == "some-value"
    assert (crm.max_in_flight, crm.rate_per_s, crm.delivery, crm.enabled) == (3, 0.5, "at_most_once", False)


def test_a_source_gets_the_options_of_its_provider(write: Write) -> None:
    """`provider` picks the model from the registry."""
    assert type(load(write(MINIMAL), {}).sources["main"]) is PROVIDERS["webfones"].options


def test_empty_sections_are_defaults(write: Write) -> None:
    """A section whose lines are all commented out is as if it were absent."""
    settings = load(write("sources:\nsubscriptions:\napi:\n"), {})

    assert settings == load(write(""), {})


def test_settings_cannot_be_changed(write: Write) -> None:
    settings = load(write(FULL), {})

    with pytest.raises(ValidationError):
        settings.public_url = None  # type: ignore[misc]
    with pytest.raises(ValidationError):
        settings.api.port = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        settings.sources["other"] = settings.sources["main"]  # type: ignore[index]
    with pytest.raises(TypeError):
        settings.subscriptions["crm"].headers["x"] = SecretStr("y")  # type: ignore[index]


def test_making_settings_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only `load` reads the environment, and only the one passed to it."""
    monkeypatch.setenv("RELAY_PUBLIC_URL", "https://elsewhere.example")
    monkeypatch.setenv("PUBLIC_URL", "https://elsewhere.example")

    assert Settings().public_url is None
    assert load(None, {}).public_url is None


def test_merge_keys_and_anchors_work(write: Write) -> None:
    """Two sources share their options through an anchor."""
    settings = load(
        write(
            "sources:\n"
            "  a: &a {provider: webfones, api_key: abc-123-def, poll_interval_s: 60}\n"
            "  b: {<<: *a, api_key: other-key}\n"
        ),
        {},
    )

    assert settings.sources["b"].poll_interval_s == 60
    assert reveal(settings.sources["b"])["api_key"] == "other-key"


def test_relay_config_names_the_file_when_no_option_does(write: Write) -> None:
    assert "crm" in load(None, {"RELAY_CONFIG": str(write(MINIMAL))}).subscriptions


def test_a_relay_yaml_in_the_working_directory_is_read_when_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory is the default place of the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relay.yaml").write_text(MINIMAL)
    (tmp_path / "other.yaml").write_text("log: {level: debug}")

    assert "crm" in load(None, {}).subscriptions
    assert not load(tmp_path / "other.yaml", {}).subscriptions
    assert not load(None, {"RELAY_CONFIG": "other.yaml"}).subscriptions


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://crm.example.com/hook", "plain http is only for addresses inside delivery.allowed_networks; use https"),
        ("https://10.0.0.5/hook", 'to allow it: delivery.allowed_networks: ["10.0.0.5/32"]'),
        ("http://127.0.0.1:3000/hook", 'to allow it: delivery.allowed_networks: ["127.0.0.1/32"]'),
    ],
)
def test_a_url_that_would_never_be_connected_to_stops_the_start(write: Write, url: str, words: str) -> None:
    """The operator finds out at once, not with the first call. A disabled subscription may keep its URL."""
    [problem] = subscription_problems(write, url=url)

    assert problem.startswith("subscriptions.crm.url: ")
    assert words in problem
    off = {"subscriptions": {"crm": {"url": url, "secret": WHSEC, "enabled": False}}}
    assert not load(write(json.dumps(off)), {}).subscriptions["crm"].enabled
    allowed = {"delivery": {"allowed_networks": ["10.0.0.0/8", "127.0.0.0/8"]}}
    on = {"subscriptions": {"crm": {"url": url, "secret": WHSEC}}, **allowed}
    assert load(write(json.dumps(on)), {}).subscriptions["crm"].enabled


def test_include_raw_is_rejected_with_a_flat_payload(write: Write) -> None:
    [problem] = subscription_problems(write, include_raw=True, payload="flat")

    assert problem == "subscriptions.crm: include_raw needs payload: full or a map; payload: flat cannot hold it"


# --------------------------------------------------------------------------------------------- the environment


def test_the_environment_wins_and_merges_into_the_maps(write: Write) -> None:
    """A deployment passes the key in a variable; the file has the rest."""
    environ = {
        "RELAY_PUBLIC_URL": "https://relay.example.com",
        "RELAY_SOURCES__MAIN__API_KEY": "from-environment",
        "RELAY_SOURCES__SECOND__PROVIDER": "webfones",
        "RELAY_SOURCES__SECOND__API_KEY": "[not-json-but-a-key",
        "RELAY_SUBSCRIPTIONS__CRM__EVENTS": '["call.completed"]',
        "RELAY_SUBSCRIPTIONS__CRM__PAYLOAD": '{"map": {"id": "id"}}',
        "RELAY_SUBSCRIPTIONS__CRM__INCLUDE_RAW": "true",
        "RELAY_DELIVERY__ALLOWED_NETWORKS": '["10.0.0.0/8"]',
        "RELAY_DELIVERY": '{"timeout_s": 9}',
        "RELAY_API__PORT": "8181",
        "RELAY_REDIS_URL": "redis://:word@redis:6379/0",
        "RELAY_SECRET_KEY": f"{KEY}new, {KEY}old",
        "RELAY_URL": "http://127.0.0.1:8080",
        "RELAY_TOKEN": "whatever",
        "RELAY_LOG__LEVEL": "",
        "PATH": "/bin",
    }
    settings = load(write(MINIMAL), environ)

    assert settings.public_url == "https://relay.example.com"
    assert reveal(settings.sources["main"])["api_key"] == "from-environment"
    assert reveal(settings.sources["second"])["api_key"] == "[not-json-but-a-key"
    assert settings.subscriptions["crm"].events == ("call.completed",)
    assert settings.subscriptions["crm"].include_raw is True
    assert isinstance(settings.subscriptions["crm"].payload, FieldMap)
    assert settings.delivery.allowed_networks == (IPv4Network("10.0.0.0/8"),)
    assert settings.delivery.timeout_s == 9
    assert settings.api.port == 8181
    assert settings.redis_url is not None
    assert [key.get_secret_value() for key in settings.secret_key] == [f"{KEY}new", f"{KEY}old"]
    assert settings.log.level == "info"


def test_an_id_with_a_dash_matches_a_variable_with_an_underscore(write: Write) -> None:
    """Shells allow no dash in the names of variables."""
    path = write("sources:\n  new-york: {provider: webfones}\n")
    settings = load(path, {"RELAY_SOURCES__NEW_YORK__API_KEY": "abc-123-def"})

    assert list(settings.sources) == ["new-york"]


def test_a_variable_that_matches_two_ids_is_rejected(write: Write) -> None:
    path = write("sources:\n  a-b_c: {provider: webfones, api_key: k-1}\n  a_b-c: {provider: webfones, api_key: k-1}\n")

    assert problems(path, {"RELAY_SOURCES__A_B_C__API_KEY": "x"}) == [
        "RELAY_SOURCES__A_B_C__API_KEY: matches both a-b_c and a_b-c; set it in the file"
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RELAY_PUBLIC_ULR", "x", "RELAY_PUBLIC_ULR: is not a setting; did you mean RELAY_PUBLIC_URL?"),
        ("RELAY_POL__TIERS", "x", "RELAY_POL__TIERS: is not a setting; did you mean RELAY_POLL?"),
        ("RELAY_LOG__LEVL", "x", "log.levl: is not recognized; did you mean level? (from RELAY_LOG__LEVL)"),
        ("RELAY_PUBLIC_URL__HOST", "x", "RELAY_PUBLIC_URL__HOST: is not a setting; public_url is not a map"),
        ("RELAY_LOG____LEVEL", "x", "RELAY_LOG____LEVEL: has an empty name between its underscores"),
        ("RELAY_POLL__TIERS", "[{", "poll.tiers: must be a list; in a variable, a JSON list (from RELAY_POLL__TIERS)"),
        ("RELAY_PUBLIC_URL", "https://x/\udcff", "RELAY_PUBLIC_URL: is not UTF-8 text"),
        (
            "RELAY_API__TOKENS",
            '["\\ud800"]',
            "api.tokens: must be a list; in a variable, a JSON list (from RELAY_API__TOKENS)",
        ),
        ("RELAY_LOG", "info", "log: must be a map of names to values; in a variable, a JSON object (from RELAY_LOG)"),
        (
            "RELAY_API__TOKENS",
            "one,two",
            "api.tokens: must be a list; in a variable, a JSON list (from RELAY_API__TOKENS)",
        ),
        ("RELAY_API__PORT", "x", "api.port: must be a whole number (from RELAY_API__PORT)"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, message: str) -> None:
    assert problems(None, {name: value}) == [message]


def test_a_variable_below_a_plain_value_is_reported() -> None:
    """pydantic-settings itself would ignore it."""
    assert problems(None, {"RELAY_LOG__LEVEL": "info", "RELAY_LOG__LEVEL__ROOT": "debug"}) == [
        "RELAY_LOG__LEVEL__ROOT: is not a setting; log.level is not a map"
    ]


def test_an_unknown_variable_without_a_close_match_lists_all_names() -> None:
    assert "expected one of RELAY_API, RELAY_CONFIG, RELAY_DATA_DIR" in problems(None, {"RELAY_ZZZZZZ": "1"})[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RELAY_PORT", "tcp://10.0.0.1:8080"),
        ("RELAY_SERVICE_HOST", "10.0.0.1"),
        ("RELAY_SERVICE_PORT", "8080"),
        ("RELAY_SERVICE_PORT_HTTP", "8080"),
        ("RELAY_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
        ("RELAY_PORT_8080_TCP_PROTO", "tcp"),
        ("RELAY_PORT_8080_TCP_PORT", "8080"),
        ("RELAY_API_PORT_8080_TCP_ADDR", "10.0.0.1"),
        ("RELAY_API_SERVICE_HOST", "10.0.0.1"),
        ("RELAY_API_PORT", "tcp://10.0.0.1:8080"),
    ],
)
def test_service_links_of_kubernetes_are_ignored(name: str, value: str) -> None:
    """A Service called relay makes Kubernetes set RELAY_PORT=tcp://… in every pod."""
    assert load(None, {name: value}) == load(None, {})


def test_relay_port_with_a_number_is_an_unknown_variable() -> None:
    assert problems(None, {"RELAY_PORT": "8080"})[0].startswith("RELAY_PORT: is not a setting;")


# --------------------------------------------------------------------------------------------------- the file


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "absent.yaml"

    assert problems(path) == [f"{path}: file not found; name another one with --config"]


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    assert problems(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]


def test_a_file_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "relay.yaml"
    path.write_bytes(b"public_url: \xff\xfe")

    assert problems(path) == [f"{path}: is not UTF-8 text"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: b: c", "line 1, column 5: this is not valid YAML: mapping values are not allowed here"),
        ("api:\n\tport: 1", "line 2, column 1: this is not valid YAML: found character '\\t' that cannot start any token"),  # noqa: E501
        ("api: *confidential", "line 1, column 6: this is not valid YAML: an undefined alias; put text that starts with * in quotes"),  # noqa: E501
        ("a: 1\n---\nb: 2", "line 2, column 1: this is not valid YAML: expected one document, with unique anchors; put text that starts with & in quotes"),  # noqa: E501
        ("a: !confidential!b c", "line 1, column 4: this is not valid YAML: check the quotes, colons and spaces around it"),  # noqa: E501
        ("a: \x07", "is not valid YAML: it has a control character"),
        ("- a", "must be a map of setting names to values, not a list"),
        ("just words", "must be a map of setting names to values, not a single value"),
        ("public_url: !confidential x", "line 1: tags are not supported; put text that starts with ! in quotes"),
        ('public_url: "\\ud800"', "line 1: the text has a lone surrogate"),
        ("public_url: !!int x", "line 1: the value does not match its tag"),
        ("log: {level: info}\napi: {port: 1}\nlog: {}", "line 3: 'log' is a duplicate key, first in line 1"),
        ("sources:\n  a: {provider: webfones, api_key: k,\n    api_key: k}", "line 3: 'api_key' is a duplicate key, first in line 2"),  # noqa: E501
        ("sources: &a {b: *a}", "is nested too deeply, or refers to itself"),
        ("a: " + "[" * 5000, "is nested too deeply, or refers to itself"),
    ],
)  # fmt: skip
def test_a_syntax_error_is_reported_with_its_line(write: Write, text: str, reason: str) -> None:
    path = write(text)
    messages = problems(path)

    assert messages[0] == f"{path}: {reason}"
    assert "confidential" not in "\n".join(messages)


def test_an_unknown_name_gets_a_suggestion(write: Write) -> None:
    assert problems(write("pubic_url: x")) == ["pubic_url: is not a setting; did you mean public_url?"]


def test_an_option_of_pydantic_settings_is_not_a_setting(write: Write) -> None:
    assert problems(write("_env_file: /etc/passwd"))[0].startswith("_env_file: is not a setting;")


# ---------------------------------------------------------------------------------------------- single values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("public_url: 12", "public_url: must be text; put it in quotes"),
        ("public_url: ftp://x", "public_url: must look like https://relay.example.com: the scheme must be https or http, not ftp"),  # noqa: E501
        ("public_url: https://u:p@x.example", "public_url: must not contain a user name or password"),
        ("data_dir: ''", "data_dir: must not be empty"),
        ("storage_url: ' '", "storage_url: must not be empty"),
        ("storage_url: http://x", "storage_url: must be a path, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"),
        ("storage_url: s3://", "storage_url: must be a path, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"),
        ("recording_links: both", "recording_links: must be 'relay' or 'presigned'"),
        ("api: {port: 70000}", "api.port: must be at most 65535 (port of the API; 0 picks a free one)"),
        ("api: {port: eighty}", "api.port: must be a whole number"),
        ("api: {port: 9090}", "api.port and internal.port are both 9090; give each its own"),
        ("api: {host: 'a b'}", "api.host: must be a host name or an IP address"),
        ("api: {tokens: [short]}", "api.tokens[0]: must have at least 16 characters, without spaces"),
        ("api: {tokens: one}", "api.tokens: must be a list; in a variable, a JSON list"),
        ("log: {level: loud}", "log.level: must be 'debug', 'info', 'warning' or 'error'"),
        ("log: info", "log: must be a map of names to values; in a variable, a JSON object"),
        ("delivery: {allowed_networks: [office]}", "delivery.allowed_networks[0]: must be an address or a network such as 10.0.0.0/8 or fd00::/8"),  # noqa: E501
        ("delivery: {allowed_networks: [10.0.0.1/8]}", "delivery.allowed_networks[0]: has bits beyond its prefix; did you mean 10.0.0.0/8?"),  # noqa: E501
        ("delivery: {timeout_s: 0}", "delivery.timeout_s: must be at least 1 (timeout of one delivery attempt, in seconds)"),  # noqa: E501
        ("delivery: {timeout_s: .nan}", "delivery.timeout_s: must be at most 120 (timeout of one delivery attempt, in seconds)"),  # noqa: E501
        ("delivery: {timeout_s: soon}", "delivery.timeout_s: must be a number"),
        ("poll: {tiers: []}", "poll.tiers: must not be empty; leave it out for the default"),
        ("poll: {tiers: [{every_s: 0}]}", "poll.tiers[0].depth_s: is missing (how far back to look, in seconds; at most 96 hours)"),  # noqa: E501
        ("poll: {tiers: [{every_s: 5, depth_s: 3600}]}", "poll: the first tier must have every_s: 0, so that every poll uses it"),  # noqa: E501
        ("poll: {tiers: [{every_s: 0, depth_s: 3600}, {every_s: 5, depth_s: 3600}]}", "poll: each tier must have a larger every_s and a larger depth_s than the one before"),  # noqa: E501
        ("poll: {tiers: [{every_s: 0, depth_s: 360000}]}", "poll.tiers[0].depth_s: must be at most 345600 (how far back to look, in seconds; at most 96 hours)"),  # noqa: E501
        ("poll: {tires: []}", "poll.tires: is not recognized; did you mean tiers?"),
        ("poll: {tiers: [{every_s: 0, depth_s: 3600, depth: 1}]}", "poll.tiers[0].depth: is not recognized; did you mean depth_s?"),  # noqa: E501
        ("retention: {events_days: 9}", "retention.events_days: must be at least 10 (days an event can be listed and replayed)"),  # noqa: E501
        ("retention: {calls_days: 10, recordings_days: 9}", "retention: events_days (14) must not be more than calls_days (10)"),  # noqa: E501
        ("retention: {recordings_days: 31}", "retention: recordings_days (31) must not be more than calls_days (30)"),
        ("retention: {calls_days: 1.5}", "retention.calls_days: must be a whole number"),
        ("redis_url: http://x", "redis_url: must be redis://host:6379/0, rediss://… or unix://…"),
        ("secret_key: short", "secret_key[0]: is too short; a secret key needs at least 32 characters"),
        ("sources: [a]", "sources: must be a map of names to values; in a variable, a JSON object"),
        ("sources: {a: b}", "sources.a: must be a map of names to values; in a variable, a JSON object"),
        ("sources: {Main: {provider: webfones, api_key: k}}", "sources.Main: is not a valid id; use 1 to 63 lower-case letters, digits, - and _, starting with a letter or a digit"),  # noqa: E501
        ("sources: {a: {api_key: k}}", "sources.a.provider: is missing; providers are " + ", ".join(sorted(PROVIDERS))),
        ("sources: {a: {provider: webfone}}", "sources.a.provider: 'webfone' is not a provider; did you mean webfones?"),  # noqa: E501
        ("sources: {a: {provider: [x]}}", "sources.a.provider: '['x']' is not a provider; expected one of " + ", ".join(sorted(PROVIDERS))),  # noqa: E501
        ("sources: {a: {provider: webfones, api_key: k, poll_interval: 3}}", "sources.a.poll_interval: is not recognized; did you mean poll_interval_s?"),  # noqa: E501
        ("sources: {a: {provider: webfones, api_key: k, region: us}}", "sources.a.region: is not valid (country whose dialling rules national numbers follow: two capital letters, such as US)"),  # noqa: E501
        ("sources: {a: {provider: webfones, api_key: k, timezone: Mars/X}}", "sources.a.timezone: 'Mars/X' is not a valid time zone; use a name such as UTC or America/New_York"),  # noqa: E501
        ("sources: {a: {provider: webfones, api_key: k, recordings: perhaps}}", "sources.a.recordings: must be true or false"),  # noqa: E501
        ("sources: {a: {provider: webfones, api_key: 12345}}", "sources.a.api_key: must be text; put it in quotes"),
        ("sources: {a: {provider: webfones, api_key: k, api_key_file: f}}", "sources.a: has both api_key and api_key_file; keep one of them"),  # noqa: E501
    ],
)  # fmt: skip
def test_an_invalid_value_is_reported_with_its_name(write: Write, text: str, message: str) -> None:
    assert problems(write(text)) == [message]


def test_every_problem_is_reported_at_once(write: Write) -> None:
    """One start lists everything, so that settings are not fixed one restart at a time."""
    messages = problems(
        write(
            "pubic_url: x\n"
            "log: {level: loud}\n"
            "log: {}\n"
            "sources:\n  main: {provider: webfones, api_key: k-1, poll_interval_s: 0}\n"
            "  other: {provider: nobody}\n"
            f"subscriptions:\n  crm: {{url: 'ftp://x', secret: {WHSEC}, sources: [mian]}}\n"
            f"  n8n: {{url: 'https://x.example', secret: {WHSEC}, sources: [mian]}}\n"
        ),
        {"RELAY_NONSENSE_NAME": "1", "RELAY_API__PORT": "x"},
    )

    assert [line.split(": ")[0] for line in messages[1:]] == [
        "RELAY_NONSENSE_NAME",
        "pubic_url",
        "api.port",
        "sources.main.poll_interval_s",
        "sources.other.provider",
        "subscriptions.crm.url",
        "subscriptions.crm.sources",
        "subscriptions.n8n.sources",
    ]
    assert messages[-1] == "subscriptions.n8n.sources: 'mian' is not a source; did you mean main?"
    assert "'log' is a duplicate key" in messages[0]


# ---------------------------------------------------------------------------------------------- subscriptions


def test_a_missing_secret_is_reported_with_a_new_one(write: Write) -> None:
    text = "subscriptions:\n  crm: {url: https://example.test/hook}\n"
    messages = problems(write(text))
    fresh = messages[0].split("is missing; use this new one: ")[1]

    assert messages[0].startswith("subscriptions.crm.secret: ")
    assert load(write(text.replace("}", f", secret: {fresh}}}")), {}).subscriptions["crm"].enabled
    assert problems(write(text)) != messages


def test_a_missing_url_is_reported(write: Write) -> None:
    assert problems(write(f"subscriptions: {{crm: {{secret: {WHSEC}}}}}")) == [
        "subscriptions.crm.url: is missing (URL that events are posted to; or url_file)"
    ]


BAD_PORT = "the port must be a number from 1 to 65535"
BAD_CHARACTERS = "a URL must not contain spaces, line breaks, backslashes or control characters"
BAD_SHAPE = "a URL must look like https://host/path"
BAD_SCHEME = "the scheme must be https or http, not "


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", BAD_SHAPE),
        ("example.test/hook", BAD_SHAPE),
        ("ftp://example.test/confidential", BAD_SCHEME + "ftp"),
        ("file:///confidential", BAD_SCHEME + "file"),
        ("https://", "the URL has no host"),
        ("https:///confidential", "the URL has no host"),
        ("https://user:confidential@", "the URL has no host"),
        ("https://..example.test", "the host is not a valid domain name"),
        ("https://example.test/hook#confidential", "a URL must not have a fragment (#…); fragments are never sent"),
        ("https://example.test/a confidential", BAD_CHARACTERS),
        ("https://example.test/\r\nconfidential: x", BAD_CHARACTERS),
        ("https://example.test\\confidential", BAD_CHARACTERS),
        ("https://example.test/\x00confidential", BAD_CHARACTERS),
        ("https://example.test:0/confidential", BAD_PORT),
        ("https://example.test:65536/confidential", BAD_PORT),
        ("https://example.test:-1/confidential", BAD_PORT),
        ("https://example.test:port/confidential", BAD_PORT),
        ("https://[::1/confidential", "an IPv6 address must be in brackets: https://[2001:db8::1]:8443/path"),
        ("https://[nonsense]/confidential", "[nonsense] is not a valid IPv6 address"),
        ("https://[fe80::1%25eth0]/confidential", "an IPv6 address in a URL must not have a zone (%…)"),
        ("https://exam%70le.test/confidential", "the host must not be percent-encoded"),
        ("https://" + "a" * 70 + "ü.test/confidential", "the host is not a valid international domain name"),
        ("https://example.test/" + "c" * 2048, "a URL must have at most 2048 characters; this one has 2069"),
    ],
)
def test_an_invalid_url_is_rejected_without_being_repeated(write: Write, url: str, message: str) -> None:
    assert subscription_problems(write, url=url) == [f"subscriptions.crm.url: {message}"]


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.test/a/b?c=d",
        "http://127.0.0.1:3000/hook",
        "https://[2001:db8::1]:8443/hook",
        "https://user:word@example.test/hook",
        "HTTPS://EXAMPLE.test",
        "https://bücher.example/hook",
        "https://example.test:65535",
        "https://example.test:/hook",
        "https://example。test/hook",
    ],
)
def test_a_valid_url_is_kept_unchanged(url: str) -> None:
    assert SubscriptionOptions.model_validate({"url": url, "secret": WHSEC}).url.get_secret_value() == url


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        ("confidential", "it does not begin with whsec_"),
        ("whsec_confidential!", "what follows is not base64 (A–Z a–z 0–9 + / and = at the end)"),
        ("whsec_" + "A" * 28, "it has 21"),
        ("whsec_" + "A" * 88, "it has 66"),
        ("whsec_é", "what follows is not base64 (A–Z a–z 0–9 + / and = at the end)"),
    ],
)
def test_a_malformed_secret_is_rejected(write: Write, secret: str, message: str) -> None:
    expected = "must be whsec_ followed by the standard base64 of 24 to 64 bytes"
    assert subscription_problems(write, secret=secret) == [f"subscriptions.crm.secret: {expected}; {message}"]


EVENTS = ", ".join(EVENT_TYPES)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("events", ["call.complete"], f"events[0]: 'call.complete' matches no event type; they are {EVENTS}; * is a wildcard"),  # noqa: E501
        ("events", ["sms.*"], f"events[0]: 'sms.*' matches no event type; they are {EVENTS}; * is a wildcard"),
        ("events", [], "events: must not be empty; leave it out for the default"),
        ("sources", [], "sources: must not be empty; leave it out for the default"),
        ("sources", ["main"], "sources: 'main' is not a source; no source is configured"),
        ("direction", ["incoming"], "direction[0]: must be 'inbound', 'outbound', 'internal' or 'unknown'"),
        ("outcome", "missed", "outcome[0]: must be 'answered', 'no_answer', 'busy', 'declined', 'cancelled', 'abandoned', 'voicemail', 'failed' or 'unknown'"),  # noqa: E501
        ("extensions", [""], "extensions[0]: must have at least 1 characters"),
        ("extensions", [True], "extensions[0]: must be text; put it in quotes"),
        ("min_duration_s", -1, "min_duration_s: must be at least 0 (only calls that lasted at least this long, in seconds)"),  # noqa: E501
        ("payload", "raw", "payload: must be full, flat, or {map: {field: JMESPath}}"),
        ("payload", {"map": {}}, "payload.map: must have 1 to 200 fields"),
        ("payload", {"map": {str(n): "id" for n in range(201)}}, "payload.map: must have 1 to 200 fields"),
        ("payload", {"map": {"id": " "}}, "payload.map: has an expression for 'id' that is empty or longer than 1000 characters"),  # noqa: E501
        ("payload", {"map": {"id": "a" * 1001}}, "payload.map: has an expression for 'id' that is empty or longer than 1000 characters"),  # noqa: E501
        ("payload", {"map": {"": "id"}}, "payload.map: has a field name that is empty or longer than 200 characters"),
        ("payload", {"fields": {"id": "id"}}, "payload.map: is missing (output field: JMESPath expression over the event)"),  # noqa: E501
        ("headers", {"webhook-id": "x"}, "headers: must not set webhook-id; the relay sets this header itself"),
        ("headers", {"Host": "x"}, "headers: must not set Host; the relay sets this header itself"),
        ("headers", {"User-Agent": "x"}, "headers: must not set User-Agent; the relay sets this header itself"),
        ("headers", {"a b": "x"}, "headers: has an invalid header name; use letters, digits and -"),
        ("headers", {"x-a\r\nb": "x"}, "headers: has an invalid header name; use letters, digits and -"),
        ("headers", {"x-a": "v\r\nx: confidential"}, "headers: has an invalid value for x-a; use one line of ASCII characters, at most 4 kB"),  # noqa: E501
        ("headers", {"x-a": "confidentiäl"}, "headers: has an invalid value for x-a; use one line of ASCII characters, at most 4 kB"),  # noqa: E501
        ("headers", {"x-a": "1", "X-A": "2"}, "headers: sets X-A twice"),
        ("headers", {f"x-{n}": "1" for n in range(33)}, "headers: must have at most 32 headers"),
        ("max_in_flight", 0, "max_in_flight: must be at least 1 (maximum number of concurrent requests)"),
        ("rate_per_s", 0, "rate_per_s: must be more than 0 (maximum requests per second; default: no limit)"),
        ("delivery", "exactly_once", "delivery: must be 'at_least_once' or 'at_most_once'"),
        ("description", "x" * 501, "description: must have at most 500 characters"),
        ("enabled", "maybe", "enabled: must be true or false"),
        ("evnts", ["call.*"], "evnts: is not recognized; did you mean events?"),
        ("url_fil", "x", "url_fil: is not recognized; did you mean url_file?"),
    ],
)  # fmt: skip
def test_an_invalid_subscription_option_is_reported(write: Write, name: str, value: object, message: str) -> None:
    messages = subscription_problems(write, **{name: value})

    assert message in [line.removeprefix("subscriptions.crm.") for line in messages]
    assert "confidential" not in "\n".join(messages)


def test_url_credentials_and_an_authorization_header_are_mutually_exclusive(write: Write) -> None:
    messages = subscription_problems(write, url="https://u:p@example.test", headers={"Authorization": "Bearer x"})

    assert messages == ["subscriptions.crm: has credentials in its url and an authorization header; keep one of them"]


def test_the_api_reports_the_same_messages() -> None:
    """`url_file` is not an option of the API, so a caller cannot read files of the relay."""
    with pytest.raises(ValidationError) as caught:
        SubscriptionOptions.model_validate({"url_file": "/etc/passwd", "secret": WHSEC, "events": ["sms"]})

    messages = error_messages(caught.value, SubscriptionOptions)
    assert messages[0] == "url: is missing (URL that events are posted to; or url_file)"
    assert messages[1] == f"events[0]: 'sms' matches no event type; they are {EVENTS}; * is a wildcard"
    assert messages[2].startswith("url_file: is not recognized; expected one of delivery, description,")


@pytest.mark.parametrize(
    ("patterns", "event_type", "matched"),
    [
        (["call.*"], "call.completed", True),
        (["call.*"], "call.recording.failed", True),
        (["call.*"], "source.error", False),
        (["*.completed"], "call.transcript.completed", True),
        (["*"], "subscription.disabled", True),
        (["call.completed"], "call.completed", True),
        (["callXcompleted"], "call.completed", False),
        (["call.complete"], "call.completed", False),
        ([], "call.completed", False),
    ],
)
def test_a_wildcard_matches_any_characters_and_a_dot_only_itself(
    patterns: list[str], event_type: str, matched: bool
) -> None:
    assert matches(patterns, event_type) is matched


# ---------------------------------------------------------------------------------------------- secret files


def test_secrets_come_from_files_beside_the_configuration(write: Write, tmp_path: Path) -> None:
    """Mounted secrets end in a line break; a source keeps the path, because it re-reads its key."""
    (tmp_path / "url").write_text("https://example.test/hook\n")
    (tmp_path / "secret").write_text(f"  {WHSEC}\r\n")
    (tmp_path / "key").write_text("abc-123-def\n")
    settings = load(
        write(
            "sources: {main: {provider: webfones, api_key_file: key}}\n"
            "subscriptions: {crm: {url_file: ./url, secret_file: secret}}\n"
        ),
        {},
    )

    assert settings.subscriptions["crm"].url.get_secret_value() == "https://example.test/hook"
    assert settings.subscriptions["crm"].secret.get_secret_value() == WHSEC
    assert reveal(settings.sources["main"])["api_key_file"] == str(tmp_path / "key")


def test_an_unusable_secret_file_is_reported(write: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "large").write_text("x" * 70_000)
    (tmp_path / "folder").mkdir()
    messages = problems(
        write(
            "sources:\n"
            "  a: {provider: webfones, api_key_file: absent}\n"
            "  b: {provider: webfones, api_key_file: empty}\n"
            "subscriptions:\n"
            "  c: {url_file: bytes, secret_file: large}\n"
            "  d: {url_file: folder, secret_file: 3}\n"
            f"  e: {{url: 'https://x.example', url_file: bytes, secret: {WHSEC}}}\n"
        )
    )

    assert messages == [
        f"sources.a.api_key_file: {tmp_path}/absent: file not found",
        f"sources.b.api_key_file: {tmp_path}/empty: is empty",
        f"subscriptions.c.url_file: {tmp_path}/bytes: cannot be read: it is not UTF-8 text",
        f"subscriptions.c.secret_file: {tmp_path}/large: is too large for a secret",
        f"subscriptions.d.url_file: {tmp_path}/folder: cannot be read: Is a directory",
        "subscriptions.d.secret_file: must be the path of a file",
        "subscriptions.e: has both url and url_file; keep one of them",
    ]


# ------------------------------------------------------------------------------------------------- no secrets


class LeakyOptions(SourceOptions):
    """A provider whose own errors repeat their input, and whose credentials are nested."""

    model_config = ConfigDict(hide_input_in_errors=True)

    provider: Literal["leaky"] = "leaky"
    token: SecretStr | None = None
    oauth: dict[str, SecretStr] | None = None

    def model_post_init(self, _: object) -> None:
        if self.token is not None and self.token.get_secret_value().startswith("!"):
            raise ValueError(f"cannot use {self.token.get_secret_value()}")


LEAKY = {**PROVIDERS, "leaky": replace(PROVIDERS["webfones"], name="leaky", options=LeakyOptions)}


def settings_model(providers: Mapping[str, ProviderKind]) -> type[Settings]:
    """Build settings that know other providers."""
    field = Settings.model_fields["sources"]
    return create_model("OtherSettings", __base__=Settings, sources=(Mapping[str, any_source(providers)], field))  # type: ignore[misc]


secret_texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=30).map(
    lambda text: f"{text}K0nf1d3nt1al"
)


@hypothesis_settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), breaks=st.booleans())
def test_a_secret_is_never_repeated(data: st.DataObject, breaks: bool, tmp_path: Path) -> None:
    """Whatever is in the place of a secret, and whatever else is wrong, no error shows it."""
    secret = data.draw(secret_texts)
    wrapped = data.draw(st.sampled_from([secret, f"https://example.test/{secret}", f"!{secret}", f"redis://{secret}"]))
    tree = {
        "api": {"tokens": [wrapped]},
        "redis_url": wrapped,
        "secret_key": [wrapped],
        "sources": {
            "a": {"provider": "webfones", "api_key": wrapped, "proxy_url": wrapped, "base_url": wrapped},
            "b": {"provider": "leaky", "token": wrapped},
            "c": {"provider": "leaky", "oauth": {"client_secret": wrapped}, "api_key": wrapped},
        },
        "subscriptions": {
            "a": {"url": wrapped, "secret": WHSEC, "headers": {"x-a": wrapped}},
            "b": {"url": "https://example.test", "secret": wrapped},
        },
    }
    if breaks:
        tree["log"] = {"level": "loud"}
    environ = {f"RELAY_SUBSCRIPTIONS__{data.draw(st.sampled_from('AB'))}__SECRET": wrapped.replace("\x00", "")}
    path = tmp_path / "relay.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")

    with pytest.raises(SettingsError) as caught:
        load(path, environ, model=settings_model(LEAKY))

    assert "K0nf1d3nt1al" not in str(caught.value)
    assert "K0nf1d3nt1al" not in repr(caught.value)


@pytest.mark.parametrize("bare", ["api_key: {}", "api_key: *{}", "api_key: !{} x", "api_key: '{}", "{} x", "&{} &{} x"])
def test_a_syntax_error_inside_a_secret_does_not_repeat_it(write: Write, bare: str) -> None:
    """PyYAML's own messages quote the text around an error."""
    text = "sources:\n  main:\n    " + bare.replace("{}", "K0nf1d3nt1al") + "\n    provider: webfones\n  : ]\n"

    assert "K0nf1d3nt1al" not in "\n".join(problems(write(text)))


@given(secret=st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=32, max_size=40))
def test_valid_settings_do_not_show_their_secrets(secret: str) -> None:
    """A repr may end up in a traceback."""
    whsec = "whsec_" + base64.b64encode(secret[:32].encode()).decode()
    environ = {
        "RELAY_API__TOKENS": json.dumps([secret]),
        "RELAY_REDIS_URL": f"redis://:{secret}@redis",
        "RELAY_SECRET_KEY": secret,
        "RELAY_SOURCES__A__PROVIDER": "webfones",
        "RELAY_SOURCES__A__API_KEY": secret,
        "RELAY_SOURCES__A__PROXY_URL": f"http://u:{secret}@proxy",
        "RELAY_SUBSCRIPTIONS__A__URL": f"https://example.test/{secret}",
        "RELAY_SUBSCRIPTIONS__A__SECRET": whsec,
        "RELAY_SUBSCRIPTIONS__A__HEADERS": json.dumps({"x-a": secret}),
    }
    settings = load(None, environ)

    for shown in (repr(settings), str(settings)):
        assert secret not in shown
        assert whsec not in shown


# --------------------------------------------------------------------------------------------- what uses them


def test_options_survive_being_stored(write: Write) -> None:
    """`reveal` returns JSON types, and validating them gives the same options."""
    settings = load(write(FULL), {})
    crm, main = settings.subscriptions["crm"], settings.sources["main"]

    assert SubscriptionOptions.model_validate(json.loads(json.dumps(reveal(crm)))) == crm
    assert type(main).model_validate(json.loads(json.dumps(reveal(main)))) == main


def test_masked_options_can_be_shown(write: Write) -> None:
    """pydantic's own dump masks secrets and can read the read-only maps."""
    dumped = load(write(FULL), {}).model_dump(mode="json")

    assert dumped["subscriptions"]["crm"]["headers"] == {"x-key": "**********"}
    assert dumped["subscriptions"]["crm"]["secret"] == "**********"


def test_a_reload_lists_the_settings_that_need_a_restart(write: Write) -> None:
    """SIGHUP applies sources and subscriptions; other changes are listed."""
    old = load(write(MINIMAL), {})
    new = load(
        write(MINIMAL), {"RELAY_API__PORT": "8181", "RELAY_SOURCES__MAIN__REGION": "GB", "RELAY_REDIS_URL": "redis://x"}
    )

    assert changed_outside_maps(old, new) == ["api.port", "redis_url"]
    assert changed_outside_maps(old, old) == []


def test_every_setting_is_described() -> None:
    """Documents are tested against this list: every setting has a description, and none is listed twice."""
    docs = script("settings_reference").describe()
    by_path = {doc.path: doc for doc in docs}

    assert all(doc.description and doc.type for doc in docs), [doc for doc in docs if not doc.description]
    assert len({(doc.path, doc.provider) for doc in docs}) == len(docs)
    assert by_path["api.port"].default == "8080"
    assert by_path["storage_url"].default == '"relay-data/recordings"'
    assert by_path["poll.tiers[].every_s"].default is None
    assert by_path["log.level"].type == "debug | info | warning | error"
    assert by_path["sources.<id>.poll_interval_s"].provider is None
    assert by_path["sources.<id>.api_key"].provider == "webfones"
    assert by_path["subscriptions.<id>.url"].type == "secret"
    assert by_path["subscriptions.<id>.payload"].type == "full | flat or map"
    assert by_path["subscriptions.<id>.secret_file"].default == "null"
    assert by_path["subscriptions.<id>.direction"].type == "list of inbound | outbound | internal | unknown"


def test_a_provider_with_nested_options_is_read_and_described(write: Write, tmp_path: Path) -> None:
    """A nested credential works from variables and files, and its options are in the list."""

    class OAuth(BaseModel):
        client_id: str = Field(description="id of the client")
        client_secret_file: Path = Field(description="secret of the client")

    class NestedOptions(SourceOptions):
        provider: Literal["nested"] = Field("nested", description="the kind of phone system")
        oauth: OAuth = Field(description="how to get a token")

    nested: dict[str, ProviderKind] = {"nested": replace(PROVIDERS["webfones"], name="nested", options=NestedOptions)}
    (tmp_path / "word").write_text("word")
    path = write("sources: {a: {provider: nested, oauth: {client_secret_file: word}}}")
    settings = load(path, {"RELAY_SOURCES__A__OAUTH__CLIENT_ID": "me"}, model=settings_model(nested))

    assert reveal(settings.sources["a"])["oauth"] == {"client_id": "me", "client_secret_file": str(tmp_path / "word")}
    docs = script("settings_reference").describe(nested)
    assert "sources.<id>.oauth.client_id" in {doc.path for doc in docs}


@pytest.mark.parametrize(
    ("text", "mode", "exposed"),
    [
        ("sources: {main: {api_key: of-the-account}}", 0o644, True),
        ("subscriptions: {crm: {url: https://hooks.example.com/secret-path}}", 0o640, True),
        ("api:\n  tokens:\n    - of-the-operator", 0o604, True),
        ("sources: {main: {api_key: of-the-account}}", 0o600, False),
        ("sources: {main: {api_key_file: /run/secrets/key}}\npublic_url: https://relay.example.com", 0o644, False),
    ],
)
def test_a_file_with_secrets_that_others_may_read_is_noticed(
    tmp_path: Path, text: str, mode: int, exposed: bool
) -> None:
    path = tmp_path / "relay.yaml"
    path.write_text(text)
    path.chmod(mode)

    assert exposes_secrets(path) is exposed

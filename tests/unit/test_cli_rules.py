"""What the command line decides without a relay."""

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as examples
from hypothesis import strategies as st

from relay.cli import arguments
from relay.cli.client import path_of
from relay.cli.csv_import import FileFormat, entries
from relay.cli.init import InitAnswers, page
from relay.cli.listen import parse_forward_url
from relay.cli.main import COMMANDS
from relay.cli.output import Column, Output, flattened, local_time, plain
from relay.cli.target import ApiTarget, LocalRelay, check_relay_url, find_target, read_local_relay
from relay.errors import SettingsError
from relay.settings import load
from tests.flow.harness import SECRET

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


# --- which relay -----------------------------------------------------------------------------------------------------


def test_a_generated_token_is_sent_only_to_the_relay_that_generated_it(tmp_path: Path) -> None:
    """The token in data_dir is used for the local address; any other address needs its own."""
    (tmp_path / "api_token").write_text("relay_own\n")
    environ = {"RELAY_DATA_DIR": str(tmp_path), "RELAY_API__HOST": "0.0.0.0", "RELAY_API__PORT": "8099"}

    assert find_target(None, None, None, environ) == ApiTarget("http://127.0.0.1:8099", "relay_own")
    assert find_target(None, "given", None, environ) == ApiTarget("http://127.0.0.1:8099", "given")
    with pytest.raises(SettingsError, match="no token for this address"):
        find_target("https://elsewhere.example.com", None, None, environ)


def test_a_configured_token_takes_precedence_over_a_generated_one(tmp_path: Path) -> None:
    """The first of api.tokens is used; an IPv6 address gets its brackets."""
    (tmp_path / "api_token").write_text("relay_own\n")
    environ = {
        "RELAY_DATA_DIR": str(tmp_path),
        "RELAY_API__HOST": "::",
        "RELAY_API__TOKENS": '["configured-token-1","configured-token-2"]',
    }

    assert find_target(None, None, None, environ) == ApiTarget("http://[::1]:8080", "configured-token-1")
    with pytest.raises(SettingsError, match="--url"):
        find_target(None, None, None, environ | {"RELAY_API__PORT": "0"})


@pytest.mark.parametrize(
    ("file", "environ"),
    [
        ("", {}),
        ("api: {host: '::', port: 8443, tokens: [a-token-in-the-file]}\ndata_dir: here\nlog: {level: debug}", {}),
        ("api: {port: 1}", {"RELAY_API__PORT": "2", "relay_internal__port": "3", "RELAY_DATA_DIR": "~/x"}),
        ("", {"RELAY_API__TOKENS": '["a-token-in-a-variable"]', "RELAY_API__HOST": "0.0.0.0"}),
        ("api: {port: 1}", {"RELAY_API": '{"port": 4}', "RELAY_INTERNAL__PORT": ""}),
        ("api: null\ndata_dir: null", {}),
    ],
)
def test_a_client_reads_the_same_address_as_the_relay(file: str, environ: dict[str, str], tmp_path: Path) -> None:
    """The quick reading of a few settings agrees with the complete one, defaults included."""
    config = tmp_path / "relay.yaml"
    config.write_text(file)
    settings = load(config, environ)

    assert read_local_relay(config, environ) == LocalRelay(
        api_host=settings.api.host,
        api_port=settings.api.port,
        internal_host=settings.internal.host,
        internal_port=settings.internal.port,
        data_dir=settings.data_dir,
        tokens=tuple(token.get_secret_value() for token in settings.api.tokens),
    )


@pytest.mark.parametrize(
    "text", ["api: {port: soon}", "api: [1]", "data_dir: ''", "api: {port: 1", "api: {tokens: [7]}"]
)
def test_an_invalid_setting_is_reported_by_the_complete_reading(text: str, tmp_path: Path) -> None:
    """A client stops with the same message as the relay."""
    config = tmp_path / "relay.yaml"
    config.write_text(text)
    with pytest.raises(SettingsError) as expected:
        load(config, {})

    with pytest.raises(SettingsError) as raised:
        read_local_relay(config, {})

    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "tökén"])
def test_an_invalid_token_is_rejected_without_repeating_it(token: str) -> None:
    """Header injection included."""
    with pytest.raises(SettingsError, match="one word") as caught:
        find_target("https://relay.example.com", token, None, {})

    assert not token or token not in str(caught.value)


def test_addresses_of_relays_are_checked() -> None:
    """A path before /v1 is kept, an invalid address is rejected."""
    assert check_relay_url("https://example.com/relay/v1/") == "https://example.com/relay"
    assert check_relay_url("http://[::1]:8080/") == "http://[::1]:8080"
    for wrong in (
        "example.com",
        "ftp://example.com",
        "https://",
        "https://a:b@example.com",
        "http://x:99999",
        "http://x/?a",
    ):
        with pytest.raises(SettingsError):
            check_relay_url(wrong)
    assert str(parse_forward_url("localhost:3000/hook").url) == "http://localhost:3000/hook"


def test_an_id_is_exactly_one_segment_of_a_path() -> None:
    """Nothing that is typed leads to another path."""
    assert path_of("sources", "a/b?c#d e") == "/v1/sources/a%2Fb%3Fc%23d%20e"
    for wrong in ("", ".", ".."):
        with pytest.raises(SettingsError):
            path_of("sources", wrong)


# --- options ---------------------------------------------------------------------------------------------------


def test_values_are_text_unless_they_begin_like_json(tmp_path: Path) -> None:
    """The relay converts text to the type of the option, so leading zeros are kept."""
    file = tmp_path / "secret"
    file.write_text("\ufeffwhsec_x\n", encoding="utf-8")
    settings = ["a=0123", "b=null", 'c=["x", 1]', 'd="@literal"', f"e=@{file}", "f=x=y", "g.h=1", "g.i=2", "j="]

    assert arguments.options(settings, None) == {
        "a": "0123",
        "b": None,
        "c": ["x", 1],
        "d": "@literal",
        "e": "whsec_x",
        "f": "x=y",
        "g": {"h": "1", "i": "2"},
        "j": "",
    }
    for wrong in ("no-equals", "=x", "a={", "a.b=1"):
        with pytest.raises(SettingsError):
            arguments.options(["a=1", wrong] if wrong == "a.b=1" else [wrong], None)


def test_set_overrides_the_options_of_a_file(tmp_path: Path) -> None:
    """YAML is read as strictly as relay.yaml: a duplicate key is reported with its line."""
    file = tmp_path / "options.yaml"
    file.write_text("api_key: 0101\npoll_interval_s: 30\n")

    assert arguments.options(["poll_interval_s=60"], str(file)) == {"api_key": "0101", "poll_interval_s": "60"}
    for text, why in (("a: 1\na: 2\n", "line 2"), ("- a\n", "must be a map"), ("a: [", "not valid YAML")):
        file.write_text(text)
        with pytest.raises(SettingsError, match=why):
            arguments.options(None, str(file))


def test_tables_are_read_as_spreadsheets_export_them() -> None:
    """Commas, semicolons or tabs; empty cells and lines are left out; dots go into maps."""
    for mark in ",;\t":
        text = f"id{mark}provider{mark}oauth.client_id\r\n\r\na{mark}nfon{mark}007\r\nb{mark}{mark}\r\n"

        first, second = entries(text, FileFormat.CSV, name="x.csv", provider="webfones")

        assert (first.where, first.id, first.options) == (
            "line 3",
            "a",
            {"provider": "nfon", "oauth": {"client_id": "007"}},
        )
        assert (second.id, second.options, second.problem) == ("b", {"provider": "webfones"}, "")
    with pytest.raises(SettingsError, match="different name"):
        entries("id,a,a\n1,2,3\n", FileFormat.CSV, name="x.csv", provider=None)


@examples(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_any_json_is_entries_or_a_clear_error(document: Any) -> None:
    """Whatever a file contains, each entry is valid or has a problem."""
    try:
        found = entries(json.dumps(document), FileFormat.JSON, name="x.json", provider=None)
    except SettingsError:
        return

    for entry in found:
        assert entry.problem or (entry.id and isinstance(entry.options, dict))


# --- output -------------------------------------------------------------------------------------------------


def test_untrusted_text_cannot_control_the_terminal() -> None:
    """Escape sequences, line tricks and right-to-left marks."""
    assert plain("a\x1b[31mb\u202ec\x9b") == "a\ufffd[31mb\ufffdc\ufffd"
    assert [plain(each) for each in (None, True, ["a", 1], {"k": "v"})] == ["", "yes", "a, 1", '{"k": "v"}']


@pytest.mark.parametrize(
    ("zone", "text"),
    [
        ("UTC", "2026-11-20 12:00:03 UTC"),
        ("Europe/Berlin", "2026-11-20 13:00:03 CET"),
        ("America/New_York", "2026-11-20 07:00:03 EST"),
    ],
)
def test_times_are_local_and_name_their_zone(zone: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zone is that of the terminal, and of the date: winter here."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()

    try:
        assert local_time("2026-11-20T12:00:03.250Z") == text
        assert local_time(None) == ""
    finally:
        monkeypatch.undo()
        time.tzset()


def test_details_leave_out_empty_values() -> None:
    """Zero and false are shown."""
    document = {"a": None, "b": "", "c": [], "d": {"e": 0, "f": False, "g": {}}, "h": [{"i": 1}, {"i": 2}], "j": [1]}

    assert flattened(document) == [("d.e", 0), ("d.f", False), ("h.0.i", 1), ("h.1.i", 2), ("j", [1])]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_table_is_whole_on_any_terminal(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A narrow one gets a block of lines per row; markup is text; an empty column is left out."""
    from rich.console import Console

    out = Output(as_json=False)
    out.console = Console(width=width, markup=False, highlight=False)
    columns = (Column("call", "id"), Column("nothing", "none"), Column("who", "name"), Column("why", "why"))
    rows = [{"id": "call_" + "a" * 26, "name": "[bold]Jo[/bold]", "why": "because"} for _ in range(2)]

    out.table({"items": rows}, columns, empty="none")
    text = capsys.readouterr().out

    assert text.count("call_" + "a" * 26) == 2
    assert text.count("[bold]Jo[/bold]") == 2
    assert "nothing" not in text


# --- init ------------------------------------------------------------------------------------------------------------


@examples(
    st.sampled_from(["webfones", "unpod"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30),
)
def test_what_init_writes_is_read_back_unchanged(provider: str, key: str) -> None:
    """Whatever characters a key has: quotes, colons, hashes, a leading 0."""
    name = "api_key" if provider == "webfones" else "token"
    options = {name: key} if provider == "webfones" else {"org_handle": "acme", name: key}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(page(InitAnswers(provider, "office", options, "crm", None, SECRET)))
        file.flush()
        source = load(Path(file.name), {}).sources["office"]

    assert getattr(source, name).get_secret_value() == key


# --- the commands ----------------------------------------------------------------------------------------------------


def test_every_client_command_has_the_same_options() -> None:
    """--json everywhere; the address and the token from the environment."""
    groups = {command.name: command.load() for command in COMMANDS}
    nouns = ("sources", "subscriptions", "calls", "events", "deliveries", "jobs", "tokens")
    commands = [command for noun in nouns for command in groups[noun].commands.values()]
    commands += [groups[name] for name in ("backfill", "explain", "tail", "listen", "replay", "erase")]

    for command in commands:
        options = {opt: parameter.envvar for parameter in command.params for opt in parameter.opts}
        assert {"--json", "--url", "--token", "--config"} <= set(options), command.name
        assert (options["--url"], options["--token"]) == ("RELAY_URL", "RELAY_TOKEN")
        assert command.help
    assert len(commands) > 35


def imported_by(*arguments: str) -> tuple[str, set[str]]:
    """Run a command in a process of its own; return what it wrote to stdout and the packages it imported."""
    program = (
        "import sys\nfrom relay.cli.main import main\n"
        f"try:\n    main({list(arguments)})\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write('\\n' + ' '.join(sys.modules))"
    )
    environ = {"RELAY_URL": "http://127.0.0.1:9", "RELAY_TOKEN": "t", "PATH": os.environ["PATH"]}
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30, env=environ
    )
    return ran.stdout, set(ran.stderr.splitlines()[-1].split())


SLOW = {"aiohttp", "redis", "arq", "uvloop", "asyncio", "cryptography", "phonenumbers", "obstore", "structlog"}
"""Each of them takes a good part of what a command may take: 0.4 s of processor time."""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("sources", "list"),
        ("subscriptions", "show", "crm"),
        ("backfill", "main", "--since", "2h"),
        ("explain", "1"),
        ("tail",),
        ("sources", "import", "none.csv"),
    ],
    ids=" ".join,
)
def test_a_client_command_imports_nothing_slow(arguments: tuple[str, ...]) -> None:
    """No server, no settings, no HTTP framework: a command answers at once."""
    _, modules = imported_by(*arguments)

    assert "relay.cli.main" in modules
    assert modules & (SLOW | {"relay.settings", "relay.providers"}) == set()


def test_help_imports_no_command() -> None:
    """`relay --help` and completion read names and help from the table."""
    help_text, modules = imported_by("--help")

    assert all(str(command.name) in help_text for command in COMMANDS)
    assert {name for name in modules if name.startswith("relay.")} == {"relay.cli", "relay.cli.main", "relay.errors"}

"""What the command line decides without asking anybody."""

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as examples
from hypothesis import strategies as st
from typer.main import get_command

from relay.cli import arguments
from relay.cli.client import Target, checked_url, find_target, path_of
from relay.cli.csv_import import Format, entries
from relay.cli.init import Answers, page
from relay.cli.listen import checked_forward
from relay.cli.main import app
from relay.cli.output import Column, Out, flattened, plain
from relay.errors import SettingsError
from relay.settings import load
from tests.flow.harness import SECRET

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


# --- which relay -----------------------------------------------------------------------------------------------------


def test_the_relays_own_token_goes_to_the_relay_of_the_configuration_only(tmp_path: Path) -> None:
    """A token in data_dir is taken for the local address; another address wants a token of its own."""
    (tmp_path / "api_token").write_text("relay_own\n")
    environ = {"RELAY_DATA_DIR": str(tmp_path), "RELAY_API__HOST": "0.0.0.0", "RELAY_API__PORT": "8099"}

    assert find_target(None, None, None, environ) == Target("http://127.0.0.1:8099", "relay_own")
    assert find_target(None, "given", None, environ) == Target("http://127.0.0.1:8099", "given")
    with pytest.raises(SettingsError, match="no token for this address"):
        find_target("https://elsewhere.example.com", None, None, environ)


def test_a_configured_token_goes_before_the_one_that_was_made(tmp_path: Path) -> None:
    """The first of api.tokens; an IPv6 address gets its brackets."""
    (tmp_path / "api_token").write_text("relay_own\n")
    environ = {
        "RELAY_DATA_DIR": str(tmp_path),
        "RELAY_API__HOST": "::",
        "RELAY_API__TOKENS": '["configured-token-1","configured-token-2"]',
    }

    assert find_target(None, None, None, environ) == Target("http://[::1]:8080", "configured-token-1")
    with pytest.raises(SettingsError, match="--url"):
        find_target(None, None, None, environ | {"RELAY_API__PORT": "0"})


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "tökén"])
def test_a_token_that_cannot_be_sent_is_refused_without_repeating_it(token: str) -> None:
    """Header injection included."""
    with pytest.raises(SettingsError, match="one word") as caught:
        find_target("https://relay.example.com", token, None, {})

    assert not token or token not in str(caught.value)


def test_addresses_of_relays() -> None:
    """A path before /v1 stays, what cannot be one is refused."""
    assert checked_url("https://example.com/relay/v1/") == "https://example.com/relay"
    assert checked_url("http://[::1]:8080/") == "http://[::1]:8080"
    for wrong in (
        "example.com",
        "ftp://example.com",
        "https://",
        "https://a:b@example.com",
        "http://x:99999",
        "http://x/?a",
    ):
        with pytest.raises(SettingsError):
            checked_url(wrong)
    assert checked_forward("localhost:3000/hook") == "http://localhost:3000/hook"


def test_an_id_is_one_part_of_a_path() -> None:
    """Nothing that is typed reaches another address."""
    assert path_of("sources", "a/b?c#d e") == "/v1/sources/a%2Fb%3Fc%23d%20e"
    for wrong in ("", ".", ".."):
        with pytest.raises(SettingsError):
            path_of("sources", wrong)


# --- what is given ---------------------------------------------------------------------------------------------------


def test_values_are_text_unless_they_begin_like_json(tmp_path: Path) -> None:
    """The relay makes of a text what the option is: leading zeros stay."""
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


def test_a_file_of_options_is_a_map_and_set_goes_before_it(tmp_path: Path) -> None:
    """YAML as relay.yaml is read: a key twice is told with its line."""
    file = tmp_path / "options.yaml"
    file.write_text("api_key: 0101\npoll_interval_s: 30\n")

    assert arguments.options(["poll_interval_s=60"], str(file)) == {"api_key": "0101", "poll_interval_s": "60"}
    for text, why in (("a: 1\na: 2\n", "line 2"), ("- a\n", "must be a map"), ("a: [", "not valid YAML")):
        file.write_text(text)
        with pytest.raises(SettingsError, match=why):
            arguments.options(None, str(file))


def test_tables_are_read_as_spreadsheets_write_them() -> None:
    """Commas, semicolons or tabs; empty cells and lines are left out; dots go into maps."""
    for mark in ",;\t":
        text = f"id{mark}provider{mark}oauth.client_id\r\n\r\na{mark}nfon{mark}007\r\nb{mark}{mark}\r\n"

        first, second = entries(text, Format.CSV, name="x.csv", provider="webfones")

        assert (first.where, first.id, first.options) == (
            "line 3",
            "a",
            {"provider": "nfon", "oauth": {"client_id": "007"}},
        )
        assert (second.id, second.options, second.problem) == ("b", {"provider": "webfones"}, "")
    with pytest.raises(SettingsError, match="name of its own"):
        entries("id,a,a\n1,2,3\n", Format.CSV, name="x.csv", provider=None)


@examples(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_any_json_is_entries_or_a_sentence(document: Any) -> None:
    """Whatever a file holds, each entry is usable or says why not."""
    try:
        found = entries(json.dumps(document), Format.JSON, name="x.json", provider=None)
    except SettingsError:
        return

    for entry in found:
        assert entry.problem or (entry.id and isinstance(entry.options, dict))


# --- what is written -------------------------------------------------------------------------------------------------


def test_what_a_stranger_wrote_cannot_command_the_terminal() -> None:
    """Escape sequences, line tricks and right-to-left marks."""
    assert plain("a\x1b[31mb\u202ec\x9b") == "a\ufffd[31mb\ufffdc\ufffd"
    assert [plain(each) for each in (None, True, ["a", 1], {"k": "v"})] == ["", "yes", "a, 1", '{"k": "v"}']


def test_details_leave_out_what_says_nothing() -> None:
    """A zero and a no are said."""
    document = {"a": None, "b": "", "c": [], "d": {"e": 0, "f": False, "g": {}}, "h": [{"i": 1}, {"i": 2}], "j": [1]}

    assert flattened(document) == [("d.e", 0), ("d.f", False), ("h.0.i", 1), ("h.1.i", 2), ("j", [1])]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_table_is_whole_on_any_terminal(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A narrow one gets a few lines for each row; markup is text; an empty column is left out."""
    from rich.console import Console

    out = Out(as_json=False)
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
def test_what_init_writes_is_read_back_as_it_was_said(provider: str, key: str) -> None:
    """Whatever characters a key has: quotes, colons, hashes, a leading 0."""
    name = "api_key" if provider == "webfones" else "token"
    options = {name: key} if provider == "webfones" else {"org_handle": "acme", name: key}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(page(Answers(provider, "office", options, "crm", None, SECRET)))
        file.flush()
        source = load(Path(file.name), {}).sources["office"]

    assert getattr(source, name).get_secret_value() == key


# --- the commands ----------------------------------------------------------------------------------------------------


def test_every_command_that_asks_a_relay_has_the_same_options() -> None:
    """--json everywhere; the address and the token from the environment."""
    groups = get_command(app).commands  # type: ignore[attr-defined]
    nouns = ("sources", "subscriptions", "calls", "events", "deliveries", "jobs", "tokens")
    asking = [each for noun in nouns for each in groups[noun].commands.values()]
    asking += [groups[name] for name in ("explain", "tail", "listen", "replay", "erase")]

    for each in asking:
        options = {opt: parameter.envvar for parameter in each.params for opt in parameter.opts}
        assert {"--json", "--url", "--token", "--config"} <= set(options), each.name
        assert (options["--url"], options["--token"]) == ("RELAY_URL", "RELAY_TOKEN")
        assert each.help
    assert len(asking) > 35


def test_help_loads_nothing_heavy() -> None:
    """`relay --help` and completion answer at once: no client, no server, no settings."""
    heavy = ("aiohttp", "pydantic", "redis", "arq", "asyncio", "cryptography", "phonenumbers", "relay.settings")
    program = (
        "import sys\nfrom relay.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"sys.stderr.write(','.join(name for name in {heavy} if name in sys.modules))"
    )

    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)

    assert "subscriptions" in ran.stdout
    assert ran.stderr == ""

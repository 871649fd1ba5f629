"""`relay init`: a few questions, and a commented `relay.yaml` that only its owner may read. Nothing is overwritten."""

import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from relay.domain.json import Json
from relay.errors import SettingsError

_CREDENTIALS: Final = {"webfones": "api_key", "unpod": "token", "cinnox": "token", "nfon": "token"}
"""The option that holds each provider's credential."""
_NEEDED: Final[Mapping[str, Mapping[str, str]]] = {
    "webfones": {},
    "unpod": {"org_handle": "Handle of the organisation"},
    "cinnox": {"base_url": "Address of the tenant's API", "app_id": "App ID of the dashboard"},
    "nfon": {},
}
"""What else a source cannot do without, with the question for it."""
_ZONED: Final = frozenset({"webfones"})
"""Providers whose rows carry no time zone."""
_PUBLIC_URL: Final = "public_url"


@dataclass(frozen=True, slots=True)
class Answers:
    """What was answered: the source, and who hears; values are as in the file."""

    provider: str
    source: str
    options: Json = field(repr=False)
    subscription: str = "crm"
    hook: str | None = field(default=None, repr=False)
    secret: str = field(default="", repr=False)
    public_url: str | None = None


def page(answers: Answers) -> str:
    """Write the file: what was answered, and beside it, as comments, what one may want to change."""
    lines = [
        "# The configuration of Call Relay: docs/settings.md has every setting. It holds secrets: keep it to yourself.",
        "#   relay check --config relay.yaml    looks at everything, and says what to fix",
        "#   relay up    --config relay.yaml    runs the relay",
        "",
        "# The embedded store, the relay's own key, its API token and the recordings live here: back it up.",
        "data_dir: ./relay-data",
        "",
        "# Where this relay is reached from outside. Without it, links to recordings are null.",
        f"public_url: {_scalar(answers.public_url)}"
        if answers.public_url
        else "# public_url: https://relay.example.com",
        "",
        "# Accounts at providers, by an id of your own. The id is part of every call's id: do not rename it later.",
        "sources:",
        f"  {answers.source}:",
        f"    provider: {answers.provider}",
        *(f"    {name}: {_scalar(value)}" for name, value in answers.options.items()),
        "    # poll_interval_s: 30",
        "    # contacts: false       # do not look callers up in the provider's address book",
        "    # recordings: false     # do not fetch audio",
        "",
        "# Who hears. The secret signs every post (Standard Webhooks): give it to the subscriber.",
    ]
    if answers.hook is None:
        lines += [
            "# subscriptions:",
            f"#   {answers.subscription}:",
            "#     url: https://example.com/hooks/calls",
            f"#     secret: {answers.secret}",
        ]
    else:
        lines += [
            "subscriptions:",
            f"  {answers.subscription}:",
            f"    url: {_scalar(answers.hook)}",
            f"    secret: {answers.secret}",
            "    events: [call.*]",
            "    # direction: [inbound]          # only calls from outside",
            "    # outcome: [no_answer, busy]    # only calls that ended like this",
            "    # payload: flat                 # one level of keys, for Zapier and the like",
        ]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """Write a value so that YAML reads exactly it: JSON is YAML."""
    text = str(value)
    plain = text.isascii() and text.replace("_", "").replace("-", "").replace("/", "").replace(".", "").isalnum()
    return text if plain and text[0].isalpha() and text.lower() not in _WORDS else json.dumps(value, ensure_ascii=False)


_WORDS: Final = frozenset({"true", "false", "null", "yes", "no", "on", "off"})


def write(path: Path, text: str) -> None:
    """Write the file with mode 0600, checked before it appears. Raises SettingsError; what is there is left alone."""
    from relay.settings import load

    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise SettingsError(f"{path.parent} cannot be written to: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        try:
            load(draft, {})
        except SettingsError as error:
            raise SettingsError(str(error).replace(str(draft), str(path))) from None
        try:
            os.link(draft, path)
        except FileExistsError:
            raise _exists(path) from None
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        draft.unlink(missing_ok=True)


def _exists(path: Path) -> SettingsError:
    return SettingsError(f"{path} is there already and is left as it is; name another file with --file")


def init(
    file: Annotated[Path, typer.Option("--file", "-f", help="the file to write")] = Path("relay.yaml"),
    provider: Annotated[str | None, typer.Option(help="webfones, unpod, cinnox or nfon")] = None,
    source: Annotated[str | None, typer.Option("--source", help="an id of your own for the account")] = None,
    key_file: Annotated[
        str | None,
        typer.Option("--key-file", metavar="FILE", help="a file that holds the credential; it is named, not copied"),
    ] = None,
    timezone: Annotated[
        str | None, typer.Option(help="IANA zone of the account's times, such as Europe/Berlin")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="NAME=VALUE", help="an option of the source; @file reads the value"),
    ] = None,
    hook: Annotated[str | None, typer.Option(help="where events are posted to; @file reads it")] = None,
    subscription: Annotated[str | None, typer.Option("--subscription", help="an id of your own for who hears")] = None,
    public_url: Annotated[str | None, typer.Option(help="where this relay is reached from outside")] = None,
    ask: Annotated[bool, typer.Option("--ask/--no-ask", help="ask for what is not given; only at a terminal")] = True,
    check: Annotated[bool, typer.Option("--check/--no-check", help="look at everything afterwards")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout and nothing else, for programs")] = False,
) -> None:
    """Ask a few questions and write a commented relay.yaml, for its owner's eyes alone; then check it."""
    from relay.cli import arguments
    from relay.cli.output import Out

    if file.exists() or file.is_symlink():
        raise _exists(file)
    out = Out(as_json=as_json)
    questions = _Questions(asks=ask and not as_json and sys.stdin.isatty())
    options: Json = arguments.options(settings, None)
    kind = questions.choice("--provider", "Provider", provider, sorted(_CREDENTIALS))
    source_id = questions.text("--source", "An id for this account", source, default="main", check=_known_id)
    for name, question in _NEEDED[kind].items():
        options[name] = questions.text(f"--set {name}=…", question, options.get(name))
    _credential(kind, options, key_file, questions)
    if timezone is not None or ("timezone" not in options and kind in _ZONED):
        options["timezone"] = questions.text(
            "--timezone",
            "Time zone of the account, as its settings show it",
            timezone,
            default="UTC",
            check=_known_zone,
        )
    given_hook = arguments.value(hook, name="--hook") if hook is not None else None
    wanted = questions.optional("Where to post events to (empty: later)", given_hook, check=_dialled)
    sub = "crm"
    if wanted:
        sub = questions.text("--subscription", "An id for who hears there", subscription, default=sub, check=_known_id)
    reached = questions.optional(
        "Where this relay is reached from outside (empty: nowhere)", public_url, check=_dialled
    )
    questions.end()
    from relay.delivery.signature import new_secret

    answers = Answers(kind, source_id, options, sub, wanted, new_secret(), reached)
    write(file, page(answers))
    named = f"--config {file}"
    out.note(f"{file} is written, readable by you alone.")
    well, findings = _checked(file, out) if check else (True, [])
    report = {"file": str(file), "source": source_id, "subscription": sub if wanted else None, "findings": findings}
    out.answer(report, f"Next: relay up {named}" if well else f"Then: relay check {named}")
    if not well:
        raise typer.Exit(1)


def _credential(kind: str, options: Json, key_file: str | None, questions: "_Questions") -> None:
    name = _CREDENTIALS[kind]
    if key_file is not None:
        options[f"{name}_file"] = str(Path(key_file).expanduser().absolute())
    elif name not in options and f"{name}_file" not in options and "oauth" not in options:
        options[name] = questions.hidden("--key-file", f"The {name} of the account (not shown)")


def _prompt(question: str, default: str | None, check: Callable[[str], object] | None) -> str:
    """Ask until the answer can be used; `check` raises a ValueError for what cannot."""
    while True:
        answer: str = typer.prompt(question, default=default, show_default=bool(default)).strip()
        try:
            if check is not None:
                check(answer)
        except ValueError as error:
            typer.echo(f"  {error}", err=True)
        else:
            return answer


def _known_id(text: str) -> None:
    from relay.settings import ID_PATTERN

    if not re.fullmatch(ID_PATTERN, text):
        raise ValueError("has 1 to 63 lower-case letters, digits, - and _, and starts with a letter or a digit")


def _known_zone(text: str) -> None:
    from zoneinfo import ZoneInfo

    try:
        ZoneInfo(text)
    except (KeyError, ValueError, OSError):
        raise ValueError("is no time zone; write a name such as UTC or America/New_York") from None


def _dialled(text: str) -> None:
    from relay.domain.url import parse_url

    parse_url(text)


@dataclass(slots=True)
class _Questions:
    """Asks at a terminal; elsewhere collects what is missing, to say all of it at once."""

    asks: bool
    missing: list[str] = field(default_factory=list)

    def text(
        self,
        option: str,
        question: str,
        given_: str | None,
        *,
        default: str | None = None,
        check: Callable[[str], object] | None = None,
    ) -> str:
        if given_ is not None:
            return given_
        if self.asks:
            return _prompt(question, default, check)
        if default is not None:
            return default
        self.missing.append(option)
        return ""

    def choice(self, option: str, question: str, given_: str | None, known: list[str]) -> str:
        names = ", ".join(known)
        while True:
            chosen = self.text(option, f"{question} ({names})", given_, default="webfones" if self.asks else None)
            if chosen in known:
                return chosen
            if not self.asks or given_ is not None:
                raise SettingsError(f"{option}: must be one of {names}")
            typer.echo(f"one of {names}, please", err=True)

    def hidden(self, option: str, question: str) -> str:
        if not self.asks:
            self.missing.append(option)
            return ""
        answer: str = typer.prompt(question, hide_input=True)
        return answer.strip()

    def optional(self, question: str, given_: str | None, *, check: Callable[[str], object]) -> str | None:
        if given_ is None and self.asks:
            given_ = _prompt(question, "", lambda answer: check(answer) if answer else None)
        return (given_ or "").strip() or None

    def end(self) -> None:
        if self.missing:
            raise SettingsError(f"there is nobody to ask, so these are needed: {', '.join(self.missing)}")


def _checked(file: Path, out: Any) -> tuple[bool, list[Json]]:
    """Look at everything that the relay needs, as `relay check` does."""
    import asyncio

    from relay.cli import check as checking
    from relay.log import configure
    from relay.settings import load

    settings = load(file, os.environ)
    configure("error", settings.log.format)

    async def run() -> list[checking.Finding]:
        findings = []
        async for finding in checking.check(settings):
            findings.append(finding)
            out.note(finding.line())
        return findings

    verdict = checking.verdict(asyncio.run(run()))
    return bool(verdict["ok"]), verdict["findings"]

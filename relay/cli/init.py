"""`relay init`: ask a few questions and write a commented `relay.yaml` with mode 0600. Never overwrites a file."""

import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final
from zoneinfo import ZoneInfo

import typer

from relay.cli import arguments, check
from relay.cli.output import Output
from relay.cli.terminal import JsonOption, new_app
from relay.delivery.signature import new_secret
from relay.domain.json import Json
from relay.domain.url import parse_url
from relay.errors import SettingsError
from relay.settings import ID_PATTERN, load

# The option that holds each provider's credential.
_CREDENTIALS: Final = {"webfones": "api_key", "unpod": "token", "cinnox": "token", "nfon": "token"}
# Other required options of each provider, with the question for each.
_REQUIRED: Final[Mapping[str, Mapping[str, str]]] = {
    "webfones": {},
    "unpod": {"org_handle": "Handle of the organisation"},
    "cinnox": {"base_url": "Address of the tenant's API", "app_id": "App ID of the dashboard"},
    "nfon": {},
}
# Providers whose rows carry no time zone.
_ZONED: Final = frozenset({"webfones"})
_YAML_WORDS: Final = frozenset({"true", "false", "null", "yes", "no", "on", "off"})

app = new_app()


@dataclass(frozen=True, slots=True)
class InitAnswers:
    provider: str
    source: str
    options: Json = field(repr=False)
    subscription: str = "crm"
    hook: str | None = field(default=None, repr=False)
    secret: str = field(default="", repr=False)
    public_url: str | None = None


def page(answers: InitAnswers) -> str:
    """Return the text of the file: the answers, and other common options as comments."""
    lines = [
        "# Configuration of Call Relay; docs/settings.md has every setting. It contains secrets: keep it private.",
        "#   relay check --config relay.yaml    checks everything, and says what to fix",
        "#   relay up    --config relay.yaml    runs the relay",
        "",
        "# Holds the embedded store, the encryption key, the API token and the recordings: back it up.",
        "data_dir: ./relay-data",
        "",
        "# Public address of this relay. Without it, links to recordings are null.",
        f"public_url: {_scalar(answers.public_url)}"
        if answers.public_url
        else "# public_url: https://relay.example.com",
        "",
        "# Accounts at providers, by an id that you choose. It is part of every call's id: do not rename it later.",
        "sources:",
        f"  {answers.source}:",
        f"    provider: {answers.provider}",
        *(f"    {name}: {_scalar(value)}" for name, value in answers.options.items()),
        "    # poll_interval_s: 30",
        "    # contacts: false       # do not look up callers in the provider's address book",
        "    # recordings: false     # do not download recordings",
        "",
        "# Where events are delivered. The secret signs every request (Standard Webhooks): give it to the subscriber.",
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
            "    # direction: [inbound]          # only incoming calls",
            "    # outcome: [no_answer, busy]    # only calls with these outcomes",
            "    # payload: flat                 # flat keys, for Zapier and similar",
        ]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """Quote a value unless YAML reads it back unchanged; JSON is valid YAML."""
    text = str(value)
    plain = text.isascii() and text.replace("_", "").replace("-", "").replace("/", "").replace(".", "").isalnum()
    return (
        text
        if plain and text[0].isalpha() and text.lower() not in _YAML_WORDS
        else json.dumps(value, ensure_ascii=False)
    )


def write(path: Path, text: str) -> None:
    """Validate the text and write it with mode 0600. Raises SettingsError; an existing file is left alone."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise SettingsError(f"{path.parent} cannot be written: {error.strerror}") from None
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
    return SettingsError(f"{path} already exists and was not changed; pass another file with --file")


@app.command()
def init(
    file: Annotated[Path, typer.Option("--file", "-f", help="The file to write.")] = Path("relay.yaml"),
    provider: Annotated[str | None, typer.Option(help="webfones, unpod, cinnox or nfon.")] = None,
    source: Annotated[str | None, typer.Option("--source", help="ID of the account, of your choice.")] = None,
    key_file: Annotated[
        str | None,
        typer.Option("--key-file", metavar="FILE", help="File that holds the credential; relay.yaml refers to it."),
    ] = None,
    timezone: Annotated[str | None, typer.Option(help="IANA time zone of the account, such as Europe/Berlin.")] = None,
    settings: arguments.SetOption = None,
    hook: Annotated[str | None, typer.Option(help="URL that events are posted to; @file reads it.")] = None,
    subscription: Annotated[
        str | None, typer.Option("--subscription", help="ID of the subscription, of your choice.")
    ] = None,
    public_url: Annotated[str | None, typer.Option(help="Public address of this relay.")] = None,
    ask: Annotated[bool, typer.Option("--ask/--no-ask", help="Ask for what is missing, if this is a terminal.")] = True,
    check_after: Annotated[bool, typer.Option("--check/--no-check", help="Run `relay check` afterwards.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Never overwrites a file. The new one is readable by its owner only."""
    if file.exists() or file.is_symlink():
        raise _exists(file)
    out = Output(as_json=as_json)
    questions = _Questions(interactive=ask and not as_json and sys.stdin.isatty())
    answers = _ask(questions, provider, source, key_file, timezone, settings, hook, subscription, public_url)
    questions.raise_for_missing()
    write(file, page(answers))
    out.note(f"{file} written (mode 0600)")
    findings = check.run(load(file, os.environ), lambda finding: out.note(finding.line())) if check_after else []
    checked = check.report(findings)
    document = {
        "file": str(file),
        "source": answers.source,
        "subscription": answers.subscription if answers.hook else None,
        "findings": checked["findings"],
    }
    command = "relay up" if checked["ok"] else "relay check"
    out.result(document, f"Next: {command} --config {file}")
    if not checked["ok"]:
        raise typer.Exit(1)


def _ask(
    questions: "_Questions",
    provider: str | None,
    source: str | None,
    key_file: str | None,
    timezone: str | None,
    settings: list[str] | None,
    hook: str | None,
    subscription: str | None,
    public_url: str | None,
) -> InitAnswers:
    options = arguments.options(settings, None)
    kind = questions.choice("--provider", "Provider", provider, sorted(_CREDENTIALS))
    source_id = questions.text("--source", "ID for this account", source, default="main", check=_check_id)
    for name, question in _REQUIRED[kind].items():
        options[name] = questions.text(f"--set {name}=…", question, options.get(name))
    credential = _CREDENTIALS[kind]
    if key_file is not None:
        options[f"{credential}_file"] = str(Path(key_file).expanduser().absolute())
    elif credential not in options and f"{credential}_file" not in options and "oauth" not in options:
        options[credential] = questions.hidden("--key-file", f"The {credential} of the account (not shown)")
    if timezone is not None or ("timezone" not in options and kind in _ZONED):
        question = "Time zone of the account, as shown in its settings"
        options["timezone"] = questions.text("--timezone", question, timezone, default="UTC", check=_check_zone)
    url = arguments.value(hook, name="--hook") if hook is not None else None
    url = questions.optional("URL to post events to (empty: later)", url, check=parse_url)
    subscription_id = "crm"
    if url:
        question = "ID for this subscription"
        subscription_id = questions.text("--subscription", question, subscription, default="crm", check=_check_id)
    public_url = questions.optional("Public address of this relay (empty: none)", public_url, check=parse_url)
    return InitAnswers(kind, source_id, options, subscription_id, url, new_secret(), public_url)


def _check_id(text: str) -> None:
    if not re.fullmatch(ID_PATTERN, text):
        raise ValueError("must be 1 to 63 lower-case letters, digits, - and _, starting with a letter or a digit")


def _check_zone(text: str) -> None:
    try:
        ZoneInfo(text)
    except (KeyError, ValueError, OSError):
        raise ValueError("is not a time zone; use a name such as UTC or America/New_York") from None


@dataclass(slots=True)
class _Questions:
    """Asks at a terminal; elsewhere collects what is missing, to report all of it at once."""

    interactive: bool
    missing: list[str] = field(default_factory=list)

    def text(
        self,
        option: str,
        question: str,
        value: str | None,
        *,
        default: str | None = None,
        check: Callable[[str], object] | None = None,
    ) -> str:
        if value is not None:
            return value
        if self.interactive:
            return _prompt(question, default, check)
        if default is not None:
            return default
        self.missing.append(option)
        return ""

    def choice(self, option: str, question: str, value: str | None, choices: list[str]) -> str:
        names = ", ".join(choices)
        while True:
            default = "webfones" if self.interactive else None
            chosen = self.text(option, f"{question} ({names})", value, default=default)
            if chosen in choices:
                return chosen
            if not self.interactive or value is not None:
                raise SettingsError(f"{option}: must be one of {names}")
            typer.echo(f"  must be one of {names}", err=True)

    def hidden(self, option: str, question: str) -> str:
        if not self.interactive:
            self.missing.append(option)
            return ""
        answer: str = typer.prompt(question, hide_input=True)
        return answer.strip()

    def optional(self, question: str, value: str | None, *, check: Callable[[str], object]) -> str | None:
        if value is None and self.interactive:
            value = _prompt(question, "", lambda answer: check(answer) if answer else None)
        return (value or "").strip() or None

    def raise_for_missing(self) -> None:
        if self.missing:
            raise SettingsError(f"not a terminal, so these options are required: {', '.join(self.missing)}")


def _prompt(question: str, default: str | None, check: Callable[[str], object] | None) -> str:
    while True:
        answer: str = typer.prompt(question, default=default, show_default=bool(default)).strip()
        try:
            if check is not None:
                check(answer)
        except ValueError as error:
            typer.echo(f"  {error}", err=True)
        else:
            return answer

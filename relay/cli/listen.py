"""`relay listen --forward URL`: what a subscriber would be sent, posted to a program under development.

Requests are signed as real deliveries are, one event at a time, each sent once; nothing in the relay changes. The
address is the developer's own, so it may be a private one; redirects are not followed.
"""

import time
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Annotated, Final, Literal

import typer

import relay
from relay.cli import arguments
from relay.cli.client import CONNECT_S, connect, why_unreachable
from relay.cli.events import SourceOption, SubscriptionOption, TypesOption
from relay.cli.output import local_time
from relay.cli.stream import AfterOption, CountOption, events
from relay.cli.terminal import Terminal, command, new_app
from relay.delivery import signature
from relay.domain.url import ParsedUrl, parse_url
from relay.errors import SettingsError
from relay.events.render import render

_EXCERPT_BYTES: Final = 16 * 1024
_EXCERPT_CHARS: Final = 120

app = new_app()


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """What the program answered; `status` is None when there was no answer."""

    status: int | None
    duration_ms: int
    text: str

    @property
    def acknowledged(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


@command(app, "listen", endless=True)
def listen(
    term: Terminal,
    forward: Annotated[str, typer.Option("--forward", "-f", metavar="URL", help="Such as http://localhost:3000/hook.")],
    types: TypesOption = None,
    source: SourceOption = None,
    subscription: SubscriptionOption = None,
    payload: Annotated[Literal["full", "flat"], typer.Option(help="Form of the body.")] = "full",
    secret: Annotated[
        str | None, typer.Option(metavar="@FILE", help="Secret to sign with; generated for this run by default.")
    ] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, max=120, help="Seconds to wait for an answer.")
    ] = 15,
    after: AfterOption = None,
    count: CountOption = None,
) -> None:
    """Prints what the program answers, until Ctrl-C."""
    url = parse_forward_url(forward)
    key = signature.new_secret() if secret is None else arguments.value(secret, name="--secret").strip()
    try:
        keys = [signature.decode_secret(key)]
    except ValueError as error:
        raise SettingsError(f"--secret: {error}") from None
    if secret is None:
        term.out.line({"secret": key, "forward": str(url.url)}, f"secret for this run: {key}")
    query = {"type": types, "source": source, "subscription": subscription}
    for event in events(term, query, after=after, count=count):
        body = render(event, payload=payload)
        headers = signature.headers(event["id"], int(time.time()), body, keys)
        result = post(url, body, headers, timeout_s=timeout_s)
        report = {
            "event_id": event["id"],
            "event_type": event["type"],
            "status": result.status,
            "duration_ms": result.duration_ms,
            "answer": result.text,
        }
        answer = result.text if result.status is None else f"{result.status}  {result.text}".rstrip()
        line = (
            f"{local_time(event['timestamp'])}  {event['type']}  {event['id']}  → {answer}  ({result.duration_ms} ms)"
        )
        term.out.line(report, line, style=None if result.acknowledged else "red")


def parse_forward_url(text: str) -> ParsedUrl:
    """Parse the address to post to; `localhost:3000` is http. Raises SettingsError."""
    try:
        return parse_url(text if "://" in text else f"http://{text}")
    except ValueError as error:
        raise SettingsError(f"--forward: must look like http://localhost:3000/hook: {error}") from None


def post(url: ParsedUrl, body: bytes, headers: dict[str, str], *, timeout_s: float) -> ForwardResult:
    """Post once; a failure is a result too."""
    started_s = time.monotonic()
    status, text = _exchange(url, body, headers, timeout_s=timeout_s)
    return ForwardResult(status, round((time.monotonic() - started_s) * 1000), text)


def _exchange(url: ParsedUrl, body: bytes, headers: dict[str, str], *, timeout_s: float) -> tuple[int | None, str]:
    all_headers = {
        "Content-Type": "application/json",
        "User-Agent": f"call-relay/{relay.__version__}",
        "Connection": "close",
        **headers,
    }
    if url.authorization is not None:
        all_headers["Authorization"] = url.authorization
    try:
        connection = connect(url, timeout_s=min(timeout_s, CONNECT_S))
    except OSError as error:
        return None, f"cannot connect: {why_unreachable(error)}"
    try:
        connection.sock.settimeout(timeout_s)
        connection.request("POST", url.url.raw_path_qs, body=body, headers=all_headers)
        response = connection.getresponse()
        return response.status, _excerpt(response)
    except TimeoutError:
        return None, f"no answer within {timeout_s:g} s"
    except (HTTPException, OSError, ValueError) as error:
        return None, f"no valid HTTP answer ({type(error).__name__})"
    finally:
        connection.close()


def _excerpt(response: HTTPResponse) -> str:
    if 300 <= response.status < 400:
        return "a redirect; redirects are not followed"
    text = response.read(_EXCERPT_BYTES).decode("utf-8", "replace")
    return " ".join(text.split())[:_EXCERPT_CHARS]

"""`relay listen --forward URL`: what a subscriber would get, posted to a program under development.

It is signed as real deliveries are, with a secret that is made for this run and printed. One event at a time, once;
nothing in the relay changes. The address is the user's own, so it may be a private one; redirects are not followed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import urlsplit

import typer

from relay.cli import arguments
from relay.cli.events import After, Count, OfSource, OfSubscription, Types, follow
from relay.cli.output import time_text
from relay.cli.terminal import Terminal
from relay.domain.json import Json
from relay.errors import SettingsError

if TYPE_CHECKING:
    import aiohttp

_KEPT_BYTES: Final = 16 * 1024
_EXCERPT_CHARS: Final = 120


class Payload(StrEnum):
    """In which form."""

    FULL = "full"
    FLAT = "flat"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the program answered; `status` is None when it did not."""

    status: int | None
    duration_ms: int
    words: str

    @property
    def well(self) -> bool:
        """Whether a delivery would count as heard."""
        return self.status is not None and 200 <= self.status < 300


async def listen(
    term: Terminal,
    forward: Annotated[str, typer.Option("--forward", "-f", metavar="HOOK", help="such as http://localhost:3000/hook")],
    type_: Types = None,
    source: OfSource = None,
    subscription: OfSubscription = None,
    payload: Annotated[Payload, typer.Option(help="form of the body")] = Payload.FULL,
    secret: Annotated[
        str | None, typer.Option(metavar="@FILE", help="sign with this one; absent: one is made for this run")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, max=120, help="seconds for one answer")] = 15,
    after: After = None,
    count: Count = None,
) -> None:
    """Follow the events and post each to a program on your side, signed; shows what it answers. Ctrl-C ends it."""
    import aiohttp

    from relay.delivery import signature

    target = checked_forward(forward)
    key = signature.new_secret() if secret is None else arguments.value(secret, name="--secret").strip()
    try:
        keys = [signature.decode_secret(key)]
    except ValueError as error:
        raise SettingsError(f"--secret: {error}") from None
    if secret is None:
        term.out.line({"secret": key, "forward": target}, f"secret for this run: {key}")
    query = {"type": type_, "source": source, "subscription": subscription}
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), trust_env=False) as http:
        async for document in follow(term, query, after=after):
            body = _body(document, payload)
            headers = signature.headers(document["id"], int(time.time()), body, keys)
            answer = await post(http, target, body, headers, timeout_s=timeout_s)
            report = {
                "event_id": document["id"],
                "event_type": document["type"],
                "status": answer.status,
                "duration_ms": answer.duration_ms,
                "answer": answer.words,
            }
            said = answer.words if answer.status is None else f"{answer.status}  {answer.words}"
            at = time_text(document["timestamp"])
            words = f"{at}  {document['type']}  {document['id']}  → {said.rstrip()}  ({answer.duration_ms} ms)"
            term.out.line(report, words, style=None if answer.well else "red")
            if count is not None:
                count -= 1
                if count == 0:
                    return


def checked_forward(text: str) -> str:
    """Check the address that events are posted to."""
    wanted = "--forward: must look like http://localhost:3000/hook"
    url = text if "://" in text else f"http://{text}"
    parts = urlsplit(url)
    try:
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or any(ord(char) <= 32 for char in url):
        raise SettingsError(wanted)
    return url


def _body(document: Json, payload: Payload) -> bytes:
    from relay.events.render import render

    return render(document, payload="flat" if payload is Payload.FLAT else "full")


async def post(
    http: "aiohttp.ClientSession",
    url: str,
    body: bytes,
    headers: dict[str, str],
    *,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Answer:
    """Post once; whatever goes wrong is an answer too."""
    import aiohttp

    import relay
    from relay.cli.client import why_unreachable

    began_s = clock()

    def answer(status: int | None, words: str) -> Answer:
        return Answer(status, round((clock() - began_s) * 1000), words)

    all_headers: dict[str, Any] = {
        "Content-Type": "application/json",
        "User-Agent": f"call-relay/{relay.__version__}",
        **headers,
    }
    try:
        async with http.post(
            url,
            data=body,
            headers=all_headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=5),
        ) as response:
            kept = (await response.content.read(_KEPT_BYTES)).decode("utf-8", "replace")
            if 300 <= response.status < 400:
                return answer(response.status, "a redirect; redirects are not followed")
            return answer(response.status, " ".join(kept.split())[:_EXCERPT_CHARS])
    except TimeoutError:
        return answer(None, f"no answer within {timeout_s:g} s")
    except aiohttp.ClientConnectorError as error:
        return answer(None, f"cannot connect: {why_unreachable(error)}")
    except (aiohttp.ClientError, ConnectionError, ValueError) as error:
        return answer(None, f"no usable answer ({type(error).__name__})")

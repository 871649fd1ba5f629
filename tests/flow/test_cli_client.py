"""The HTTP client of the command line, against servers that behave badly."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from relay.cli.client import Client, RelayUnreachable, UnexpectedServer
from relay.cli.target import ApiTarget

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"


@contextmanager
def answering(*answers: bytes) -> Iterator[ApiTarget]:
    """Serve one answer per request; after one that is incomplete or says close, the connection is closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            waiting = list(answers)
            while waiting:
                connection, _ = server.accept()
                with connection:
                    while waiting and connection.recv(65_536):
                        answer = waiting.pop(0)
                        connection.sendall(answer)
                        if not answer.endswith(b"\r\n\r\n{}") or b"close" in answer:
                            break

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield ApiTarget(f"http://127.0.0.1:{server.getsockname()[1]}", "t")
        thread.join(timeout=5)


def test_a_connection_is_kept_until_the_server_closes_it() -> None:
    """Also when the server announces that it closes it."""
    with (
        answering(OK + b"\r\n{}", OK + b"Connection: close\r\n\r\n{}", OK + b"\r\n{}") as target,
        Client(target) as api,
    ):
        documents = [api.get("/v1/x") for _ in range(3)]

    assert documents == [{}, {}, {}]


@pytest.mark.parametrize(
    "broken", [b"", OK, OK + b"\r\n{", b"garbage\r\n\r\n", OK.replace(b": 2", b": soon") + b"\r\n"], ids=repr
)
def test_a_request_after_a_broken_answer_uses_a_new_connection(broken: bytes) -> None:
    """Half an answer is a message, and does not become a part of the next one."""
    with answering(broken, OK + b"\r\n{}") as target, Client(target) as api:
        with pytest.raises((RelayUnreachable, UnexpectedServer)):
            api.get("/v1/x")

        assert api.get("/v1/x") == {}


def test_https_at_a_plain_port_is_a_clear_message() -> None:
    """It says which scheme to try."""
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as target:
        secure = ApiTarget(target.url.replace("http:", "https:"), "t")

        with Client(secure) as api, pytest.raises(RelayUnreachable, match="is it an http:// address"):
            api.get("/v1/x")

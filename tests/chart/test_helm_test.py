"""`helm test`, run as it is rendered: the program of the test pod against servers on loopback."""

import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.chart.conftest import Render

# Names of Services resolve to pods, and the pods' addresses to the servers of the test. The program's own clock runs
# thirty times as fast, so that its minute of retries takes two seconds.
_CLUSTER = """
import socket, sys, time
addresses, ports = {addresses!r}, {ports!r}
connect, sleep, monotonic = socket.create_connection, time.sleep, time.monotonic
resolve = socket.getaddrinfo
def getaddrinfo(name, port, *rest, **options):
    if name == "127.0.0.1":
        return resolve(name, port, *rest, **options)
    if name not in addresses:
        raise socket.gaierror(-2, "Name or service not known")
    return [(2, 1, 6, "", (address, port)) for address in addresses[name]]
socket.getaddrinfo = getaddrinfo
socket.create_connection = lambda address, *rest, **options: connect(("127.0.0.1", ports[address[0]]), timeout=5)
time.sleep, time.monotonic = lambda wait_s: sleep(wait_s / 30), lambda: monotonic() * 30
"""


@contextmanager
def serving(statuses: list[int]) -> Iterator[int]:
    """Answer requests with these statuses in turn, the last one for ever; gives the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(render: Render, pods: Mapping[str, list[int]], api: list[int]) -> subprocess.CompletedProcess[str]:
    """Run the test pod's program in a cluster of these pods, by address, and an API."""
    (container,) = render("minimal").pods()["test"]["spec"]["containers"]
    addresses = {"calls-relay-internal": list(pods)} if pods else {}
    with ExitStack() as stack:
        ports = {address: stack.enter_context(serving(list(statuses))) for address, statuses in pods.items()}
        ports["calls-relay-api"] = stack.enter_context(serving(list(api)))
        program = _CLUSTER.format(addresses=addresses, ports=ports) + container["args"][0]
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


READY = {"10.0.0.1": [200], "10.0.0.2": [200], "10.0.0.3": [200]}


def test_helm_test_succeeds_when_all_is_well(render: Render) -> None:
    """Exit code 0, and a line for each request."""
    done = run(render, READY, [403])

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("/readyz: 200") == 3
    assert "every pod is ready" in done.stdout


def test_helm_test_waits_for_network_policies_and_slow_pods(render: Render) -> None:
    """What is not ready yet is asked again for a minute."""
    done = run(render, {**READY, "10.0.0.2": [503, 503, 200]}, [502, 404])

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("pods", "api", "message"),
    [
        ({"10.0.0.1": [200], "10.0.0.2": [200]}, [403], "2 pods are listed by calls-relay-internal"),
        ({**READY, "10.0.0.3": [503]}, [403], "10.0.0.3:9090/readyz answered 503; expected 200"),
        (READY, [200], "/recordings/helm-test answered 200; expected 403"),
        ({}, [403], "calls-relay-internal does not resolve"),
    ],
)
def test_helm_test_fails_with_what_is_wrong(
    render: Render, pods: Mapping[str, list[int]], api: list[int], message: str
) -> None:
    """Exit code 1, and a sentence on stderr."""
    done = run(render, pods, api)

    assert done.returncode == 1
    assert message in done.stderr

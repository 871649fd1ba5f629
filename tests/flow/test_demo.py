"""`relay demo` as a person starts it: real processes, killed ones too."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from relay.cli.main import main
from relay.simulator.accounts import PROVIDER_NAMES

pytestmark = pytest.mark.timeout(90)


async def _start(*arguments: str, folder: Path) -> asyncio.subprocess.Process:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    # Settings that are meant for the person's own relay must not reach the demo's.
    environ |= {"RELAY_REDIS_URL": "redis://127.0.0.1:1/0", "TMPDIR": str(folder)}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "relay",
        "demo",
        *arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environ,
        start_new_session=True,
    )


def _left_behind(folder: Path) -> list[str]:
    """Processes that still have the demo's directory on their command line."""
    return [
        entry.name
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and os.fsencode(folder) in _command_line(entry)
    ]


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


async def test_the_demo_ends_by_itself_with_nothing_lost_and_nothing_left(tmp_path: Path) -> None:
    """Calls come in, verified events go out, the recording can be fetched with curl, and the directory is clean."""
    demo = await _start("--for", "4s", "--calls-per-minute", "240", folder=tmp_path)
    assert demo.stdout is not None
    lines: list[str] = []
    audio = b""
    async for line in demo.stdout:
        lines.append(line.decode().rstrip())
        link = re.search(r"call\.recording\.completed .*(http://127\.0\.0\.1:\d+/recordings/\S+)", lines[-1])
        if link and not audio:
            audio = await asyncio.to_thread(_fetch, link[1])
    code = await demo.wait()

    output = "\n".join(lines)
    assert code == 0, output
    assert audio[:4] == b"RIFF"
    assert re.search(
        r"^\d\d:\d\d:\d\d call   [←→] \(\d{3}\) 555-01\d\d +[A-Z ]+ (answered|no_answer|busy)", output, re.M
    )
    assert re.search(r"^\d\d:\d\d:\d\d event  ✓ call\.completed +\d+\.\d\d s  \S", output, re.M)
    listed, delivered = map(int, re.findall(r"^calls +(\d+) listed, (\d+) delivered$", output, re.M)[0])
    assert listed == delivered > 3
    assert "duplicates   0" in lines
    assert lines[-1] == "✓ nothing was lost"
    assert "\x1b" not in output
    assert list(tmp_path.glob("relay-demo-*")) == []  # noqa: ASYNC240 - nothing else runs
    assert _left_behind(tmp_path) == []


def _fetch(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"Range": "bytes=0-99"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        body: bytes = answer.read()
    assert answer.status == 206
    return body


async def test_chaos_loses_nothing(tmp_path: Path) -> None:
    """The relay is killed, its store too; every call is delivered all the same, under one id, in order."""
    demo = await _start("--for", "8.5s", "--calls-per-minute", "240", "--chaos", "--seed", "309", folder=tmp_path)
    stdout, _ = await demo.communicate()

    output = stdout.decode()
    assert demo.returncode == 0, output
    assert "kill -9: the relay" in output
    assert "kill -9: the store" in output
    assert re.search(r"^chaos +[1-9]\d* × kill -9", output, re.M)
    assert output.splitlines()[-1] == "✓ nothing was lost"
    assert _left_behind(tmp_path) == []


async def test_one_relay_reads_every_provider(tmp_path: Path) -> None:
    """With all of them, each lists calls of its own; NFON's arrive by its stream, and transcripts follow."""
    demo = await _start("--for", "4s", "--calls-per-minute", "120", "--provider", "all", folder=tmp_path)
    stdout, _ = await demo.communicate()

    output = stdout.decode()
    assert demo.returncode == 0, output
    for name in PROVIDER_NAMES:
        listed, delivered = map(int, re.findall(rf"^  {name} +(\d+) listed, (\d+) delivered", output, re.M)[0])
        assert listed == delivered > 0, output
    assert re.search(r"call\.completed +\d+\.\d\d s  \S.*  nfon by stream$", output, re.M)
    assert re.search(r"call\.transcript\.completed .*  nfon", output)
    assert re.search(r"call\.recording\.completed .*  cinnox  http://", output)
    assert output.splitlines()[-1] == "✓ nothing was lost"
    assert _left_behind(tmp_path) == []


async def test_ctrl_c_ends_the_calls_and_waits_for_the_last_deliveries(tmp_path: Path) -> None:
    """Without --for the demo goes on until Ctrl-C, and then prints its summary."""
    demo = await _start("--calls-per-minute", "240", folder=tmp_path)
    assert demo.stdout is not None
    async for line in demo.stdout:
        if b" event " in line:
            demo.send_signal(signal.SIGINT)
            break
    stdout, _ = await demo.communicate()

    output = stdout.decode()
    assert demo.returncode == 0, output
    assert "no more calls; waiting for the last deliveries" in output
    assert output.splitlines()[-1] == "✓ nothing was lost"
    assert _left_behind(tmp_path) == []


async def test_closing_the_terminal_leaves_no_relay_behind(tmp_path: Path) -> None:
    """The relay is in a session of its own, which the hangup does not reach: the demo has to end it."""
    demo = await _start("--calls-per-minute", "240", folder=tmp_path)
    assert demo.stdout is not None
    async for line in demo.stdout:
        if b"calls begin" in line:
            demo.send_signal(signal.SIGHUP)
            break
    await demo.communicate()

    assert demo.returncode == 0
    assert _left_behind(tmp_path) == []
    assert list(tmp_path.glob("relay-demo-*")) == []  # noqa: ASYNC240 - nothing else runs


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--for", "soon"], "--for: 'soon' is not a valid duration"),
        (["--for", "0s"], "--for"),
        (["--calls-per-minute", "nan"], "calls-per-minute"),
        (["--calls-per-minute", "0"], "calls-per-minute"),
        (["--provider", "unknown"], "'unknown' is not one of"),
    ],
)
def test_bad_input_is_a_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", *arguments])

    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err

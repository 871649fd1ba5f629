"""`relay init`, with answers at a terminal or by options, and the relay that it configures."""

import asyncio
import contextlib
import os
import pty
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from relay.settings import load
from tests.fakes.webfones import FaultyWebFones
from tests.flow.cli import environ_for, run, start
from tests.flow.test_cli_stream import wait_for_line

ENVIRON = environ_for(None, None)
KEY = "simulated-key"


async def test_options_are_written_to_a_file_that_only_its_owner_can_read(tmp_path: Path) -> None:
    """Mode 0600, with comments; the key's file is referred to, not copied; the settings are read back as given."""
    key, file = tmp_path / "key", tmp_path / "relay.yaml"
    key.write_text("the-key-of-the-account")
    options = ["--provider", "webfones", "--source", "office", "--key-file", str(key), "--timezone", "Europe/Berlin"]
    hook = ["--hook", "https://hooks.example.com/in?a=1#", "--public-url", "https://relay.example.com"]

    refused = await run("init", "-f", str(file), *options, *hook, "--no-check", environ=ENVIRON)
    hook[1] = "https://hooks.example.com/in?a=1&b=%20"
    made = await run("init", "-f", str(file), *options, *hook, "--no-check", "--json", environ=ENVIRON)

    assert refused.code == 2
    assert "subscriptions.crm.url: " in refused.err
    assert made.code == 0, made.err
    assert made.json["source"] == "office"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["key", "relay.yaml"]
    settings = load(file, {})
    assert settings.sources["office"].timezone == "Europe/Berlin"
    assert settings.subscriptions["crm"].url.get_secret_value() == hook[1]
    text = file.read_text()
    assert "the-key-of-the-account" not in text
    assert "# poll_interval_s: 30" in text


async def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    """Nor is a symbolic link followed."""
    (tmp_path / "relay.yaml").write_text("mine\n")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    arguments = ["--provider", "webfones", "--set", "api_key=k", "--no-check"]

    there = await run("init", "-f", str(tmp_path / "relay.yaml"), *arguments, environ=ENVIRON)
    link = await run("init", "-f", str(tmp_path / "link.yaml"), *arguments, environ=ENVIRON)

    assert (there.code, link.code) == (2, 2)
    assert "already exists and was not changed" in there.err
    assert (tmp_path / "relay.yaml").read_text() == "mine\n"
    assert not (tmp_path / "elsewhere.yaml").exists()


async def test_without_a_terminal_all_missing_options_are_reported(tmp_path: Path) -> None:
    """In one message, and nothing is written."""
    file = tmp_path / "relay.yaml"

    missing = await run("init", "-f", str(file), "--provider", "cinnox", environ=ENVIRON)
    unknown = await run("init", "-f", str(file), "--provider", "carrier-pigeon", environ=ENVIRON)

    assert missing.code == 2
    assert all(name in missing.err for name in ("base_url", "app_id", "--key-file"))
    assert (unknown.code, unknown.err) == (2, "--provider: must be one of cinnox, nfon, unpod, webfones\n")
    assert os.listdir(tmp_path) == []


@contextlib.asynccontextmanager
async def phone_system() -> AsyncIterator[str]:
    provider = FaultyWebFones()
    provider.add_account(KEY)
    async with provider.serve() as url:
        yield url


def _type(arguments: Sequence[str], answers: Sequence[str], folder: Path) -> tuple[int, str]:
    """Run a command at a terminal of its own, and answer each question."""
    try:
        ours, theirs = pty.openpty()
    except OSError:
        pytest.skip("needs a pseudo-terminal; this machine has none")
    process = subprocess.Popen(
        [sys.executable, "-m", "relay", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=ENVIRON,
        start_new_session=True,
    )
    os.close(theirs)
    screen, waiting = "", list(answers)
    try:
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the terminal is gone with its process
                break
            screen += piece.decode()
            if waiting and screen.endswith(": "):
                os.write(ours, f"{waiting.pop(0)}\n".encode())
                screen += "\n"
    finally:
        os.close(ours)
        code = process.wait()
    return code, screen


async def test_questions_are_asked_at_a_terminal_and_answers_are_checked(tmp_path: Path) -> None:
    """An invalid answer is asked for again, the key is not echoed, and the account is tried."""
    async with phone_system() as url:
        answers = ["pigeon", "webfones", "", KEY, "New York", "America/New_York", "", ""]

        code, screen = await asyncio.to_thread(_type, ["init", "--set", f"base_url={url}"], answers, tmp_path)

    assert code == 0, screen
    assert "must be one of cinnox, nfon, unpod, webfones" in screen
    assert "is not a time zone" in screen
    assert KEY not in screen
    assert "✓ source main" in screen
    assert "Next: relay up --config relay.yaml" in screen
    settings = load(tmp_path / "relay.yaml", {})
    assert settings.sources["main"].timezone == "America/New_York"
    assert dict(settings.subscriptions) == {}
    assert "whsec_" in (tmp_path / "relay.yaml").read_text()


@pytest.mark.timeout(60)
async def test_client_commands_find_the_relay_by_its_configuration(tmp_path: Path, free_port: int) -> None:
    """`relay up` generates a token, which commands on the same machine use."""
    file = tmp_path / "relay.yaml"
    environ = environ_for(None, None, RELAY_API__PORT=str(free_port), RELAY_INTERNAL__PORT="0")
    async with phone_system() as url:
        options = ["--provider", "webfones", "--set", f"api_key={KEY}", "--set", f"base_url={url}"]
        made = await run("init", "-f", str(file), *options, "--no-check", environ=ENVIRON)
        relay = await start("up", "--config", str(file), environ=environ)
        try:
            await wait_for_line(relay, "source_first_polled")
            listed = await run("sources", "list", "--config", str(file), "--json", environ=environ)
            checked = await run("sources", "check", "main", "--config", str(file), environ=environ)
            filled = await run("backfill", "main", "--since", "1h", "-c", str(file), environ=environ)
            tail = await start("tail", "-c", str(file), environ=environ)
            await wait_for_line(tail, "Listening at")
        finally:
            relay.send_signal(signal.SIGTERM)
            await relay.communicate()
        await wait_for_line(tail, "Disconnected")
        tail.send_signal(signal.SIGINT)
        await tail.communicate()

    assert made.code == 0, made.err
    assert [each["state"] for each in listed.json["items"]] == ["working"]
    assert checked.code == 0, checked.err
    assert (filled.code, filled.out) == (0, "backfill done: nothing so far\n")
    assert (relay.returncode, tail.returncode) == (0, 0)

"""The image is small, restricted and built from the lock; the compose file runs it with a store."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from relay.settings import load
from tests.chart.conftest import REPOSITORY, Object

DOCKERFILE = REPOSITORY / "Dockerfile"
COMPOSE = REPOSITORY / "docs" / "compose.yaml"


@dataclass(frozen=True)
class Instruction:
    """One instruction, its lines joined."""

    word: str
    rest: str

    def exec_form(self) -> list[str]:
        return [str(part) for part in json.loads(self.rest)]


def stages() -> list[list[Instruction]]:
    """Parse the Dockerfile: the part before the first FROM, then each stage."""
    found: list[list[Instruction]] = [[]]
    text = DOCKERFILE.read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n\s*", " ", lines).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            if word == "FROM":
                found.append([])
            found[-1].append(Instruction(word, rest.strip()))
    return found


def of(word: str, stage: list[Instruction]) -> list[Instruction]:
    return [instruction for instruction in stage if instruction.word == word]


def only(word: str) -> Instruction:
    """Return the only instruction of its kind in the last stage."""
    (found,) = of(word, stages()[-1])
    return found


def environment() -> dict[str, str]:
    """The variables that the image sets."""
    return dict(pair.split("=", 1) for item in of("ENV", stages()[-1]) for pair in item.rest.split())


def test_the_dockerfile_works_with_any_builder() -> None:
    """docker, podman and buildah: no heredoc, no syntax line, no BuildKit-only features."""
    text = DOCKERFILE.read_text(encoding="utf-8")

    assert "<<" not in text
    assert not re.search(r"^#\s*(syntax|escape)\s*=", text, re.MULTILINE)
    assert not re.search(r"--(mount|network|security|link|parents|checksum|exclude)\b", text)
    assert {i.word for stage in stages() for i in stage} <= set(
        "ARG FROM ENV WORKDIR RUN COPY LABEL VOLUME EXPOSE USER STOPSIGNAL HEALTHCHECK ENTRYPOINT CMD".split()  # noqa: SIM905
    )


def test_the_base_image_is_selected_by_tag_and_digest() -> None:
    """A slim image of a supported Python; the digest is an argument that every stage uses."""
    head, *built = stages()
    arguments = dict(item.rest.split("=", 1) for item in of("ARG", head))
    tag = re.fullmatch(r"(\d+)\.(\d+)-slim-[a-z]+", arguments["PYTHON_TAG"])
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = re.fullmatch(r">=(\d+)\.(\d+)", project["requires-python"])

    assert tag
    assert oldest
    assert tuple(map(int, tag.groups())) >= tuple(map(int, oldest.groups()))
    assert re.fullmatch(r"(@sha256:[0-9a-f]{64})?", arguments["PYTHON_DIGEST"])
    assert len(built) == 2
    for stage in built:
        assert stage[0].rest.split(" AS ")[0] == "python:${PYTHON_TAG}${PYTHON_DIGEST}"


def test_packages_come_from_the_lock_with_their_hashes() -> None:
    """As wheels, so nothing is compiled; our own wheel is installed without an index."""
    installs = [
        command
        for stage in stages()
        for item in of("RUN", stage)
        for command in item.rest.split("&&")
        if re.search(r"\bpip\s+(install|wheel)\b", command)
    ]

    assert len(installs) == 4
    for command in installs:
        locked = "--require-hashes" in command and "--only-binary=:all:" in command
        ours = "--no-deps" in command and ("--no-index" in command or "--no-build-isolation" in command)
        assert locked or ours, command
    assert any("-r .ci/runtime.lock" in command for command in installs)


@pytest.mark.parametrize("name", ["runtime", "build", "chart"])
def test_locks_have_hashes_and_no_addresses(name: str) -> None:
    """Every package is pinned with hashes, and no index is named."""
    text = (REPOSITORY / ".ci" / f"{name}.lock").read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]

    assert pins
    assert all(re.match(r"[a-z0-9._-]+==\S+", pin) and pin.endswith("\\") for pin in pins)
    assert "://" not in text
    assert "--index" not in text


def test_the_build_lock_has_the_build_backend() -> None:
    """Whatever pyproject.toml requires is pinned."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    pins = (REPOSITORY / ".ci" / "build.lock").read_text(encoding="utf-8")

    for requirement in project["build-system"]["requires"]:
        name = re.split(r"[<>=~! ]", requirement)[0]
        assert re.search(rf"^{name}==", pins, re.MULTILINE)


def test_the_last_stage_has_no_build_tools() -> None:
    """It installs nothing and copies the result of the first stage, from which pip was removed."""
    last = stages()[-1]
    runs = " ".join(item.rest for item in of("RUN", last))
    built = " ".join(item.rest for item in of("RUN", stages()[-2]))

    assert not re.search(r"\b(pip|apt|apt-get|apk|gcc|make|curl|wget)\b", runs)
    assert "pip uninstall --yes pip" in built
    assert [item.rest for item in of("COPY", last)] == ["--from=build /opt/relay /opt/relay"]


def test_the_user_is_numeric_and_not_root() -> None:
    """Kubernetes can only check a numeric user; it is the one that the chart uses."""
    user = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", only("USER").rest)
    chart = yaml.safe_load((REPOSITORY / "helm/relay/values.yaml").read_text(encoding="utf-8"))["podSecurityContext"]

    assert user
    assert tuple(map(int, user.groups())) == (chart["runAsUser"], chart["runAsGroup"])
    order = [item.word for item in stages()[-1]]
    assert order.index("USER") > max(i for i, word in enumerate(order) if word in ("RUN", "COPY"))


def test_it_starts_without_a_shell() -> None:
    """Signals reach the relay itself, and the command selects the role."""
    assert only("ENTRYPOINT").exec_form() == ["relay"]
    assert only("CMD").exec_form() == ["up", "--config", "/etc/relay/relay.yaml"]
    assert only("STOPSIGNAL").rest == "SIGTERM"
    health, _, command = only("HEALTHCHECK").rest.partition("CMD ")
    assert json.loads(command) == ["relay", "healthcheck"]
    assert "--start-period=" in health


def test_only_one_directory_is_written_to() -> None:
    """The root may be read-only: data, home and working directory are the volume, and no bytecode is written."""
    env = environment()
    (volume,) = only("VOLUME").exec_form()

    assert volume == env["RELAY_DATA_DIR"] == env["HOME"] == only("WORKDIR").rest
    assert env["PYTHONDONTWRITEBYTECODE"] == "1"
    owner = only("USER").rest.split(":")
    assert f"install -d -o {owner[0]} -g {owner[1]} -m 0750 {volume}" in [item.rest for item in of("RUN", stages()[-1])]


def test_the_image_sets_valid_settings(tmp_path: Path) -> None:
    """The relay loads the variables of the image without an error."""
    settings = load(None, environment())

    assert settings.api.host == "0.0.0.0"
    assert str(settings.data_dir) == "/var/lib/relay"
    assert {settings.api.port, settings.internal.port} == set(map(int, only("EXPOSE").rest.split()))


def test_the_image_has_oci_labels() -> None:
    """With version, revision and date as arguments."""
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', only("LABEL").rest))
    arguments = {item.rest.split("=")[0] for item in of("ARG", stages()[-1])}

    assert labels["licenses"] == "MIT"
    assert labels.keys() == {"title", "description", "licenses", "version", "revision", "created"}
    for name in ("version", "revision", "created"):
        assert labels[name] == f"${{{name.upper()}}}"
        assert name.upper() in arguments


def sent_to_the_builder(path: str) -> bool:
    """Apply .dockerignore: the last matching rule wins."""
    sent = True
    for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines():
        rule = line.strip()
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        candidates = heads + (parts if rule.startswith("**/") else [])
        if any(fnmatch(candidate, pattern) and ("/" in pattern or "/" not in candidate) for candidate in candidates):
            sent = rule.startswith("!")
    return sent


def test_the_build_context_is_minimal() -> None:
    """No history, no secrets, no virtual environment; everything that is copied is included."""
    for path in (".git/config", ".venv/bin/python", "relay.yaml", "docs/.env", "tests/conftest.py", "relay-data/x"):
        assert not sent_to_the_builder(path), path
    for path in ("relay/__pycache__/cli.cpython-313.pyc", "relay/prod.env", "workers/relay.yaml"):
        assert not sent_to_the_builder(path), path
    copied = [source for item in of("COPY", stages()[1]) for source in item.rest.split()[:-1]]
    assert {"relay", "workers", ".ci/runtime.lock"} <= set(copied)
    for source in copied:
        assert (REPOSITORY / source).exists(), source
        assert sent_to_the_builder(source), source
    for path in ("relay/cli/main.py", "relay/queue/lane.lua", "workers/__init__.py"):
        assert sent_to_the_builder(path), path


def test_hadolint_reports_nothing() -> None:
    """The linter of Dockerfiles, where it is installed."""
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: `make test` brings it, from .ci/chart.lock")
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "")


# --- compose ---------------------------------------------------------------------------------------------------------


def services() -> Object:
    parsed: Object = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    return parsed


def test_compose_runs_a_durable_private_store() -> None:
    """AOF on a volume, no eviction, no published port, and an internal network."""
    whole = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    store = services()["valkey"]
    options = dict(zip(store["command"][1::2], store["command"][2::2], strict=True))

    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert store["volumes"] == ["valkey-data:/data"]
    assert "valkey-data" in whole["volumes"]
    assert "ports" not in store
    assert store["networks"] == ["store"]
    assert whole["networks"]["store"] == {"internal": True}


def test_compose_restricts_its_containers() -> None:
    """Read-only roots, no capabilities, limited memory; the API is published on loopback only."""
    for service in services().values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "mem_limit" in service
        assert service["restart"] == "unless-stopped"
    assert services()["relay"]["ports"] == ["127.0.0.1:8080:8080"]


def test_compose_waits_for_the_drain() -> None:
    """The grace period is longer than the drain."""
    relay = services()["relay"]

    assert int(relay["stop_grace_period"].removesuffix("s")) >= int(relay["environment"]["RELAY_DRAIN_S"]) + 10


def test_compose_requires_its_secrets() -> None:
    """Both secrets come from .env; without them, compose fails and says what to do."""
    variables = services()["relay"]["environment"]

    for name in ("RELAY_SECRET_KEY", "RELAY_API__TOKENS"):
        assert re.fullmatch(rf"\$\{{{name}:\?[^}}]+\}}", variables[name])
        assert f'echo "{name}=' in COMPOSE.read_text(encoding="utf-8")


def test_compose_sets_valid_settings() -> None:
    """The relay loads its variables, and its command names a mounted file."""
    relay = services()["relay"]
    variables = relay["environment"] | {"RELAY_SECRET_KEY": "k" * 44, "RELAY_API__TOKENS": f'["{"t" * 48}"]'}
    settings = load(None, environment() | variables)

    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == "redis://valkey:6379/0"
    assert len(settings.api.tokens) == 1
    assert relay["command"] == only("CMD").exec_form()
    assert f"./relay.yaml:{relay['command'][2]}:ro" in relay["volumes"]
    assert f"relay-data:{environment()['RELAY_DATA_DIR']}" in relay["volumes"]

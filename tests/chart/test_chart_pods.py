"""Every pod of the chart is restricted, probed, and has enough time to shut down."""

import re
from typing import Any

import pytest
import yaml

from relay import __version__
from relay.settings import load
from tests.chart.conftest import CHART, MATRIX, ROLES, Object, Render, Rendered

PREFIX = "app.kubernetes.io/"


def test_there_are_three_roles_from_one_template(release: Rendered) -> None:
    """api, poller and worker differ in their command; only the api is exposed."""
    containers = {role: release.deployment(role)["spec"]["template"]["spec"]["containers"][0] for role in ROLES}

    for role, container in containers.items():
        assert container["args"] == [role, "--config", "/etc/relay/relay.yaml"]
        assert "command" not in container
    assert containers["poller"] | {"args": [], "resources": {}} == containers["worker"] | {"args": [], "resources": {}}
    assert {port["name"] for port in containers["api"]["ports"]} == {"http", "internal"}


def test_every_pod_meets_the_restricted_standard(release: Rendered) -> None:
    """Numeric user, no root, no capabilities, nothing writable but volumes, in every pod of every values file."""
    for component, pod in release.pods().items():
        spec = pod["spec"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, component
        assert security["runAsUser"] > 0, component
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, component
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), component
        assert not any("hostPath" in volume for volume in spec.get("volumes", [])), component
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] is True, component
            assert own["allowPrivilegeEscalation"] is False, component
            assert own["capabilities"] == {"drop": ["ALL"]}, component
            assert "hostPort" not in str(container.get("ports", "")), component


def test_pods_have_no_api_token_and_no_service_links(release: Rendered) -> None:
    """No token is mounted, and no service links add RELAY_… variables."""
    for component, pod in release.pods().items():
        assert pod["spec"]["automountServiceAccountToken"] is False, component
        assert pod["spec"]["enableServiceLinks"] is False, component
    for account in release.of("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_every_container_has_requests_and_a_memory_limit(release: Rendered) -> None:
    """One process cannot starve others on the node. There is no CPU limit, because it would throttle."""
    for component, pod in release.pods().items():
        for container in pod["spec"]["containers"]:
            resources = container["resources"]
            assert resources["requests"].keys() == {"cpu", "memory"}, component
            assert "memory" in resources["limits"], component
            assert "cpu" not in resources["limits"], component


def test_probes_use_the_internal_port(release: Rendered) -> None:
    """Liveness is the event loop, readiness is the store; both on the port that is not exposed."""
    for role in ROLES:
        container = release.deployment(role)["spec"]["template"]["spec"]["containers"][0]

        probes = {kind: container[kind]["httpGet"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")}
        assert probes["startupProbe"] == probes["livenessProbe"] == {"path": "/livez", "port": "internal"}
        assert probes["readinessProbe"] == {"path": "/readyz", "port": "internal"}
        assert {"name": "internal", "containerPort": 9090, "protocol": "TCP"} in container["ports"]
        assert env_of(container)["RELAY_INTERNAL__PORT"] == "9090"


def test_the_internal_port_is_in_no_exposed_service(release: Rendered) -> None:
    """Everything exposed leads to the API port only."""
    for service in release.of("Service"):
        ports = [port["targetPort"] for port in service["spec"]["ports"]]
        headless = service["spec"].get("clusterIP") == "None"
        assert ports == (["internal"] if headless else ports)
        assert headless or "internal" not in ports
    for ingress in release.of("Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                service = release.one("Service", path["backend"]["service"]["name"])
                assert path["backend"]["service"]["port"]["name"] in [port["name"] for port in service["spec"]["ports"]]
                assert [port["targetPort"] for port in service["spec"]["ports"]] == ["http"]


@pytest.mark.parametrize("drain_s", [25, 60, 600])
def test_one_value_sets_the_drain_and_the_grace_period(render: Render, drain_s: int) -> None:
    """The pod is killed only well after the drain, including the api's preStop delay."""
    rendered = render("minimal", {"drainSeconds": drain_s})

    for role in ROLES:
        spec = rendered.deployment(role)["spec"]["template"]["spec"]
        container = spec["containers"][0]
        pause = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        assert env_of(container)["RELAY_DRAIN_S"] == str(drain_s)
        assert spec["terminationGracePeriodSeconds"] >= drain_s + int(pause[1]) + 10


def test_a_new_pod_is_ready_before_an_old_one_goes(release: Rendered) -> None:
    """A rolling restart never leaves a role without pods."""
    for role in ROLES:
        strategy = release.deployment(role)["spec"]["strategy"]
        assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}


def test_pods_restart_when_the_settings_change_and_only_then(render: Render) -> None:
    """The checksum covers relay.yaml and the store's URL, and nothing else."""

    def checksums(extra: Object) -> set[str]:
        rendered = render("keda", {"existingConfigSecret": "", **extra})
        pods = [rendered.deployment(role)["spec"]["template"] for role in ROLES]
        return {pod["metadata"]["annotations"]["checksum/config"] for pod in pods}

    before = checksums({})
    assert len(before) == 1
    assert checksums({"poller": {"replicaCount": 5}}) == before
    assert checksums({"config": {"retention": {"calls_days": 31}}}).isdisjoint(before)
    assert checksums({"redis": {"url": "redis://elsewhere:6379/0"}}).isdisjoint(before)


def test_a_volume_for_one_node_keeps_the_pods_together(render: Render) -> None:
    """ReadWriteOnce can be mounted on one node only, so all three roles are scheduled there."""
    one_node = render("trial")
    many = render("trial", {"recordings": {"persistence": {"accessModes": ["ReadWriteMany"]}}})

    for role in ROLES:
        spec = one_node.deployment(role)["spec"]["template"]["spec"]
        (term,) = spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        for other in ROLES:
            labels = one_node.pods()[other]["metadata"]["labels"]
            assert term["labelSelector"]["matchLabels"].items() <= labels.items()
        assert "affinity" not in many.deployment(role)["spec"]["template"]["spec"]


def test_all_roles_share_the_storage_of_recordings(release: Rendered) -> None:
    """The worker writes, the api reads, and the poller stores its marker there."""
    places: set[str] = set()
    mounts: set[str] = set()
    for role in ROLES:
        spec = release.deployment(role)["spec"]["template"]["spec"]
        places.add(env_of(spec["containers"][0])["RELAY_STORAGE_URL"])
        mounts.add(str([v for v in spec["volumes"] if "persistentVolumeClaim" in v]))

    (place,) = places
    assert len(mounts) == 1
    assert "://" in place or place in str(release.deployment("api")["spec"]["template"]["spec"]["containers"])


def test_the_chart_renders_valid_settings(render: Render, tmp_path: Any) -> None:
    """The relay loads the relay.yaml and the variables of each role without an error."""
    for name in MATRIX:
        rendered = render(name)
        files = [
            item["stringData"]["relay.yaml"] for item in rendered.of("Secret") if "relay.yaml" in item["stringData"]
        ]
        config = (files or ["{}"])[0].replace("/run/secrets/relay", str(tmp_path))
        for file_name, content in {
            "main-api-key": "a-key",
            "crm-url": "https://crm.example.com/hook",
            "crm-secret": "whsec_" + "A" * 43 + "=",
        }.items():
            (tmp_path / file_name).write_text(content)
        path = tmp_path / f"{name}.yaml"
        path.write_text(config)

        for role in ROLES:
            container = rendered.deployment(role)["spec"]["template"]["spec"]["containers"][0]
            settings = load(path, env_of(container))

            assert settings.redis_url is not None
            assert settings.secret_key
            assert (settings.internal.port, settings.api.port) == (9090, 8080)
            assert settings.internal.host == settings.api.host == rendered_host(rendered)
            assert bool(settings.api.tokens) == (role == "api")


def test_relay_yaml_is_passed_unchanged(render: Render) -> None:
    """Numbers, text that looks like numbers, and words such as NO survive rendering into the Secret."""
    config = {
        "log": {"format": "json"},
        "retention": {"calls_days": 3650},
        "delivery": {"timeout_s": 7.5},
        "sources": {"main": {"provider": "webfones", "api_key": "0123", "region": "NO", "recordings": False}},
        "subscriptions": {"crm": {"extensions": ["007", "1e3"], "description": "ü: 'once' \"twice\" # no comment"}},
    }

    rendered = render("minimal", {"existingConfigSecret": "", "config": config})

    assert yaml.safe_load(rendered.one("Secret", "calls-relay-config")["stringData"]["relay.yaml"]) == config


def test_secrets_are_in_secrets_only(release: Rendered) -> None:
    """No key of relay.yaml, password or store URL is in a Deployment or ConfigMap."""
    secrets = [value for item in release.of("Secret") for value in item["stringData"].values()]
    inner = [word for value in secrets for word in re.findall(r"not-a-real-key|relay_\w+|rediss?://\S+|\w{40,}", value)]
    rest = str([item for item in release.objects if item["kind"] != "Secret"]) + release.notes

    assert not [word for word in inner if word in rest]
    assert not any(value in rest for value in secrets if value.strip() != "{}")


def test_every_reference_exists(release: Rendered) -> None:
    """Each Secret, claim and account that a pod refers to is created here or named in the values."""
    made = {(item["kind"], item["metadata"]["name"]) for item in release.objects}
    for pod in release.pods().values():
        spec = pod["spec"]
        named = {("ServiceAccount", spec["serviceAccountName"])}
        named |= {("Secret", v["secret"]["secretName"]) for v in spec.get("volumes", []) if "secret" in v}
        named |= {
            ("PersistentVolumeClaim", v["persistentVolumeClaim"]["claimName"])
            for v in spec.get("volumes", [])
            if "persistentVolumeClaim" in v
        }
        for container in spec["containers"]:
            named |= {("Secret", source["secretRef"]["name"]) for source in container.get("envFrom", [])}
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    named.add(("Secret", reference["name"]))
                    if ("Secret", reference["name"]) in made:
                        secret = release.one("Secret", reference["name"])
                        assert reference["key"] in secret["stringData"]
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            templates = {"data"} if "data" in mounted and container["name"] == "valkey" else set()
            assert mounted <= {volume["name"] for volume in spec.get("volumes", [])} | templates

        for kind, name in named:
            assert (kind, name) in made or f"{name!r}" in str(release.values)


def test_a_trial_generates_its_secrets_once(render: Render, helm: Any) -> None:
    """The first installation generates strong secrets and keeps them; an upgrade that cannot read them fails."""
    first, second = render("trial"), render("trial")
    made = [item.one("Secret", "calls-relay-generated") for item in (first, second)]

    assert made[0]["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert {key: len(value) >= 40 for key, value in made[0]["stringData"].items()} == {
        "secret-key": True,
        "api-tokens": True,
        "valkey-password": True,
    }
    assert made[0]["stringData"] != made[1]["stringData"]
    with pytest.raises(helm.HelmError, match="a new key would make what is stored unreadable"):
        render("trial", is_upgrade=True)


def test_no_key_is_required_in_values(render: Render) -> None:
    """Minimal values name existing Secrets, and the chart creates none."""
    rendered = render("minimal")

    assert rendered.of("Secret") == []


def test_the_store_in_the_chart_is_durable(render: Render) -> None:
    """AOF, no eviction, a volume, a password, and memory left for the process itself."""
    for name in ("trial", "everything"):
        (store,) = render(name).of("StatefulSet")
        container = store["spec"]["template"]["spec"]["containers"][0]
        options = dict(zip(container["args"][1::2], container["args"][2::2], strict=True))

        assert store["spec"]["replicas"] == 1
        assert options["--appendonly"] == "yes"
        assert options["--appendfsync"] in ("everysec", "always")
        assert options["--maxmemory-policy"] == "noeviction"
        assert options["--requirepass"] == "$(VALKEY_PASSWORD)"
        assert int(options["--maxmemory"].removesuffix("mb")) * 4 <= 3 * 512
        assert store["spec"]["volumeClaimTemplates"][0]["spec"]["accessModes"] == ["ReadWriteOnce"]
        assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]
        assert options["--dir"] == "/data"


def test_a_digest_selects_the_image(render: Render) -> None:
    """With a digest, the pods run exactly that image; without a tag, the version of the chart."""
    by_digest = render("production").deployment("api")["spec"]["template"]["spec"]["containers"][0]["image"]
    by_version = render("minimal").deployment("api")["spec"]["template"]["spec"]["containers"][0]["image"]

    assert re.fullmatch(r"registry\.example\.com/call-relay:[0-9.]+@sha256:[0-9a-f]{64}", by_digest)
    assert by_version == f"call-relay:{__version__}"


def test_chart_and_relay_have_the_same_version() -> None:
    """They are released together."""
    meta = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))

    assert meta["appVersion"] == meta["version"] == __version__


def env_of(container: Object) -> dict[str, str]:
    """The variables of a container, with plausible values for those from Secrets."""
    stand_ins = {
        "RELAY_REDIS_URL": "rediss://:word@valkey.example.com:6379/0",
        "RELAY_SECRET_KEY": "k" * 64,
        "RELAY_API__TOKENS": '["relay_a-token-of-some-length"]',
        "VALKEY_PASSWORD": "p" * 40,
    }
    env = {item["name"]: item.get("value", stand_ins.get(item["name"], "")) for item in container["env"]}
    return {name: value.replace("$(VALKEY_PASSWORD)", env.get("VALKEY_PASSWORD", "")) for name, value in env.items()}


def rendered_host(rendered: Rendered) -> str:
    return env_of(rendered.deployment("api")["spec"]["template"]["spec"]["containers"][0])["RELAY_API__HOST"]

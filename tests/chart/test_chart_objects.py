"""The chart's objects other than pods are valid for the oldest and newest Kubernetes, and refer to what exists."""

import functools
import json
import re
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import yaml

from tests.chart.conftest import CHART, NAMESPACE, RELEASE, ROLES, Object, Render, Rendered, matches

CRDS = {path.stem: path for path in (CHART.parents[1] / "tests" / "chart" / "crds").glob("*.json")}
OLDEST = re.fullmatch(
    r">=(\d+\.\d+)\.0-0", yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))["kubeVersion"]
)


@pytest.fixture(scope="session")
def kubernetes() -> Iterator[Any]:
    """The validator, cached because it would read its 100 kB definitions for each object."""
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validator.utils, "schema_contents", functools.cache(validator.utils.schema_contents))
        yield validator


def test_kubernetes_accepts_every_object(release: Rendered, kubernetes: Any) -> None:
    """Strictly, unknown fields included, for the oldest supported version and the newest available one."""
    assert OLDEST
    versions = [OLDEST[1], kubernetes.latest_version()]
    assert f"{OLDEST[1]}.0" in kubernetes.utils.all_versions()
    checked = 0
    for item in release.objects:
        if item["kind"] in CRDS:
            continue
        for version in versions:
            kubernetes.validate(item, version, strict=True)
            checked += 1

    assert checked >= 2 * 10


def test_the_validator_rejects_an_invalid_object(render: Render, kubernetes: Any) -> None:
    """The check above can fail: a misspelt field is an error for both versions."""
    deployment = render("minimal").deployment("api")
    deployment["spec"]["replicsa"] = 2

    assert OLDEST
    for version in (OLDEST[1], kubernetes.latest_version()):
        with pytest.raises(kubernetes.ValidationError, match="replicsa"):
            kubernetes.validate(deployment, version, strict=True)


def test_custom_resources_match_their_definitions(render: Render, helm: Any) -> None:
    """HTTPRoute, PodMonitor, PrometheusRule and ScaledObject, against the parts of their definitions in use."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    seen = set()
    for item in render("everything").objects + render("keda").objects + render("production").objects:
        if item["kind"] in CRDS:
            jsonschema.Draft202012Validator(json.loads(CRDS[item["kind"]].read_text())).validate(item)
            seen.add(item["kind"])

    assert seen == set(CRDS)


def test_helm_lint_reports_nothing(helm: Any) -> None:
    """`helm lint --strict` reports only the missing icon."""
    for values in sorted((CHART / "ci").glob("*-values.yaml")):
        report = helm.lint(CHART, yaml.safe_load(values.read_text(encoding="utf-8")), strict=True)

        assert report["errors"] == []
        assert [m["error"] for m in report["messages"] if m["severity"] > 1] == []


def test_names_fit_for_any_length_of_the_release_name(render: Render) -> None:
    """Names and label values have at most 63 characters, including what controllers append."""
    long = "a" * 53
    for name, extra in (("everything", {"nameOverride": "b" * 45}), ("keda", {}), ("trial", {})):
        rendered = render(name, extra, name=long)
        assert len({(item["kind"], item["metadata"]["name"]) for item in rendered.objects}) == len(rendered.objects)
        for item in rendered.objects:
            own = item["metadata"]["name"]
            added = {"StatefulSet": "-0123456789", "ScaledObject": "keda-hpa-"}.get(item["kind"], "")
            assert len(own) + len(added) <= 63, own
            assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", own)
            labels = dict(item["metadata"].get("labels", {}))
            labels |= item.get("spec", {}).get("template", {}).get("metadata", {}).get("labels", {})
            assert all(len(value) <= 63 for value in labels.values())


def test_everything_is_labelled_and_in_the_releases_namespace(release: Rendered) -> None:
    """Selecting by the labels of a release finds all its objects."""
    for item in release.objects:
        assert item["metadata"]["namespace"] == NAMESPACE
        assert item["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE
        assert item["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"
        assert item["metadata"]["labels"]["helm.sh/chart"].startswith("relay-")


def test_selectors_find_their_pods_and_no_others(release: Rendered) -> None:
    """No Service, PodDisruptionBudget or PodMonitor selects another role's or release's pods."""
    labels = {component: pod["metadata"]["labels"] for component, pod in release.pods().items()}

    def found(selector: Object) -> set[str]:
        return {component for component, own in labels.items() if matches(selector, own)}

    for item in release.of("Deployment") + release.of("StatefulSet"):
        assert found(item["spec"]["selector"]["matchLabels"]) == {
            item["metadata"]["labels"]["app.kubernetes.io/component"]
        }
    for item in release.of("Service"):
        name = item["metadata"]["name"]
        assert found(item["spec"]["selector"]) == (set(ROLES) if name.endswith("-internal") else {name.split("-")[-1]})
        for component in found(item["spec"]["selector"]):
            ports = [port["name"] for port in release.pods()[component]["spec"]["containers"][0]["ports"]]
            assert {port["targetPort"] for port in item["spec"]["ports"]} <= set(ports)
    for item in release.of("PodDisruptionBudget"):
        assert found(item["spec"]["selector"]["matchLabels"]) == {item["metadata"]["name"].split("-")[-1]}
    for item in release.of("PodMonitor"):
        assert found(item["spec"]["selector"]["matchLabels"]) == set(ROLES)
        assert [endpoint["port"] for endpoint in item["spec"]["podMetricsEndpoints"]] == ["internal"]
    assert len(release.of("PodDisruptionBudget")) == len(ROLES)


def test_pods_are_spread(release: Rendered) -> None:
    """Over zones and nodes, separately for each role."""
    for role in ROLES:
        template = release.deployment(role)["spec"]["template"]
        constraints = template["spec"]["topologySpreadConstraints"]
        assert [c["topologyKey"] for c in constraints] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
        for constraint in constraints:
            assert matches(constraint["labelSelector"]["matchLabels"], template["metadata"]["labels"])
            assert constraint["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == role


# --- scaling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "kind"), [("cpu", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")])
def test_a_scaled_worker_sets_no_replicas(render: Render, mode: str, kind: str) -> None:
    """An upgrade must not reset the number of pods. The minimum is one, because a worker reports the metric."""
    rendered = render("keda", {"worker": {"autoscaling": {"mode": mode, "minReplicas": 1}}})
    (scaler,) = rendered.of(kind)

    assert "replicas" not in rendered.deployment("worker")["spec"]
    assert rendered.deployment("poller")["spec"]["replicas"] == 2
    assert scaler["spec"]["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": rendered.deployment("worker")["metadata"]["name"],
    }
    assert scaler["spec"].get("minReplicas", scaler["spec"].get("minReplicaCount")) == 1
    assert len(rendered.of("HorizontalPodAutoscaler") + rendered.of("ScaledObject")) == 1


def test_keda_falls_back_when_prometheus_is_gone(render: Render) -> None:
    """An empty result counts as a failure, and failures trigger the fallback."""
    (scaled,) = render("keda").of("ScaledObject")
    (trigger,) = scaled["spec"]["triggers"]

    assert scaled["spec"]["fallback"] == {"failureThreshold": 3, "replicas": 4}
    assert trigger["metricType"] == "AverageValue"
    assert trigger["metadata"]["ignoreNullValues"] == "false"
    assert trigger["metadata"]["query"] == (
        f'max(relay_lane_oldest_due_seconds{{namespace="{NAMESPACE}",job="{RELEASE}",lane!~"poll|contacts"}})'
    )
    assert trigger["authenticationRef"] == {"name": "prometheus"}


def test_without_a_scaler_replicas_come_from_the_values(render: Render) -> None:
    """`none` creates no scaler and sets replicaCount."""
    rendered = render("production")

    assert rendered.deployment("worker")["spec"]["replicas"] == 3
    assert rendered.of("HorizontalPodAutoscaler") == rendered.of("ScaledObject") == []


# --- network policies ------------------------------------------------------------------------------------------------


def may_call(rendered: Rendered, component: str, address: str, port: int, protocol: str = "TCP") -> bool:
    """Evaluate the policies: may a pod connect to an address outside the cluster?"""
    labels = rendered.pods()[component]["metadata"]["labels"]
    policies = [
        item["spec"]
        for item in rendered.of("NetworkPolicy")
        if "Egress" in item["spec"]["policyTypes"] and matches(item["spec"]["podSelector"]["matchLabels"], labels)
    ]
    return not policies or any(
        _port_fits(rule, port, protocol) and _address_fits(rule, address)
        for policy in policies
        for rule in policy.get("egress", [])
    )


def _port_fits(rule: Object, port: int, protocol: str) -> bool:
    return not rule.get("ports") or {"port": port, "protocol": protocol} in rule["ports"]


def _address_fits(rule: Object, address: str) -> bool:
    blocks = [peer["ipBlock"] for peer in rule.get("to", []) if "ipBlock" in peer]
    return not rule.get("to") or any(
        ip_address(address) in ip_network(block["cidr"])
        and not any(ip_address(address) in ip_network(hole) for hole in block.get("except", []))
        for block in blocks
    )


def may_be_called(rendered: Rendered, component: str, port: int, by: Object) -> bool:
    """Evaluate the policies: may a pod of this namespace with the labels `by` connect to a component's port?"""
    labels = rendered.pods()[component]["metadata"]["labels"]
    policies = [
        item["spec"]
        for item in rendered.of("NetworkPolicy")
        if "Ingress" in item["spec"]["policyTypes"] and matches(item["spec"]["podSelector"]["matchLabels"], labels)
    ]
    return not policies or any(
        _port_fits(rule, port, "TCP")
        and (
            not rule.get("from")
            or any("podSelector" in peer and matches(peer["podSelector"]["matchLabels"], by) for peer in rule["from"])
        )
        for policy in policies
        for rule in policy.get("ingress", [])
    )


PRIVATE = [
    "10.0.0.1",
    "10.20.255.255",
    "100.64.0.1",
    "127.0.0.1",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "192.0.0.192",
    "198.18.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "0.0.0.1",
    "::1",
    "fd00::1",
    "fd00:ec2::254",
    "fe80::1",
    "ff02::1",
    "::ffff:10.0.0.1",
    "64:ff9b::a00:1",
    "2002:a00:1::1",
]


def test_network_policies_are_off_by_default(render: Render) -> None:
    """They can cut a relay off from a provider or subscriber."""
    assert render("minimal").of("NetworkPolicy") == []
    assert render("trial").of("NetworkPolicy") == []


@pytest.mark.parametrize("address", PRIVATE)
@pytest.mark.parametrize("role", ROLES)
def test_private_addresses_are_blocked(render: Render, role: str, address: str) -> None:
    """With no allowed networks, special-purpose ranges are blocked on web ports, metadata services included."""
    rendered = render("minimal", {"networkPolicy": {"enabled": True}})

    assert not any(may_call(rendered, role, address, port) for port in (80, 443, 2343, 8080))


@pytest.mark.parametrize("role", ROLES)
def test_what_the_relay_needs_is_reachable(render: Render, role: str) -> None:
    """DNS anywhere, the store on its port, allowed networks on any port, and every public address."""
    rendered = render("production")

    for address in ("10.96.0.10", "169.254.20.10", "fd00::a"):
        assert may_call(rendered, role, address, 53, "UDP")
        assert may_call(rendered, role, address, 53, "TCP")
    assert may_call(rendered, role, "10.30.0.5", 6380)
    assert not may_call(rendered, role, "10.30.0.5", 443)
    assert may_call(rendered, role, "10.20.3.4", 8443)
    assert may_call(rendered, role, "192.168.7.4", 80)
    assert not may_call(rendered, role, "192.168.7.5", 80)
    for address in ("1.1.1.1", "172.15.255.255", "172.32.0.1", "2606:4700::1111"):
        assert may_call(rendered, role, address, 2343)


def test_a_store_without_named_peers_is_reachable_on_its_port(render: Render) -> None:
    """The chart cannot read the store's address from a Secret, so it allows its port to any address."""
    rendered = render("minimal", {"networkPolicy": {"enabled": True}})

    assert may_call(rendered, "worker", "10.99.1.2", 6379)
    assert not may_call(rendered, "worker", "10.99.1.2", 6380)


def test_allowed_networks_come_from_both_places(render: Render) -> None:
    """From relay.yaml and from the chart's own list; loopback needs no policy."""
    rendered = render("everything")
    policy = rendered.one("NetworkPolicy", RELEASE)
    blocks = {p["ipBlock"]["cidr"] for rule in policy["spec"]["egress"] for p in rule.get("to", []) if "ipBlock" in p}

    assert {"10.1.0.0/16", "fd00:1::/32", "fd00:2::7/128", "10.9.0.0/24", "10.8.8.8/32", "10.7.0.0/24"} <= blocks
    assert not any(block.startswith("127.") for block in blocks)
    for block in blocks:
        assert ip_network(block)


def test_only_the_relay_reaches_the_store_in_the_chart(render: Render) -> None:
    """Not the test pod or any other pod; the store itself has no egress, not even DNS."""
    rendered = render("everything")
    labels = {component: pod["metadata"]["labels"] for component, pod in rendered.pods().items()}

    for component, own in labels.items():
        assert may_be_called(rendered, "valkey", 6379, own) == (component in ROLES)
    assert not may_be_called(rendered, "valkey", 6379, {"app": "stranger"})
    assert not may_call(rendered, "valkey", "10.96.0.10", 53, "UDP")
    assert not may_call(rendered, "valkey", "1.1.1.1", 443)


def test_the_test_pod_is_allowed_by_strict_policies(render: Render) -> None:
    """`helm test` works if only the ingress controller and Prometheus are allowed; other pods are blocked."""
    rendered = render("everything")
    test = rendered.pods()["test"]["metadata"]["labels"]

    assert may_be_called(rendered, "api", 8080, test)
    assert all(may_be_called(rendered, role, 9090, test) for role in ROLES)
    assert not may_be_called(rendered, "api", 8080, {"app": "stranger"})
    assert not any(may_be_called(rendered, role, 9090, {"app": "stranger"}) for role in ROLES)
    assert not any(may_be_called(rendered, role, 8080, test) for role in ("poller", "worker"))


# --- figures, alerts, dashboard --------------------------------------------------------------------------------------


def queries(render: Render) -> list[str]:
    """All PromQL queries of the chart."""
    everything, keda = render("everything"), render("keda")
    (rule,), (scaled,) = everything.of("PrometheusRule"), keda.of("ScaledObject")
    found = [alert["expr"] for group in rule["spec"]["groups"] for alert in group["rules"]]
    found.append(scaled["spec"]["triggers"][0]["metadata"]["query"])
    found += [target["expr"] for panel in dashboard(everything)["panels"] for target in panel.get("targets", [])]
    return found + [v["query"]["query"] for v in dashboard(everything)["templating"]["list"] if v["type"] == "query"]


def dashboard(rendered: Rendered) -> Object:
    (config_map,) = rendered.of("ConfigMap")
    parsed: Object = json.loads(config_map["data"]["call-relay.json"])
    return parsed


def test_every_metric_in_a_query_exists(render: Render) -> None:
    """An alert with a misspelt metric never fires."""
    from prometheus_client.metrics import MetricWrapperBase

    from relay import metrics

    measured = {value._name for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)}
    queried = {name for query in queries(render) for name in re.findall(r"\brelay_[a-z_]+", query)}
    queried = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in queried}

    assert queried <= measured
    assert len(queried) > 15


def test_queries_are_well_formed(render: Render) -> None:
    """Brackets match, and every query selects only this release."""
    for query in queries(render):
        bare = re.sub(r'"[^"]*"', "", query)
        assert [bare.count(c) for c in "([{"] == [bare.count(c) for c in ")]}"], query
        if not query.startswith("label_values"):
            for braces in re.findall(r"(?:relay_\w+|\bup|process_\w+)(\{[^}]*\})?", query):
                assert "namespace=" in braces, query
                assert "job=" in braces, query


def test_alerts_cover_every_failure(render: Render) -> None:
    """Down, late, quiet, failed, failing, budget, quarantine, memory, disk: each with a summary."""
    (rule,) = render("everything").of("PrometheusRule")
    alerts = {alert["alert"]: alert for group in rule["spec"]["groups"] for alert in group["rules"]}

    assert set(alerts) == {
        "RelayNoData",
        "RelayRoleDown",
        "RelayPollLag",
        "RelaySourceQuiet",
        "RelayIncomplete",
        "RelayWorkLate",
        "RelayGaveUp",
        "RelaySubscriptionFailing",
        "RelayBudgetExhausted",
        "RelayQuarantineGrowing",
        "RelayStoreMemory",
        "RelayStoreUnsuitable",
        "RelayVolumeFull",
    }
    assert "absent" in alerts["RelayNoData"]["expr"]
    assert alerts["RelayRoleDown"]["expr"].count("absent(up{") == len(ROLES)
    assert "data-calls-valkey-0|calls-recordings" in alerts["RelayVolumeFull"]["expr"]
    for name, alert in alerts.items():
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["labels"]["team"] == "voice"
        assert alert["annotations"]["runbook_url"] == f"https://docs.example.com/operations#{name.lower()}"
        for label in re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]):
            assert label in alert["expr"], f"{name} speaks of a label that its query does not keep"


def test_thresholds_come_from_the_values(render: Render) -> None:
    """The alerts compare with what the operator sets."""
    thresholds = {"pollLagSeconds": 77, "oldestDueSeconds": 1000000, "fullRatio": 0.5}
    (rule,) = render("everything", {"prometheusRule": {"thresholds": thresholds}}).of("PrometheusRule")
    alerts = {alert["alert"]: alert["expr"].strip() for group in rule["spec"]["groups"] for alert in group["rules"]}

    assert alerts["RelayPollLag"].endswith("> 77")
    assert float(alerts["RelayWorkLate"].split(">")[-1]) == 1_000_000
    assert alerts["RelayStoreMemory"].endswith("> 0.5")
    assert alerts["RelayVolumeFull"].endswith("> 0.5")


def test_the_monitor_sets_the_labels_that_queries_select(render: Render) -> None:
    """The job is the release name, and the role is a label."""
    rendered = render("everything")
    (monitor,) = rendered.of("PodMonitor")

    for role in ROLES:
        labels = rendered.pods()[role]["metadata"]["labels"]
        assert labels[monitor["spec"]["jobLabel"]] == RELEASE
        assert labels[monitor["spec"]["podTargetLabels"][0]] == role
    assert any('app_kubernetes_io_component="worker"' in query for query in queries(render))


def test_the_dashboard_is_valid(render: Render) -> None:
    """Panels have unique ids, do not overlap, and use the selected data source."""
    board = dashboard(render("everything"))
    panels = board["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    for panel in panels:
        assert panel["type"] == "row" or panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "namespace", "release"]


# --- notes and the test pod ------------------------------------------------------------------------------------------


def test_the_notes_list_the_next_steps(release: Rendered) -> None:
    """How to test, check and reach the installation."""
    assert f"helm test {RELEASE} -n {NAMESPACE}" in release.notes
    assert "relay check --config /etc/relay/relay.yaml" in release.notes
    assert "port-forward" in release.notes
    for name in re.findall(r"(?:deploy|svc)/([\w-]+)", release.notes):
        assert name in {item["metadata"]["name"] for item in release.of("Deployment") + release.of("Service")}


@pytest.mark.parametrize(
    ("name", "extra", "words"),
    [
        ("trial", {}, "Back it up"),
        ("trial", {}, "fine for a trial"),
        ("trial", {}, "No source is configured"),
        ("minimal", {}, "rollout restart"),
        ("minimal", {}, "publicUrl is empty"),
        ("minimal", {"publicUrl": "https://r.example.com"}, "enable ingress or httpRoute"),
        ("minimal", {"recordings": {"storageUrl": "", "none": True}}, "no markers to recover from"),
        ("minimal", {}, "No metrics are collected"),
    ],
)
def test_the_notes_warn(render: Render, name: str, extra: Object, words: str) -> None:
    """What an installation lacks is listed; a complete installation gets no warning."""
    assert words in render(name, extra).notes
    assert words not in render("production").notes


@pytest.mark.parametrize("name", ["on", "n", "true", "1e3"])
def test_a_release_may_have_a_name_that_yaml_reads_as_another_type(render: Render, name: str) -> None:
    """Selector labels are quoted, so they are text whatever the release is called."""
    rendered = render("minimal", name=name)

    labels = [item["spec"]["selector"]["matchLabels"] for item in rendered.of("Deployment")]
    assert len(labels) == 3
    assert {label["app.kubernetes.io/instance"] for label in labels} == {name}


def program_of(release: Rendered) -> str:
    (container,) = release.pods()["test"]["spec"]["containers"]
    program: str = container["args"][0]
    return program


def test_the_test_pod_requests_existing_services_at_their_ports(release: Rendered) -> None:
    """`helm test` asks the internal Service and the API."""
    requested = re.findall(r'"(calls[\w-]*)", (\d+)', program_of(release))

    assert len(requested) == 2
    for name, port in requested:
        service = release.one("Service", name)
        assert int(port) in [p["port"] for p in service["spec"]["ports"]]
    assert release.pods()["test"]["metadata"]["annotations"]["helm.sh/hook"] == "test"

"""Invalid values are rejected by name, and every value is described."""

import copy
import importlib.util
import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.chart.conftest import CHART, MATRIX, REPOSITORY, Object, Render

DEFAULTS: Object = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA: Object = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
EVERYTHING: Object = yaml.safe_load(MATRIX["everything"].read_text(encoding="utf-8"))
FREE = {"config", "commonLabels", "annotations", "labels", "podLabels", "podAnnotations", "nodeSelector", "alertLabels"}
FREE |= {"matchLabels", "extraVolumes", "requests", "limits", "affinity"}
Path = tuple[str | int, ...]


def maps(value: Any, path: Path = ()) -> Iterator[Path]:
    """List every map in which a name may be misspelt."""
    if isinstance(value, dict):
        yield path
        for key, inner in value.items():
            if key not in FREE:
                yield from maps(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from maps(inner, (*path, index))


def with_value(values: Object, path: Path, value: Any) -> Object:
    """Copy values with one of them replaced."""
    changed = copy.deepcopy(values)
    at: Any = changed
    for step in path[:-1]:
        at = at.setdefault(step, {}) if isinstance(at, dict) else at[step]
    at[path[-1]] = value
    return changed


@pytest.mark.parametrize("path", sorted(set(maps(DEFAULTS)) | set(maps(EVERYTHING)), key=str), ids=str)
def test_an_unknown_name_is_rejected_at_every_level(chart: Any, helm: Any, path: Path) -> None:
    """The error says which name is unknown, and where."""
    values = with_value(EVERYTHING, (*path, "mispselt"), 1)

    with pytest.raises(helm.HelmValuesError) as error:
        chart.validate_schema(values)
    assert "mispselt" in str(error.value)
    assert "/".join(map(str, path)) in str(error.value)


def test_the_list_of_levels_is_complete(chart: Any) -> None:
    """The list above is not empty by mistake, and the values it starts from are valid."""
    assert len(set(maps(DEFAULTS)) | set(maps(EVERYTHING))) > 50
    for path in MATRIX.values():
        chart.validate_schema(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("api.replicaCount", "two"),
        ("api.resources.requests.memory", "lots"),
        ("api.resources.requests.memroy", "1Gi"),
        ("api.tolerations", [{"effect": "NoShedule"}]),
        ("api.affinity", {"podAntiAfinity": {}}),
        ("drainSeconds", 3),
        ("drainSeconds", "25s"),
        ("image.digest", "sha256:abc"),
        ("image.pullPolicy", "Sometimes"),
        ("image.repository", "example.com/call-relay:latest"),
        ("ingress.paths", ["recordings"]),
        ("listenHost", "localhost"),
        ("networkPolicy.allowedNetworks", ["ten-net"]),
        ("networkPolicy.metricsFrom", [{"podSelektor": {}}]),
        ("podMonitor.interval", "30"),
        ("publicUrl", "relay.example.com"),
        ("recordings.persistence.accessModes", ["ReadOnlyMany"]),
        ("recordings.storageUrl", "/var/lib/recordings"),
        ("redis.url", "valkey:6379"),
        ("redis.existingSecret", "My Secret"),
        ("service.port", 70000),
        ("topologySpread.whenUnsatisfiable", "Never"),
        ("valkey.appendfsync", "no"),
        ("valkey.maxMemory", "384Mi"),
        ("worker.autoscaling.minReplicas", 0),
        ("worker.autoscaling.mode", "hpa"),
        ("podLabels", {}),
    ],
)
def test_an_invalid_value_is_rejected_by_name(chart: Any, helm: Any, path: str, value: Any) -> None:
    """The message names the field."""
    with pytest.raises(helm.HelmValuesError) as error:
        chart.validate_schema(with_value({}, tuple(path.split(".")), value))
    assert all(step in str(error.value) for step in path.split(".")[:2])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"secrets": {"existingSecret": ""}}, "secrets.existingSecret: set it to a Secret"),
        ({"secrets": {"generate": True}}, "secrets.existingSecret and secrets.generate are mutually exclusive"),
        ({"redis": {"existingSecret": ""}}, "redis: set exactly one"),
        ({"redis": {"url": "redis://x"}}, "redis: set exactly one"),
        ({"valkey": {"enabled": True}}, "redis: set exactly one"),
        ({"valkey": {"enabled": True}, "redis": {"existingSecret": ""}}, "valkey.existingSecret: set it to a Secret"),
        ({"recordings": {"storageUrl": ""}}, "recordings: set exactly one"),
        ({"recordings": {"none": True}}, "recordings: set exactly one"),
        ({"config": {"sources": {}}}, "config and existingConfigSecret are mutually exclusive; config has: sources"),
        (
            {
                "existingConfigSecret": "",
                "recordings": {"storageUrl": "", "none": True},
                "config": {"sources": {"main": {"provider": "webfones"}, "other": {"recordings": False}}},
            },
            "config.sources.main: recordings.none is set",
        ),
        ({"existingConfigSecret": "", "config": {"data_dir": "/x"}}, "config.data_dir has no effect"),
        ({"existingConfigSecret": "", "config": {"storage_url": "/x"}}, "set recordings.storageUrl"),
        ({"existingConfigSecret": "", "config": {"redis_url": "redis://x"}}, "set redis.existingSecret"),
        ({"existingConfigSecret": "", "config": {"secret_key": "x"}}, "set secrets.existingSecret"),
        ({"existingConfigSecret": "", "config": {"drain_s": 9}}, "set drainSeconds"),
        ({"existingConfigSecret": "", "config": {"public_url": "https://x"}}, "set publicUrl"),
        ({"existingConfigSecret": "", "config": {"api": {"port": 1}}}, "config.api.port has no effect"),
        ({"existingConfigSecret": "", "config": {"internal": {"port": 1}}}, "config.internal has no effect"),
        (
            {"existingConfigSecret": "", "config": {"delivery": {"timeout_s": 20.5}}},
            "drainSeconds: must be at least config.delivery.timeout_s + 5, which is 26; it is 25",
        ),
        ({"drainSeconds": 19}, "which is 20; it is 19"),
        ({"existingConfigSecret": "", "config": {"x": "y" * 1_000_001}}, "through the API instead"),
        ({"ingress": {"enabled": True}}, "ingress.hosts: set at least one"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs: set at least one"),
        ({"worker": {"autoscaling": {"mode": "keda"}}}, "keda.serverAddress: set it to"),
        ({"worker": {"autoscaling": {"minReplicas": 20}}}, "maxReplicas: must be at least minReplicas"),
        (
            {
                "recordings": {
                    "storageUrl": "",
                    "persistence": {"enabled": True, "accessModes": ["ReadWriteOnce"]},
                },
                "topologySpread": {"whenUnsatisfiable": "DoNotSchedule"},
            },
            "would leave pods pending",
        ),
    ],
)
def test_conflicting_values_are_rejected(render: Render, helm: Any, extra: Object, words: str) -> None:
    """Rendering fails before anything is installed, and says what to set."""
    with pytest.raises(helm.HelmRenderError) as error:
        render("minimal", extra)
    assert words in str(error.value)


def test_all_problems_are_reported_at_once(chart: Any, helm: Any) -> None:
    """One attempt lists everything to fix."""
    with pytest.raises(helm.HelmRenderError) as error:
        chart.render({"ingress": {"enabled": True}}, name="x", namespace="y")
    assert str(error.value).count("\n  - ") == 4


def test_schema_and_values_have_the_same_names() -> None:
    """A value without a schema cannot be set, and one in the schema alone has no default."""

    def compare(schema: Object, values: Object, path: str) -> None:
        names = set(schema["properties"]) - ({"global"} if not path else set())
        assert names == set(values), path
        for name in names:
            inner = schema["properties"][name]
            if inner.get("additionalProperties") is False and "properties" in inner:
                compare(inner, values[name], f"{path}.{name}")

    compare(SCHEMA, DEFAULTS, "")


def test_every_map_of_the_schema_is_closed() -> None:
    """Except relay.yaml, labels, and what is passed to Kubernetes verbatim."""

    def walk(schema: Any, path: str) -> Iterator[str]:
        if isinstance(schema, dict):
            if "properties" in schema and schema.get("additionalProperties") is not False and path.count("/") > 0:
                yield path
            for key, inner in schema.items():
                yield from walk(inner, f"{path}/{key}")
        elif isinstance(schema, list):
            for index, inner in enumerate(schema):
                yield from walk(inner, f"{path}/{index}")

    assert SCHEMA["additionalProperties"] is False
    assert [path for path in walk(SCHEMA, "") if not path.endswith(("/properties", "/definitions"))] == []


def chart_readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chart_readme", REPOSITORY / ".ci" / "chart_readme.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_readme_matches_the_comments() -> None:
    """`python .ci/chart_readme.py` has been run since values.yaml changed."""
    assert chart_readme().main(["--check"]) == 0


def test_every_value_is_described() -> None:
    """No row of the table is empty, and every default of values.yaml is in it."""
    found = list(chart_readme().values((CHART / "values.yaml").read_text(encoding="utf-8")))
    table = {value.path: value for value in found}

    assert [value.path for value in found if not value.section and not value.description] == []
    for path, value in table.items():
        at: Any = DEFAULTS
        for step in path.split("."):
            at = at[step]
        assert value.section or value.default == at
    described = {path for path, value in table.items() if not value.section}
    assert len(described) > 100
    assert {path.split(".")[0] for path in described} == set(DEFAULTS)

"""The chart, rendered as Helm would, for every values file in helm/relay/ci plus a test's own values."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "helm" / "relay"
MATRIX = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
ROLES = ("api", "poller", "worker")
RELEASE, NAMESPACE = "calls", "voice"

Object = dict[str, Any]


def deep_merge(base: Object, extra: Object) -> Object:
    """Merge two values files, as `helm -f a -f b` does."""
    merged = copy.deepcopy(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = deep_merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def matches(selector: Object, labels: Object) -> bool:
    """Return whether a `matchLabels` selects these labels."""
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())


@dataclass(frozen=True)
class Rendered:
    """The objects rendered from one set of values."""

    values: Object
    objects: list[Object]
    notes: str

    def of(self, kind: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] == kind]

    def one(self, kind: str, name: str) -> Object:
        (found,) = (item for item in self.of(kind) if item["metadata"]["name"] == name)
        return found

    def deployment(self, role: str) -> Object:
        (found,) = (
            item for item in self.of("Deployment") if item["metadata"]["labels"]["app.kubernetes.io/component"] == role
        )
        return found

    def pods(self) -> dict[str, Object]:
        """All pods, by component: labels, annotations and spec."""
        templates = [item["spec"]["template"] for item in self.of("Deployment") + self.of("StatefulSet")]
        return {pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod for pod in templates + self.of("Pod")}


Render = Callable[..., Rendered]


@pytest.fixture(scope="session")
def helm() -> Any:
    """Helm as a library; its tests are skipped where it is not installed."""
    try:
        import helm_python

        helm_python.helm_c_version()
    except ImportError:
        pytest.skip("helm-python-sdk is not installed: `make test` brings it, from .ci/chart.lock")
    except helm_python.HelmError as error:
        pytest.skip(f"helm-python-sdk has no library for this machine: {error}")
    return helm_python


@pytest.fixture(scope="session")
def chart(helm: Any) -> Iterator[Any]:
    with helm.Chart.load(CHART) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def render(chart: Any) -> Render:
    """Render a values file of the matrix, merged with further values."""

    def rendered(values_file: str, extra: Object | None = None, **release: Any) -> Rendered:
        values = deep_merge(yaml.safe_load(MATRIX[values_file].read_text(encoding="utf-8")), extra or {})
        files = chart.render(values, **{"name": RELEASE, "namespace": NAMESPACE, **release})
        notes = next(text for path, text in files.items() if path.endswith("NOTES.txt"))
        manifests = {path: text for path, text in sorted(files.items()) if not path.endswith("NOTES.txt")}
        objects = [item for text in manifests.values() for item in yaml.safe_load_all(text) if item]
        return Rendered(values, objects, notes)

    return rendered


@pytest.fixture(scope="session", params=list(MATRIX))
def release(request: pytest.FixtureRequest, render: Render) -> Rendered:
    """Each values file of the matrix."""
    return render(request.param)

"""Generate helm/relay/README.md from the comments in values.yaml; `--check` only compares.

The comment directly above a key is its description. A map whose children have comments is a section; any other value
is a row of the table.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent.parent / "helm" / "relay"

HEAD = """\
# Helm chart for Call Relay

{description} The chart runs three Deployments (api, poller, worker) with your Redis or Valkey.

```
kubectl create secret generic relay-secrets \\
  --from-literal=secret-key="$(openssl rand -base64 48)" \\
  --from-literal=api-tokens="[\\"$(openssl rand -hex 24)\\"]" \\
  --from-literal=redis-url='rediss://:password@valkey.example.com:6379/0'
kubectl create secret generic relay-config --from-file=relay.yaml
helm install relay ./helm/relay -f my-values.yaml
```

The minimal `my-values.yaml`:

```yaml
{minimal}```

Build the image from the `Dockerfile` in the root of the repository. Push it and set `image.repository`, or load it into
a trial cluster: `kind load docker-image call-relay:{app_version}`, `minikube image load call-relay:{app_version}`.
To try the chart on a single node, without creating Secrets:
`helm install relay ./helm/relay -f ./helm/relay/ci/trial-values.yaml`. `ci/` has more examples.

Requires Kubernetes {kube_version} and Helm 3 or 4.

An unknown value is rejected by name, and a conflict between values with a message that says what to set. `config` is
validated by the relay when it starts.

## Values

`python .ci/chart_readme.py` generates this page from the comments in `values.yaml`.

| value | default | description |
|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Value:
    """One row of the table; `default` is None for a section."""

    path: str
    default: Any
    description: str
    section: bool


def comment_above(lines: list[str], line: int) -> str:
    """Join the comment lines directly above a line (counted from 0)."""
    comment: list[str] = []
    while line > 0 and lines[line - 1].strip().startswith("#"):
        line -= 1
        comment.insert(0, lines[line].strip().lstrip("#").strip())
    return " ".join(comment)


def values(text: str) -> Iterator[Value]:
    """Yield the values in the order of the file."""
    lines = text.splitlines()

    def commented(node: yaml.Node) -> bool:
        return isinstance(node, yaml.MappingNode) and any(
            comment_above(lines, key.start_mark.line) or commented(child) for key, child in node.value
        )

    def walk(node: yaml.MappingNode, prefix: str) -> Iterator[Value]:
        for key, child in node.value:
            path = f"{prefix}{key.value}"
            description = comment_above(lines, key.start_mark.line)
            block = child.start_mark.line > key.start_mark.line
            if isinstance(child, yaml.MappingNode) and block and commented(child):
                yield Value(path, None, description, section=True)
                yield from walk(child, f"{path}.")
            else:
                default = yaml.safe_load(yaml.serialize(child))
                yield Value(path, default, description, section=False)

    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)  # noqa: S101 - values.yaml is ours
    yield from walk(root, "")


def page(chart: Path = CHART) -> str:
    meta = yaml.safe_load((chart / "Chart.yaml").read_text(encoding="utf-8"))
    minimal = (chart / "ci" / "minimal-values.yaml").read_text(encoding="utf-8")
    minimal = "".join(line for line in minimal.splitlines(keepends=True) if not line.startswith("#"))
    kube_version = meta["kubeVersion"].removesuffix("-0")
    parts = [
        HEAD.format(
            description=meta["description"], minimal=minimal, kube_version=kube_version, app_version=meta["appVersion"]
        )
    ]
    for value in values((chart / "values.yaml").read_text(encoding="utf-8")):
        default = "" if value.section else f"`{json.dumps(value.default, ensure_ascii=False)}`"
        name = f"**`{value.path}`**" if value.section else f"`{value.path}`"
        parts.append(f"| {name} | {default} | {value.description} |\n".replace("|  |", "| |"))
    return "".join(parts)


def main(arguments: list[str]) -> int:
    target = CHART / "README.md"
    content = page()
    if arguments == ["--check"]:
        if target.is_file() and target.read_text(encoding="utf-8") == content:
            return 0
        sys.stderr.write("helm/relay/README.md does not match values.yaml; run python .ci/chart_readme.py\n")
        return 1
    if arguments:
        sys.stderr.write("usage: python .ci/chart_readme.py [--check]\n")
        return 2
    target.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

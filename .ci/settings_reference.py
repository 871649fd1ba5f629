"""Write docs/settings.md from the settings themselves; `--check` only compares."""

import sys
from itertools import groupby
from pathlib import Path

from relay.settings import SettingDoc, describe

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """# Settings

Written from the settings themselves by `.ci/settings_reference.py`; a test keeps it true.

`relay up --config relay.yaml`, or `RELAY_CONFIG`; without either a `relay.yaml` in the working directory is read, if
there is one. Every setting is also an environment variable, which wins over the file: `RELAY_` and the path in
capitals, `__` between its parts. `RELAY_SOURCES__MAIN__API_KEY` is `sources.main.api_key`, `RELAY_LOG__FORMAT=json` is
`log.format`. Lists and maps are written as JSON.

`sources` and `subscriptions` are maps by an id of your choice (lower-case letters, digits, `-` and `_`). An id is for
ever: the ids of calls and events are made of it, so a renamed source makes new calls.

Relative paths start at the folder of the file, without a file at the working directory. A secret can be in a file of
its own: `api_key_file` for `api_key`, `url_file`, `secret_file`. `kill -HUP` (or `systemctl reload`) reads sources and
subscriptions again; other settings need a restart. A mistake stops the start with a sentence for each.
"""


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for title, rows in groupby(sorted(describe(), key=_order), key=_title):
        lines += [f"\n## {title}\n", "| setting | what | default |", "|---|---|---|"]
        lines += [f"| `{row.path}` | {row.description} ({_cell(row.type)}) | {_default(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _title(row: SettingDoc) -> str:
    top = row.path.partition(".")[0]
    if top == "sources":
        return f"Sources: {row.provider}" if row.provider else "Sources: every provider"
    return "Subscriptions" if top == "subscriptions" else "The relay"


def _order(row: SettingDoc) -> tuple[int, str]:
    titles = ("The relay", "Sources: every provider")
    title = _title(row)
    return (titles.index(title), "") if title in titles else (3 if title == "Subscriptions" else 2, title)


def _default(row: SettingDoc) -> str:
    return f"`{row.default}`" if row.default not in (None, "null") else ("—" if row.default == "null" else "required")


def _cell(text: str) -> str:
    return text.replace("|", "or").replace("  ", " ")


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(None if PAGE.read_text() == page() else "docs/settings.md is old: run .ci/settings_reference.py")
    PAGE.write_text(page())

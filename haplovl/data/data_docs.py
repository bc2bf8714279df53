"""Data docs of Great Expectations as pages that need no network and depend on nothing but what was judged.

Its pages load their styling, and scripts that build the index, from six servers; without them the index is empty. Here
they get a stylesheet of their own and no script, and the index is written anew.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

SITE = "records"
FIXED_TIME = datetime(2000, 1, 1, tzinfo=UTC)
"""Stands for the run's time: data docs are a DVC out and hold no clock."""

STYLE = """
:root { color-scheme: light dark; --line: #8885; --box: #8882; --good: #1a7f37; --bad: #cf222e; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1280px; padding: 0 1.5rem 3rem; }
h4, h5, h6, p { margin: .3rem 0; } h4 { font-size: 1.25rem; } h5 { font-size: 1.1rem; } h6, .h6 { font-size: 1rem; }
.navbar { display: flex; align-items: center; } .sticky-top { border-bottom: 1px solid var(--line); }
.breadcrumb { list-style: none; display: flex; margin: 0 0 0 1rem; padding: 0; }
.breadcrumb-item + .breadcrumb-item::before { content: "/"; padding: 0 .5rem; }
.nav, .list-group { list-style: none; margin: 0; padding: 0; } .navbar.bg-light { display: block; }
.container-fluid > .row:has(> .col-md-10) { display: grid; grid-template-columns: 15rem 1fr; gap: 2rem; }
@media (max-width: 800px) { .container-fluid > .row:has(> .col-md-10) { display: block; } }
.sticky { position: sticky; top: 1rem; }
.card { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; overflow: auto; }
.card-header, .alert { background: var(--box); border-radius: 6px; margin: .5rem 0; padding: .5rem .75rem; }
.card-body { padding: .5rem .75rem; } .collapse { display: none; } .collapse:target { display: block; }
.collapse.p-1 { border: 0; display: block; margin: 0; padding: 0; } li hr { display: none; }
.sticky > .card:has(.btn-group) { display: none; }
table { border-collapse: collapse; margin: .4rem 0; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; }
.badge, code { background: var(--box); border-radius: 4px; padding: 0 .35rem; }
.text-danger, .bad { color: var(--bad); }
.fa-check-circle::before { content: "✓"; color: var(--good); } .fa-times::before { content: "✗"; color: var(--bad); }
.fa-exclamation-triangle::before { content: "!"; color: var(--bad); } .fas { font-style: normal; font-weight: bold; }
.cooltip .top { display: none; } .good { color: var(--good); }
"""

_INDEX = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="UTF-8"><title>Data docs</title><style>{style}</style></head>
<body>
<h4>Data docs</h4>
<p>What the suites of Great Expectations found in the collected data.</p>
<table>
<tr><th>Judged</th><th>Outcome</th><th>Expectations that failed</th></tr>
{rows}
</table>
<p>Suites: {suites}</p>
</body>
</html>
"""


@dataclass(frozen=True)
class Outcome:
    """One table that was judged: its suite, its name, and the names of the checks that failed."""

    suite: str
    name: str
    failed: tuple[str, ...]


def write_docs(context: Any, outcomes: list[Outcome], docs: Path) -> None:
    """Builds the site of all that `context` judged in the existing folder `docs`; `outcomes` become its index."""
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    site = {"class_name": "SiteBuilder", "store_backend": store, "site_index_builder": index}
    context.add_data_docs_site(SITE, site | {"show_how_to_buttons": False})
    context.build_data_docs(site_names=[SITE])
    for page in sorted(docs.rglob("*.html")):
        to_root = "../" * (len(page.relative_to(docs).parts) - 1)
        text = _offline(_without_run(page.read_text(encoding="utf-8")), to_root)
        page.write_text(text, encoding="utf-8")
    (docs / "index.html").write_text(_index(outcomes, docs), encoding="utf-8")


def _index(outcomes: list[Outcome], docs: Path) -> str:
    rows = []
    for outcome in outcomes:
        (page,) = (docs / "validations" / outcome.suite / outcome.name).rglob("*.html")
        link = quote(page.relative_to(docs).as_posix())
        state = '<span class="bad">✗ failed</span>' if outcome.failed else '<span class="good">✓ passed</span>'
        failed = escape(", ".join(outcome.failed))
        rows.append(f'<tr><td><a href="{link}">{escape(outcome.name)}</a></td><td>{state}</td><td>{failed}</td></tr>')
    suites = sorted({outcome.suite for outcome in outcomes})
    links = ", ".join(f'<a href="expectations/{quote(suite)}.html">{escape(suite)}</a>' for suite in suites)
    return _INDEX.format(style=STYLE, rows="\n".join(rows), suites=links)


def _offline(page: str, to_root: str) -> str:
    """A page with our stylesheet in the place of everything that is fetched from servers, and of all scripts."""
    taken_out = r"<script\b.*?</script>|<style\b.*?</style>|<footer\b.*?</footer>|<link\b[^>]*>"
    page = re.sub(taken_out, "", page, flags=re.DOTALL)
    page = re.sub(r'https://[^"\s]*/logo-long\.png\?d=[0-9TZ.]+', f"{to_root}static/images/logo-long.png", page)
    return page.replace("</head>", f"<style>{STYLE}</style></head>", 1)


def _without_run(page: str) -> str:
    """A page without the random ids and the clock."""
    page = re.sub(r"(collapse-body-)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", r"\1fixed", page)
    page = re.sub(r"\b20\d{6}T\d{6}\.\d{6}Z", FIXED_TIME.strftime("%Y%m%dT%H%M%S.%fZ"), page)
    # FIXED_TIME itself is shown in this machine's time zone.
    return re.sub(r"\b(1999-12-31|2000-01-01)[T ]\d\d:\d\d:\d\d(Z| [-+\w]+)", "2000-01-01 00:00:00 UTC", page)

"""The report page: complete, self-contained, and harmless whatever names a model has."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from lowbit.compiler.job.report import render_html, worst_layers, write_report

HOSTILE = "<script>alert(1)</script>\"'&</td>"
REPORT = {
    "model": HOSTILE,
    "scheme": {"name": "w4a16", "options": {"damping": 0.01}},
    "totals": {"bits_per_weight": 5.5, "seconds": 12.0},
    "notes": [HOSTILE],
    "layers": [
        {"path": "a", "format": "int4.g64.sym", "proxy_error": 0.5, "seconds": 1.0},
        {"path": HOSTILE, "format": "int4.g64.sym", "proxy_error": 2.0, "seconds": 1.0},
        {"path": "c", "format": "int4.g64.sym", "proxy_error": float("nan"), "seconds": 1.0},
    ],
}


class Tags(HTMLParser):
    """Names of all elements, and whether they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_and_has_no_script_or_outside_reference() -> None:
    page = render_html(REPORT)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.seen.isdisjoint({"script", "img", "link", "iframe", "a", "object"})
    assert "http" not in page.replace("http-equiv", "")
    assert "Content-Security-Policy" in page


def test_every_layer_and_total_is_shown() -> None:
    page = render_html(REPORT)
    assert "int4.g64.sym" in page
    assert "All 3 layers" in page
    assert re.search(r"bits per weight</th><td>5.5", page)
    assert "scheme.options.damping" in page


def test_worst_layers_come_first() -> None:
    assert [layer["path"] for layer in worst_layers(REPORT, 1)] == [HOSTILE]


def test_files_are_written_whole(tmp_path: Path) -> None:
    write_report(tmp_path, REPORT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["layers"][2]["proxy_error"] is None
    assert values["model"] == HOSTILE


def test_an_empty_report_is_a_page() -> None:
    assert "none" in render_html({})

"""The report of a run: `report.json` for machines, `report.html` for people.

The page is one file without scripts or outside references, and everything that came from a model or a path is escaped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

__all__ = ["render_html", "worst_layers", "write_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
body { color: #1c2024; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #e3e6e8; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: #4a7dbd; height: .6rem; display: block; }
.scroll { overflow-x: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #15181b; color: #dfe3e6; } th, td { border-color: #33383d; }
}
""".strip()


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json` and `report.html` into `folder`, each staged and renamed."""
    _write(folder / "report.json", json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _write(folder / "report.html", render_html(report))


def _write(path: Path, text: str) -> None:
    staged = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with staged.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """The same tree with NaN and infinities as null, which JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not (value == value and abs(value) != float("inf")):
        return None
    return value


def worst_layers(report: Mapping[str, Any], count: int = 10) -> list[Mapping[str, Any]]:
    """The layers with the largest `proxy_error`: the output error relative to the output, on calibration data."""
    layers = [layer for layer in report.get("layers", []) if _badness(layer) is not None]
    return sorted(layers, key=lambda layer: -(_badness(layer) or 0.0))[:count]


def _badness(layer: Mapping[str, Any]) -> float | None:
    value = layer.get("proxy_error")
    return float(value) if isinstance(value, int | float) and value == value else None


def render_html(report: Mapping[str, Any]) -> str:
    """The page for a report: totals, what was run, the worst layers, and every layer."""
    layers: Sequence[Mapping[str, Any]] = report.get("layers", [])
    title = f"Quantization report: {report.get('model', 'model')}"
    rest = {k: v for k, v in report.items() if k not in ("layers", "totals", "notes")}
    parts = [
        f"<h1>{_text(title)}</h1>",
        _section("Totals", _pairs(_flat(report.get("totals", {})))),
        _section("Notes", "<ul>" + "".join(f"<li>{_text(n)}</li>" for n in report.get("notes", [])) + "</ul>"),
        _section("Worst layers", _layer_table(worst_layers(report))),
        _section("The run", _pairs(_flat(rest))),
        _section(f"All {len(layers)} layers", _layer_table(layers)),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(title)}</title>'
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    body = "\n".join(parts)
    head += f"{policy}<style>{_STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>\n<div class=scroll>{content}</div>"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _pairs(pairs: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(f"<tr><th>{_text(name.replace('_', ' '))}</th><td>{_text(value)}</td></tr>" for name, value in pairs)
    return f"<table>{rows}</table>"


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    if not layers:
        return "<p>none</p>"
    columns = list(dict.fromkeys(key for layer in layers for key in layer))
    top = max((_badness(layer) or 0.0 for layer in layers), default=0.0) or 1.0
    head = "".join(f"<th{_numeric(layers[0].get(c))}>{_text(c.replace('_', ' '))}</th>" for c in columns)
    rows = []
    for layer in layers:
        cells = "".join(f"<td{_numeric(layer.get(c))}>{_text(layer.get(c, ''))}</td>" for c in columns)
        width = 100 * max(0.0, min(1.0, (_badness(layer) or 0.0) / top))
        rows.append(f'<tr>{cells}<td style="width:8rem"><span class=bar style="width:{width:.1f}%"></span></td></tr>')
    return f"<table><tr>{head}<th>error</th></tr>{''.join(rows)}</table>"


def _numeric(value: Any) -> str:
    return " class=n" if isinstance(value, int | float) and not isinstance(value, bool) else ""


def _text(value: Any) -> str:
    """Any value as escaped text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return escape(", ".join(str(v) for v in value)) or "none"
    return escape(str(value))

"""`quantize formats` and `quantize schemes`: what there is to choose from."""

from __future__ import annotations

from typing import Any

import typer

from lowbit.commands._output import JsonFlag, print_json, print_table, quiet_stdout

__all__ = ["formats", "schemes"]

_SHAPE = (4096, 4096)


def formats(json_output: JsonFlag = False) -> None:
    """List number formats: bits, symmetry, an example, who can load them, and which backends run them."""
    with quiet_stdout(json_output):
        rows = _format_rows()
    if json_output:
        names = {"granularities": ["t", "ch", "g<columns>"], "scales": _scales(), "aliases": _aliases()}
        print_json({"formats": rows, **names})
        return
    print_table(
        ("element", "bits", "zero point", "example", "bits/weight", "exported as", "backends"),
        [
            (
                r["element"],
                r["bits"],
                r["zero"],
                r["example"],
                f"{r['bits_per_weight']:.3f}",
                r["export"],
                " ".join(r["backends"]),
            )
            for r in rows
        ],
    )
    typer.echo("")
    typer.echo("A format is element.granularity.symmetry[.scale], such as int4.g128.asym or int8.ch.sym.f32:")
    typer.echo("  element      int1 to int8; nf4; e<exponent>m<mantissa> (floats of up to 8 bits), as in e3m2.ch")
    typer.echo("  symmetry     sym, asym (a zero point stored as a code), fz (an offset stored like the scale)")
    typer.echo("  granularity  t (one scale per tensor), ch (per output row), g64 (per 64 input columns; any size)")
    typer.echo(f"  scale        {', '.join(_scales())}; f16 when left out; e4m3.t32 adds a float32 per tensor")
    typer.echo("bcq2 to bcq4 are binary coding: sums of so many signs, each with its own scale, as in bcq3.g128")
    typer.echo(
        "tcq1 to tcq4 are trellis codes: a weight's value follows from its code and those before it, as in tcq2.ch"
    )
    typer.echo("Short names: " + ", ".join(f"{name} = {text}" for name, text in _aliases().items()))
    typer.echo("With | between several formats, each layer gets the one with the lowest error: int6.ch.sym|e2m3.ch")
    typer.echo(
        "Vector quantization is vq.d<length>.k<centroids>[.r<residual centroids>][.c<column groups>], then any of"
    )
    typer.echo(
        "  o<columns>v<length>k<centroids> (outliers; 2p is 2 percent), cn or rn (norms per column or row), a type."
    )
    typer.echo("  Vectors run along the outputs (VPTQ's), or with .in along the inputs (AQLM's): vq.d8.k256.r256.in.rn")


def _scales() -> list[str]:
    from lowbit.quantizers.formats import SCALE_DTYPES

    return list(SCALE_DTYPES)


def _aliases() -> dict[str, str]:
    from lowbit.quantizers.formats import ALIASES

    return ALIASES


def _format_rows() -> list[dict[str, Any]]:
    from dataclasses import replace

    from lowbit.compiler.io.checkpoint import export_layout
    from lowbit.compiler.job.plan import runs_on
    from lowbit.quantizers.formats import (
        Granularity,
        WeightFormat,
        catalog,
        sum_catalog,
        trellis_catalog,
        vector_catalog,
    )

    def row(fmt: WeightFormat, element: str, bits: float, zero: str) -> dict[str, Any]:
        runs = runs_on(fmt)
        return {
            "element": element,
            "bits": bits,
            "zero": zero,
            "example": str(fmt),
            "bits_per_weight": fmt.bits_per_weight(*_SHAPE),
            "export": export_layout(fmt),
            "backends": [name for name, why in runs.items() if why is None],
            "why_not": {name: why for name, why in runs.items() if why is not None},
        }

    rows = []
    for base in catalog():
        fmt = replace(base, granularity=Granularity("g", 64 if base.bits <= 4 else 128))
        zero = "code" if fmt.zero else "float" if fmt.offset else "no"
        rows.append(row(fmt, fmt.element.name, fmt.bits, zero))
    for binary in sum_catalog():
        rows.append(row(binary, f"bcq{binary.terms}", binary.code_bits, "no"))
    for trellis in trellis_catalog():
        rows.append(row(trellis, trellis.element.name, trellis.bits, "no"))
    for vector in vector_catalog():
        bits = (vector.index_bits + vector.residual_bits) / vector.dim
        rows.append(row(vector, "vq", bits, "no"))
    return rows


def schemes(json_output: JsonFlag = False) -> None:
    """List schemes: named choices of format and method for a whole model."""
    from lowbit.quantizers.scheme import PRESETS

    rows = [{**s.to_dict(), "bits_per_weight": s.weight.bits_per_weight(*_SHAPE)} for s in PRESETS.values()]
    if json_output:
        print_json({"schemes": rows, "default": "w4a16"})
        return
    print_table(
        ("scheme", "weights", "bits/weight", "inputs", "cache", "method", "rewrites", "kept as they are"),
        [
            (
                r["name"],
                r["weight"],
                f"{r['bits_per_weight']:.3f}",
                r.get("activation", ""),
                r.get("kv", ""),
                r["method"],
                ", ".join(r.get("rewrites", ())),
                ", ".join(r["ignore"]),
            )
            for r in rows
        ],
    )
    typer.echo("")
    typer.echo(
        "The default is w4a16. A scheme can also be a .toml file; --format, --activation, --kv, --rewrite and --method "
        "replace parts of one."
    )

"""Turn a JUnit file into a short JSON: `python bench/junit_summary.py tests.xml EXIT_STATUS tests.json`.

Nothing is written when the tests did not get to their end, so that a repeated run starts them again.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def summary(xml: Path, status: int) -> dict[str, object]:
    """Counts, seconds, and name and first line of every failure."""
    suite = ET.parse(xml).getroot().find("testsuite")
    if suite is None:
        raise SystemExit(f"{xml} has no test suite")
    failures = {}
    for case in suite.iter("testcase"):
        for problem in (*case.findall("failure"), *case.findall("error")):
            failures[case.get("name", "?")] = (problem.get("message") or "").splitlines()[:1]
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    return {"exit_status": status, **counts, "seconds": float(suite.get("time", "0")), "failed": failures}


def main() -> int:
    """The command line."""
    xml, status, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    if status not in (0, 1) or not xml.exists():
        print(f"tests ended with {status}: no summary", file=sys.stderr)
        return 1
    result = summary(xml, status)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "failed"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

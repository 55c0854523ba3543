"""Turn a JUnit file into a short JSON: `python bench/junit_summary.py tests.xml EXIT_STATUS tests.json`.

Nothing is written there when the tests did not get to their end; but tests that passed are added to `tests.passed`
beside it, a line each as pytest names them, so that a repeated run can leave them out.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def summary(suite: ET.Element, status: int, before: int) -> dict[str, object]:
    """Counts, seconds, and name and first line of every failure. before: tests that passed in runs before."""
    failures = {}
    for case in suite.iter("testcase"):
        for problem in (*case.findall("failure"), *case.findall("error")):
            failures[case.get("name", "?")] = (problem.get("message") or "").splitlines()[:1]
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    seconds = float(suite.get("time", "0"))
    return {"exit_status": status, **counts, "passed_before": before, "seconds": seconds, "failed": failures}


def passed(suite: ET.Element) -> list[str]:
    """Names of tests that passed, as pytest takes them."""
    cases = [case for case in suite.iter("testcase") if not len(case)]  # others hold a failure, or why they are skipped
    return [f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}" for case in cases]


def main() -> int:
    """The command line."""
    xml, status, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    suite = ET.parse(xml).getroot().find("testsuite") if xml.exists() else None
    if suite is None:
        print(f"tests ended with {status}: no summary", file=sys.stderr)
        return 1
    done = out.with_suffix(".passed")
    before = done.read_text().splitlines() if done.exists() else []
    done.write_text("".join(f"{name}\n" for name in dict.fromkeys([*before, *passed(suite)])))
    if status not in ((0, 1, 5) if before else (0, 1)):  # 5: none was left to run
        print(f"tests ended with {status}; the next run leaves out those that passed", file=sys.stderr)
        return 1
    result = summary(suite, status, len(before))
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "failed"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

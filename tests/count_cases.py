#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Turns one `bazel test` run into a list of test cases, a line each.

    count_cases.py --expected LABELS --events EVENTS --section NAME

EVENTS is what --build_event_json_file wrote; LABELS names the tests that should have run, one a line.
Written to stdout, separated by tabs: PASS, FAIL or SKIP, the section, the test's label, the case.

A test program is read case by case from its log when it speaks cmocka, and counts as one case when it does
not. What keeps the numbers honest:

  - A case has passed only if its program said so; one that began and never ended has failed.
  - A program that failed without a failed case (a leak at exit, a race, a crash between two cases, a
    fixture that could not be set up, a time limit) adds a failed case of its own.
  - A test that was expected and has no result, for instance because it did not compile, has failed.
  - A program that passed with no case at all in a cmocka log has failed: it tested nothing.
"""

import argparse
import collections
import json
import re
import sys
from urllib.parse import unquote, urlparse

# cmocka 1.1.5. Not anchored at the left: a case may have printed half a line before its verdict. Its
# closing summary repeats "[  FAILED  ] name", which is why failures are not counted but left over.
_BEGAN = re.compile(r"\[ RUN      \] (\S+)")
_PASSED = re.compile(r"\[       OK \] (\S+)")
_SKIPPED = re.compile(r"\[  SKIPPED \] (\S+)")
_GROUP = re.compile(r"\[==========\]")


def cases_of_log(log, program_passed):
    """[(verdict, case name)] of one program, whose log is the text `log`."""
    began = collections.Counter(_BEGAN.findall(log))
    passed = collections.Counter(_PASSED.findall(log))
    skipped = collections.Counter(_SKIPPED.findall(log))

    cases = []
    for name, times in began.items():
        ok = min(passed[name], times)
        skip = min(skipped[name], times - ok)
        bad = times - ok - skip
        cases += [("PASS", name)] * ok + [("SKIP", name)] * skip + [("FAIL", name)] * bad

    if not cases and program_passed and _GROUP.search(log):
        return [("FAIL", "(ran no case)")]
    if not cases:
        return [("PASS" if program_passed else "FAIL", "(program)")]
    if not program_passed and not any(verdict == "FAIL" for verdict, _ in cases):
        cases.append(("FAIL", "(program failed, no case did)"))
    return cases


def results_of_events(lines):
    """{label: [(passed, status, path of the log)]}: one entry per run of the test."""
    results = collections.defaultdict(list)
    for line in lines:
        event = json.loads(line)
        if "testResult" not in event:
            continue
        status = event["testResult"].get("status", "NO_STATUS")
        logs = [
            unquote(urlparse(output["uri"]).path)
            for output in event["testResult"].get("testActionOutput", [])
            if output["name"] == "test.log"
        ]
        label = event["id"]["testResult"]["label"]
        results[label].append((status in ("PASSED", "FLAKY"), status, logs[0] if logs else None))
    return results


def cases_of_run(expected, results, read):
    """[(verdict, label, case)] for all expected labels; read(path) gives the text of a log."""
    cases = []
    for label in expected:
        if label not in results:
            cases.append(("FAIL", label, "(did not build or did not run)"))
        for passed, status, path in results.get(label, []):
            log = read(path) if path else ""
            for verdict, name in cases_of_log(log, passed):
                if verdict == "FAIL" and status == "TIMEOUT":
                    name += " (time limit)"
                cases.append((verdict, label, name))
    return cases


def _read(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--expected", required=True)
    parser.add_argument("--events", required=True)
    parser.add_argument("--section", required=True)
    options = parser.parse_args()

    expected = _read(options.expected).split()
    try:
        results = results_of_events(_read(options.events).splitlines())
    except FileNotFoundError:  # Bazel stopped before it began
        results = {}
    for verdict, label, name in cases_of_run(expected, results, _read):
        print(verdict, options.section, label, name, sep="\t")


if __name__ == "__main__":
    sys.exit(main())

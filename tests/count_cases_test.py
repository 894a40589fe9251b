#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The counter of test cases must not be fooled: by logs as cmocka 1.1.5 really writes them."""

import json
import unittest

import count_cases

ALL_GOOD = """\
[==========] Running 2 test(s).
[ RUN      ] opens
[       OK ] opens
[ RUN      ] closes
half a line[       OK ] closes
[==========] 2 test(s) run.
[  PASSED  ] 2 test(s).
"""

ONE_BAD = """\
[==========] Running 3 test(s).
[ RUN      ] opens
[       OK ] opens
[ RUN      ] breaks
[  ERROR   ] --- 0x1 != 0x2
[   LINE   ] --- some_test.c:12: error: Failure!
[  FAILED  ] breaks
[ RUN      ] waits
[  SKIPPED ] waits
[==========] 3 test(s) run.
[  PASSED  ] 1 test(s).
[  SKIPPED ] 1 test(s), listed below:
[  SKIPPED ] waits
[  FAILED  ] 1 test(s), listed below:
[  FAILED  ] breaks

 1 FAILED TEST(S)
"""

CRASHED = """\
[==========] Running 2 test(s).
[ RUN      ] opens
[       OK ] opens
[ RUN      ] crashes
==12==ERROR: AddressSanitizer: heap-use-after-free
"""

EMPTY = "[==========] Running 0 test(s).\n[==========] 0 test(s) run.\n[  PASSED  ] 0 test(s).\n"


class Logs(unittest.TestCase):
    def verdicts(self, log, passed):
        return sorted(count_cases.cases_of_log(log, passed))

    def test_each_case_counts_once(self):
        self.assertEqual(self.verdicts(ALL_GOOD, True), [("PASS", "closes"), ("PASS", "opens")])

    def test_the_summary_is_not_counted_again(self):
        self.assertEqual(
            self.verdicts(ONE_BAD, False),
            [("FAIL", "breaks"), ("PASS", "opens"), ("SKIP", "waits")],
        )

    def test_a_case_that_never_ended_has_failed(self):
        self.assertEqual(self.verdicts(CRASHED, False), [("FAIL", "crashes"), ("PASS", "opens")])

    def test_a_failed_program_without_a_failed_case_fails(self):
        self.assertIn("FAIL", [verdict for verdict, _ in self.verdicts(ALL_GOOD, False)])

    def test_the_same_name_in_two_groups_is_two_cases(self):
        self.assertEqual(len(self.verdicts(ALL_GOOD + ALL_GOOD, True)), 4)

    def test_a_script_is_one_case(self):
        self.assertEqual(self.verdicts("fine\n", True), [("PASS", "(program)")])
        self.assertEqual(self.verdicts("", False), [("FAIL", "(program)")])

    def test_a_suite_without_a_case_has_failed(self):
        self.assertEqual(self.verdicts(EMPTY, True), [("FAIL", "(ran no case)")])


class Runs(unittest.TestCase):
    def event(self, label, status):
        return json.dumps({
            "id": {"testResult": {"label": label}},
            "testResult": {
                "status": status,
                "testActionOutput": [{"name": "test.log", "uri": "file:///logs/" + label[2:]}],
            },
        })

    def cases(self, expected, *events):
        results = count_cases.results_of_events(['{"id": {"progress": {}}}', *events])
        return count_cases.cases_of_run(expected, results, lambda path: "")

    def test_a_test_without_a_result_has_failed(self):
        cases = self.cases(["//a:a", "//b:b"], self.event("//a:a", "PASSED"))
        self.assertEqual([verdict for verdict, _, _ in cases], ["PASS", "FAIL"])

    def test_every_status_but_passed_is_a_failure(self):
        for status in ("FAILED", "TIMEOUT", "INCOMPLETE", "NO_STATUS", "FAILED_TO_BUILD"):
            cases = self.cases(["//a:a"], self.event("//a:a", status))
            self.assertEqual([verdict for verdict, _, _ in cases], ["FAIL"], status)

    def test_no_events_at_all_fail_everything(self):
        self.assertEqual([verdict for verdict, _, _ in self.cases(["//a:a"])], ["FAIL"])


if __name__ == "__main__":
    unittest.main()

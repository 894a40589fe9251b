#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""What the README says is served, what the contract declares, and what the daemon answers are one.

    contract_test.py KIVID DESCRIPTORS README

Every call of every service in the descriptors stands once in the README's table, either as served or as
UNIMPLEMENTED, and answers accordingly: the latter with its own name, the former with anything else.
"""

import re
import sys
import unittest

import grpc

import foreign_client_test as stranger

SERVICES = ("kivi.v1.Kivi", "kivi.v1.Admin")
STANDARD = ("health", "reflection")  # services of gRPC's own, which the other tests call


def row_of_the_table(name):
    """The calls that a row of README.md's table names; what is in parentheses explains."""
    with open(sys.argv[3], encoding="utf-8") as readme:
        rows = [line for line in readme if line.startswith(f"| {name} |")]
    assert len(rows) == 1, f"README.md has {len(rows)} rows '{name}'"
    names = re.sub(r"\([^)]*\)", "", rows[0].split("|")[2]).split(",")
    return [one.strip() for one in names if one.strip() not in STANDARD]


SERVED = row_of_the_table("served")
UNIMPLEMENTED = row_of_the_table("in the contract, UNIMPLEMENTED")


class ContractTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.kivid = stranger.Kivid()
        cls.channel = cls.kivid.channel()
        cls.methods = {method.name: (service, method) for service in SERVICES
                       for method in stranger.POOL.FindServiceByName(service).methods}

    @classmethod
    def tearDownClass(cls):
        cls.channel.close()
        cls.kivid.stop()

    def answer(self, name):
        """(code, details) of the call with an empty message, through the stub of its shape."""
        service, method = self.methods[name]
        stub = stranger.Stub(self.channel, service)
        empty = stranger.FACTORY.GetPrototype(method.input_type)()
        try:
            streams = name in ("Append", "Attend", "Put")
            answer = getattr(stub, name)(iter([empty]) if streams else empty, timeout=10)
            if hasattr(answer, "__next__"):
                list(answer)
        except grpc.RpcError as error:
            return error.code(), error.details()
        return grpc.StatusCode.OK, ""

    def test_the_readme_names_every_call_of_the_contract_once(self):
        self.assertEqual(sorted(SERVED + UNIMPLEMENTED), sorted(self.methods))

    def test_what_the_readme_calls_unimplemented_says_so_by_name(self):
        for name in UNIMPLEMENTED:
            self.assertEqual(self.answer(name), (
                grpc.StatusCode.UNIMPLEMENTED, f"{name}: not served by this version"))

    def test_what_the_readme_calls_served_is(self):
        for name in SERVED:
            code, details = self.answer(name)
            self.assertIn(code, (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT,
                                 grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION),
                          f"{name}: {details}")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)

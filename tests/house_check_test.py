#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""house_check must find what it claims to find.

Each test plants one violation in a small repository that is otherwise in order, and wants exactly that
one found, by its rule.
"""

import os
import shutil
import tempfile
import unittest

import house_check

SPDX = "/* SPDX-License-Identifier: Apache-2.0 */\n"

IN_ORDER = {
    "BUILD": "# SPDX-License-Identifier: Apache-2.0\n",
    "README.md": "See [the tests](tests/run), /etc/kivid.yaml and https://example.org/a/b/c.\n",
    "proto/check.h": SPDX + "#include <stdint.h>\n",
    "kernels/device.h": SPDX + '#include "proto/check.h"\n',
    "kernels/page.h": SPDX + '#include "proto/check.h"\n',
    "storage/store.c": SPDX + '#include "kernels/device.h"\n#include "proto/check.h"\n',
    "storage/store_test.c": SPDX + '#include "storage/store.h"\n#include "tests/seed.h"\n',
    "service/engine.c": SPDX + '#include "kernels/page.h"\n#include "storage/store.h"\n',
    "service/rpc.c": SPDX + "#include <grpc/grpc.h>\n#include <protobuf-c/protobuf-c.h>\n",
    "clients/c/kivi.c": SPDX + '#include "proto/kivi/v1/kivi.pb-c.h"\n#include <grpc/grpc.h>\n',
    "clients/c/kivi_test.c": SPDX + 'mkdtemp("/tmp/kivi-XXXXXX");\n',
    "clients/cli/main.c": SPDX + '#include "clients/c/kivi.h"\n',
    "tests/run": "#!/bin/bash\n# SPDX-License-Identifier: Apache-2.0\n../tests/run\n",
    "tests/data/raw.bin": "no licence here",
}


class Planted(unittest.TestCase):
    def rules(self, planted):
        with tempfile.TemporaryDirectory() as root:
            for path, text in {**IN_ORDER, **planted}.items():
                os.makedirs(os.path.dirname(os.path.join(root, path)), exist_ok=True)
                with open(os.path.join(root, path), "w") as file:
                    file.write(text)
            return [(finding.path, finding.rule) for finding in house_check.check(root)]

    def finds(self, rule, path, text):
        self.assertEqual(self.rules({path: text}), [(path, rule)])

    def test_nothing_where_all_is_in_order(self):
        self.assertEqual(self.rules({}), [])

    def test_what_git_ignores_is_not_looked_at(self):
        planted = {".git/HEAD": "ref: refs/heads/main\n", ".gitignore": "*_pb2.py\n"}
        planted.update({".git/objects/none": "", ".git/refs/none": ""})
        planted.update({"clients/a_pb2.py": "made\n", "clients/b.py": "written\n"})
        if shutil.which("git"):
            self.assertEqual(self.rules(planted), [("clients/b.py", "licence")])

    def test_an_include_of_a_later_room(self):
        self.finds("include", "proto/a.h", SPDX + '#include "kernels/page.h"\n')
        self.finds("include", "kernels/a.c", SPDX + '#include "storage/store.h"\n')
        self.finds("include", "storage/a.c", SPDX + '#include "service/engine.h"\n')

    def test_storage_sees_only_device_memory(self):
        self.finds("include", "storage/a.c", SPDX + '#include "kernels/page.h"\n')

    def test_clients_and_server_share_only_the_words(self):
        self.finds("include", "clients/c/a.c", SPDX + '#include "kernels/page.h"\n')
        self.finds("include", "clients/c/a.c", SPDX + '#include "clients/cli/table.h"\n')
        self.finds("include", "service/a.c", SPDX + '#include "clients/c/kivi.h"\n')

    def test_only_tests_use_what_tests_share(self):
        self.finds("include", "storage/a.c", SPDX + '#include "tests/seed.h"\n')

    def test_an_include_that_does_not_start_at_the_root(self):
        self.finds("include", "storage/a.c", SPDX + '#include "store.h"\n')
        self.finds("include", "storage/a.c", SPDX + '#include "../proto/check.h"\n')

    def test_grpc_away_from_the_wire(self):
        self.finds("grpc", "service/engine.h", SPDX + "#  include <grpc/slice.h>\n")
        self.finds("grpc", "clients/cli/a.c", SPDX + "#include <grpc/grpc.h>\n")

    def test_protobuf_away_from_the_wire(self):
        self.finds("protobuf", "storage/a.c", SPDX + '#include "proto/kivi/v1/kivi.pb-c.h"\n')
        self.finds("protobuf", "kernels/a.c", SPDX + "#include <protobuf-c/protobuf-c.h>\n")

    def test_protobuf_in_too_many_files(self):
        text = SPDX + "#include <protobuf-c/protobuf-c.h>\n"
        many = {"service/rpc_%d.c" % i: text for i in range(house_check.PROTOBUF_FILES_MAX)}
        self.assertEqual({rule for _, rule in self.rules(many)}, {"protobuf"})

    def test_a_source_without_a_licence(self):
        self.finds("licence", "storage/a.c", "int a;\n")
        self.finds("licence", "storage/a.c", "\n" + SPDX)
        self.finds("licence", "deploy/script", "#!/bin/bash\ntrue\n")
        self.finds("licence", "tests/BUILD", "cc_test()\n")

    # Put together from parts, or this file would be found as well.
    def test_a_path_of_one_machine(self):
        for parts in (("home", "ann", "kivid"), ("root", "kivid"), ("work", "main", "a")):
            self.finds("path", "deploy/notes.md", "cd " + "/" + "/".join(parts) + "\n")
            self.finds("path", "deploy/notes.md", "gcc -I" + "/" + "/".join(parts) + "\n")
        self.finds("path", "storage/a.c", SPDX + 'open("' + "/" + "/".join(("tmp", "a")) + '");\n')

    def test_a_path_out_of_the_repository(self):
        for parts in (("..", "other", "kv"), ("..", "..", "README.md"), ("..", "storage", "none.c")):
            self.finds("path", "deploy/notes.md", "cp " + "/".join(parts) + " .\n")

    def test_a_repository_too_big(self):
        big = {"tests/data/%d.bin" % i: "x" * 7_000_000 for i in range(5)}
        self.assertEqual(self.rules(big), [(".", "size")])


if __name__ == "__main__":
    unittest.main()

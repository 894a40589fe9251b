# SPDX-License-Identifier: Apache-2.0
"""Generates the protocol stubs into kivi/v1 when the package is built; they are not committed.

The contract is proto/kivi/v1 at the root of the repository; a source distribution carries a copy
beside this file.
"""

import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).resolve().parent
PROTO_ROOTS = [HERE / "proto", HERE.parent.parent / "proto"]


def generate(target: pathlib.Path) -> None:
    """Writes kivi/v1/*_pb2.py and *_pb2_grpc.py below `target`."""
    import grpc_tools
    from grpc_tools import protoc

    root = next((r for r in PROTO_ROOTS if (r / "kivi/v1/kivi.proto").exists()), None)
    if root is None:
        raise SystemExit("kivi/v1/kivi.proto not found in " + " or ".join(map(str, PROTO_ROOTS)))
    well_known = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    files = sorted(str(p.relative_to(root)) for p in (root / "kivi/v1").glob("*.proto"))
    code = protoc.main(["protoc", f"-I{root}", f"-I{well_known}", f"--python_out={target}",
                        f"--pyi_out={target}", f"--grpc_python_out={target}", *files])
    if code != 0:
        raise SystemExit(f"protoc failed with exit code {code}")
    (target / "kivi/v1/__init__.py").write_text('"""Generated from proto/kivi/v1."""\n')


class BuildPy(build_py):
    def run(self):
        super().run()
        generate(HERE / "src" if self.editable_mode else pathlib.Path(self.build_lib))


setup(cmdclass={"build_py": BuildPy})

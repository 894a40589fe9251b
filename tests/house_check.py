#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Looks over every file of the repository for what no compiler would refuse.

    house_check.py [DIRECTORY]

prints `file:line: what is wrong`, a line each, and exits with 1 if there was anything. The rules:

  include    A room includes itself and the rooms before it, by paths from the root. (Visibility in the
             BUILD files says the same; this also holds for who compiles by hand, and says which line.)
  grpc       gRPC's headers stay where the wire is: the server's rpc files and the C client.
  protobuf   protobuf-c's headers too, and in few files.
  licence    Every source begins with its SPDX line.
  path       No file names a place that exists on one machine only, or one outside of the repository.
  size       The repository stays small enough to clone without thinking.

house_check_test.py plants a violation of each and must see it found.
"""

import collections
import os
import re
import subprocess
import sys

SIZE_MAX = 30 * 1000 * 1000

# Who may include whom, by the longest prefix of the path. Tests and fuzzers inside a room obey the room
# and may use what tests share.
MAY_INCLUDE = {
    "proto/": ["proto/"],
    "kernels/": ["proto/", "kernels/"],
    "storage/": ["proto/", "kernels/device.h", "storage/"],
    "service/": ["proto/", "kernels/", "storage/", "service/"],
    "clients/c/": ["proto/", "clients/c/"],
    "clients/cli/": ["proto/", "clients/c/", "clients/cli/"],
    "clients/": ["proto/", "clients/"],
    "tests/": ["proto/", "kernels/", "storage/", "service/", "clients/", "tests/"],
}

# Tests speak broken gRPC on purpose, and a bench needs a bare stream to be measured against. Messages
# become our own structures, and back, in service/convert*.
GRPC_ALLOWED = ["service/rpc", "clients/c/", "clients/cli/bench", "clients/cli/opponent", "tests/"]
PROTOBUF_ALLOWED = GRPC_ALLOWED + ["service/convert", "service/standard", "proto/"]
PROTOBUF_FILES_MAX = 12  # tests not counted

# What a build, an editor or Python leaves beside the sources, for a copy without git.
SKIPPED_DIRS = re.compile(r"^(\.git|\.cache|bazel-.*|__pycache__|.*\.egg-info|\.pytest_cache)$")

C_SUFFIXES = (".c", ".h", ".cu", ".cuh")
SOURCE_SUFFIXES = C_SUFFIXES + (".py", ".sh", ".bzl", ".proto", ".bazel")
SOURCE_NAMES = ("BUILD",)

# Absolute paths may start at what every Linux has, or at what an example would call a data directory.
COMMON_ROOTS = (
    "bin boot data dev etc lib lib64 mnt nonexistent opt proc run sbin srv sys tmp usr var"
).split()

_INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
_ABSOLUTE = re.compile(r"(?:(?<=-[IL])|(?<![\w./$})~*\]>-]))/([A-Za-z][\w-]*)/([\w.-]*)")
_RELATIVE = re.compile(r"(?<![\w./$}\"])(?:\.\./)+[\w][\w./-]*")

Finding = collections.namedtuple("Finding", "path line rule text")


def files_of(root):
    """Paths of all files of the repository at root, relative to it, sorted.

    Those that git knows or would add; all but the usual leftovers where there is no git to ask.
    """
    paths = []
    if os.path.exists(os.path.join(root, ".git")):
        # The checkout may belong to another user than the one who tests it.
        command = ["git", "-C", root, "-c", "safe.directory=*", "ls-files", "-z"]
        command += ["--cached", "--others", "--exclude-standard"]
        try:
            listed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
            paths = [os.fsdecode(path) for path in set(listed.split(b"\0")) if path]
        except (OSError, subprocess.CalledProcessError):
            pass
    return sorted(path for path in paths or walk(root) if is_plain(os.path.join(root, path)))


def is_plain(path):
    return os.path.isfile(path) and not os.path.islink(path)


def walk(root):
    for directory, dirs, names in os.walk(root):
        dirs[:] = [name for name in dirs if not SKIPPED_DIRS.match(name)]
        for name in names:
            yield os.path.relpath(os.path.join(directory, name), root)


def room_of(path):
    """The key of MAY_INCLUDE that path falls under, or None."""
    rooms = [room for room in MAY_INCLUDE if path.startswith(room)]
    return max(rooms, key=len) if rooms else None


def starts_with_any(path, prefixes):
    return any(path.startswith(prefix) for prefix in prefixes)


def check_include(path, header, quoted):
    """(rule, what is wrong) with one include, or None."""
    if header.startswith(("grpc/", "grpc++/", "grpcpp/")) and not header.endswith(".pb-c.h"):
        if not starts_with_any(path, GRPC_ALLOWED):
            return "grpc", "gRPC's %s is for %s only" % (header, ", ".join(GRPC_ALLOWED))
        return None
    if is_protobuf(header):
        if not starts_with_any(path, PROTOBUF_ALLOWED):
            return "protobuf", "%s is for %s only" % (header, ", ".join(PROTOBUF_ALLOWED))
        return None

    room = room_of(path)
    if not quoted or room is None:
        return None
    if room_of(header) is None:
        return "include", '"%s" is not a path from the root into a room' % header
    allowed = list(MAY_INCLUDE[room])
    if re.search(r"_(test|fuzz)\.c$", path):
        allowed.append("tests/")
    if not starts_with_any(header, allowed):
        return "include", "%s may not include %s" % (room, header)
    return None


def is_protobuf(header):
    return header.startswith("protobuf-c/") or header.endswith(".pb-c.h")


def check_path(path, line, root):
    """What is wrong with the paths named in one line: strings."""
    for match in _ABSOLUTE.finditer(line):
        first, after = match.groups()
        if first not in COMMON_ROOTS:
            yield "/%s/... exists on some machines only" % first
        elif first == "tmp" and after[:1].isalpha() and "XXXXXX" not in after:
            yield "a fixed name in /tmp: use mktemp, or TEST_TMPDIR in tests"
    for match in _RELATIVE.finditer(line):
        target = os.path.normpath(os.path.join(os.path.dirname(path), match.group()))
        if target.startswith("..") or not os.path.exists(os.path.join(root, target.rstrip("."))):
            yield "%s leads out of the repository, or nowhere" % match.group()


def is_source(path, first_line):
    name = os.path.basename(path)
    return (
        name.endswith(SOURCE_SUFFIXES) or name in SOURCE_NAMES or first_line.startswith("#!")
    ) and not path.startswith("tests/data/")


def check_file(path, text, root):
    """Findings in one file, and whether it includes protobuf-c."""
    lines = text.splitlines()
    findings = []
    protobuf = False

    if is_source(path, lines[0] if lines else ""):
        # Below a #! line or in the first line of a comment; in C, the very first line.
        head = lines[: 1 if path.endswith(C_SUFFIXES) else 3]
        if not any("SPDX-License-Identifier: Apache-2.0" in line for line in head):
            findings.append(Finding(path, 1, "licence", "no SPDX line"))

    for number, line in enumerate(lines, 1):
        include = _INCLUDE.match(line) if path.endswith(C_SUFFIXES) else None
        if include:
            protobuf = protobuf or is_protobuf(include.group(2))
            wrong = check_include(path, include.group(2), include.group(1) == '"')
            if wrong:
                findings.append(Finding(path, number, *wrong))
            continue
        for text in check_path(path, line, root):
            findings.append(Finding(path, number, "path", text))
    return findings, protobuf


def check(root):
    """All findings in the repository at root."""
    findings = []
    protobuf_files = []
    bytes_all = 0
    for path in files_of(root):
        bytes_all += os.path.getsize(os.path.join(root, path))
        with open(os.path.join(root, path), "rb") as file:
            content = file.read()
        if b"\0" in content or path.startswith("tests/data/"):
            continue  # data, not text
        found, protobuf = check_file(path, content.decode("utf-8", "replace"), root)
        findings += found
        if protobuf and not path.startswith("tests/"):
            protobuf_files.append(path)

    if len(protobuf_files) > PROTOBUF_FILES_MAX:
        text = "%d files include protobuf-c's headers, %d is the limit" % (
            len(protobuf_files),
            PROTOBUF_FILES_MAX,
        )
        findings += [Finding(path, 1, "protobuf", text) for path in protobuf_files]
    if bytes_all > SIZE_MAX:
        text = "the repository has %d bytes, %d is the limit" % (bytes_all, SIZE_MAX)
        findings.append(Finding(".", 0, "size", text))
    return findings


def main():
    # Resolved, because Bazel runs a link to this file.
    here = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    root = sys.argv[1] if len(sys.argv) > 1 else here
    if not os.path.exists(os.path.join(root, "WORKSPACE")):
        sys.exit("house_check: %s is not the repository" % root)
    findings = check(root)
    for finding in findings:
        print("%s:%d: %s: %s" % finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

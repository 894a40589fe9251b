# SPDX-License-Identifier: Apache-2.0
"""Repositories made of what the distribution installed: a library, a program, a few files.

    system_lib(name = "liburing", ...)       -> @liburing//:lib              a cc_library to depend on
    system_program(name = "protoc_c", ...)   -> @protoc_c//:protoc-c         an executable
    system_files(name = "grpc_proto", ...)   -> @grpc_proto//:grpc/health... source files

Each looks when it is first needed, and when what it looks for is missing says which package to
install. They are `local`, so that a package installed or upgraded later is seen by the next build.

Headers are not listed: they lie in /usr/include, which the compiler searches anyway and which Bazel
treats as part of the toolchain. A library elsewhere is found through PKG_CONFIG_PATH.
"""

def _missing(rctx, what):
    fail("%s is not installed. On Debian 12: apt-get install %s (or deploy/install-deps, which installs all that the build needs)" %
         (what, rctx.attr.apt))

def _words(text):
    return [word for word in text.replace("\n", " ").split(" ") if word]

def _pkg_config(rctx, program, option):
    result = rctx.execute([program, option, rctx.attr.pkg_config])
    if result.return_code:
        _missing(rctx, "The library " + rctx.attr.pkg_config)
    return result.stdout

def _system_lib(rctx):
    program = rctx.which("pkg-config")
    if not program:
        fail("pkg-config is not installed. On Debian 12: apt-get install pkg-config")

    version = _pkg_config(rctx, program, "--modversion").strip()
    cflags = _words(_pkg_config(rctx, program, "--cflags"))
    dirs = _words(_pkg_config(rctx, program, "--libs-only-L"))

    # A directory outside the standard ones is one that Bazel's sandbox shows but the loader would
    # not search: tell it.
    linkopts = dirs + ["-Wl,-rpath," + flag[2:] for flag in dirs]
    linkopts += ["-l" + lib for lib in rctx.attr.libs]

    # Defines such as gRPC's NOMINMAX are for C++ on other systems; only directories matter to C.
    includes = [flag[2:] for flag in cflags if flag.startswith("-I")]
    for index in range(len(includes)):
        rctx.symlink(includes[index], "include%d" % index)

    rctx.file("BUILD.bazel", """\
# {package} {version}, as pkg-config described it.
load("@rules_cc//cc:defs.bzl", "cc_library")

cc_library(
    name = "lib",
    hdrs = glob(["include*/**/*.h"], allow_empty = True),
    includes = {includes},
    linkopts = {linkopts},
    visibility = ["//visibility:public"],
)
""".format(
        package = rctx.attr.pkg_config,
        version = version,
        includes = repr(["include%d" % index for index in range(len(includes))]),
        linkopts = repr(linkopts),
    ))

system_lib = repository_rule(
    implementation = _system_lib,
    attrs = {
        "apt": attr.string(mandatory = True, doc = "Debian package that brings the library."),
        "libs": attr.string_list(mandatory = True, doc = "What to link, without -l, in order."),
        "pkg_config": attr.string(mandatory = True, doc = "The library's name for pkg-config."),
    },
    environ = ["PKG_CONFIG_PATH"],
    local = True,
    configure = True,
)

def _system_program(rctx):
    path = rctx.which(rctx.attr.program)
    if not path:
        _missing(rctx, "The program " + rctx.attr.program)

    # The link keeps the program's name: protoc-c looks at how it was called.
    rctx.symlink(path, rctx.attr.program)
    rctx.file("BUILD.bazel", """\
exports_files([%r], visibility = ["//visibility:public"])
""" % rctx.attr.program)

system_program = repository_rule(
    implementation = _system_program,
    attrs = {
        "apt": attr.string(mandatory = True, doc = "Debian package that brings the program."),
        "program": attr.string(mandatory = True, doc = "Its name in PATH."),
    },
    environ = ["PATH"],
    local = True,
    configure = True,
)

def _system_files(rctx):
    for name in rctx.attr.files:
        path = rctx.path(rctx.attr.root + "/" + name)
        if not path.exists:
            _missing(rctx, "The file " + str(path))
        rctx.symlink(path, name)
    rctx.file("BUILD.bazel", """\
exports_files(%r, visibility = ["//visibility:public"])
""" % rctx.attr.files)

system_files = repository_rule(
    implementation = _system_files,
    attrs = {
        "apt": attr.string(mandatory = True, doc = "Debian package that brings the files."),
        "files": attr.string_list(mandatory = True, doc = "Paths under root; labels are the same."),
        "root": attr.string(mandatory = True, doc = "The directory they are installed in."),
    },
    local = True,
)

# SPDX-License-Identifier: Apache-2.0
"""Protocol buffers in C, through protobuf-c.

    proto_c_library(
        name = "kivi_proto",
        srcs = ["kivi/v1/types.proto", "kivi/v1/kivi.proto"],
    )
    proto_descriptor_set(
        name = "descriptors",       # descriptors.pb: a FileDescriptorSet with all imports
        deps = [":kivi_proto"],
    )

A .proto is known by its path below the package that declares it, so proto/kivi/v1/types.proto is
imported as "kivi/v1/types.proto", and its C header is included as "kivi/v1/types.pb-c.h" or, from the
repository's root like everything else of ours, as "proto/kivi/v1/types.pb-c.h". A source may also
be a file of another repository (the standard gRPC services come from @grpc_proto); it keeps its
path there, and its C lands in the package that named it.
"""

load("@rules_cc//cc:defs.bzl", "cc_library")

ProtoCInfo = provider(
    doc = "The .proto files behind a proto_c_library, its own and those of its dependencies.",
    fields = {
        "files": "depset of File",
        "roots": "depset of string: the directories that import paths are relative to",
    },
)

def _root(file):
    """The directory that `file`'s import path starts from: that of the package that owns it."""
    parts = [part for part in [file.owner.workspace_root, file.owner.package] if part]
    return "/".join(parts) or "."

def _import_path(file):
    root = _root(file)
    return file.path if root == "." else file.path[len(root) + 1:]

def _proto_c_sources(ctx):
    direct = ctx.files.srcs
    files = depset(direct, transitive = [dep[ProtoCInfo].files for dep in ctx.attr.deps])
    roots = depset(
        [_root(file) for file in direct],
        transitive = [dep[ProtoCInfo].roots for dep in ctx.attr.deps],
    )

    sources = []
    headers = []
    for file in direct:
        stem = _import_path(file)[:-len(".proto")]
        sources.append(ctx.actions.declare_file(stem + ".pb-c.c"))
        headers.append(ctx.actions.declare_file(stem + ".pb-c.h"))

    arguments = ctx.actions.args()
    arguments.add("/".join([
        part
        for part in ["--c_out=" + ctx.bin_dir.path, ctx.label.workspace_root, ctx.label.package]
        if part
    ]))
    arguments.add_all(roots, format_each = "-I%s")
    arguments.add_all(direct, map_each = _import_path)
    ctx.actions.run(
        executable = ctx.executable._protoc,
        arguments = [arguments],
        inputs = files,
        outputs = sources + headers,
        mnemonic = "ProtocC",
        progress_message = "Generating C for %s" % ctx.label,
    )

    return [
        DefaultInfo(files = depset(sources + headers)),
        OutputGroupInfo(sources = depset(sources), headers = depset(headers)),
        ProtoCInfo(files = files, roots = roots),
    ]

_protoc = attr.label(
    default = Label("@protoc_c//:protoc-c"),
    allow_single_file = True,
    executable = True,
    cfg = "exec",
)

_proto_c_sources_rule = rule(
    implementation = _proto_c_sources,
    attrs = {
        "srcs": attr.label_list(allow_files = [".proto"], mandatory = True),
        "deps": attr.label_list(providers = [ProtoCInfo]),
        "_protoc": _protoc,
    },
)

def proto_c_library(name, srcs, deps = [], visibility = None):
    """A cc_library of the messages and enums in `srcs`.

    Args:
      name: the cc_library. NAME_sources stands beside it and is what proto_descriptor_set reads.
      srcs: .proto files.
      deps: proto_c_library targets whose files are imported.
      visibility: as usual.
    """
    _proto_c_sources_rule(
        name = name + "_sources",
        srcs = srcs,
        deps = [dep + "_sources" for dep in deps],
        visibility = visibility,
    )
    native.filegroup(
        name = name + "_c",
        srcs = [name + "_sources"],
        output_group = "sources",
        visibility = ["//visibility:private"],
    )
    native.filegroup(
        name = name + "_h",
        srcs = [name + "_sources"],
        output_group = "headers",
        visibility = ["//visibility:private"],
    )
    cc_library(
        name = name,
        srcs = [name + "_c"],
        hdrs = [name + "_h"],
        copts = ["-w"],  # generated: warnings in it are nobody's to fix
        includes = ["."],
        visibility = visibility,
        deps = deps + [Label("@protobuf_c//:lib")],
    )

def _proto_descriptor_set(ctx):
    files = depset(transitive = [dep[ProtoCInfo].files for dep in ctx.attr.deps])
    roots = depset(transitive = [dep[ProtoCInfo].roots for dep in ctx.attr.deps])
    output = ctx.actions.declare_file(ctx.label.name + ".pb")

    arguments = ctx.actions.args()
    arguments.add("--include_imports")
    arguments.add("--descriptor_set_out=" + output.path)
    arguments.add_all(roots, format_each = "-I%s")
    arguments.add_all(files, map_each = _import_path)
    ctx.actions.run(
        executable = ctx.executable._protoc,
        arguments = [arguments],
        inputs = files,
        outputs = [output],
        mnemonic = "ProtoDescriptors",
        progress_message = "Describing %s" % ctx.label,
    )
    return [DefaultInfo(files = depset([output]))]

_proto_descriptor_set_rule = rule(
    implementation = _proto_descriptor_set,
    attrs = {
        "deps": attr.label_list(providers = [ProtoCInfo], mandatory = True),
        "_protoc": _protoc,
    },
)

def proto_descriptor_set(name, deps, visibility = None):
    """One FileDescriptorSet, NAME.pb, of some proto_c_library targets and all that they import."""
    _proto_descriptor_set_rule(
        name = name,
        visibility = visibility,
        deps = [dep + "_sources" for dep in deps],
    )

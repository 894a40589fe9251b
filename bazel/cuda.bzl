# SPDX-License-Identifier: Apache-2.0
"""CUDA, where there is an nvcc: $CUDA_HOME/bin/nvcc, or /usr/local/cuda/bin/nvcc.

    load("@cuda//:defs.bzl", "HAVE_CUDA")
    load("//bazel:cuda.bzl", "cuda_library")

    cuda_library(
        name = "cuda",
        srcs = ["attend.cu", "quantize.cu"],
        hdrs = ["cuda.h"],
        deps = ["//kernels:page"],
    )

    cc_library(
        name = "backends",
        local_defines = ["KV_HAVE_CUDA"] if HAVE_CUDA else [],
        deps = [":cpu"] + (["//kernels/cuda"] if HAVE_CUDA else []),
    )

Without nvcc a cuda_library declares nothing, so `//...` builds, and what depends on it must ask
HAVE_CUDA first. With nvcc, each .cu is an action of its own that sees only the headers of its hdrs and
deps, like any C file. The runtime is linked statically and looks for the driver when it is first
called: one binary runs with and without a GPU.
"""

load("@cuda//:defs.bzl", "CUDA_ARCHS", "CUDA_ARCHS_KNOWN", "CUDA_PORTABLE", "HAVE_CUDA", "NVCC")
load("@rules_cc//cc:defs.bzl", "cc_library")
load("@rules_cc//cc/common:cc_info.bzl", "CcInfo")

def _archs(ctx):
    """What --define=cuda_archs=80,90a asks for, or else what a build has time for."""
    asked = ctx.var.get("cuda_archs", "")
    if not asked:
        return ctx.attr.archs
    archs = asked.split(",")
    unknown = [arch for arch in archs if arch not in ctx.attr.archs_known]
    if unknown:
        fail("cuda_archs: %s are not among %s" % (unknown, ctx.attr.archs_known))
    return archs

def _cuda_objects(ctx):
    compilation = [dep[CcInfo].compilation_context for dep in ctx.attr.deps]
    headers = depset(ctx.files.hdrs, transitive = [context.headers for context in compilation])
    includes = depset(transitive = [context.includes for context in compilation])
    system_includes = depset(transitive = [context.system_includes for context in compilation])

    objects = []
    for source in ctx.files.srcs:
        object = ctx.actions.declare_file("_cuda/%s/%s.o" % (ctx.label.name, source.basename))
        arguments = ctx.actions.args()
        for arch in _archs(ctx):
            arguments.add("-gencode=arch=compute_%s,code=sm_%s" % (arch, arch))

        # Every other GPU translates this when it first loads it, which takes it a minute or more.
        arguments.add("-gencode=arch=compute_%s,code=compute_%s" % (ctx.attr.portable, ctx.attr.portable))

        arguments.add_all(["-O3", "-std=c++17", "-lineinfo", "-Xfatbin=-compress-all"])
        arguments.add("--fmad=true" if ctx.attr.fmad else "--fmad=false")
        arguments.add_all(["-Xcompiler", "-fPIC,-Wall,-fno-exceptions"])
        arguments.add("-diag-suppress=2361")  # C's enums in braces, which our headers share with C++
        arguments.add_all(["-I.", "-I" + ctx.bin_dir.path])
        arguments.add_all(includes, before_each = "-I")
        arguments.add_all(system_includes, before_each = "-I")
        arguments.add_all(ctx.attr.copts)
        arguments.add("-c", source)
        arguments.add("-o", object)
        ctx.actions.run(
            executable = ctx.attr.nvcc,
            arguments = [arguments],
            inputs = depset([source], transitive = [headers]),
            outputs = [object],
            mnemonic = "Nvcc",
            progress_message = "Compiling " + source.short_path,
            use_default_shell_env = True,
        )
        objects.append(object)

    arguments = ctx.actions.args()
    arguments.add("rcsD", ctx.outputs.archive)
    arguments.add_all(objects)
    ctx.actions.run(
        executable = "/usr/bin/ar",
        arguments = [arguments],
        inputs = objects,
        outputs = [ctx.outputs.archive],
        mnemonic = "CudaArchive",
    )

_cuda_objects_rule = rule(
    implementation = _cuda_objects,
    attrs = {
        "archive": attr.output(mandatory = True),
        "archs": attr.string_list(mandatory = True, allow_empty = False),
        "archs_known": attr.string_list(mandatory = True, allow_empty = False),
        "copts": attr.string_list(),
        "deps": attr.label_list(providers = [CcInfo]),
        "fmad": attr.bool(),
        "hdrs": attr.label_list(allow_files = [".h", ".cuh"]),
        "nvcc": attr.string(mandatory = True),
        "portable": attr.string(mandatory = True),
        "srcs": attr.label_list(allow_files = [".cu"], mandatory = True),
    },
)

def cuda_library(name, srcs, hdrs = [], deps = [], archs = None, fmad = False, copts = [], visibility = None):
    """A cc_library of .cu files, or nothing where nvcc is missing.

    Args:
      name: the cc_library.
      srcs: .cu files.
      hdrs: .h for those who depend on it, .cuh for its own sources.
      deps: cc_library targets whose headers the sources include.
      archs: compute capabilities to make machine code for, "80" to "120"; by default those of
        cuda_configure.bzl. --define=cuda_archs=80,89,90a,100,120 on the command line goes before both.
      fmad: whether a*b+c may be fused into one rounding. Not where codes are made, for the reason
        given at -ffp-contract in .bazelrc; attention is the place to be fast.
      copts: more flags for nvcc.
      visibility: as usual.
    """
    if not HAVE_CUDA:
        return
    archive = "lib%s_objects.a" % name
    _cuda_objects_rule(
        name = name + "_objects",
        srcs = srcs,
        hdrs = hdrs,
        archive = archive,
        archs = archs or CUDA_ARCHS,
        archs_known = CUDA_ARCHS_KNOWN,
        copts = copts,
        fmad = fmad,
        nvcc = NVCC,
        portable = CUDA_PORTABLE,
        visibility = ["//visibility:private"],
        deps = deps,
    )
    cc_library(
        name = name,
        srcs = [archive],
        hdrs = [header for header in hdrs if header.endswith(".h")],
        linkstatic = True,
        visibility = visibility,
        deps = deps + [Label("@cuda//:cudart")],
    )

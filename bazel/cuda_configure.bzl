# SPDX-License-Identifier: Apache-2.0
"""cuda_configure: looks for nvcc once and says what it found, as the repository @cuda.

@cuda//:defs.bzl has
  HAVE_CUDA   whether there is an nvcc
  NVCC        its path
  CUDA_ARCHS_KNOWN  which of _ARCHS it can compile for
  CUDA_ARCHS        those that are compiled for unless --define=cuda_archs says otherwise
  CUDA_PORTABLE     what the intermediate code for all other GPUs assumes
and @cuda//:cudart is the static runtime. (A file of its own, apart from cuda.bzl, because that one
loads what this one writes.)
"""

# A100, L4 and RTX 40, H100 and H200, B200, RTX 50. The "a" of 90a opens Hopper's own instructions; code
# for 8.0 also runs on 8.6 and 8.7, code for 10.0 on 10.3.
_ARCHS = ["80", "89", "90a", "100", "120"]

# The other four cost two shared cores 254 s (bazel build --define=cuda_archs=80,89,100,120
# //kernels/cuda:cuda_objects), so a plain build is for Hopper and translates for the rest.
_DEFAULT = ["90a"]
_PORTABLE = "80"

_BUILD = """\
load("@rules_cc//cc:defs.bzl", "cc_library")

# Static: the binary starts where no driver is, and finds no device there. It is written in C++.
cc_library(
    name = "cudart",
    hdrs = glob(["include/**"], allow_empty = True),
    includes = ["include"],
    linkopts = [
        "-L{home}/lib64",
        "-lcudart_static",
        "-lstdc++",
        "-ldl",
        "-lrt",
        "-lpthread",
    ],
    visibility = ["//visibility:public"],
)
"""

def _cuda_configure(rctx):
    home = rctx.os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = home + "/bin/nvcc"
    have = rctx.path(nvcc).exists

    archs = []
    default = []
    if have:
        listed = rctx.execute([nvcc, "--list-gpu-code"])
        if listed.return_code:
            fail("%s --list-gpu-code failed: %s" % (nvcc, listed.stderr))
        codes = listed.stdout.replace("\n", " ").split(" ")
        archs = [arch for arch in _ARCHS if "sm_" + arch.replace("a", "") in codes]
        if not archs:
            fail("%s knows none of the architectures %s" % (nvcc, _ARCHS))

        default = [arch for arch in _DEFAULT if arch in archs] or archs[-1:]

    rctx.file("defs.bzl", "\n".join([
        "HAVE_CUDA = %r" % have,
        "NVCC = %r" % nvcc,
        "CUDA_ARCHS = %r" % default,
        "CUDA_ARCHS_KNOWN = %r" % archs,
        "CUDA_PORTABLE = %r" % _PORTABLE,
        "",
    ]))
    rctx.file("BUILD.bazel", _BUILD.format(home = home) if have else "")

cuda_configure = repository_rule(
    implementation = _cuda_configure,
    environ = ["CUDA_HOME"],
    local = True,
    configure = True,
)

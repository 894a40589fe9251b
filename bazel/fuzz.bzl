# SPDX-License-Identifier: Apache-2.0
"""fuzz_target: one libFuzzer program.

    fuzz_target(
        name = "config_fuzz",
        srcs = ["config_fuzz.c"],                  # LLVMFuzzerTestOneInput()
        corpus = glob(["corpus/config/*"]),        # optional: inputs to start from
        deps = [":config"],
    )

It is tagged `fuzz`, by which tests/run finds it, and `manual`, because only `--config=fuzz` (clang)
can link it. By hand:

    bazel build --config=fuzz //service:config_fuzz
    bazel-bin/service/config_fuzz -max_total_time=30 service/corpus/config
"""

load("@rules_cc//cc:defs.bzl", "cc_binary")

def fuzz_target(name, srcs, deps = [], corpus = [], copts = [], linkopts = []):
    """A cc_binary with libFuzzer's main.

    Args:
      name: the program.
      srcs: C files, one of which defines LLVMFuzzerTestOneInput().
      deps: as usual.
      corpus: files to start from, one input each.
      copts: as usual.
      linkopts: as usual.
    """
    cc_binary(
        name = name,
        testonly = True,
        srcs = srcs,
        copts = copts,
        data = corpus,
        linkopts = linkopts + ["-fsanitize=fuzzer"],
        tags = [
            "fuzz",
            "manual",
        ],
        deps = deps,
    )

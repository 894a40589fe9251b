# SPDX-License-Identifier: Apache-2.0
"""fuzz_target: one libFuzzer program.

    fuzz_target(
        name = "config_fuzz",
        srcs = ["config_fuzz.c"],                  # LLVMFuzzerTestOneInput()
        corpus = glob(["corpus/config/*"]),        # optional: inputs to start from
        deps = ["//service:config"],
    )

It is tagged `fuzz`, by which tests/run finds it, and `manual`, because only `--config=fuzz` (clang)
can link it. By hand:

    bazel build --config=fuzz //tests:config_fuzz
    bazel-bin/tests/config_fuzz -max_total_time=30 tests/corpus/config
"""

load("@rules_cc//cc:defs.bzl", "cc_binary")

def fuzz_target(name, srcs, deps = [], corpus = [], copts = [], linkopts = []):
    """A cc_binary with libFuzzer's main. Corpus files lie beside it as NAME_corpus."""
    native.filegroup(
        name = name + "_corpus",
        testonly = True,
        srcs = corpus,
    )
    cc_binary(
        name = name,
        testonly = True,
        srcs = srcs,
        copts = copts,
        data = [name + "_corpus"],
        linkopts = linkopts + ["-fsanitize=fuzzer"],
        tags = [
            "fuzz",
            "manual",
        ],
        deps = deps,
    )

# SPDX-License-Identifier: Apache-2.0
"""embed_file: a file's bytes as a constant in a C program.

    embed_file(
        name = "descriptors_embedded",
        src = ":descriptors",
        symbol = "kv_proto_descriptors",
    )

is a cc_library with one header, NAME.h, in the package's directory:

    extern const unsigned char kv_proto_descriptors[];
    extern const size_t kv_proto_descriptors_bytes;

The bytes stand in read-only data, for the life of the program, followed by a NUL that is not counted
(so that a text can be used as a string).
"""

load("@rules_cc//cc:defs.bzl", "cc_library")

# od and sed are on every machine that has a compiler; xxd is not.
_SOURCE = """
{{
    echo '#include "{header}"'
    echo 'const unsigned char {symbol}[] = {{'
    od -An -v -tx1 $< | sed 's/ \\([0-9a-f][0-9a-f]\\)/0x\\1,/g'
    echo '0}};'
    echo 'const size_t {symbol}_bytes = sizeof {symbol} - 1;'
}} > $@
"""

_HEADER = """
{{
    echo '#pragma once'
    echo '#include <stddef.h>'
    echo 'extern const unsigned char {symbol}[];'
    echo 'extern const size_t {symbol}_bytes;'
}} > $@
"""

def embed_file(name, src, symbol, visibility = None):
    """A cc_library that holds the bytes of `src`.

    Args:
      name: the cc_library; its header is PACKAGE/NAME.h.
      src: one file.
      symbol: the C name of the array; SYMBOL_bytes is its length.
      visibility: as usual.
    """
    header = name + ".h"
    path = native.package_name() + "/" + header if native.package_name() else header
    native.genrule(
        name = name + "_c",
        srcs = [src],
        outs = [name + ".c"],
        cmd = _SOURCE.format(symbol = symbol, header = path),
        visibility = ["//visibility:private"],
    )
    native.genrule(
        name = name + "_h",
        outs = [header],
        cmd = _HEADER.format(symbol = symbol),
        visibility = ["//visibility:private"],
    )
    cc_library(
        name = name,
        srcs = [name + ".c"],
        hdrs = [header],
        visibility = visibility,
    )

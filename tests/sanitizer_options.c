/* SPDX-License-Identifier: Apache-2.0 */
/* sanitizer_options.c - what the sanitizers are told, in every program they are built into.
 *
 * Options in the environment would be lost on the way to a daemon that a test starts with an
 * environment of its own, and a suppression file named there would have to be found from whatever
 * directory that daemon runs in. So both are compiled in: the runtimes ask these functions at start.
 * The environment (ASAN_OPTIONS and its sisters) still overrides them, one option at a time. */
#include "tests/tsan_suppressions.h"

/* Declared here because the runtimes' own header is not part of GCC's. */
const char *__asan_default_options(void);
const char *__ubsan_default_options(void);
const char *__tsan_default_options(void);
const char *__tsan_default_suppressions(void);

const char *__asan_default_options(void) {
    /* Not detect_stack_use_after_return: GCC 12 puts 64-byte aligned locals on its fake stack at
     * multiples of 32, and AVX-512 code faults there. */
    return "detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=0";
}

const char *__ubsan_default_options(void) {
    return "print_stacktrace=1:halt_on_error=1";
}

/* A race fails the program at its end (exit code 66), after all of them have been printed. */
const char *__tsan_default_options(void) {
    return "second_deadlock_stack=1";
}

const char *__tsan_default_suppressions(void) {
    return (const char *)tsan_suppressions;
}

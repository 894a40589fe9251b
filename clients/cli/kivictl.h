/* SPDX-License-Identifier: Apache-2.0 */
/* kivictl.h - one command: its options, its connection, its exit code.
 *
 * Exit codes, the same for all commands:
 *   0  done
 *   1  the service refused, or the answer is no
 *   2  the command line is wrong
 *   3  the service cannot be reached, or did not answer in time
 *   4  done, but a figure missed its goal (bench) or something needs attention (doctor)
 */
#ifndef KIVI_CLIENTS_CLI_KIVICTL_H
#define KIVI_CLIENTS_CLI_KIVICTL_H

#include <popt.h>

#include "clients/c/kivi.h"
#include "clients/cli/output.h"

enum { EXIT_DONE = 0, EXIT_REFUSED = 1, EXIT_USAGE = 2, EXIT_UNREACHABLE = 3, EXIT_MISSED = 4 };

struct ctl {
    const char *name;     /* of the command, for messages */
    char *target;         /* NULL: libkivi's default */
    int timeout_ms, spin_us;
    int json, quiet;
    poptContext options;
    const char **arguments; /* after the options, NULL at the end */
    int argument_count;
    char *texts[16];        /* values of options, to be freed at the end */
    int text_count;
    struct kivi_client *client;
    struct kivi_error error; /* of the last call */
};

struct command {
    const char *name;      /* one or two words */
    const char *arguments; /* as the usage line shows them */
    const char *summary;
    int (*run)(struct ctl *ctl, int argc, const char **argv);
};

/* The commands, in the order in which the help lists them; NULL name at the end. */
extern const struct command SERVICE_COMMANDS[], SESSION_COMMANDS[], BLOCK_COMMANDS[],
    BENCH_COMMANDS[], DOCTOR_COMMANDS[];

/* Reads the options of a command, `own` (may be NULL) and the general ones; `notes` (may be NULL)
 * stands below the options in --help.  True: go on with ctl->arguments, of which there are
 * least .. most.  False: leave with *exit_code; --help was answered or a message printed. */
bool ctl_options(struct ctl *ctl, int argc, const char **argv, const struct poptOption *own,
                 const char *usage, const char *notes, int least, int most, int *exit_code);

/* Connects.  False, with the reason said, if the options make no sense. */
bool ctl_connect(struct ctl *ctl);

/* Says ctl->error (as JSON on stdout too, when that is asked for) and returns the exit code it
 * means. */
int ctl_failed(struct ctl *ctl);

/* Says a sentence about the command line or the machine; returns `exit_code`. */
int ctl_say(struct ctl *ctl, int exit_code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

double ctl_seconds(void); /* of a clock that never goes back */

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* kivictl.c - the command line of kivid: finds the command, and what all commands share. */
#include "clients/cli/kivictl.h"

#include <malloc.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const struct command *const GROUPS[] = {SERVICE_COMMANDS, SESSION_COMMANDS, BLOCK_COMMANDS,
                                               BENCH_COMMANDS, DOCTOR_COMMANDS};
static const char *const TITLES[] = {"The service", "Sessions", "Blocks", "Measurements",
                                     "This machine"};
enum { GROUP_COUNT = sizeof GROUPS / sizeof *GROUPS };

static const char *const EXIT_CODES =
    "Exit codes: 0 done, 1 the service refused, 2 wrong usage, 3 the service cannot be reached,\n"
    "4 done but a goal was missed (bench) or something needs attention (doctor).\n";

double ctl_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

int ctl_say(struct ctl *ctl, int exit_code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "kivictl %s: ", ctl->name);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    return exit_code;
}

int ctl_failed(struct ctl *ctl) {
    const struct kivi_error *error = &ctl->error;
    if (ctl->json) json_print(json_error(error));
    fprintf(stderr, "kivictl %s: %s: %s\n", ctl->name, kivi_code_name(error->code),
            error->message);
    if (error->retry_ms > 0)
        fprintf(stderr, "kivictl %s: try again in %u ms\n", ctl->name, error->retry_ms);
    bool unreachable = error->code == KIVI_UNAVAILABLE || error->code == KIVI_DEADLINE_EXCEEDED;
    return unreachable ? EXIT_UNREACHABLE : EXIT_REFUSED;
}

bool ctl_connect(struct ctl *ctl) {
    struct kivi_options options = KIVI_OPTIONS_INIT;
    options.target = ctl->target;
    options.timeout_ms = (uint32_t)ctl->timeout_ms;
    options.spin_us = (uint32_t)ctl->spin_us;
    if (kivi_client_open(&options, &ctl->client, &ctl->error) == KIVI_OK) return true;
    ctl_failed(ctl);
    return false;
}

/* Text values belong to who asked for them, and are needed until the command is over. */
static void texts_keep(struct ctl *ctl, const struct poptOption *own) {
    for (const struct poptOption *option = own; option && option->longName; option++) {
        if ((option->argInfo & POPT_ARG_MASK) != POPT_ARG_STRING) continue;
        char *text = *(char **)option->arg;
        if (text && ctl->text_count < 16) ctl->texts[ctl->text_count++] = text;
    }
}

bool ctl_options(struct ctl *ctl, int argc, const char **argv, const struct poptOption *own,
                 const char *usage, const char *notes, int least, int most, int *exit_code) {
    static const struct poptOption none[] = {POPT_TABLEEND};
    int help = 0;
    struct poptOption general[] = {
        {"target", 't', POPT_ARG_STRING, &ctl->target, 0,
         "unix:///path, host:port or dns:///name:port (else $KIVID_TARGET, else "
         "unix:///run/kivid/kivid.sock)", "ADDRESS"},
        {"timeout-ms", 0, POPT_ARG_INT, &ctl->timeout_ms, 0, "time for one call (30000)", "MS"},
        {"spin-us", 0, POPT_ARG_INT, &ctl->spin_us, 0,
         "look so long for an answer before sleeping (0)", "US"},
        {"json", 'j', POPT_ARG_NONE, &ctl->json, 0, "print JSON", NULL},
        {"quiet", 'q', POPT_ARG_NONE, &ctl->quiet, 0, "no progress", NULL},
        {"help", 'h', POPT_ARG_NONE, &help, 0, "show this", NULL},
        POPT_TABLEEND};
    struct poptOption all[] = {
        {NULL, 0, POPT_ARG_INCLUDE_TABLE, (void *)(own ? own : none), 0, "Options:", NULL},
        {NULL, 0, POPT_ARG_INCLUDE_TABLE, general, 0, "General options:", NULL},
        POPT_TABLEEND};
    char title[64];
    snprintf(title, sizeof title, "kivictl %s", ctl->name);
    argv[0] = title; /* what the usage line begins with */

    ctl->options = poptGetContext(title, argc, argv, all, 0);
    int got = poptGetNextOpt(ctl->options);
    texts_keep(ctl, own);
    if (got < -1) {
        *exit_code = ctl_say(ctl, EXIT_USAGE, "%s: %s   (kivictl %s --help lists the options)",
                             poptBadOption(ctl->options, 0), poptStrerror(got), ctl->name);
        return false;
    }
    if (help) {
        poptSetOtherOptionHelp(ctl->options, usage);
        poptPrintHelp(ctl->options, stdout, 0);
        if (notes) printf("\n%s", notes);
        printf("\n%s", EXIT_CODES);
        *exit_code = EXIT_DONE;
        return false;
    }
    ctl->arguments = poptGetArgs(ctl->options);
    while (ctl->arguments && ctl->arguments[ctl->argument_count]) ctl->argument_count++;
    if (ctl->argument_count < least || ctl->argument_count > most) {
        *exit_code = ctl_say(ctl, EXIT_USAGE, "usage: kivictl %s %s   (--help says more)",
                             ctl->name, usage);
        return false;
    }
    if (ctl->timeout_ms < 0 || ctl->spin_us < 0) {
        *exit_code = ctl_say(ctl, EXIT_USAGE, "a time cannot be negative");
        return false;
    }
    return true;
}

static void help_print(FILE *out) {
    fprintf(out, "kivictl %s - the command line of kivid\n\n"
                 "Usage: kivictl COMMAND [ARGUMENTS] [OPTIONS]\n", kivi_version());
    for (int i = 0; i < GROUP_COUNT; i++) {
        fprintf(out, "\n%s\n", TITLES[i]);
        for (const struct command *command = GROUPS[i]; command->name; command++) {
            char left[64];
            snprintf(left, sizeof left, "%s %s", command->name, command->arguments);
            fprintf(out, "  %-34s %s\n", left, command->summary);
        }
    }
    fprintf(out, "\nEvery command takes --target ADDRESS, --json and --help.\n%s", EXIT_CODES);
}

/* A word that begins commands without being one, as in "kivictl bench".  False: it is none. */
static bool group_help(const char *word, FILE *out) {
    size_t length = strlen(word);
    bool any = false;
    for (int i = 0; i < GROUP_COUNT; i++) {
        for (const struct command *command = GROUPS[i]; command->name; command++) {
            if (strncmp(command->name, word, length) != 0 || command->name[length] != ' ') continue;
            if (!any) fprintf(out, "Usage: kivictl %s COMMAND [OPTIONS]   (COMMAND --help says more)\n\n", word);
            char left[64];
            snprintf(left, sizeof left, "%s %s", command->name, command->arguments);
            fprintf(out, "  %-34s %s\n", left, command->summary);
            any = true;
        }
    }
    if (any) fprintf(out, "\n%s", EXIT_CODES);
    return any;
}

/* The command that argv begins with, and how many words its name has. */
static const struct command *command_find(int argc, char **argv, int *words) {
    for (int i = 0; i < GROUP_COUNT; i++) {
        for (const struct command *command = GROUPS[i]; command->name; command++) {
            char two[128];
            snprintf(two, sizeof two, "%s %s", argv[1], argc > 2 ? argv[2] : "");
            *words = strchr(command->name, ' ') ? 2 : 1;
            if (strcmp(command->name, *words == 2 ? two : argv[1]) == 0) return command;
        }
    }
    return NULL;
}

int main(int argc, char **argv) {
    /* As kivi.h advises: large messages without a page fault for every page of them. */
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    mallopt(M_TOP_PAD, 64 << 20);

    if (argc < 2 || strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ||
        strcmp(argv[1], "help") == 0) {
        help_print(argc < 2 ? stderr : stdout);
        return argc < 2 ? EXIT_USAGE : EXIT_DONE;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("kivictl %s\n", kivi_version());
        return EXIT_DONE;
    }
    int words;
    const struct command *command = command_find(argc, argv, &words);
    if (!command) {
        bool asked = argc > 2 && (strcmp(argv[2], "--help") == 0 || strcmp(argv[2], "-h") == 0);
        if (group_help(argv[1], asked ? stdout : stderr)) return asked ? EXIT_DONE : EXIT_USAGE;
        fprintf(stderr, "kivictl: there is no command '%s' (kivictl --help lists them)\n", argv[1]);
        return EXIT_USAGE;
    }
    struct ctl ctl = {.name = command->name};
    int exit_code = command->run(&ctl, argc - words, (const char **)argv + words);
    kivi_client_close(ctl.client);
    poptFreeContext(ctl.options);
    while (ctl.text_count > 0) free(ctl.texts[--ctl.text_count]);
    free(ctl.target);
    return exit_code;
}

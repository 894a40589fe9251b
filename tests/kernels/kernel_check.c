/* SPDX-License-Identifier: Apache-2.0 */
/* kernel_check.c - holds a backend to the scalar definition, and times it.
 *
 *     kernel_check [--backend NAME] [--random N] [--seed S [--case N]] [--every N]
 *                  [--fixture FILE] [--workers N]
 *     kernel_check --bench [--backend NAME] [--json [FILE]] [--workers N]
 *
 * Without --backend every backend that this machine has is held to "scalar" in turn.  Pages
 * must be equal to the byte, attention to the bound in kernel_check_attend.c.  The fixed
 * cases are every codec x head_dim x element type x awkward pattern; after them come real
 * KV and --random cases with everything drawn from the seed.  A failure prints the --seed
 * and the --case that replay it alone.  --every N runs one fixed case in N, spread over all.
 *
 * Needs nothing but the kernels: tests/kernel_check compiles it with gcc, and with nvcc where
 * there is one, on machines that have no Bazel.
 */
#include "tests/kernels/kernel_check.h"

#include <getopt.h>
#include <math.h>

#include "proto/kv_check.h"

/* Codecs that no preset names but the contract allows. */
static const struct kv_codec more_codecs[] = {
    {.kind = KV_CODEC_MINMAX, .key_bits = 4, .value_bits = 2, .group = 64},
    {.kind = KV_CODEC_MINMAX, .key_bits = 2, .value_bits = 4, .group = 128},
    {.kind = KV_CODEC_UNBIASED, .value_bits = 1, .mix_count = 1, .mixes = {{1, 1, 1, 1}}},
    {.kind = KV_CODEC_UNBIASED, .value_bits = 2, .value_rotated = 1, .mix_count = 2,
     .mixes = {{4, 4, 4, 4}, {4, 4, 4, 4}}},
    {.kind = KV_CODEC_UNBIASED, .value_bits = 2, .mix_count = 2,
     .mixes = {{1, 0, 0, 0}, {1, 0, 0, 0}}},
};
enum { MORE_CODECS = sizeof more_codecs / sizeof more_codecs[0] };

static const uint16_t head_dims[] = {64, 96, 128, 256};
enum { HEAD_DIMS = 4 };

struct options {
    const char *backend;
    const char *fixture;
    uint64_t seed;
    uint64_t only; /* number of the one case to run; 0: all */
    uint32_t random;
    uint32_t every;
    bool bench;
    const char *json;
    uint32_t workers;
};

static struct kv_codec codec_number(size_t index) {
    size_t presets;
    const struct kv_preset *preset = kv_presets(&presets);
    return index < presets ? preset[index].codec : more_codecs[index - presets];
}

static size_t codec_count(void) {
    size_t presets;
    kv_presets(&presets);
    return presets + MORE_CODECS;
}

/* ---- cases -------------------------------------------------------------------------------- */

void case_page(const struct check_case *check, struct dice *dice, uint32_t block, uint16_t *raw) {
    size_t half = kv_shape_elements(&check->shape);
    if (check->fixture == NULL) {
        pattern_fill(check->pattern, dice, &check->shape, raw);
        pattern_fill(check->pattern, dice, &check->shape, raw + half);
        return;
    }
    static const char *const names[3][2] = {{"k.0", "v.0"}, {"k.3", "v.3"}, {"k.7", "v.7"}};
    for (uint32_t side = 0; side < 2; side++) {
        struct tensor tensor;
        KV_CHECK(fixture_find(check->fixture, names[block % 3][side], &tensor));
        KV_CHECK(tensor.shape[0] >= check->shape.heads && tensor.shape[2] == 128);
        uint32_t blocks = tensor.shape[1] / KV_BLOCK_TOKENS;
        size_t block_elements = KV_BLOCK_TOKENS * 128;
        for (uint32_t head = 0; head < check->shape.heads; head++)
            memcpy(raw + side * half + head * block_elements,
                   (const uint16_t *)tensor.data +
                       ((size_t)head * blocks + block / 3 % blocks) * block_elements,
                   block_elements * sizeof *raw);
    }
}

void case_fail(struct bench_pair *pair, const struct check_case *check, const char *what) {
    if (pair->failures++ >= 20) return;
    printf("FAIL %s: %s; codec %s D %u heads %u %s %s; --seed %llu --case %llu\n", pair->name,
           what, kv_codec_name(&check->shape.codec), check->shape.head_dim, check->shape.heads,
           check->shape.dtype == KV_DTYPE_BF16 ? "bf16" : "f16",
           check->fixture != NULL ? "fixture" : pattern_name(check->pattern),
           (unsigned long long)pair->seed, (unsigned long long)pair->number);
}

/* Cases are numbered in the order in which they come; each has a seed of its own. */
static void run_case(struct bench_pair *pair, struct check_case *check) {
    check->seed = pair->seed + ++pair->number;
    if (pair->only != 0 && pair->only != pair->number) return;
    pair->cases++;
    check_pages(pair, check);
    check_attend(pair, check);
}

static void random_case(struct bench_pair *pair) {
    struct dice dice = {~(pair->seed + pair->number)};
    struct check_case check = {0};
    check.shape.heads = (uint16_t)(1 + dice_below(&dice, 4));
    check.shape.dtype = dice_bits(&dice) & 1 ? KV_DTYPE_F16 : KV_DTYPE_BF16;
    check.pattern = (enum pattern)dice_below(&dice, PATTERN_COUNT);
    do {
        check.shape.head_dim = head_dims[dice_below(&dice, HEAD_DIMS)];
        check.shape.codec = codec_number(dice_below(&dice, (uint32_t)codec_count()));
    } while (!kv_shape_valid(&check.shape));
    run_case(pair, &check);
}

/* One number in `every`, without a pattern that the loops' lengths could share. */
static bool is_sampled(uint64_t number, uint32_t every) {
    return dice_bits(&(struct dice){number}) % every == 0;
}

static void fixed_cases(struct bench_pair *pair, uint32_t every) {
    for (size_t codec = 0; codec < codec_count(); codec++)
        for (uint32_t d = 0; d < HEAD_DIMS; d++)
            for (uint32_t pattern = 0; pattern < PATTERN_COUNT; pattern++)
                for (uint32_t bf16 = 0; bf16 < 2; bf16++) {
                    struct check_case check = {
                        .pattern = (enum pattern)pattern,
                        .shape = {.heads = 1,
                                  .head_dim = head_dims[d],
                                  .dtype = bf16 ? KV_DTYPE_BF16 : KV_DTYPE_F16,
                                  .codec = codec_number(codec)},
                    };
                    if (!kv_shape_valid(&check.shape)) continue;
                    if (is_sampled(pair->number, every))
                        run_case(pair, &check);
                    else
                        pair->number++;
                }
}

static void fixture_cases(struct bench_pair *pair, const char *path) {
    struct fixture fixture;
    if (!fixture_open(&fixture, path)) {
        printf("note: no fixture at %s, real KV is not checked (--fixture FILE)\n", path);
        return;
    }
    for (size_t codec = 0; codec < codec_count(); codec++) {
        struct check_case check = {
            .fixture = &fixture,
            .shape = {.heads = 2,
                      .head_dim = 128,
                      .dtype = KV_DTYPE_F16,
                      .codec = codec_number(codec)},
        };
        if (kv_shape_valid(&check.shape)) run_case(pair, &check);
    }
    fixture_close(&fixture);
}

/* ---- a run ---------------------------------------------------------------------------------- */

/* False: a difference was found, or the backend was asked for and is not there. */
static bool check_backend(const struct options *options, const char *name) {
    static struct bench_pair pair; /* its labs hold large areas for the program's whole life */
    memset(&pair, 0, sizeof pair);
    pair.name = name;
    pair.seed = options->seed;
    pair.only = options->only;
    if (!lab_open(&pair.tested, name, options->workers)) {
        printf("%-8s not on this machine\n", name);
        return options->backend == NULL;
    }
    KV_CHECK(lab_open(&pair.truth, "scalar", 1));
    fixed_cases(&pair, options->every);
    fixture_cases(&pair, options->fixture);
    for (uint32_t i = 0; i < options->random; i++) random_case(&pair);
    lab_close(&pair.truth);
    lab_close(&pair.tested);

    double error = pair.square_output > 0 ? sqrt(pair.square_error / pair.square_output) : 0;
    printf("%-8s %llu cases, %llu differences; attention at worst %.3f (lse %.3f) of its bound, "
           "relative error %.1e\n",
           name, (unsigned long long)pair.cases, (unsigned long long)pair.failures,
           pair.worst_out, pair.worst_lse, error);
    return pair.failures == 0 && error <= ERROR_ORDINARY;
}

static bool check_all(const struct options *options) {
    if (options->backend != NULL) return check_backend(options, options->backend);
    static const char *const names[] = {"scalar", "avx2", "avx512", "amx", "cuda"};
    bool good = true;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        good &= check_backend(options, names[i]);
    return good;
}

static void usage(FILE *to) {
    fprintf(to, "usage: kernel_check [--backend scalar|avx2|avx512|amx|cuda[:N]] [--random N] "
                    "[--seed S [--case N]] [--every N] [--fixture FILE] "
                    "[--workers N]\n"
                    "       kernel_check --bench [--backend NAME] [--json [FILE]] [--workers N]\n"
                    "\n"
                    "Holds every backend of this machine, or NAME, to the scalar definition: pages to the\n"
                    "byte, attention to a bound; exit 1 if one differs.  --bench times quantize, dequantize\n"
                    "and attend of every codec against scalar, and quantize against memcpy, on N workers\n"
                    "(1); exit 1 if a goal was missed.  --json writes the rows to FILE, or to stdout while\n"
                    "the table goes to stderr.\n");
}

/* What follows an option that may stand alone, if anything does. */
static const char *optional_word(int argc, char **argv) {
    if (optarg != NULL) return optarg;
    return optind < argc && argv[optind][0] != '-' ? argv[optind++] : "-";
}

static struct options options_parse(int argc, char **argv) {
    static const struct option names[] = {
        {"backend", required_argument, NULL, 'b'}, {"random", required_argument, NULL, 'r'},
        {"seed", required_argument, NULL, 's'},    {"case", required_argument, NULL, 'c'},
        {"fixture", required_argument, NULL, 'f'},
        {"every", required_argument, NULL, 'e'},   {"bench", no_argument, NULL, 'B'},
        {"json", optional_argument, NULL, 'j'},    {"workers", required_argument, NULL, 'w'},
        {"help", no_argument, NULL, 'h'},
        {0},
    };
    struct options options = {
        .random = 200,
        .every = 1,
        .seed = (uint64_t)(lab_seconds() * 1e9),
        .fixture = fixture_path("data/llama30m-wikitext.safetensors"),
    };
    int letter;
    while ((letter = getopt_long(argc, argv, "", names, NULL)) != -1) switch (letter) {
        case 'b': options.backend = optarg; break;
        case 'r': options.random = (uint32_t)strtoul(optarg, NULL, 10); break;
        case 's': options.seed = strtoull(optarg, NULL, 10); break;
        case 'c': options.only = strtoull(optarg, NULL, 10); break;
        case 'f': options.fixture = optarg; break;
        case 'e': options.every = (uint32_t)strtoul(optarg, NULL, 10); break;
        case 'B': options.bench = true; break;
        case 'j': options.json = optional_word(argc, argv); break;
        case 'w': options.workers = (uint32_t)strtoul(optarg, NULL, 10); break;
        case 'h': usage(stdout); exit(0);
        default: usage(stderr); exit(2);
        }
    if (optind != argc || options.every == 0) {
        usage(stderr);
        exit(2);
    }
    return options;
}

int main(int argc, char **argv) {
    struct options options = options_parse(argc, argv);
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (options.bench) {
        struct bench_options bench = {options.backend, options.workers, options.json};
        return kernel_bench(&bench) ? 0 : 1;
    }
    printf("seed %llu\n", (unsigned long long)options.seed);
    return check_all(&options) ? 0 : 1;
}

/* Products of bfloat16 rows with weights of 4 or 8 bits, which stay as they are in memory: codes and scales.
 *
 * quantised_library.py calls these functions through ctypes; native_quantised_tile.h describes the layout of
 * weights. A few rows are multiplied by codes that are decoded on the way, at the speed of memory. For more
 * rows each panel is decoded once into scratch that stays in a core's cache. bfloat16 numbers are uint16_t.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <omp.h>

/* Bytes of a cache line. */
#define CACHE_LINE 64
/* Bytes by which codes are prefetched before they are used; 1536 and 4096 were slower. */
#define PREFETCH_BYTES 12288
/* Vectors of columns of a panel. */
#define PANEL_VECTORS 4
/* Rows of a tile, at most. */
#define ROWS 6
/* Rows of an expert that are multiplied by nibbles or bytes decoded on the way, at most: above, decoding once
 * was measured to be faster (EPYC, Zen 4, 2026-11-30).
 */
#define MOST_NIBBLE 128
#define MOST_BYTE 12

/* Meanings of a code; PAIRS: codes that are decoded already. */
enum { NIBBLE, E4M3, INT8, PAIRS };
/* Types of scales as they are stored. */
enum { FLOAT32, BFLOAT16, FLOAT16 };

/* Tables of bfloat16 numbers. `numbers`, `low_bytes` and `high_bytes`: of the 16 nibbles, or of the e4m3 codes
 * below the smallest normal one, as often as a register holds them. `low_of_size` and `high_of_size`: the
 * bytes of all e4m3 codes without their signs.
 */
struct decoder {
    uint16_t numbers[32];
    uint8_t low_bytes[32], high_bytes[32], low_of_size[128], high_of_size[128];
};

/* A weight [outputs, inputs] with a scale for each output and `group` inputs, a multiple of 8 unless one group
 * is all. The last group may be shorter.
 */
struct quantised {
    int64_t outputs, inputs, group;
    int32_t code, scale, has_zeros;
    const struct decoder *decoder;
};

/* The place of a tile's results: rows `stride` numbers apart, `columns` numbers from `out` on. Sums are
 * multiplied by `factor` before `bias` is added, which may be NULL.
 */
struct target {
    void *out;
    int64_t stride, columns;
    const float *bias;
    float factor;
    int is_float32;
};

static inline int64_t scale_bytes(int32_t scale) { return scale == FLOAT32 ? 4 : 2; }

#include "native_quantised_sets.h"

/* One instruction set: the columns of a panel, the bytes of x for a pair of inputs, the vectors of a tile of
 * decoded numbers, and its functions.
 */
struct isa {
    int columns, pair_bytes, pair_vectors;
    void (*decode)(const struct quantised *, const char *, uint32_t *);
    void (*codes)(
        int, const struct quantised *, const char *, const void *, const float *, const struct target *);
    void (*pairs)(
        int, int, const struct quantised *, const char *, const uint32_t *, const void *, const float *,
        const struct target *);
    void (*lay)(
        const struct quantised *, const uint16_t *, const int64_t *, int64_t, int, void *, float *);
};

#define ISA(suffix, columns, pair_bytes, pair_vectors) \
    {columns, pair_bytes, pair_vectors, decode_panel_##suffix, multiply_codes_##suffix, multiply_pairs_##suffix, \
     lay_rows_##suffix}
/* By the numbers that `xpar_quantised_set` returns. */
static const struct isa sets[] = {
    {0}, ISA(avx2, 32, 8, 2), ISA(avx512, 64, 8, 4), ISA(bf16, 64, 4, 4)};

/* Return the best instruction set here: 1 AVX2, 2 AVX-512, 3 AVX-512 with bfloat16 products; 0 for none. */
int xpar_quantised_set(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") ? 3 : 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static int64_t groups_of(const struct quantised *w) { return (w->inputs + w->group - 1) / w->group; }

static int64_t words_of(const struct quantised *w)
{
    const int64_t per_word = w->code == NIBBLE ? 8 : 4;
    return (w->inputs + per_word - 1) / per_word;
}

/* Return the bytes of one panel of `w`, and the columns of a panel in `columns`. */
int64_t xpar_quantised_panel_bytes(const struct quantised *w, int set, int32_t *columns)
{
    *columns = sets[set].columns;
    const int64_t header = scale_bytes(w->scale) + (w->has_zeros ? 2 : 0);
    return *columns * (groups_of(w) * header + words_of(w) * (int64_t)sizeof(uint32_t));
}

/* Gather the nibbles in every other place of `word`. */
static uint32_t every_other_nibble(uint32_t word)
{
    word &= 0x0f0f0f0f;
    word = (word | word >> 4) & 0x00ff00ff;
    return (word | word >> 8) & 0xffff;
}

/* Copy one weight into the layout of native_quantised_tile.h.
 *
 * codes: [outputs, inputs] bytes, or [outputs, (inputs + 1) / 2] with the nibble of an even input low.
 * scales, zeros: [blocks of `block_rows` outputs, groups]; zeros in bfloat16, times 2^24 if codes are int8.
 *
 * Returns the number of e4m3 codes that are NaN.
 */
int64_t xpar_quantised_pack(
    const struct quantised *w, const uint8_t *codes, const char *scales, const uint16_t *zeros,
    int64_t block_rows, char *packed, int set, int threads)
{
    const int columns = sets[set].columns, per_word = w->code == NIBBLE ? 8 : 4;
    const int64_t stride = w->code == NIBBLE ? (w->inputs + 1) / 2 : w->inputs, groups = groups_of(w);
    const int64_t size = scale_bytes(w->scale), panels = (w->outputs + columns - 1) / columns;
    int32_t unused;
    const int64_t panel_bytes = xpar_quantised_panel_bytes(w, set, &unused);
    int64_t nans = 0;

#pragma omp parallel for num_threads(threads) reduction(+ : nans)
    for (int64_t panel = 0; panel < panels; panel++) {
        char *group_start = packed + panel * panel_bytes;
        memset(group_start, 0, panel_bytes);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t begin = g * w->group;
            const int64_t left = w->inputs - begin < w->group ? w->inputs - begin : w->group;
            char *zero = group_start + columns * size;
            uint32_t *words = (uint32_t *)(zero + (w->has_zeros ? columns * 2 : 0));
            for (int64_t c = 0; c < columns && panel * columns + c < w->outputs; c++) {
                const int64_t n = panel * columns + c, block = n / block_rows * groups + g;
                memcpy(group_start + c * size, scales + block * size, size);
                if (w->has_zeros)
                    memcpy(zero + c * 2, zeros + block, 2);
                for (int64_t k = begin; k < begin + left; k += per_word) {
                    const int64_t first = w->code == NIBBLE ? k / 2 : k;
                    uint32_t word = 0;
                    memcpy(&word, codes + n * stride + first, stride - first < 4 ? stride - first : 4);
                    for (int b = 0; w->code == E4M3 && b < 4; b++)
                        nans += (word >> 8 * b & 0x7f) == 0x7f;
                    uint32_t *row = words + (k - begin) / per_word * columns;
                    if (w->code == NIBBLE)
                        row[c] = every_other_nibble(word) | every_other_nibble(word >> 4) << 16;
                    else
                        for (int half = 0; half < 2; half++)
                            memcpy((char *)row + c / 4 * 16 + half * 8 + c % 4 * 2, (char *)&word + half * 2, 2);
                }
            }
            group_start = (char *)(words + (left + per_word - 1) / per_word * columns);
        }
    }
    return nans;
}

/* A block of `rows` sorted rows from `first` on, all of span `span`. */
struct block {
    int64_t span, first;
    int rows;
};

/* Split spans (expert, first, end) evenly into blocks of at most ROWS rows and return how many there are. */
static int64_t split_spans(
    const int64_t *spans, int64_t num_spans, struct block *blocks, int64_t *starts)
{
    int64_t count = 0;
    for (int64_t s = 0; s < num_spans; s++) {
        const int64_t begin = spans[3 * s + 1], rows = spans[3 * s + 2] - begin;
        const int64_t parts = (rows + ROWS - 1) / ROWS;
        starts[s] = count;
        for (int64_t p = 0; p < parts; p++) {
            const int64_t first = rows * p / parts, end = rows * (p + 1) / parts;
            blocks[count++] = (struct block){s, begin + first, (int)(end - first)};
        }
    }
    starts[num_spans] = count;
    return count;
}

/* The arguments of xpar_quantised_product. */
struct product {
    const struct quantised *weight;
    const uint16_t *x;     /* [.., inputs] */
    const int64_t *rows;   /* the row of x that each result reads, or NULL if result r reads row r */
    const int64_t *spans;  /* [num_spans, 3]: expert, first and end, one after the other */
    int64_t num_spans;
    const char *packed;    /* [experts, panels] */
    const float *factors;  /* [experts], or NULL */
    const float *bias;     /* [experts, panels, columns], or NULL */
    char *out;             /* [results, outputs] bfloat16, or float32 if `is_float32` */
    char *laid;            /* room for all rows, `laid_bytes` each, at a cache line's start */
    int64_t laid_bytes;
    char *scratch;         /* room for one decoded panel a thread */
    int64_t scratch_bytes;
    int32_t is_float32, set, threads;
};

/* Multiply all rows of a span by one panel. */
static void multiply_panel(
    const struct product *p, const struct isa *isa, int64_t span, int64_t panel, const struct block *blocks,
    int64_t num_blocks)
{
    const struct quantised *w = p->weight;
    const int64_t panels = (w->outputs + isa->columns - 1) / isa->columns, expert = p->spans[3 * span];
    const int64_t base = p->spans[1], sums_at = (w->inputs + 7) / 8 * 4 * isa->pair_bytes;
    int32_t columns;
    const char *packed =
        p->packed + (expert * panels + panel) * xpar_quantised_panel_bytes(w, p->set, &columns);
    uint32_t *scratch = (uint32_t *)(p->scratch + omp_get_thread_num() * p->scratch_bytes);
    const int64_t rows = p->spans[3 * span + 2] - p->spans[3 * span + 1];
    const int is_direct = rows <= (w->code == NIBBLE ? MOST_NIBBLE : MOST_BYTE);
    if (!is_direct)
        isa->decode(w, packed, scratch);
    for (const struct block *b = blocks; b < blocks + num_blocks; b++) {
        char *laid = p->laid + (b->first - base) * p->laid_bytes;
        const float *sums = (const float *)(laid + b->rows * sums_at);
        const int64_t column = panel * columns, left = w->outputs - column;
        const struct target to = {
            p->out + (b->first * w->outputs + column) * (p->is_float32 ? 4 : 2), w->outputs, left < columns ? left : columns,
            p->bias ? p->bias + expert * panels * columns + column : NULL,
            (p->factors ? p->factors[expert] : 1) * (w->code == INT8 ? 0x1p-24f : 1), p->is_float32,
        };
        if (is_direct) {
            isa->codes(b->rows, w, packed, laid, sums, &to);
            continue;
        }
        for (int vector = 0; vector < PANEL_VECTORS; vector += isa->pair_vectors)
            isa->pairs(b->rows, vector, w, packed, scratch, laid, sums, &to);
    }
}

/* Compute out[r] = factors[expert] * (x[rows[r]] @ weight[expert].T) + bias[expert] for the rows r of each
 * span. Returns 0, or -1 if there is no memory for the table of blocks.
 */
int xpar_quantised_product(const struct product *p)
{
    const struct isa *isa = &sets[p->set];
    const struct quantised *w = p->weight;
    const int64_t panels = (w->outputs + isa->columns - 1) / isa->columns;
    const int64_t sums_at = (w->inputs + 7) / 8 * 4 * isa->pair_bytes, base = p->num_spans ? p->spans[1] : 0;
    int64_t most = 0;
    for (int64_t s = 0; s < p->num_spans; s++)
        most += (p->spans[3 * s + 2] - p->spans[3 * s + 1] + ROWS - 1) / ROWS;
    struct block *blocks = malloc(most * sizeof *blocks + 1);
    int64_t *starts = malloc((p->num_spans + 1) * sizeof *starts);
    if (!blocks || !starts) {
        free(blocks);
        free(starts);
        return -1;
    }
    const int64_t count = split_spans(p->spans, p->num_spans, blocks, starts);

#pragma omp parallel num_threads(p->threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < count; b++) {
            char *laid = p->laid + (blocks[b].first - base) * p->laid_bytes;
            isa->lay(
                w, p->x, p->rows, blocks[b].first, blocks[b].rows, laid,
                (float *)(laid + blocks[b].rows * sums_at));
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < p->num_spans * panels; task++) {
            const int64_t s = task / panels;
            multiply_panel(p, isa, s, task % panels, blocks + starts[s], starts[s + 1] - starts[s]);
        }
    }
    free(blocks);
    free(starts);
    return 0;
}

#else

int xpar_quantised_set(void) { return 0; }

#endif

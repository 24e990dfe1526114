/* Products of bfloat16 rows with bfloat16 weights, in bfloat16 arithmetic where an x86 processor has it, else
 * in float32. There the products of other libraries run at a fifth of float32's speed, and float32 weights
 * would be twice the memory to read.
 *
 * native_library.py calls these functions through ctypes; native_tile.h describes the layout of weights. All
 * tensors lie row after row. bfloat16 numbers are uint16_t: the upper half of a float32.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <omp.h>

/* Bytes of a cache line. */
#define CACHE_LINE 64
/* Bytes, of all panels together, by which weights are prefetched before they are used; 512 to 16384 were
 * tried.
 */
#define PREFETCH_BYTES 8192
/* Panels that a tile reads side by side, at most. */
#define MAX_PANELS 4
/* Panels that one task multiplies by the same blocks of rows, so that panels and block stay in a core's
 * cache.
 */
#define PANELS_PER_TASK 4

/* The place of a tile's results: rows `stride` numbers apart, `columns` numbers of the last panel; `bias` may
 * be NULL.
 */
struct target {
    uint16_t *out;
    int64_t stride, columns;
    const float *bias;
};

/* Attention of one query per head and sequence against `length` keys.
 *
 * query: [sequences, heads, head_size]; key and value: [sequences, key_heads, length, head_size]. Strides are
 * in numbers; the numbers of a head are contiguous.
 * added: [sequences, length], added to the scores, `added_stride` numbers a sequence (0: the same for all);
 * or NULL.
 * out: [sequences, heads, head_size], contiguous.
 */
struct attention {
    const uint16_t *query, *key, *value;
    const float *added;
    uint16_t *out;
    int64_t sequences, heads, key_heads, length, head_size;
    int64_t query_strides[2], key_strides[3], value_strides[3], added_stride;
    float scale;
};

/* Heads with the same keys that are computed together, at most. */
#define MAX_HEADS 8
/* Vectors of a value that are summed at a time, in registers. */
#define VALUE_VECTORS 2
typedef float float4 __attribute__((vector_size(16)));

/* One instruction set: the largest number of rows of a tile, the columns of a panel, the numbers of 32 bits
 * of a row for each pair of inputs, and its functions.
 */
struct isa {
    int rows, columns, numbers_of_pair;
    int (*panels_abreast)(int);
    void (*tile)(int, int, const uint32_t *, const uint32_t *, int64_t, const struct target *);
    void (*attend)(const struct attention *, int64_t, int64_t, float *);
};

/* ROWS: as many as leave registers for a pair of weights and a number of x. */
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define SUFFIX avx512
#define VBYTES 64
#define ROWS 12
#define NUMBERS_OF_PAIR 2
#include "native_tile.h"
#include "native_attention.h"
static const struct isa isa_avx512 = {
    ROWS, 2 * VBYTES / 4, NUMBERS_OF_PAIR, panels_abreast_avx512, tile_avx512, attend_avx512};
#undef SUFFIX
#undef NUMBERS_OF_PAIR
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
#define SUFFIX bf16
#define NUMBERS_OF_PAIR 1
#include "native_tile.h"
static const struct isa isa_bf16 = {
    ROWS, 2 * VBYTES / 4, NUMBERS_OF_PAIR, panels_abreast_bf16, tile_bf16, attend_avx512};
#undef SUFFIX
#undef VBYTES
#undef ROWS
#undef NUMBERS_OF_PAIR
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define SUFFIX avx2
#define VBYTES 32
#define ROWS 6
#define NUMBERS_OF_PAIR 2
#include "native_tile.h"
#include "native_attention.h"
static const struct isa isa_avx2 = {
    ROWS, 2 * VBYTES / 4, NUMBERS_OF_PAIR, panels_abreast_avx2, tile_avx2, attend_avx2};
#undef SUFFIX
#undef VBYTES
#undef ROWS
#undef NUMBERS_OF_PAIR
#pragma GCC pop_options

/* Return the instruction set with `lanes` float32 numbers in a vector, 16 or 8; `multiplies` bfloat16 or not.
 */
static struct isa isa_for(int lanes, int multiplies)
{
    return lanes < 16 ? isa_avx2 : multiplies ? isa_bf16 : isa_avx512;
}

/* A block of `rows` sorted rows from `first` on, all of span `span`; at most the rows of a tile. */
struct block {
    int64_t span, first;
    int rows;
};

/* Split spans (expert, first, end) into blocks of at most `rows` rows, those of a span as equal as can be:
 * a block of few rows waits for weights. Returns the number of blocks.
 *
 * starts: [num_spans + 1], the first block of each span, then the number of blocks.
 */
static int64_t split_spans(
    const int64_t *spans, int64_t num_spans, int rows, struct block *blocks, int64_t *starts)
{
    int64_t count = 0;
    for (int64_t s = 0; s < num_spans; s++) {
        const int64_t end = spans[3 * s + 2];
        starts[s] = count;
        for (int64_t first = spans[3 * s + 1]; first < end; first += blocks[count++].rows) {
            const int64_t left = (end - first + rows - 1) / rows;
            blocks[count] = (struct block){s, first, (int)((end - first + left - 1) / left)};
        }
    }
    starts[num_spans] = count;
    return count;
}

/* Lay a block's rows side by side, [pairs, numbers, rows], as float32 or, with one number, as pairs; an odd
 * last input is followed by zeros.
 */
static void lay_block(
    const uint16_t *x, const int64_t *rows, int64_t inputs, int numbers, const struct block *block,
    uint32_t *laid)
{
    for (int m = 0; m < block->rows; m++) {
        const uint16_t *row = x + inputs * (rows ? rows[block->first + m] : block->first + m);
        uint32_t *to = laid + m;
        for (int64_t k = 0; k < inputs; k += 2, to += numbers * block->rows) {
            const uint32_t even = row[k], odd = k + 1 < inputs ? row[k + 1] : 0;
            if (numbers == 1) {
                *to = even | odd << 16;
            } else {
                to[0] = even << 16;
                to[block->rows] = odd << 16;
            }
        }
    }
}

/* Return the float32 numbers in the widest vectors of this processor that there is code for, or 0. */
int xpar_lanes(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return 16;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 8 : 0;
}

/* Return whether this processor multiplies bfloat16 in vectors of 16 lanes. */
int xpar_multiplies(void)
{
    return xpar_lanes() == 16 && __builtin_cpu_supports("avx512bf16");
}

/* Copy one weight [outputs, inputs] into the layout of native_tile.h; missing rows and columns become zeros.
 */
void xpar_pack(
    const uint16_t *weight, int64_t outputs, int64_t inputs, uint32_t *packed, int lanes, int threads)
{
    const int columns = isa_for(lanes, 0).columns;
    const int64_t pairs = (inputs + 1) / 2, panels = (outputs + columns - 1) / columns;

#pragma omp parallel for num_threads(threads)
    for (int64_t panel = 0; panel < panels; panel++) {
        uint32_t *to = packed + panel * pairs * columns;
        const uint16_t *from = weight + panel * columns * inputs;
        const int64_t filled = outputs - panel * columns < columns ? outputs - panel * columns : columns;
        if (filled < columns)
            memset(to, 0, pairs * columns * sizeof *to);
        for (int64_t pair = 0; pair < pairs; pair++)
            for (int64_t column = 0; column < filled; column++) {
                const uint16_t *of = from + column * inputs + 2 * pair;
                const uint32_t high = 2 * pair + 1 < inputs ? of[1] : 0;
                to[pair * columns + column] = of[0] | high << 16;
            }
    }
}

/* Compute out[r] = x[rows[r]] @ weight[expert].T + bias[expert] for the rows r of each span (expert, first,
 * end).
 *
 * x: [.., inputs] bfloat16.
 * rows: the row of x that each r reads, or NULL if r reads row r.
 * spans: [num_spans, 3], one after the other.
 * weights: [expert, panel, pair, column], with 2 * lanes columns.
 * bias: [expert, panel, column] float32, or NULL.
 * out: [.., outputs] bfloat16.
 * laid: room for the rows of all spans as float32, with inputs rounded up to even.
 * multiplies: whether to use the bfloat16 arithmetic of the processor, for 16 lanes.
 *
 * Returns 0, or -1 if there is no memory for the table of blocks.
 */
int xpar_product(
    const uint16_t *x, const int64_t *rows, int64_t inputs, const int64_t *spans, int64_t num_spans,
    const uint32_t *weights, const float *bias, int64_t outputs, uint16_t *out, uint32_t *laid, int lanes,
    int multiplies, int threads)
{
    const struct isa isa = isa_for(lanes, multiplies);
    const int64_t pairs = (inputs + 1) / 2, panels = (outputs + isa.columns - 1) / isa.columns;
    int64_t most = 0;
    for (int64_t s = 0; s < num_spans; s++)
        most += (spans[3 * s + 2] - spans[3 * s + 1] + isa.rows - 1) / isa.rows;
    struct block *blocks = malloc(most * sizeof *blocks + 1);
    int64_t *starts = malloc((num_spans + 1) * sizeof *starts);
    if (!blocks || !starts) {
        free(blocks);
        free(starts);
        return -1;
    }
    const int64_t count = split_spans(spans, num_spans, isa.rows, blocks, starts);
    const int64_t base = num_spans ? spans[1] : 0;
    int64_t group = PANELS_PER_TASK;
    while (group > 1 && num_spans * ((panels + group - 1) / group) < 4 * threads)
        group /= 2;
    const int64_t groups = (panels + group - 1) / group;

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < count; b++)
            lay_block(
                x, rows, inputs, isa.numbers_of_pair, &blocks[b],
                laid + (blocks[b].first - base) * isa.numbers_of_pair * pairs);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < num_spans * groups; task++) {
            const int64_t s = task / groups, first = task % groups * group;
            const int64_t end = first + group < panels ? first + group : panels;
            for (int64_t b = starts[s]; b < starts[s + 1]; b++)
                for (int64_t p = first; p < end;) {
                    int abreast = isa.panels_abreast(blocks[b].rows);
                    while (abreast > end - p)
                        abreast /= 2;
                    const int64_t panel = spans[3 * s] * panels + p, column = p * isa.columns;
                    const int64_t left = outputs - column - (abreast - 1) * isa.columns;
                    const struct target to = {
                        out + blocks[b].first * outputs + column, outputs,
                        left < isa.columns ? left : isa.columns,
                        bias ? bias + panel * isa.columns : NULL,
                    };
                    isa.tile(
                        blocks[b].rows, abreast, weights + panel * pairs * isa.columns,
                        laid + (blocks[b].first - base) * isa.numbers_of_pair * pairs, pairs, &to);
                    p += abreast;
                }
        }
    }
    free(blocks);
    free(starts);
    return 0;
}

/* Compute softmax(scale * query @ key.T + added) @ value for one query of each head. head_size is a multiple
 * of `lanes`. Returns 0, or -1 if there is no memory for the scores.
 */
int xpar_attend(const struct attention *a, int lanes, int threads)
{
    const struct isa isa = isa_for(lanes, 0);
    const int64_t room = MAX_HEADS * ((a->length + lanes - 1) / lanes * lanes + a->head_size);
    const int64_t bytes = room * sizeof(float) * threads;
    float *buffers = aligned_alloc(CACHE_LINE, (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
    if (!buffers)
        return -1;

#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < a->sequences * a->key_heads; task++)
        isa.attend(a, task / a->key_heads, task % a->key_heads, buffers + room * omp_get_thread_num());
    free(buffers);
    return 0;
}

#else

int xpar_lanes(void) { return 0; }
int xpar_multiplies(void) { return 0; }

#endif

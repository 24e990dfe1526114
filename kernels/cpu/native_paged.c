/* Attention of a flat batch over keys and values in blocks, and the copying of new keys and values into them.
 *
 * paged_library.py calls these functions through ctypes. Tensors are bfloat16 (uint16_t), arithmetic is
 * float32, the result is rounded once. The definition is attend_by_definition in paged_attention.py, whose
 * letters are used here.
 *
 * A row is a query of a token and a head. Rows that read the same keys, heads of a group and tokens of a
 * chunk, are computed together, in tiles of TILE keys that begin at multiples of TILE; the softmax is kept up
 * from tile to tile. Each number of a row is made by the same operations in the same order, however many rows
 * are computed beside it: its bits depend on its own query and the keys and values that it sees.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <omp.h>

/* Bytes of a cache line. */
#define CACHE_LINE 64
/* Keys of a tile. */
#define TILE 64
/* Rows that are computed together, at most; the keys and values of a tile are then converted once. */
#define MOST_ROWS 128
/* Rows, at most, for which converting the keys of a tile first is slower (EPYC, Zen 4, 2026-11-30). */
#define FEW_ROWS 8
/* Tasks of each thread below which tasks get fewer rows. */
#define TASKS_PER_THREAD 4

/* A call. Strides are in numbers; the numbers of a head are contiguous.
 *
 * query: [T, heads, key_size]; out: [T, heads, value_size], contiguous.
 * keys: [num_blocks, key_heads, block, key_size]; values: the same with value_size.
 * starts: [sequences + 1]; lengths: [sequences]; tables: [sequences, table_width].
 * sinks: [heads] or NULL. window: INT64_MAX if there is none. softcap: 0 if there is none.
 */
struct paged {
    const uint16_t *query, *keys, *values;
    const float *sinks;
    const int32_t *starts, *lengths, *tables;
    uint16_t *out;
    int64_t tokens, sequences, heads, key_heads, num_blocks, block, key_size, value_size, table_width, window;
    int64_t query_strides[2], key_strides[3], value_strides[3];
    float scale, softcap;
};

/* Rows `first` to `end` - 1 of a sequence and a head of keys: row r is token r / G, head r % G of the G heads
 * that share the keys.
 */
struct task {
    int64_t sequence, key_head, first, end;
};

/* Memory of one task: rows, their sums and what is converted of a tile. Numbers of TILE keys lie together. */
struct scratch {
    float *query, *keys, *values, *scores, *sums, *totals, *largest, *factors;
    int64_t *places, *key_offsets, *value_offsets, *key_ahead, *value_ahead;
};

/* Find the places `low` to `high` - 1 of the tile of keys from `tile` on that the row at `place` sees; there
 * are none unless low < high. Neither is smaller for a later row.
 */
static inline void find_visible(
    const struct paged *a, int64_t place, int64_t tile, int64_t *low, int64_t *high)
{
    const int64_t start = a->window > place ? 0 : place - a->window + 1;
    *low = start > tile ? start - tile : 0;
    *high = place + 1 < tile + TILE ? place + 1 - tile : TILE;
}

#include "native_paged_sets.h"

static void (*const attend_by_set[])(
    const struct paged *, const struct task *, const struct task *, const struct scratch *) = {
    NULL, attend_avx2, attend_avx512, attend_bf16};

/* Return the number of the best instruction set here: 1 AVX2, 2 AVX-512, 3 the same with products of
 * bfloat16; 0 if there is no code for this processor.
 */
int xpar_paged_set(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}

/* Return whether every token and every block that a sequence names exists. */
static int has_blocks(const struct paged *a)
{
    if (a->starts[0] != 0 || a->starts[a->sequences] != a->tokens)
        return 0;
    for (int64_t b = 0; b < a->sequences; b++) {
        const int64_t blocks = (a->lengths[b] + a->block - 1) / a->block;
        const int64_t count = a->starts[b + 1] - a->starts[b];
        if (blocks > a->table_width || count < 0 || count > a->lengths[b])
            return 0;
        for (int64_t i = 0; i < blocks; i++)
            if (a->tables[b * a->table_width + i] < 0 || a->tables[b * a->table_width + i] >= a->num_blocks)
                return 0;
    }
    return 1;
}

/* Split the batch into tasks of at most `most` rows and return their number; write them unless `tasks` is
 * NULL. The last tokens of a chunk, which see most keys, come first.
 */
static int64_t make_tasks(const struct paged *a, int64_t most, struct task *tasks)
{
    const int64_t each = a->heads / a->key_heads;
    int64_t count = 0;
    for (int64_t b = 0; b < a->sequences; b++) {
        const int64_t rows = (a->starts[b + 1] - a->starts[b]) * each;
        for (int64_t head = 0; head < a->key_heads; head++)
            for (int64_t end = rows; end > 0; end -= most, count++)
                if (tasks)
                    tasks[count] = (struct task){b, head, end > most ? end - most : 0, end};
    }
    return count;
}

/* Take `count` numbers of 4 bytes from `*memory`, in whole cache lines. */
static void *take(char **memory, int64_t count)
{
    void *taken = *memory;
    *memory += (4 * count + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    return taken;
}

/* Lay out the scratch of a thread for tasks of `rows` rows and return its bytes. */
static int64_t lay_scratch(const struct paged *a, int64_t rows, char *memory, struct scratch *s)
{
    char *at = memory;
    const int64_t tile = rows > FEW_ROWS ? TILE : 0;
    s->query = take(&at, rows * a->key_size);
    s->keys = take(&at, tile * a->key_size);
    s->values = take(&at, tile * a->value_size);
    s->scores = take(&at, rows * TILE);
    s->sums = take(&at, rows * a->value_size);
    s->totals = take(&at, rows * CACHE_LINE / 4);
    s->largest = take(&at, rows);
    s->factors = take(&at, rows);
    s->places = take(&at, 2 * rows);
    s->key_offsets = take(&at, 2 * TILE);
    s->value_offsets = take(&at, 2 * TILE);
    s->key_ahead = take(&at, 2 * TILE);
    s->value_ahead = take(&at, 2 * TILE);
    return at - memory;
}

/* Compute the attention of a batch with instruction set `set`. Returns 0, -1 if there is no memory, -2 if the
 * tables name blocks that do not exist.
 */
int xpar_paged_attend(const struct paged *a, int set, int threads)
{
    if (!has_blocks(a))
        return -2;
    int64_t most = MOST_ROWS, rows = 0;
    while (most > 1 && make_tasks(a, most, NULL) < TASKS_PER_THREAD * threads)
        most /= 2;
    const int64_t count = make_tasks(a, most, NULL);
    struct task *tasks = malloc(count * sizeof *tasks + 1);
    if (!tasks)
        return -1;
    make_tasks(a, most, tasks);
    for (int64_t i = 0; i < count; i++)
        rows = tasks[i].end - tasks[i].first > rows ? tasks[i].end - tasks[i].first : rows;
    struct scratch none;
    const int64_t bytes = lay_scratch(a, rows, NULL, &none);
    char *memory = aligned_alloc(CACHE_LINE, bytes * threads + CACHE_LINE);
    if (!memory) {
        free(tasks);
        return -1;
    }
    /* Neighbours in turn, so that a task can fetch the next one's keys. */
    const int64_t chunk = count / (16 * threads) > 1 ? count / (16 * threads) : 1;

#pragma omp parallel num_threads(threads)
    {
        struct scratch own;
        lay_scratch(a, rows, memory + bytes * omp_get_thread_num(), &own);
#pragma omp for schedule(dynamic, chunk)
        for (int64_t i = 0; i < count; i++)
            attend_by_set[set](a, &tasks[i], i + 1 < count ? &tasks[i + 1] : NULL, &own);
    }
    free(memory);
    free(tasks);
    return 0;
}

/* Copy rows [T, heads, `bytes`] into the places of a pool, in bytes; place p is row p % block of block
 * p / block. Strides are of tokens and heads of `rows`, and of blocks, heads and places of the pool. Returns
 * 0, or -2 without having copied anything if a place does not exist.
 */
int xpar_paged_store(
    const char *rows, const int64_t *row_strides, const int64_t *places, int64_t count, int64_t heads,
    int64_t bytes, char *pool, const int64_t *pool_strides, int64_t num_blocks, int64_t block)
{
    for (int64_t t = 0; t < count; t++)
        if (places[t] < 0 || places[t] >= num_blocks * block)
            return -2;
    for (int64_t t = 0; t < count; t++) {
        char *to = pool + places[t] / block * pool_strides[0] + places[t] % block * pool_strides[2];
        const char *from = rows + t * row_strides[0];
        for (int64_t head = 0; head < heads; head++)
            memcpy(to + head * pool_strides[1], from + head * row_strides[1], bytes);
    }
    return 0;
}

#else

int xpar_paged_set(void) { return 0; }

#endif

/* One tile of a product for one instruction set, named by SUFFIX: at most ROWS rows by two vectors of VBYTES
 * bytes of columns. native.c includes this file once for each instruction set, after a pragma that selects
 * it.
 *
 * Layout of a weight: panels of COLUMNS columns (outputs). A panel has one 32-bit number per column for each
 * pair of inputs k and k + 1: the bfloat16 of k in the low half, that of k + 1 in the high half. Shifted up,
 * or with the low half cleared, such a number is the float32 of the same value.
 *
 * The rows of a block have NUMBERS_OF_PAIR numbers of 32 bits for each pair: its two float32, or, where the
 * processor multiplies bfloat16, the pair as it is.
 *
 * Each element of a result is one chain over k in ascending order, of fused multiply-adds or of products of
 * pairs, whatever the number of rows, threads and lanes: its bits depend on its row and its column alone.
 * Products of pairs take numbers below the smallest normal bfloat16 as zero.
 */

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define LANES (VBYTES / 4)
#define COLUMNS (2 * LANES)
#define floats JOIN(floats, SUFFIX)
#define words JOIN(words, SUFFIX)
#define halves JOIN(halves, SUFFIX)
#define to_bfloat16 JOIN(to_bfloat16, SUFFIX)
#define add_pair JOIN(add_pair, SUFFIX)
#define compute_tile JOIN(compute_tile, SUFFIX)

typedef float floats __attribute__((vector_size(VBYTES)));
typedef uint32_t words __attribute__((vector_size(VBYTES)));
typedef uint16_t halves __attribute__((vector_size(VBYTES / 2)));

/* Round to bfloat16, ties to even; NaN stays NaN. */
static inline __attribute__((always_inline)) halves to_bfloat16(floats value)
{
    words bits = (words)value;
    words near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    words nan = (words)(value != value);
    return __builtin_convertvector((near & ~nan) | (((bits >> 16) | 0x40) & nan), halves);
}

/* Add to the sums of `rows` rows the products of the pair of inputs in `weights`, two vectors of columns. */
static inline __attribute__((always_inline)) void add_pair(
    const int rows, const words *weights, const uint32_t *x, floats (*sum)[2])
{
#if NUMBERS_OF_PAIR == 1
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[m]);
        sum[m][0] = (floats)_mm512_dpbf16_ps((__m512)sum[m][0], (__m512bh)weights[0], pair);
        sum[m][1] = (floats)_mm512_dpbf16_ps((__m512)sum[m][1], (__m512bh)weights[1], pair);
    }
#else
    const float *values = (const float *)x;
    floats a = (floats)(weights[0] << 16), b = (floats)(weights[1] << 16);
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++) {
        sum[m][0] += values[m] * a;
        sum[m][1] += values[m] * b;
    }
    a = (floats)(weights[0] & 0xffff0000u);
    b = (floats)(weights[1] & 0xffff0000u);
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++) {
        sum[m][0] += values[rows + m] * a;
        sum[m][1] += values[rows + m] * b;
    }
#endif
}

/* Compute and store one tile. Every call passes constants as `rows` and `panels`, so that all sums stay in
 * registers.
 *
 * first: the first of `panels` consecutive panels, which are read side by side.
 * x: [pairs, NUMBERS_OF_PAIR, rows].
 */
static inline __attribute__((always_inline)) void compute_tile(
    const int rows, const int panels, const uint32_t *first, const uint32_t *x, int64_t pairs,
    const struct target *to)
{
    floats sum[MAX_PANELS][ROWS][2];
#pragma GCC unroll 16
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++)
            sum[p][m][0] = sum[p][m][1] = (floats){0};
    for (int64_t pair = 0; pair < pairs; pair++, first += COLUMNS, x += NUMBERS_OF_PAIR * rows) {
#pragma GCC unroll 16
        for (int p = 0; p < panels; p++) {
            const uint32_t *panel = first + p * pairs * COLUMNS;
            /* The hardware prefetches no further than a page, which keeps a core's share of memory idle at
             * times. Few rows in bfloat16 arithmetic are read faster without help.
             */
            if (NUMBERS_OF_PAIR > 1 || rows > 4) {
                __builtin_prefetch((const char *)panel + PREFETCH_BYTES / panels);
                if (COLUMNS * sizeof(uint32_t) > CACHE_LINE)
                    __builtin_prefetch((const char *)panel + PREFETCH_BYTES / panels + CACHE_LINE);
            }
            const words weights[2] = {((const words *)panel)[0], ((const words *)panel)[1]};
            add_pair(rows, weights, x, sum[p]);
        }
    }
#pragma GCC unroll 16
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) {
            if (to->bias) {
                sum[p][m][0] += ((const floats *)(to->bias + p * COLUMNS))[0];
                sum[p][m][1] += ((const floats *)(to->bias + p * COLUMNS))[1];
            }
            halves result[2] = {to_bfloat16(sum[p][m][0]), to_bfloat16(sum[p][m][1])};
            uint16_t *out = to->out + m * to->stride + p * COLUMNS;
            if (p < panels - 1 || to->columns == COLUMNS)
                memcpy(out, result, sizeof result);
            else
                memcpy(out, result, to->columns * sizeof *out);
        }
}

/* Return the panels that a tile of `rows` rows reads side by side. With few rows a core waits for memory,
 * less so if it reads in several places; the sums of several panels take as many registers as those of more
 * rows.
 */
static int JOIN(panels_abreast, SUFFIX)(int rows)
{
    if (NUMBERS_OF_PAIR == 1)
        return rows <= ROWS / 3 ? 2 : 1;
    return rows <= ROWS / 6 ? MAX_PANELS : rows <= ROWS / 3 ? 2 : 1;
}

static void JOIN(tile, SUFFIX)(
    int rows, int panels, const uint32_t *first, const uint32_t *x, int64_t pairs, const struct target *to)
{
    switch (16 * panels + rows) {
#define CASE(p, n) case 16 * p + n: compute_tile(n, p, first, x, pairs, to); break
    CASE(1, 1); CASE(1, 2); CASE(1, 3); CASE(1, 4); CASE(1, 5); CASE(1, 6);
    CASE(2, 1); CASE(2, 2);
    CASE(4, 1);
#if ROWS > 6
    CASE(1, 7); CASE(1, 8); CASE(1, 9); CASE(1, 10); CASE(1, 11); CASE(1, 12);
    CASE(2, 3); CASE(2, 4);
    CASE(4, 2);
#endif
#undef CASE
    }
}

#undef LANES
#undef COLUMNS
#undef floats
#undef words
#undef halves
#undef add_pair
#undef compute_tile

/* One tile of a product for one instruction set, named by SUFFIX: ROWS rows at most, two vectors of VBYTES bytes of
 * columns. Included once for each instruction set, after a pragma that selects it.
 *
 * A weight lies in panels of COLUMNS columns; a panel holds, for each pair of inputs k and k + 1, one 32-bit number a
 * column: the bfloat16 of k in its low half, that of k + 1 in its high half. Shifted up, or with its low half cleared,
 * it is the float32 of the same value.
 *
 * Each element of a result is one chain of fused multiply-adds over k in ascending order, whatever the number of rows,
 * of threads and of lanes: its bits depend on its row and its column alone.
 */

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define LANES (VBYTES / 4)
#define COLUMNS (2 * LANES)
#define floats JOIN(floats, SUFFIX)
#define words JOIN(words, SUFFIX)
#define halves JOIN(halves, SUFFIX)
#define rounded JOIN(rounded, SUFFIX)
#define tile_of JOIN(tile_of, SUFFIX)

typedef float floats __attribute__((vector_size(VBYTES)));
typedef uint32_t words __attribute__((vector_size(VBYTES)));
typedef uint16_t halves __attribute__((vector_size(VBYTES / 2)));

/* To bfloat16, ties to even; NaN stays NaN. */
static inline __attribute__((always_inline)) halves rounded(floats value)
{
    words bits = (words)value;
    words near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    words nan = (words)(value != value);
    return __builtin_convertvector((near & ~nan) | (((bits >> 16) | 0x40) & nan), halves);
}

/* `rows` is a constant wherever this is called, so that all sums stay in registers. */
static inline __attribute__((always_inline)) void tile_of(
    const int rows, const uint32_t *panel, const float *x, int64_t pairs, const struct target *to)
{
    floats sum[ROWS][2];
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++)
        sum[m][0] = sum[m][1] = (floats){0};
    for (int64_t pair = 0; pair < pairs; pair++, panel += COLUMNS, x += 2 * rows) {
        /* One stream of a core does not keep its share of the memory busy; the hardware looks no further than a page. */
        __builtin_prefetch((const char *)panel + AHEAD);
        if (COLUMNS * sizeof(uint32_t) > LINE)
            __builtin_prefetch((const char *)panel + AHEAD + LINE);
        words left = ((const words *)panel)[0], right = ((const words *)panel)[1];
        floats a = (floats)(left << 16), b = (floats)(right << 16);
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) {
            sum[m][0] += x[m] * a;
            sum[m][1] += x[m] * b;
        }
        a = (floats)(left & 0xffff0000u);
        b = (floats)(right & 0xffff0000u);
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) {
            sum[m][0] += x[rows + m] * a;
            sum[m][1] += x[rows + m] * b;
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++) {
        if (to->bias) {
            sum[m][0] += ((const floats *)to->bias)[0];
            sum[m][1] += ((const floats *)to->bias)[1];
        }
        halves result[2] = {rounded(sum[m][0]), rounded(sum[m][1])};
        uint16_t *out = to->out + m * to->stride;
        if (to->columns == COLUMNS)
            memcpy(out, result, sizeof result);
        else
            memcpy(out, result, to->columns * sizeof *out);
    }
}

static void JOIN(tile, SUFFIX)(
    int rows, const uint32_t *panel, const float *x, int64_t pairs, const struct target *to)
{
    switch (rows) {
#define CASE(n) case n: tile_of(n, panel, x, pairs, to); break
    CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6);
#if ROWS > 6
    CASE(7); CASE(8); CASE(9); CASE(10); CASE(11); CASE(12);
#endif
#undef CASE
    }
}

#undef LANES
#undef COLUMNS
#undef floats
#undef words
#undef halves
#undef tile_of

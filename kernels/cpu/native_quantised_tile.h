/* One tile of a product with quantised weights for one instruction set, named by SUFFIX: at most ROWS rows by
 * some vectors of VBYTES bytes of columns. native_quantised.c includes this file once for each instruction
 * set, after a pragma that selects it and the functions that need instructions by name: `nibble_pair`,
 * `e4m3_pair`, `step_numbers`, `fuse` and `wide_half`.
 *
 * Layout of a weight: panels of COLUMNS columns (outputs). A panel is a sequence of groups along the inputs,
 * and a group is the scale of each column, its zero point if there are any, and the codes. The nibbles of
 * a column are 32-bit words of 8, whose halves hold those of even and of odd inputs: shifting a word brings
 * the codes of inputs k and k + 1 to the low ends of its halves, and both become bfloat16 in place. Bytes lie
 * 4 of a column and 4 columns to 16 bytes: inputs k and k + 1 of each column, then k + 2 and k + 3, so that
 * the lower and the upper 8 bytes become two vectors of pairs.
 *
 * Each element of a result is a sum over groups in ascending order, each group one chain of multiply-adds
 * that is scaled in float32, whatever the numbers of rows and threads, and whether codes are decoded here or
 * before: its bits depend on its row and its column alone.
 */

#define LANES (VBYTES / 4)
#define COLUMNS (PANEL_VECTORS * LANES)
#define floats JOIN(floats, SUFFIX)
#define words JOIN(words, SUFFIX)
#define signed_words JOIN(signed_words, SUFFIX)
#define halves JOIN(halves, SUFFIX)
#define high_bytes JOIN(high_bytes, SUFFIX)
#define nibble_pair JOIN(nibble_pair, SUFFIX)
#define e4m3_pair JOIN(e4m3_pair, SUFFIX)
#define step_numbers JOIN(step_numbers, SUFFIX)
#define fuse JOIN(fuse, SUFFIX)
#define wide_half JOIN(wide_half, SUFFIX)
#define round_to_bfloat16 JOIN(round_to_bfloat16, SUFFIX)
#define int8_pair JOIN(int8_pair, SUFFIX)
#define decode_pair JOIN(decode_pair, SUFFIX)
#define column_values JOIN(column_values, SUFFIX)
#define quantised_tile JOIN(quantised_tile, SUFFIX)

/* Round to bfloat16, ties to even; NaN stays NaN. */
static inline __attribute__((always_inline)) halves round_to_bfloat16(floats value)
{
    words bits = (words)value;
    words near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    words nan = (words)(value != value);
    return __builtin_convertvector((near & ~nan) | (((bits >> 16) | 0x40) & nan), halves);
}

/* Pair `j` of the signed bytes of each word, times 2^24: at the top of a word a byte needs no extension. */
static inline __attribute__((always_inline)) words int8_pair(words word, int j)
{
    const words both = high_bytes(word, j);
    const signed_words even = (signed_words)(both << 16), odd = (signed_words)(both & 0xff000000u);
    words low = (words)__builtin_convertvector(even, floats);
    words high = (words)__builtin_convertvector(odd, floats);
    return low >> 16 | high; /* exact: the low halves of both are zero */
}

/* The bfloat16 numbers of pair `j` of a word. `code` and `rows`, which they are multiplied by, are constants. */
static inline __attribute__((always_inline)) words decode_pair(
    const int code, words word, int j, const int rows, const struct decoder *decoder)
{
    if (code == NIBBLE)
        return nibble_pair(word >> (4 * j), decoder);
    if (code == E4M3)
        return e4m3_pair(word, j, rows, decoder);
    return int8_pair(word, j);
}

/* The float32 values of one vector of columns, stored as `kind`. */
static inline __attribute__((always_inline)) floats column_values(int kind, const char *values, int vector)
{
    if (kind == FLOAT32)
        return ((const floats *)values)[vector];
    halves half;
    memcpy(&half, values + vector * sizeof half, sizeof half);
    if (kind == FLOAT16)
        return wide_half(half);
    return (floats)(__builtin_convertvector(half, words) << 16);
}

/* Compute and store one tile. Every call passes constants as `code`, `rows` and `vectors`, so that all sums
 * of a group stay in registers.
 *
 * first: the first of the panel's vectors that is computed. pairs: the decoded panel, read if `code` is
 * PAIRS. x: the rows, laid out by `lay_rows`. sums: [groups, rows], the sums of x, read with zero points.
 */
static inline __attribute__((always_inline)) void quantised_tile(
    const int code, const int rows, const int vectors, int first, const struct quantised *w,
    const char *panel, const uint32_t *pairs, const uint32_t *x, const float *sums, const struct target *to)
{
    const int64_t per_word = w->code == NIBBLE ? 8 : 4;
    floats total[ROWS][PANEL_VECTORS], part[ROWS][PANEL_VECTORS];
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++)
            total[m][v] = (floats){0};
    for (int64_t start = 0; start < w->inputs; start += w->group) {
        const int64_t left = w->inputs - start < w->group ? w->inputs - start : w->group;
        const int64_t steps = (left + per_word - 1) / per_word;
        const char *scales = panel, *zeros = panel + COLUMNS * scale_bytes(w->scale);
        panel = zeros + (w->has_zeros ? COLUMNS * 2 : 0);
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++)
                part[m][v] = (floats){0};
        if (code == PAIRS) {
            for (int64_t pair = 0; pair < steps * per_word / 2; pair++, pairs += COLUMNS) {
                words numbers[PANEL_VECTORS];
#pragma GCC unroll 16
                for (int v = 0; v < vectors; v++)
                    numbers[v] = ((const words *)pairs)[first + v];
                step_numbers(rows, vectors, numbers, x, part);
                x += NUMBERS_OF_PAIR * rows;
            }
            panel += steps * COLUMNS * sizeof(uint32_t);
        } else
            for (int64_t step = 0; step < steps; step++, panel += COLUMNS * sizeof(uint32_t)) {
                words loaded[PANEL_VECTORS], numbers[PANEL_VECTORS];
#pragma GCC unroll 16
                for (int v = 0; v < vectors; v++) {
                    /* The hardware prefetches no further than a page. */
                    if (v * VBYTES % CACHE_LINE == 0)
                        __builtin_prefetch(panel + (first + v) * VBYTES + PREFETCH_BYTES);
                    loaded[v] = ((const words *)panel)[first + v];
                }
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    if (j >= (code == NIBBLE ? 4 : 2))
                        break;
#pragma GCC unroll 16
                    for (int v = 0; v < vectors; v++)
                        numbers[v] = decode_pair(code, loaded[v], j, rows, w->decoder);
                    step_numbers(rows, vectors, numbers, x, part);
                    x += NUMBERS_OF_PAIR * rows;
                }
            }
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) {
            const floats scale = column_values(w->scale, scales, first + v);
            if (w->has_zeros) {
                const floats zero = column_values(BFLOAT16, zeros, first + v);
#pragma GCC unroll 16
                for (int m = 0; m < rows; m++)
                    part[m][v] = fuse(-zero, (floats){0} + sums[m], part[m][v]);
            }
#pragma GCC unroll 16
            for (int m = 0; m < rows; m++)
                total[m][v] = fuse(part[m][v], scale, total[m][v]);
        }
        sums += w->has_zeros ? rows : 0;
    }
#pragma GCC unroll 16
    for (int v = 0; v < vectors; v++) {
        const int64_t column = (first + v) * LANES;
        if (column >= to->columns)
            break;
        const int64_t count = to->columns - column < LANES ? to->columns - column : LANES;
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) {
            const floats factor = (floats){0} + to->factor;
            const floats value = to->bias ? fuse(total[m][v], factor, ((const floats *)to->bias)[first + v])
                                          : total[m][v] * factor;
            const int64_t place = m * to->stride + column;
            if (to->is_float32) {
                memcpy((float *)to->out + place, &value, count * sizeof(float));
                continue;
            }
            const halves result = round_to_bfloat16(value);
            memcpy((uint16_t *)to->out + place, &result, count * sizeof(uint16_t));
        }
    }
}

/* Decode a panel to pairs of bfloat16 numbers: [pairs, COLUMNS]. */
static void JOIN(decode_panel, SUFFIX)(const struct quantised *w, const char *panel, uint32_t *pairs)
{
    const int64_t per_word = w->code == NIBBLE ? 8 : 4;
    for (int64_t start = 0; start < w->inputs; start += w->group) {
        const int64_t left = w->inputs - start < w->group ? w->inputs - start : w->group;
        panel += COLUMNS * (scale_bytes(w->scale) + (w->has_zeros ? 2 : 0));
        for (int64_t step = 0; step < (left + per_word - 1) / per_word; step++) {
            for (int v = 0; v < PANEL_VECTORS; v++) {
                if (v * VBYTES % CACHE_LINE == 0)
                    __builtin_prefetch(panel + v * VBYTES + PREFETCH_BYTES);
                const words loaded = ((const words *)panel)[v];
#define DECODE(code, n) \
    _Pragma("GCC unroll 4") for (int j = 0; j < n; j++) \
        ((words *)(pairs + j * COLUMNS))[v] = decode_pair(code, loaded, j, 1, w->decoder)
                if (w->code == NIBBLE) {
                    DECODE(NIBBLE, 4);
                } else if (w->code == E4M3) {
                    DECODE(E4M3, 2);
                } else {
                    DECODE(INT8, 2);
                }
#undef DECODE
            }
            panel += COLUMNS * sizeof(uint32_t);
            pairs += per_word / 2 * COLUMNS;
        }
    }
}

/* Multiply `rows` rows, at most ROWS, by a panel whose codes are decoded on the way. */
static void JOIN(multiply_codes, SUFFIX)(
    int rows, const struct quantised *w, const char *panel, const void *x, const float *sums,
    const struct target *to)
{
    for (int first = 0; first < PANEL_VECTORS;) {
        switch (8 * w->code + rows) {
#define CASE(code, n) \
    case 8 * code + n: \
        quantised_tile(code, n, VECTORS_OF_ROWS(n), first, w, panel, NULL, x, sums, to); \
        first += VECTORS_OF_ROWS(n); \
        break
            CASE(NIBBLE, 1); CASE(NIBBLE, 2); CASE(NIBBLE, 3); CASE(NIBBLE, 4);
            CASE(NIBBLE, 5); CASE(NIBBLE, 6);
            CASE(E4M3, 1); CASE(E4M3, 2); CASE(E4M3, 3); CASE(E4M3, 4);
            CASE(E4M3, 5); CASE(E4M3, 6);
            CASE(INT8, 1); CASE(INT8, 2); CASE(INT8, 3); CASE(INT8, 4);
            CASE(INT8, 5); CASE(INT8, 6);
#undef CASE
        }
    }
}

/* Multiply `rows` rows, at most ROWS, by PAIR_VECTORS vectors of a decoded panel. */
static void JOIN(multiply_pairs, SUFFIX)(
    int rows, int first, const struct quantised *w, const char *panel, const uint32_t *pairs, const void *x,
    const float *sums, const struct target *to)
{
    switch (rows) {
#define CASE(n) case n: quantised_tile(PAIRS, n, PAIR_VECTORS, first, w, panel, pairs, x, sums, to); break
        CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6);
#undef CASE
    }
}

/* Lay the rows of a block side by side, as tiles read them, and sum their groups in ascending order.
 *
 * x: rows of `inputs` bfloat16 numbers, of which `indices` names those of the block, or NULL: from `base` on.
 */
static void JOIN(lay_rows, SUFFIX)(
    const struct quantised *w, const uint16_t *x, const int64_t *indices, int64_t base, int rows, void *to,
    float *sums)
{
    const int64_t padded = (w->inputs + 7) / 8 * 8;
    uint32_t *laid = to;
    for (int m = 0; m < rows; m++) {
        const uint16_t *row = x + w->inputs * (indices ? indices[base + m] : base + m);
        for (int64_t pair = 0; pair < padded / 2; pair++) {
            const uint32_t even = 2 * pair < w->inputs ? row[2 * pair] : 0;
            const uint32_t odd = 2 * pair + 1 < w->inputs ? row[2 * pair + 1] : 0;
#if NUMBERS_OF_PAIR == 1
            laid[pair * rows + m] = even | odd << 16;
#else
            laid[2 * pair * rows + m] = even << 16;
            laid[(2 * pair + 1) * rows + m] = odd << 16;
#endif
        }
        for (int64_t g = 0; w->has_zeros && g * w->group < w->inputs; g++) {
            float sum = 0;
            for (int64_t k = g * w->group; k < (g + 1) * w->group && k < w->inputs; k++) {
                const uint32_t wide = (uint32_t)row[k] << 16;
                float value;
                memcpy(&value, &wide, sizeof value);
                sum += value;
            }
            sums[g * rows + m] = sum;
        }
    }
}

#undef LANES
#undef COLUMNS
#undef floats
#undef words
#undef signed_words
#undef halves
#undef high_bytes
#undef nibble_pair
#undef e4m3_pair
#undef step_numbers
#undef fuse
#undef wide_half
#undef round_to_bfloat16
#undef int8_pair
#undef decode_pair
#undef column_values
#undef quantised_tile

/* Attention of one task for one instruction set, named by SUFFIX, in vectors of VBYTES bytes.
 * native_paged_sets.h includes this file once for each, after a pragma that selects it.
 *
 * Sums of values, and values as float32, lie in vectors of even and odd halves in turn, as words come apart.
 */

#include "native_paged_scores.h"

/* Turn the scores of row `r` into weights of the keys `low` to `high` - 1 of a tile. Adds the weights to the
 * row's total, and sets the factor of what was summed before.
 */
INLINE void weigh_row(const struct paged *a, const struct scratch *s, int64_t r, int64_t low, int64_t high)
{
    float *row = s->scores + r * TILE;
    const float lowest = -__builtin_inff();
    const int64_t from = low / LANES * LANES;
    const ints lane = lane_numbers();
    floats most = (floats){0} + lowest, total = *(floats *)(s->totals + r * CACHE_LINE / 4);
    for (int64_t k = from; k < high; k += LANES) {
        floats score = *(floats *)(row + k) * a->scale;
        if (a->softcap != 0) {
            /* tanh y = (1 - e^-2|y|) / (1 + e^-2|y|) with the sign of y */
            const floats y = score / a->softcap;
            const words sign = (words)y & 0x80000000u;
            const floats e = exp_nonpositive((floats)((words)y & 0x7fffffffu) * -2.0f);
            score = (floats)((words)((1.0f - e) / (1.0f + e)) | sign) * a->softcap;
        }
        if (k < low || k + LANES > high) {
            const ints place = lane + (int32_t)k;
            const words hidden = (words)((place < (int32_t)low) | (place >= (int32_t)high));
            score = (floats)(((words)score & ~hidden) | ((words)((floats){0} + lowest) & hidden));
        }
        *(floats *)(row + k) = score;
        most = larger(score, most); /* without NaN, which reaches the total below */
    }
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
        most = larger(__builtin_shuffle(most, lane ^ half), most);
    const float largest = most[0] > s->largest[r] ? most[0] : s->largest[r];
    const float base = largest == lowest ? 0 : largest;
    s->factors[r] = 1;
    if (largest != s->largest[r]) {
        s->factors[r] = exp_nonpositive((floats){0} + (s->largest[r] - base))[0];
        s->largest[r] = largest;
        total *= s->factors[r];
    }
    for (int64_t k = from; k < high; k += LANES)
        total += *(floats *)(row + k) = exp_nonpositive(*(floats *)(row + k) - base);
    *(floats *)(s->totals + r * CACHE_LINE / 4) = total;
}

/* Add the weighted values of places `low` to `high` - 1 of a tile to `pieces` vectors of words of the sums of
 * `rows` rows. Both are constants, so that the sums stay in registers. `laid` is NULL or the values as float32.
 */
INLINE void add_values(
    const int rows, const int pieces, const uint16_t *values, const int64_t *offsets, const int64_t *ahead,
    const float *laid, int64_t low, int64_t high, int64_t value_size, const float *weights,
    const float *factors, float *sums)
{
    floats sum[4][4][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < pieces; p++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++)
                sum[r][p][h] = *(floats *)(sums + r * value_size + (2 * p + h) * LANES) * factors[r];
    for (int64_t s = low; s < high; s++) {
#pragma GCC unroll 4
        for (int p = 0; p < pieces; p++) {
            floats even, odd;
            if (laid) {
                even = *(const floats *)(laid + s * value_size + 2 * p * LANES);
                odd = *(const floats *)(laid + s * value_size + (2 * p + 1) * LANES);
            } else {
                const words pairs = load_words(values + offsets[s] + 2 * p * LANES);
                __builtin_prefetch(values + ahead[s] + 2 * p * LANES);
                even = (floats)(pairs << 16);
                odd = (floats)(pairs & 0xffff0000u);
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const floats weight = (floats){0} + weights[r * TILE + s];
                sum[r][p][0] = fuse(weight, even, sum[r][p][0]);
                sum[r][p][1] = fuse(weight, odd, sum[r][p][1]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < pieces; p++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++)
                *(floats *)(sums + r * value_size + (2 * p + h) * LANES) = sum[r][p][h];
}

/* The same for all vectors of `rows` rows from row `r` on. */
INLINE void add_all_values(
    const int rows, const struct paged *a, const struct scratch *s, int64_t r, const int is_laid, int64_t low,
    int64_t high)
{
    const int64_t size = a->value_size;
    const float *weights = s->scores + r * TILE;
    for (int64_t d = 0; d < size;) {
        const int pieces = d + PIECES(rows) * 2 * LANES <= size ? PIECES(rows) : 1;
        const float *laid = is_laid ? s->values + d : NULL;
        float *sums = s->sums + r * size + d;
        if (pieces > 1)
            add_values(
                rows, PIECES(rows), a->values + d, s->value_offsets, s->value_ahead, laid, low, high, size,
                weights, s->factors + r, sums);
        else
            add_values(
                rows, 1, a->values + d, s->value_offsets, s->value_ahead, laid, low, high, size, weights,
                s->factors + r, sums);
        d += pieces * 2 * LANES;
    }
}

/* Write the scores of all rows with the keys of a tile that they see, without converting the keys. */
INLINE void score_few(const struct paged *a, const struct scratch *s, int64_t rows, int64_t tile)
{
    int64_t low, high, unused;
    for (int64_t r = 0; r < rows;) {
        const int count = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
        const float *query = s->query + r * (a->key_size * WIDTH / 2);
        float *scores = s->scores + r * TILE;
        find_visible(a, s->places[r], tile, &low, &unused);
        find_visible(a, s->places[r + count - 1], tile, &unused, &high);
        const int each = LANES / count;
        for (int64_t k = low / each * each; k < high; k += each) {
            if (count == 4)
                dots_of_few(4, a->keys, s->key_offsets + k, s->key_ahead + k, a->key_size, query, scores + k);
            else if (count == 2)
                dots_of_few(2, a->keys, s->key_offsets + k, s->key_ahead + k, a->key_size, query, scores + k);
            else
                dots_of_few(1, a->keys, s->key_offsets + k, s->key_ahead + k, a->key_size, query, scores + k);
        }
        r += count;
    }
}

/* The same for many rows, for which the keys `first` to `end` - 1 of the tile are converted once. */
INLINE void score_many(
    const struct paged *a, const struct scratch *s, int64_t rows, int64_t tile, int64_t first, int64_t end)
{
    int64_t low, high, unused;
    const int64_t stride = a->key_size * WIDTH / 2;
    for (int64_t k = first / LANES * LANES; k < end; k += LANES)
        lay_keys(a->keys, s->key_offsets + k, a->key_size, s->keys + k * stride);
    for (int64_t r = 0; r < rows;) {
        const int count = rows - r >= KEY_ROWS ? KEY_ROWS : 1;
        find_visible(a, s->places[r], tile, &low, &unused);
        find_visible(a, s->places[r + count - 1], tile, &unused, &high);
        for (int64_t k = low / LANES * LANES; k < high; k += LANES) {
            const float *keys = s->keys + k * stride, *query = s->query + r * stride;
            float *scores = s->scores + r * TILE + k;
            if (count < KEY_ROWS)
                dots_of_many(1, keys, a->key_size, query, scores);
            else if (a->key_size == 128) /* loops of a constant length are faster */
                dots_of_many(KEY_ROWS, keys, 128, query, scores);
            else if (a->key_size == 64)
                dots_of_many(KEY_ROWS, keys, 64, query, scores);
            else
                dots_of_many(KEY_ROWS, keys, a->key_size, query, scores);
        }
        r += count;
    }
}

/* Weigh the values of a tile and add them. Rows that see the same keys are added together; a row never reads
 * a value that it does not see, which may be no number.
 */
INLINE void sum_tile(
    const struct paged *a, const struct scratch *s, int64_t rows, int64_t tile, const int is_laid)
{
    for (int64_t r = 0; r < rows;) {
        int64_t low, high, count = 1;
        find_visible(a, s->places[r], tile, &low, &high);
        while (r + count < rows && count < 4) {
            int64_t other_low, other_high;
            find_visible(a, s->places[r + count], tile, &other_low, &other_high);
            if (other_low != low || other_high != high)
                break;
            count++;
        }
        count = count == 3 ? 2 : count;
        if (low < high) {
            for (int64_t i = r; i < r + count; i++)
                weigh_row(a, s, i, low, high);
            if (count == 4)
                add_all_values(4, a, s, r, is_laid, low, high);
            else if (count == 2)
                add_all_values(2, a, s, r, is_laid, low, high);
            else
                add_all_values(1, a, s, r, is_laid, low, high);
        }
        r += count;
    }
}

/* Write queries as `dot_words` and `dot_lane` read them, and sums of nothing but the sink. */
INLINE void begin_rows(const struct paged *a, const struct task *t, const struct scratch *s)
{
    const int64_t each = a->heads / a->key_heads, start = a->starts[t->sequence];
    const int64_t before = a->lengths[t->sequence] - (a->starts[t->sequence + 1] - start);
    for (int64_t r = 0; r < t->end - t->first; r++) {
        const int64_t token = (t->first + r) / each, head = t->key_head * each + (t->first + r) % each;
        const uint16_t *from = a->query + (start + token) * a->query_strides[0] + head * a->query_strides[1];
        float *query = s->query + r * (a->key_size * WIDTH / 2);
        for (int64_t d = 0; d < a->key_size; d += 2 * LANES, query += STEP) {
            const words pairs = load_words(from + d);
            if (WIDTH == 1)
                *(floats *)query = (floats)pairs;
            else {
                *(floats *)query = (floats)(pairs << 16);
                *(floats *)(query + LANES) = (floats)(pairs & 0xffff0000u);
            }
        }
        memset(s->sums + r * a->value_size, 0, a->value_size * sizeof(float));
        memset(s->totals + r * CACHE_LINE / 4, 0, CACHE_LINE);
        s->largest[r] = a->sinks ? a->sinks[head] : -__builtin_inff();
        if (s->largest[r] != -__builtin_inff())
            s->totals[r * CACHE_LINE / 4] = 1;
        s->places[r] = before + token;
    }
}

/* Divide the sums by the totals and write them as bfloat16. */
INLINE void end_rows(const struct paged *a, const struct task *t, const struct scratch *s)
{
    const int64_t each = a->heads / a->key_heads;
    for (int64_t r = 0; r < t->end - t->first; r++) {
        const int64_t token = (t->first + r) / each, head = t->key_head * each + (t->first + r) % each;
        uint16_t *out = a->out + ((a->starts[t->sequence] + token) * a->heads + head) * a->value_size;
        const float *sums = s->sums + r * a->value_size;
        const float total = sum_of_lanes(*(floats *)(s->totals + r * CACHE_LINE / 4));
        for (int64_t d = 0; d < a->value_size; d += 2 * LANES) {
            const words even = round_to_bfloat16(*(const floats *)(sums + d) / total);
            const words odd = round_to_bfloat16(*(const floats *)(sums + d + LANES) / total);
            const words pairs = even | odd << 16;
            memcpy(out + d, &pairs, sizeof pairs);
        }
    }
}

/* The places that the rows of a task see: from `first` to `last`. */
INLINE void find_range(const struct paged *a, const struct task *t, int64_t *first, int64_t *last)
{
    const int64_t each = a->heads / a->key_heads;
    const int64_t before =
        a->lengths[t->sequence] - (a->starts[t->sequence + 1] - a->starts[t->sequence]);
    const int64_t place = before + t->first / each;
    *first = a->window > place ? 0 : place - a->window + 1;
    *last = before + (t->end - 1) / each;
}

/* Compute a task; `next` is the task that this thread probably computes then, or NULL. */
static void JOIN(attend, SUFFIX)(
    const struct paged *a, const struct task *t, const struct task *next, const struct scratch *s)
{
    const int64_t rows = t->end - t->first;
    int64_t first, last, next_first = 0, next_last = -1;
    begin_rows(a, t, s);
    find_range(a, t, &first, &last);
    if (next)
        find_range(a, next, &next_first, &next_last);
    for (int64_t tile = first / TILE * TILE; tile <= last; tile += TILE) {
        const int64_t low = first > tile ? first - tile : 0;
        const int64_t high = last + 1 < tile + TILE ? last + 1 - tile : TILE;
        if (low >= high)
            continue;
        find_keys(a, t, tile, low, high, s->key_offsets, s->value_offsets);
        if (rows > FEW_ROWS) {
            score_many(a, s, rows, tile, low, high);
            lay_values(a->values, s->value_offsets, low, high, a->value_size, s->values);
            sum_tile(a, s, rows, tile, 1);
            continue;
        }
        int64_t ahead = tile + TILE, end = last + 1;
        const struct task *following = t;
        if (ahead >= end) {
            ahead = next_first / TILE * TILE;
            end = next_last + 1;
            following = next;
        }
        if (ahead < end)
            find_keys(
                a, following, ahead, 0, end < ahead + TILE ? end - ahead : TILE, s->key_ahead,
                s->value_ahead);
        else {
            memcpy(s->key_ahead, s->key_offsets, TILE * sizeof *s->key_ahead);
            memcpy(s->value_ahead, s->value_offsets, TILE * sizeof *s->value_ahead);
        }
        score_few(a, s, rows, tile);
        sum_tile(a, s, rows, tile, 0);
    }
    end_rows(a, t, s);
}

#undef LANES
#undef STEP
#undef floats
#undef words
#undef ints
#undef fuse
#undef larger
#undef nearest_whole
#undef times_power_of_2
#undef dot_words
#undef dot_lane
#undef load_words
#undef lane_numbers
#undef sum_of_lanes
#undef sums_of_vectors
#undef transpose
#undef exp_nonpositive
#undef round_to_bfloat16
#undef dots_of_few
#undef dots_of_many
#undef lay_keys
#undef lay_values
#undef find_keys
#undef score_few
#undef score_many
#undef sum_tile
#undef find_range
#undef weigh_row
#undef add_values
#undef add_all_values
#undef begin_rows
#undef end_rows

/* Attention of one task for one instruction set, named by SUFFIX, in vectors of VBYTES bytes.
 * native_paged_sets.h includes this file once for each, after a pragma that selects it.
 *
 * A score is a sum in two stages: each lane of a vector adds the products of its own words, and the lanes are
 * then added pairwise, those half a vector apart first. `dots_of_few` has the words of a key in the lanes,
 * `dots_of_many` has keys in the lanes and adds the sums of the words in the same order.
 *
 * Sums of values, and values as float32, lie in vectors of even and odd halves in turn, as words come apart.
 */

#define LANES (VBYTES / 4)
/* Numbers of 4 bytes that a vector of words of a query or a key becomes. */
#define STEP (WIDTH * LANES)
#define floats JOIN(floats, SUFFIX)
#define words JOIN(words, SUFFIX)
#define ints JOIN(ints, SUFFIX)
#define fuse JOIN(fuse, SUFFIX)
#define larger JOIN(larger, SUFFIX)
#define nearest_whole JOIN(nearest_whole, SUFFIX)
#define times_power_of_2 JOIN(times_power_of_2, SUFFIX)
#define dot_words JOIN(dot_words, SUFFIX)
#define dot_lane JOIN(dot_lane, SUFFIX)
#define load_words JOIN(load_words, SUFFIX)
#define lane_numbers JOIN(lane_numbers, SUFFIX)
#define sum_of_lanes JOIN(sum_of_lanes, SUFFIX)
#define sums_of_vectors JOIN(sums_of_vectors, SUFFIX)
#define transpose JOIN(transpose, SUFFIX)
#define exp_nonpositive JOIN(exp_nonpositive, SUFFIX)
#define round_to_bfloat16 JOIN(round_to_bfloat16, SUFFIX)
#define dots_of_few JOIN(dots_of_few, SUFFIX)
#define dots_of_many JOIN(dots_of_many, SUFFIX)
#define lay_keys JOIN(lay_keys, SUFFIX)
#define lay_values JOIN(lay_values, SUFFIX)
#define find_keys JOIN(find_keys, SUFFIX)
#define score_few JOIN(score_few, SUFFIX)
#define score_many JOIN(score_many, SUFFIX)
#define sum_tile JOIN(sum_tile, SUFFIX)
#define find_range JOIN(find_range, SUFFIX)
#define weigh_row JOIN(weigh_row, SUFFIX)
#define add_values JOIN(add_values, SUFFIX)
#define add_all_values JOIN(add_all_values, SUFFIX)
#define begin_rows JOIN(begin_rows, SUFFIX)
#define end_rows JOIN(end_rows, SUFFIX)

INLINE words load_words(const void *from)
{
    words loaded;
    memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

/* 0, 1, 2, … */
INLINE ints lane_numbers(void)
{
#if VBYTES == 64
    return (ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
    return (ints){0, 1, 2, 3, 4, 5, 6, 7};
#endif
}

INLINE float sum_of_lanes(floats sum)
{
    float4 quarters[LANES / 4], four;
    memcpy(quarters, &sum, sizeof quarters);
    four = quarters[0];
    for (int i = 1; i < LANES / 4; i++)
        four += quarters[i];
    return (four[0] + four[1]) + (four[2] + four[3]);
}

/* The sums of the lanes of LANES vectors: lane i is that of vector i. Half of the vectors are left after each
 * stage, in which lanes `half` apart are added.
 */
INLINE floats sums_of_vectors(floats *v)
{
    const ints lane = lane_numbers();
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2) {
        const ints is_second = (lane & half) != 0;
        const ints own = lane + (is_second & LANES), other = lane + (~is_second & LANES);
#pragma GCC unroll 16
        for (int i = 0; i < half; i++) {
            const floats a = v[i], b = v[i + half];
            v[i] = __builtin_shuffle(a, b, own) +
                   __builtin_shuffle(__builtin_shuffle(a, b, other), lane ^ half);
        }
    }
    return v[0];
}

/* Transpose LANES vectors in place. */
INLINE void transpose(words *v)
{
    const ints lane = lane_numbers();
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2) {
        const ints is_second = (lane & half) != 0;
        const ints low = (lane & ~half) + (is_second & LANES), high = low + half;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & half)) {
                const words a = v[i], b = v[i + half];
                v[i] = __builtin_shuffle(a, b, low);
                v[i + half] = __builtin_shuffle(a, b, high);
            }
    }
}

/* e^x for x <= 0, to 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, and e^r by its series (Cephes,
 * expf).
 */
INLINE floats exp_nonpositive(floats x)
{
    const floats one = (floats){0} + 1.0f;
    x = larger(-104.0f * one, x); /* e^-104 is 0 */
    const floats n = nearest_whole(x * 1.44269504088896341f);
    floats r = fuse(n, -0.693359375f * one, x);
    r = fuse(n, 2.12194440e-4f * one, r);
    floats p = fuse(r, 1.9875691500e-4f * one, 1.3981999507e-3f * one);
    p = fuse(p, r, 8.3334519073e-3f * one);
    p = fuse(p, r, 4.1665795894e-2f * one);
    p = fuse(p, r, 1.6666665459e-1f * one);
    p = fuse(p, r, 5.0000001201e-1f * one);
    return times_power_of_2(fuse(p * r, r, r) + one, n);
}

/* Round to bfloat16, ties to even, in the low half of each word; NaN stays NaN. */
INLINE words round_to_bfloat16(floats value)
{
    const words bits = (words)value, nan = (words)(value != value);
    const words near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (near & ~nan) | (((bits >> 16) | 0x40) & nan);
}

/* Scores of `rows` rows, a constant, with LANES / rows keys: scores[row * TILE + key]. Fetches the keys of the
 * offsets `ahead` into the cache.
 */
INLINE void dots_of_few(
    const int rows, const uint16_t *keys, const int64_t *offsets, const int64_t *ahead, int64_t key_size,
    const float *query, float *scores)
{
    const int count = LANES / rows;
    floats sum[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        sum[i] = (floats){0};
    for (int64_t d = 0; d < key_size; d += 2 * LANES, query += STEP)
#pragma GCC unroll 16
        for (int k = 0; k < count; k++) {
            const words key = load_words(keys + offsets[k] + d);
            __builtin_prefetch(keys + ahead[k] + d);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++)
                sum[r * count + k] = dot_words(
                    sum[r * count + k], key, query + r * (key_size * WIDTH / 2));
        }
    const floats result = sums_of_vectors(sum);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        memcpy(scores + r * TILE, (const float *)&result + r * count, count * sizeof *scores);
}

/* Scores of `rows` rows, a constant, with LANES keys that `lay_keys` laid out. */
INLINE void dots_of_many(const int rows, const float *keys, int64_t key_size, const float *query, float *scores)
{
    const int64_t stride = key_size * WIDTH / 2;
    floats part[4][KEY_ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        /* The place of word i in the order in which the lanes are added: its bits from the other end. */
        const int lane = LANES == 16 ? (i & 1) << 3 | (i & 2) << 1 | (i & 4) >> 1 | (i & 8) >> 3
                                     : (i & 1) << 2 | (i & 2) | (i & 4) >> 2;
        floats sum[KEY_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            sum[r] = (floats){0};
#pragma GCC unroll 8
        for (int64_t d = 0; d < stride; d += STEP)
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                sum[r] = dot_lane(sum[r], keys + i * stride + d, query + r * stride + d, lane);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            if (i & 1)
                sum[r] = part[0][r] + sum[r];
            if ((i & 3) == 3)
                sum[r] = part[1][r] + sum[r];
            if ((i & 7) == 7)
                sum[r] = part[2][r] + sum[r];
            if ((i & 15) == 15)
                sum[r] = part[3][r] + sum[r];
            part[i & 1 ? i & 2 ? i & 4 ? 3 : 2 : 1 : 0][r] = sum[r];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        *(floats *)(scores + r * TILE) = part[3][r];
}

/* Lay out LANES keys for `dots_of_many`: for each word of a vector, in the order in which the lanes are added,
 * that word of all keys, vector by vector.
 */
INLINE void lay_keys(const uint16_t *keys, const int64_t *offsets, int64_t key_size, float *laid)
{
    const int64_t steps = key_size / (2 * LANES);
    for (int64_t step = 0; step < steps; step++) {
        words v[LANES];
#pragma GCC unroll 16
        for (int k = 0; k < LANES; k++)
            v[k] = load_words(keys + offsets[k] + step * 2 * LANES);
        transpose(v);
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; lane++) {
            const int i = LANES == 16 ? (lane & 1) << 3 | (lane & 2) << 1 | (lane & 4) >> 1 | (lane & 8) >> 3
                                      : (lane & 1) << 2 | (lane & 2) | (lane & 4) >> 2;
            float *to = laid + (i * steps + step) * STEP;
            if (WIDTH == 1)
                *(floats *)to = (floats)v[lane];
            else {
                *(floats *)to = (floats)(v[lane] << 16);
                *(floats *)(to + LANES) = (floats)(v[lane] & 0xffff0000u);
            }
        }
    }
}

/* Write the values of places `low` to `high` - 1 of a tile as float32. */
INLINE void lay_values(
    const uint16_t *values, const int64_t *offsets, int64_t low, int64_t high, int64_t value_size, float *laid)
{
    for (int64_t s = low; s < high; s++)
        for (int64_t d = 0; d < value_size; d += 2 * LANES) {
            const words pairs = load_words(values + offsets[s] + d);
            *(floats *)(laid + s * value_size + d) = (floats)(pairs << 16);
            *(floats *)(laid + s * value_size + d + LANES) = (floats)(pairs & 0xffff0000u);
        }
}

/* Write where the keys and values of places `low` to `high` - 1 of a tile lie; the other places get the
 * offsets of one that is there, so that whole vectors of keys can be read.
 */
INLINE void find_keys(
    const struct paged *a, const struct task *t, int64_t tile, int64_t low, int64_t high, int64_t *keys,
    int64_t *values)
{
    const int32_t *table = a->tables + t->sequence * a->table_width;
    int64_t place = low;
    while (place < high) {
        const int64_t block = (tile + place) / a->block, inside = (tile + place) % a->block;
        const int64_t end = place + a->block - inside < high ? place + a->block - inside : high;
        int64_t key = table[block] * a->key_strides[0] + t->key_head * a->key_strides[1];
        int64_t value = table[block] * a->value_strides[0] + t->key_head * a->value_strides[1];
        key += inside * a->key_strides[2];
        value += inside * a->value_strides[2];
        for (; place < end; place++, key += a->key_strides[2], value += a->value_strides[2]) {
            keys[place] = key;
            values[place] = value;
        }
    }
    for (place = 0; place < low; place++) {
        keys[place] = keys[low];
        values[place] = values[low];
    }
    for (place = high; place < TILE; place++) {
        keys[place] = keys[high - 1];
        values[place] = values[high - 1];
    }
}

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
    const float *laid, int64_t low, int64_t high, int64_t value_size, const float *weights, const float *factors, float *sums)
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
    const int pieces = PIECES(rows);
    int64_t d = 0;
    for (; d + pieces * 2 * LANES <= a->value_size; d += pieces * 2 * LANES)
        add_values(
            rows, pieces, a->values + d, s->value_offsets, s->value_ahead, is_laid ? s->values + d : NULL, low, high,
            a->value_size, s->scores + r * TILE, s->factors + r, s->sums + r * a->value_size + d);
    for (; d < a->value_size; d += 2 * LANES)
        add_values(
            rows, 1, a->values + d, s->value_offsets, s->value_ahead, is_laid ? s->values + d : NULL, low, high, a->value_size,
            s->scores + r * TILE, s->factors + r, s->sums + r * a->value_size + d);
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

/* Products of queries and keys for one instruction set, the places of keys, and functions of vectors.
 * native_paged_tile.h includes this file and takes its names away again.
 *
 * A score is a sum in two stages: each lane of a vector adds the products of its own words, and the lanes are
 * then added pairwise, those half a vector apart first. `dots_of_few` has the words of a key in the lanes,
 * `dots_of_many` has keys in the lanes and adds the sums of the words in the same order.
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

/* Scores of `rows` rows, a constant, with LANES / rows keys: scores[row * TILE + key]. Fetches the keys of
 * the offsets `ahead` into the cache.
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
INLINE void dots_of_many(
    const int rows, const float *keys, int64_t key_size, const float *query, float *scores)
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

/* Lay out LANES keys for `dots_of_many`: for each word of a vector, in the order in which the lanes are
 * added, that word of all keys, vector by vector.
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
    const uint16_t *values, const int64_t *offsets, int64_t low, int64_t high, int64_t value_size,
    float *laid)
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

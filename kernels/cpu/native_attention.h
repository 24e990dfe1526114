/* Attention of one query for one instruction set, named by SUFFIX, in vectors of VBYTES bytes. Included once for each,
 * after native_tile.h, whose types and `rounded` it uses. Arithmetic in float32; keys, values, queries and results in bfloat16.
 */

#define LANES (VBYTES / 4)
#define floats JOIN(floats, SUFFIX)
#define words JOIN(words, SUFFIX)
#define halves JOIN(halves, SUFFIX)
#define widened JOIN(widened, SUFFIX)
#define rounded JOIN(rounded, SUFFIX)
#define total_of JOIN(total_of, SUFFIX)
#define powers JOIN(powers, SUFFIX)
#define sum_of JOIN(sum_of, SUFFIX)
#define attend_heads JOIN(attend_heads, SUFFIX)

static inline __attribute__((always_inline)) floats widened(const uint16_t *numbers)
{
    halves bits;
    memcpy(&bits, numbers, sizeof bits);
    return (floats)(__builtin_convertvector(bits, words) << 16);
}

static inline __attribute__((always_inline)) float total_of(floats sum)
{
    quads quarters[LANES / 4], four;
    memcpy(quarters, &sum, sizeof quarters);
    four = quarters[0];
    for (int i = 1; i < LANES / 4; i++)
        four += quarters[i];
    return (four[0] + four[1]) + (four[2] + four[3]);
}

/* e^x for x <= 0, to 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, e^r by its series (Cephes, expf). */
static inline __attribute__((always_inline)) floats powers(floats x)
{
    const words tiny = (words)(x < -87.0f); /* below float32's normal numbers, -infinity among it: 0 */
    x = (floats)((words)x & ~tiny);
    typedef int32_t ints __attribute__((vector_size(VBYTES)));
    ints n = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, ints);
    floats whole = __builtin_convertvector(n, floats);
    floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p *= (floats)((words)(n + 127) << 23);
    return (floats)((words)p & ~tiny);
}

/* Weighted sums of the values' numbers `first` on, `pieces` vectors of them, for `heads` heads; both are constants. */
static inline __attribute__((always_inline)) void sum_of(
    const int heads, const int pieces, const uint16_t *values, int64_t stride, int64_t length, const float *scores,
    int64_t room, const float *totals, uint16_t *out, int64_t size)
{
    floats sum[HEADS][PIECES];
#pragma GCC unroll 16
    for (int g = 0; g < heads; g++)
#pragma GCC unroll 16
        for (int p = 0; p < pieces; p++)
            sum[g][p] = (floats){0};
    for (int64_t s = 0; s < length; s++) {
#pragma GCC unroll 16
        for (int p = 0; p < pieces; p++) {
            const floats value = widened(values + s * stride + p * LANES);
#pragma GCC unroll 16
            for (int g = 0; g < heads; g++)
                sum[g][p] += scores[g * room + s] * value;
        }
    }
#pragma GCC unroll 16
    for (int g = 0; g < heads; g++)
#pragma GCC unroll 16
        for (int p = 0; p < pieces; p++) {
            const halves result = rounded(sum[g][p] / totals[g]);
            memcpy(out + g * size + p * LANES, &result, sizeof result);
        }
}

/* `heads` heads, a constant, that read one head's keys. `place`: room for their queries and scores. */
static inline __attribute__((always_inline)) void attend_heads(
    const int heads, const struct attention *a, int64_t sequence, int64_t first_head, float *place)
{
    const int64_t size = a->head_size, length = a->length, room = (length + LANES - 1) / LANES * LANES;
    const int64_t key_head = first_head / (a->heads / a->key_heads);
    const uint16_t *keys = a->key + sequence * a->key_strides[0] + key_head * a->key_strides[1];
    const uint16_t *values = a->value + sequence * a->value_strides[0] + key_head * a->value_strides[1];
    const float *added = a->added ? a->added + sequence * a->added_stride : NULL;
    uint16_t *out = a->out + (sequence * a->heads + first_head) * size;
    float *query = place, *scores = place + heads * size, totals[HEADS], most[HEADS];
    const float lowest = -__builtin_inff();

    for (int g = 0; g < heads; g++) {
        const uint16_t *from = a->query + sequence * a->query_strides[0] + (first_head + g) * a->query_strides[1];
        for (int64_t d = 0; d < size; d += LANES)
            *(floats *)(query + g * size + d) = widened(from + d) * a->scale;
        most[g] = lowest;
    }
    for (int64_t s = 0; s < length; s++) {
        const uint16_t *key = keys + s * a->key_strides[2];
        floats sum[HEADS];
#pragma GCC unroll 16
        for (int g = 0; g < heads; g++)
            sum[g] = (floats){0};
        for (int64_t d = 0; d < size; d += LANES) {
            const floats numbers = widened(key + d);
#pragma GCC unroll 16
            for (int g = 0; g < heads; g++)
                sum[g] += *(floats *)(query + g * size + d) * numbers;
        }
#pragma GCC unroll 16
        for (int g = 0; g < heads; g++) {
            const float score = total_of(sum[g]) + (added ? added[s] : 0);
            scores[g * room + s] = score;
            most[g] = score <= most[g] ? most[g] : score; /* NaN is kept, and reaches the result */
        }
    }
    for (int g = 0; g < heads; g++) {
        float *of = scores + g * room;
        floats sums = {0};
        if (most[g] == lowest) { /* nothing is seen: zeros */
            memset(of, 0, length * sizeof *of);
            totals[g] = 1;
            continue;
        }
        for (int64_t s = length; s < room; s++)
            of[s] = lowest;
        for (int64_t s = 0; s < room; s += LANES)
            sums += *(floats *)(of + s) = powers(*(floats *)(of + s) - most[g]);
        totals[g] = total_of(sums);
    }
    int64_t d = 0;
    for (; d + PIECES * LANES <= size; d += PIECES * LANES)
        sum_of(heads, PIECES, values + d, a->value_strides[2], length, scores, room, totals, out + d, size);
    for (; d < size; d += LANES)
        sum_of(heads, 1, values + d, a->value_strides[2], length, scores, room, totals, out + d, size);
}

/* All heads of one sequence that read the keys of `key_head`. */
static void JOIN(attend, SUFFIX)(const struct attention *a, int64_t sequence, int64_t key_head, float *place)
{
    const int64_t each = a->heads / a->key_heads;
    int64_t g = 0;
    for (; g + HEADS <= each; g += HEADS)
        attend_heads(HEADS, a, sequence, key_head * each + g, place);
    for (; g + HEADS / 2 <= each; g += HEADS / 2)
        attend_heads(HEADS / 2, a, sequence, key_head * each + g, place);
    for (; g < each; g++)
        attend_heads(1, a, sequence, key_head * each + g, place);
}

#undef LANES
#undef floats
#undef words
#undef halves
#undef widened
#undef total_of
#undef powers
#undef sum_of
#undef attend_heads
#undef rounded

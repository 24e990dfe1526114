/* Attention of one query for one instruction set, named by SUFFIX, in vectors of VBYTES bytes. native.c
 * includes this file once for each, after native_tile.h, whose types and `to_bfloat16` it uses. Arithmetic is
 * float32; keys, values, queries and results are bfloat16.
 */

#define LANES (VBYTES / 4)
#define floats JOIN(floats, SUFFIX)
#define words JOIN(words, SUFFIX)
#define halves JOIN(halves, SUFFIX)
#define to_float32 JOIN(to_float32, SUFFIX)
#define to_bfloat16 JOIN(to_bfloat16, SUFFIX)
#define horizontal_sum JOIN(horizontal_sum, SUFFIX)
#define exp_nonpositive JOIN(exp_nonpositive, SUFFIX)
#define weighted_values JOIN(weighted_values, SUFFIX)
#define attend_heads JOIN(attend_heads, SUFFIX)

/* LANES bfloat16 numbers as float32. */
static inline __attribute__((always_inline)) floats to_float32(const uint16_t *numbers)
{
    halves bits;
    memcpy(&bits, numbers, sizeof bits);
    return (floats)(__builtin_convertvector(bits, words) << 16);
}

/* The sum of a vector's numbers. */
static inline __attribute__((always_inline)) float horizontal_sum(floats sum)
{
    float4 quarters[LANES / 4], four;
    memcpy(quarters, &sum, sizeof quarters);
    four = quarters[0];
    for (int i = 1; i < LANES / 4; i++)
        four += quarters[i];
    return (four[0] + four[1]) + (four[2] + four[3]);
}

/* e^x for x <= 0, to 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, and e^r by its series (Cephes,
 * expf).
 */
static inline __attribute__((always_inline)) floats exp_nonpositive(floats x)
{
    const words tiny = (words)(x < -87.0f); /* results below normal float32 numbers are 0 */
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

/* Write the weighted sums of `pieces` vectors of the values for `heads` heads. Both numbers are constants, so
 * that the sums stay in registers.
 *
 * values: the first of `length` values, `stride` numbers apart. scores: `room` numbers a head. totals: the
 * sum of each head's scores. out: `size` numbers a head.
 */
static inline __attribute__((always_inline)) void weighted_values(
    const int heads, const int pieces, const uint16_t *values, int64_t stride, int64_t length,
    const float *scores, int64_t room, const float *totals, uint16_t *out, int64_t size)
{
    floats sum[MAX_HEADS][VALUE_VECTORS];
#pragma GCC unroll 16
    for (int g = 0; g < heads; g++)
#pragma GCC unroll 16
        for (int p = 0; p < pieces; p++)
            sum[g][p] = (floats){0};
    for (int64_t s = 0; s < length; s++) {
#pragma GCC unroll 16
        for (int p = 0; p < pieces; p++) {
            const floats value = to_float32(values + s * stride + p * LANES);
#pragma GCC unroll 16
            for (int g = 0; g < heads; g++)
                sum[g][p] += scores[g * room + s] * value;
        }
    }
#pragma GCC unroll 16
    for (int g = 0; g < heads; g++)
#pragma GCC unroll 16
        for (int p = 0; p < pieces; p++) {
            const halves result = to_bfloat16(sum[g][p] / totals[g]);
            memcpy(out + g * size + p * LANES, &result, sizeof result);
        }
}

/* Compute `heads` heads, a constant, from `first_head` on, which read the same keys. `buffer` has room for
 * their queries and scores.
 */
static inline __attribute__((always_inline)) void attend_heads(
    const int heads, const struct attention *a, int64_t sequence, int64_t first_head, float *buffer)
{
    const int64_t size = a->head_size, length = a->length, room = (length + LANES - 1) / LANES * LANES;
    const int64_t key_head = first_head / (a->heads / a->key_heads);
    const uint16_t *keys = a->key + sequence * a->key_strides[0] + key_head * a->key_strides[1];
    const uint16_t *values = a->value + sequence * a->value_strides[0] + key_head * a->value_strides[1];
    const float *added = a->added ? a->added + sequence * a->added_stride : NULL;
    uint16_t *out = a->out + (sequence * a->heads + first_head) * size;
    float *query = buffer, *scores = buffer + heads * size, totals[MAX_HEADS], largest[MAX_HEADS];
    const float lowest = -__builtin_inff();

    for (int g = 0; g < heads; g++) {
        const int64_t head = first_head + g;
        const uint16_t *from = a->query + sequence * a->query_strides[0] + head * a->query_strides[1];
        for (int64_t d = 0; d < size; d += LANES)
            *(floats *)(query + g * size + d) = to_float32(from + d) * a->scale;
        largest[g] = lowest;
    }
    for (int64_t s = 0; s < length; s++) {
        const uint16_t *key = keys + s * a->key_strides[2];
        floats sum[MAX_HEADS];
#pragma GCC unroll 16
        for (int g = 0; g < heads; g++)
            sum[g] = (floats){0};
        for (int64_t d = 0; d < size; d += LANES) {
            const floats numbers = to_float32(key + d);
#pragma GCC unroll 16
            for (int g = 0; g < heads; g++)
                sum[g] += *(floats *)(query + g * size + d) * numbers;
        }
#pragma GCC unroll 16
        for (int g = 0; g < heads; g++) {
            const float score = horizontal_sum(sum[g]) + (added ? added[s] : 0);
            scores[g * room + s] = score;
            /* NaN is kept and reaches the result. */
            largest[g] = score <= largest[g] ? largest[g] : score;
        }
    }
    for (int g = 0; g < heads; g++) {
        float *row = scores + g * room;
        floats sums = {0};
        if (largest[g] == lowest) { /* all keys are masked: zeros */
            memset(row, 0, length * sizeof *row);
            totals[g] = 1;
            continue;
        }
        for (int64_t s = length; s < room; s++)
            row[s] = lowest;
        for (int64_t s = 0; s < room; s += LANES)
            sums += *(floats *)(row + s) = exp_nonpositive(*(floats *)(row + s) - largest[g]);
        totals[g] = horizontal_sum(sums);
    }
    const int64_t stride = a->value_strides[2];
    int64_t d = 0;
    for (; d + VALUE_VECTORS * LANES <= size; d += VALUE_VECTORS * LANES)
        weighted_values(
            heads, VALUE_VECTORS, values + d, stride, length, scores, room, totals, out + d, size);
    for (; d < size; d += LANES)
        weighted_values(heads, 1, values + d, stride, length, scores, room, totals, out + d, size);
}

/* Compute all heads of one sequence that read the keys of `key_head`. */
static void JOIN(attend, SUFFIX)(const struct attention *a, int64_t sequence, int64_t key_head, float *buffer)
{
    const int64_t each = a->heads / a->key_heads;
    int64_t g = 0;
    for (; g + MAX_HEADS <= each; g += MAX_HEADS)
        attend_heads(MAX_HEADS, a, sequence, key_head * each + g, buffer);
    for (; g + MAX_HEADS / 2 <= each; g += MAX_HEADS / 2)
        attend_heads(MAX_HEADS / 2, a, sequence, key_head * each + g, buffer);
    for (; g < each; g++)
        attend_heads(1, a, sequence, key_head * each + g, buffer);
}

#undef LANES
#undef floats
#undef words
#undef halves
#undef to_float32
#undef horizontal_sum
#undef exp_nonpositive
#undef weighted_values
#undef attend_heads
#undef to_bfloat16

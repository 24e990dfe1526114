/* Rows of bfloat16 as e4m3 codes with float32 scales, and back.
 *
 * row_library.py calls these functions through ctypes. A row of words has `columns` codes, from word
 * `first_scale` on the scales of its groups, and zeros up to `words` words. The last group may be shorter.
 * The results have the bits of quantised_rows.py.
 */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)

#define ALWAYS static inline __attribute__((always_inline))
/* Rows that one thread does alone. */
#define FEW_ROWS 4

struct row_format {
    int64_t columns, group, first_scale, words;
    int32_t power_of_two;
};

ALWAYS float as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

ALWAYS uint32_t as_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Return the scale of a group whose largest absolute value has the bits `size`; NaN stays. */
static inline float scale_of(uint32_t size, int32_t power_of_two)
{
    const float largest = as_float(size), least = 0x1p-100f;
    const float scale = (largest < least ? least : largest) / 448.0f;
    const uint32_t bits = as_bits(scale);
    if (!power_of_two || bits >= 0x7f800000)
        return scale;
    return as_float((bits + 0x7fffff) & 0x7f800000);
}

/* Return `a` where `condition` is 1, `b` where it is 0; without a branch, so that loops become vectors. */
ALWAYS uint32_t choose(uint32_t condition, uint32_t a, uint32_t b) { return b ^ ((a ^ b) & (0u - condition)); }

/* Return the code nearest to a value; ties to even, NaN above 464. */
ALWAYS uint8_t code_of(float x)
{
    const uint32_t bits = as_bits(x), size = bits & 0x7fffffff;
    /* Below 2^-6 the steps are 2^-9, those of float32 at 2^14: the sum rounds, its last bits are the code. */
    const uint32_t small = as_bits(as_float(size) + 16384.0f) - 0x46800000;
    const uint32_t normal = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120 << 3);
    const uint32_t code = choose(size > 0x43e80000, 0x7f, choose(size < 0x3c800000, small, normal));
    return (uint8_t)(code | ((bits >> 24) & 0x80));
}

/* Return the value of a code. */
ALWAYS float value_of(uint8_t code)
{
    const uint32_t size = code & 0x7f;
    const uint32_t normal = (size << 20) + (120u << 23), small = as_bits((float)(int32_t)size * 0x1p-9f);
    const uint32_t value = choose(size == 0x7f, 0x7fc00000, choose(size < 8, small, normal));
    return as_float(value | ((uint32_t)(code & 0x80) << 24));
}

ALWAYS uint16_t bfloat16_of(float x)
{
    const uint32_t bits = as_bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)choose((bits & 0x7fffffff) > 0x7f800000, 0x7fc0, rounded);
}

/* Both bodies are compiled for each instruction set; the compiler makes vectors of the loops. */
ALWAYS void encode_body(
    const uint16_t *restrict x, int64_t count, float *scale, uint8_t *restrict codes, int32_t power_of_two)
{
    uint16_t size = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint16_t one = x[i] & 0x7fff;
        size = one > size ? one : size;
    }
    const float divisor = *scale = scale_of((uint32_t)size << 16, power_of_two);
    for (int64_t i = 0; i < count; i++)
        codes[i] = code_of(as_float((uint32_t)x[i] << 16) / divisor);
}

ALWAYS void decode_body(const uint8_t *restrict codes, int64_t count, float scale, uint16_t *restrict out)
{
    for (int64_t i = 0; i < count; i++)
        out[i] = bfloat16_of(value_of(codes[i]) * scale);
}

#define SET(name, ...) \
    __VA_ARGS__ static void encode_##name( \
        const uint16_t *x, int64_t count, float *scale, uint8_t *codes, int32_t power_of_two) \
    { \
        encode_body(x, count, scale, codes, power_of_two); \
    } \
    __VA_ARGS__ static void decode_##name(const uint8_t *codes, int64_t count, float scale, uint16_t *out) \
    { \
        decode_body(codes, count, scale, out); \
    }

SET(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))))
SET(avx2, __attribute__((target("avx2"))))
SET(plain, )

static const struct {
    void (*encode)(const uint16_t *, int64_t, float *, uint8_t *, int32_t);
    void (*decode)(const uint8_t *, int64_t, float, uint16_t *);
} sets[] = {{encode_plain, decode_plain}, {encode_avx2, decode_avx2}, {encode_avx512, decode_avx512}};

/* Return the best instruction set here: 2 AVX-512, 1 AVX2, 0 for neither. */
int xpar_rows_set(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return 2;
    return __builtin_cpu_supports("avx2") ? 1 : 0;
}

/* Write `count` rows of words from rows `x` [count, columns], by `threads` threads, with instruction set `set`. */
void xpar_encode_rows(
    const struct row_format *f, const uint16_t *x, int64_t count, uint32_t *words, int set,
    int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (count > FEW_ROWS)
    for (int64_t r = 0; r < count; r++) {
        uint32_t *row = words + r * f->words;
        memset(row, 0, f->words * sizeof *row);
        for (int64_t at = 0, g = 0; at < f->columns; at += f->group, g++) {
            const int64_t left = f->columns - at, size = left < f->group ? left : f->group;
            float *scale = (float *)(row + f->first_scale) + g;
            sets[set].encode(x + r * f->columns + at, size, scale, (uint8_t *)row + at, f->power_of_two);
        }
    }
}

/* Write `count` rows `out` [count, columns]; row r is made of row `index[r]` of words, or of row r without
 * `index`.
 */
void xpar_decode_rows(
    const struct row_format *f, const uint32_t *words, const int64_t *index, int64_t count, uint16_t *out,
    int set, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (count > FEW_ROWS)
    for (int64_t r = 0; r < count; r++) {
        const uint32_t *row = words + (index ? index[r] : r) * f->words;
        for (int64_t at = 0, g = 0; at < f->columns; at += f->group, g++) {
            const int64_t left = f->columns - at, size = left < f->group ? left : f->group;
            const float scale = ((const float *)(row + f->first_scale))[g];
            sets[set].decode((const uint8_t *)row + at, size, scale, out + r * f->columns + at);
        }
    }
}

#endif

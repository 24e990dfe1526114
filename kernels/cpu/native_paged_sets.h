/* What native_paged_tile.h needs instructions by name for, for each instruction set: types, and the products of
 * queries and keys. A word is a pair of neighbouring bfloat16 numbers. Queries are kept as words or, without
 * products of bfloat16, as vectors of the float32 numbers of the even and of the odd halves.
 */

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define INLINE static inline __attribute__((always_inline))

#define DEFINE_TYPES(suffix, bytes) \
    typedef float floats_##suffix __attribute__((vector_size(bytes))); \
    typedef uint32_t words_##suffix __attribute__((vector_size(bytes))); \
    typedef int32_t ints_##suffix __attribute__((vector_size(bytes)))
DEFINE_TYPES(bf16, 64);
DEFINE_TYPES(avx512, 64);
DEFINE_TYPES(avx2, 32);
typedef float float4 __attribute__((vector_size(16)));

/* `larger` is its second argument where one is NaN. `times_power_of_2` takes whole n from -151 to 0. */
#define DEFINE_AVX512(suffix) \
    INLINE floats_##suffix fuse_##suffix(floats_##suffix a, floats_##suffix b, floats_##suffix c) \
    { \
        return (floats_##suffix)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); \
    } \
    INLINE floats_##suffix larger_##suffix(floats_##suffix a, floats_##suffix b) \
    { \
        return (floats_##suffix)_mm512_max_ps((__m512)a, (__m512)b); \
    } \
    INLINE floats_##suffix nearest_whole_##suffix(floats_##suffix a) \
    { \
        return (floats_##suffix)_mm512_roundscale_ps((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); \
    } \
    INLINE floats_##suffix times_power_of_2_##suffix(floats_##suffix a, floats_##suffix n) \
    { \
        return (floats_##suffix)_mm512_scalef_ps((__m512)a, (__m512)n); \
    }

/* Products in float32: of the even halves, then of the odd ones. `dot_words` adds those of a vector of words of
 * one key; `dot_lane` those of word `lane` of a vector of the query with the same word of several keys.
 */
#define DEFINE_FLOAT32_DOTS(suffix, lanes) \
    INLINE floats_##suffix dot_words_##suffix(floats_##suffix sum, words_##suffix key, const float *query) \
    { \
        const floats_##suffix *halves = (const floats_##suffix *)query; \
        sum = fuse_##suffix((floats_##suffix)(key << 16), halves[0], sum); \
        return fuse_##suffix((floats_##suffix)(key & 0xffff0000u), halves[1], sum); \
    } \
    INLINE floats_##suffix dot_lane_##suffix( \
        floats_##suffix sum, const float *keys, const float *query, const int lane) \
    { \
        const floats_##suffix *halves = (const floats_##suffix *)keys; \
        sum = fuse_##suffix(halves[0], (floats_##suffix){0} + query[lane], sum); \
        return fuse_##suffix(halves[1], (floats_##suffix){0} + query[lanes + lane], sum); \
    }

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
DEFINE_AVX512(bf16)
INLINE floats_bf16 dot_words_bf16(floats_bf16 sum, words_bf16 key, const float *query)
{
    return (floats_bf16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)key, (__m512bh)_mm512_load_ps(query));
}
INLINE floats_bf16 dot_lane_bf16(floats_bf16 sum, const float *keys, const float *query, const int lane)
{
    const __m512bh one = (__m512bh)_mm512_set1_ps(query[lane]);
    return (floats_bf16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_load_ps(keys), one);
}
#define SUFFIX bf16
#define VBYTES 64
/* Vectors of a row's words that a vector of words becomes. */
#define WIDTH 1
/* Rows that are multiplied by a vector of keys together, and vectors of words of values that are summed
 * together for 1, 2 and 4 rows: as many as leave registers for the rest.
 */
#define KEY_ROWS 4
#define PIECES(rows) (rows == 4 ? 2 : 4)
#include "native_paged_tile.h"
#undef SUFFIX
#undef WIDTH
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
DEFINE_AVX512(avx512)
DEFINE_FLOAT32_DOTS(avx512, 16)
#define SUFFIX avx512
#define WIDTH 2
#include "native_paged_tile.h"
#undef SUFFIX
#undef VBYTES
#undef KEY_ROWS
#undef PIECES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
INLINE floats_avx2 fuse_avx2(floats_avx2 a, floats_avx2 b, floats_avx2 c)
{
    return (floats_avx2)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
INLINE floats_avx2 larger_avx2(floats_avx2 a, floats_avx2 b)
{
    return (floats_avx2)_mm256_max_ps((__m256)a, (__m256)b);
}
INLINE floats_avx2 nearest_whole_avx2(floats_avx2 a)
{
    return (floats_avx2)_mm256_round_ps((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE floats_avx2 times_power_of_2_avx2(floats_avx2 a, floats_avx2 n)
{
    /* Two factors, as one would be below the smallest normal number. */
    const ints_avx2 whole = __builtin_convertvector(n, ints_avx2), half = whole >> 1;
    return a * (floats_avx2)((half + 127) << 23) * (floats_avx2)((whole - half + 127) << 23);
}
DEFINE_FLOAT32_DOTS(avx2, 8)
#define SUFFIX avx2
#define VBYTES 32
#define KEY_ROWS 2
#define PIECES(rows) (4 / rows)
#include "native_paged_tile.h"
#undef SUFFIX
#undef VBYTES
#undef WIDTH
#undef KEY_ROWS
#undef PIECES
#pragma GCC pop_options

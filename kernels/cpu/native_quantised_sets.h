/* What native_quantised_tile.h needs instructions by name for, for each instruction set: types, decoding of
 * pairs, and multiplication. NUMBERS_OF_PAIR says how many numbers of x belong to a pair of inputs: one of two
 * bfloat16, or two float32.
 */

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define INLINE static inline __attribute__((always_inline))

#define DEFINE_TYPES(suffix, bytes) \
    typedef float floats_##suffix __attribute__((vector_size(bytes))); \
    typedef uint32_t words_##suffix __attribute__((vector_size(bytes))); \
    typedef int32_t signed_words_##suffix __attribute__((vector_size(bytes))); \
    typedef uint16_t halves_##suffix __attribute__((vector_size(bytes / 2)))
DEFINE_TYPES(bf16, 64);
DEFINE_TYPES(avx512, 64);
DEFINE_TYPES(avx2, 32);

/* Multiply in float32: the even input of every pair, then the odd one. */
#define DEFINE_FLOAT32_STEP(suffix) \
    INLINE void step_numbers_##suffix( \
        const int rows, const int vectors, const words_##suffix *numbers, const uint32_t *x, \
        floats_##suffix (*part)[PANEL_VECTORS]) \
    { \
        const float *values = (const float *)x; \
        _Pragma("GCC unroll 16") for (int v = 0; v < vectors; v++) \
        { \
            const floats_##suffix even = (floats_##suffix)(numbers[v] << 16); \
            _Pragma("GCC unroll 16") for (int m = 0; m < rows; m++) \
                part[m][v] = fuse_##suffix(even, (floats_##suffix){0} + values[m], part[m][v]); \
            const floats_##suffix odd = (floats_##suffix)(numbers[v] & 0xffff0000u); \
            _Pragma("GCC unroll 16") for (int m = 0; m < rows; m++) \
                part[m][v] = fuse_##suffix(odd, (floats_##suffix){0} + values[rows + m], part[m][v]); \
        } \
    }

/* Decoding in AVX-512: a table of 32 numbers of 16 bits is one register. */
#define DEFINE_AVX512(suffix) \
    INLINE words_##suffix nibble_pair_##suffix(words_##suffix word, const struct decoder *decoder) \
    { \
        /* Five bits choose; the table of 16 is there twice. */ \
        return (words_##suffix)_mm512_permutexvar_epi16( \
            (__m512i)word, _mm512_loadu_si512(decoder->numbers)); \
    } \
    /* The bytes of pair `j`, each at the top of half a word. */ \
    INLINE words_##suffix high_bytes_##suffix(words_##suffix word, int j) \
    { \
        const __m512i zero = _mm512_setzero_si512(); \
        return (words_##suffix)(j ? _mm512_unpackhi_epi8(zero, (__m512i)word) \
                                  : _mm512_unpacklo_epi8(zero, (__m512i)word)); \
    } \
    /* Shift a code to where bfloat16 has exponent and fraction, but look up those below the normal ones. */ \
    INLINE words_##suffix e4m3_shifted_##suffix(words_##suffix word, int j, const struct decoder *decoder) \
    { \
        const words_##suffix both = high_bytes_##suffix(word, j); \
        const __m512i code = _mm512_srli_epi16((__m512i)both, 8); \
        const __mmask32 small = _mm512_testn_epi16_mask(code, _mm512_set1_epi16(0x78)); \
        __m512i size = (__m512i)((both & 0x7f007f00u) >> 4); \
        size = _mm512_add_epi16(size, _mm512_set1_epi16(120 << 7)); \
        size = _mm512_mask_permutexvar_epi16(size, small, code, _mm512_loadu_si512(decoder->numbers)); \
        return (words_##suffix)size | (both & 0x80008000u); \
    } \
    INLINE floats_##suffix fuse_##suffix(floats_##suffix a, floats_##suffix b, floats_##suffix c) \
    { \
        return (floats_##suffix)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); \
    } \
    INLINE floats_##suffix wide_half_##suffix(halves_##suffix half) \
    { \
        return (floats_##suffix)_mm512_cvtph_ps((__m256i)half); \
    }

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,prefer-vector-width=512")
DEFINE_AVX512(bf16)
/* For few rows, look up both bytes of every number: seven bits of an index choose among 128 bytes. With more
 * rows the tables take registers that sums need.
 */
INLINE words_bf16 e4m3_pair_bf16(words_bf16 word, int j, const int rows, const struct decoder *decoder)
{
    if (rows > 2)
        return e4m3_shifted_bf16(word, j, decoder);
    const __m512i low = _mm512_permutex2var_epi8(
        _mm512_loadu_si512(decoder->low_of_size), (__m512i)word,
        _mm512_loadu_si512(decoder->low_of_size + 64));
    const __m512i size = _mm512_permutex2var_epi8(
        _mm512_loadu_si512(decoder->high_of_size), (__m512i)word,
        _mm512_loadu_si512(decoder->high_of_size + 64));
    const __m512i high = (__m512i)((words_bf16)size | (word & 0x80808080u));
    return (words_bf16)(j ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high));
}
INLINE void step_numbers_bf16(
    const int rows, const int vectors, const words_bf16 *numbers, const uint32_t *x,
    floats_bf16 (*part)[PANEL_VECTORS])
{
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32((int)x[m]);
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++)
            part[m][v] = (floats_bf16)_mm512_dpbf16_ps((__m512)part[m][v], (__m512bh)numbers[v], both);
    }
}
#define SUFFIX bf16
#define VBYTES 64
#define PAIR_VECTORS 4
#define NUMBERS_OF_PAIR 1
#define VECTORS_OF_ROWS(n) 4
#include "native_quantised_tile.h"
#undef SUFFIX
#undef NUMBERS_OF_PAIR
#undef PAIR_VECTORS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
DEFINE_AVX512(avx512)
INLINE words_avx512 e4m3_pair_avx512(words_avx512 word, int j, int rows, const struct decoder *decoder)
{
    (void)rows;
    return e4m3_shifted_avx512(word, j, decoder);
}
DEFINE_FLOAT32_STEP(avx512)
#define SUFFIX avx512
#define PAIR_VECTORS 4
#define NUMBERS_OF_PAIR 2
#include "native_quantised_tile.h"
#undef SUFFIX
#undef VBYTES
#undef PAIR_VECTORS
#undef VECTORS_OF_ROWS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
/* Look up the low and the high byte of each number; `index` has four bits in either half of a word. */
INLINE __m256i number_of_index(__m256i index, const struct decoder *decoder)
{
    const __m256i low = _mm256_loadu_si256((const __m256i *)decoder->low_bytes);
    const __m256i high = _mm256_loadu_si256((const __m256i *)decoder->high_bytes);
    /* An index with its top bit set yields zero. */
    const __m256i first = _mm256_or_si256(index, _mm256_set1_epi16((short)0x8000));
    const __m256i second = _mm256_or_si256(_mm256_slli_epi16(index, 8), _mm256_set1_epi16(0x80));
    return _mm256_or_si256(_mm256_shuffle_epi8(low, first), _mm256_shuffle_epi8(high, second));
}
INLINE words_avx2 nibble_pair_avx2(words_avx2 word, const struct decoder *decoder)
{
    return (words_avx2)number_of_index((__m256i)(word & 0x000f000fu), decoder);
}
INLINE words_avx2 high_bytes_avx2(words_avx2 word, int j)
{
    const __m256i zero = _mm256_setzero_si256();
    return (words_avx2)(j ? _mm256_unpackhi_epi8(zero, (__m256i)word)
                          : _mm256_unpacklo_epi8(zero, (__m256i)word));
}
INLINE words_avx2 e4m3_pair_avx2(words_avx2 word, int j, int rows, const struct decoder *decoder)
{
    (void)rows;
    const words_avx2 both = high_bytes_avx2(word, j);
    const __m256i size = _mm256_srli_epi16((__m256i)(both & 0x7f007f00u), 8);
    const __m256i normal = _mm256_add_epi16(_mm256_slli_epi16(size, 4), _mm256_set1_epi16(120 << 7));
    const __m256i small = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), size);
    const __m256i looked_up = number_of_index(_mm256_and_si256(size, _mm256_set1_epi16(7)), decoder);
    return (words_avx2)_mm256_blendv_epi8(normal, looked_up, small) | (both & 0x80008000u);
}
INLINE floats_avx2 fuse_avx2(floats_avx2 a, floats_avx2 b, floats_avx2 c)
{
    return (floats_avx2)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
INLINE floats_avx2 wide_half_avx2(halves_avx2 half)
{
    return (floats_avx2)_mm256_cvtph_ps((__m128i)half);
}
DEFINE_FLOAT32_STEP(avx2)
#define SUFFIX avx2
#define VBYTES 32
#define PAIR_VECTORS 2
#define VECTORS_OF_ROWS(n) (n == 1 ? 4 : 2)
#include "native_quantised_tile.h"
#undef SUFFIX
#undef VBYTES
#undef PAIR_VECTORS
#undef NUMBERS_OF_PAIR
#undef VECTORS_OF_ROWS
#pragma GCC pop_options

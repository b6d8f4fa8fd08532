// Vectors of LANES numbers of 32 bits, so that one source serves every level. All of it is in the level's namespace.
//
// Floats and Ints are the compiler's own vector types; + - * / work on Floats and are what IEEE 754 says of each lane.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(FEWBITS_IS_amx)
#define FEWBITS_AMX 1
#endif
#if defined(FEWBITS_IS_amx) || defined(FEWBITS_IS_avx512_bf16)
#define FEWBITS_BF16 1
#endif
#if defined(FEWBITS_BF16) || defined(FEWBITS_IS_avx512)
#define FEWBITS_AVX512 1
#include <immintrin.h>
#elif defined(FEWBITS_IS_avx2)
#define FEWBITS_AVX2 1
#include <immintrin.h>
#elif defined(FEWBITS_IS_neon)
#define FEWBITS_NEON 1
#include <arm_neon.h>
#endif
// each is 0 or 1, so that C++ can ask as well
#ifndef FEWBITS_AMX
#define FEWBITS_AMX 0
#endif
#ifndef FEWBITS_BF16
#define FEWBITS_BF16 0
#endif
#ifndef FEWBITS_AVX512
#define FEWBITS_AVX512 0
#endif
#ifndef FEWBITS_AVX2
#define FEWBITS_AVX2 0
#endif
#ifndef FEWBITS_NEON
#define FEWBITS_NEON 0
#endif

// loops over arrays of vectors have to be unrolled, or the arrays are in memory
#if defined(FEWBITS_EMULATE)
#define UNROLL
#elif defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define INLINE static inline __attribute__((always_inline))
#define INLINE_METHOD inline __attribute__((always_inline))

// a value that was loaded stays in a register: GCC otherwise loads it again for every use
#if FEWBITS_AVX512 && !defined(FEWBITS_EMULATE)
#define KEEP(v) asm("" : "+v"(v))
#elif FEWBITS_AVX2
#define KEEP(v) asm("" : "+x"(v))
#else
#define KEEP(v) (void)(v)
#endif

namespace fewbits {
namespace FEWBITS_LEVEL {

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Some bytes of the row of the output that is written eight rows later, `last` at most: rows lie pages apart, which no
// hardware foresees.
INLINE void fetch_rows_ahead(void* out, int64_t row, int64_t last, int64_t row_bytes, int64_t begin, int64_t bytes) {
    const char* at = static_cast<const char*>(out) + least(row + 8, last) * row_bytes + begin;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 1);
}

// ------------------------------------------------------------------------------------------- one number

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE uint16_t to_bf16(float value) {
    const uint32_t bits = to_bits(value);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float from_f16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // the product gives subnormal ones their exponent
    return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
}

INLINE uint16_t to_f16(float value) {
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more
    if (rest < 0x38800000)  // subnormal: the sum with 0.5 rounds at the right place
        return static_cast<uint16_t>(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000));
    return static_cast<uint16_t>(sign | (((rest + 0xfff + (rest >> 13 & 1)) >> 13) - 0x1c000));
}

INLINE float load_one(int64_t dtype, const void* from, int64_t index) {
    if (dtype == FLOAT32) return static_cast<const float*>(from)[index];
    const uint16_t half = static_cast<const uint16_t*>(from)[index];
    return dtype == FLOAT16 ? from_f16(half) : from_bits(static_cast<uint32_t>(half) << 16);
}

INLINE void store_one(int64_t dtype, void* to, int64_t index, float value) {
    if (dtype == FLOAT32)
        static_cast<float*>(to)[index] = value;
    else
        static_cast<uint16_t*>(to)[index] = dtype == FLOAT16 ? to_f16(value) : to_bf16(value);
}

INLINE int64_t size_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

// ------------------------------------------------------------------------------------------- a vector
// zero, splat, load, store          of fp32, any alignment
// load_bf16, load_f16, store_…      LANES numbers of 16 bits; stores round to nearest even
// load_int8                         LANES integers of 8 bits
// fma(a, b, c)                      a * b + c; rounded once where the level has such an instruction
// sum                               of all lanes, in the order of a tree
// load_ints, shift_right            words of 32 bits
// spread(codes)                     the codes of LANES elements from that many half bytes, in the lowest four bits
// Table, table, lookup              16 values by the lowest four bits of each lane; other bits may be anything

#if FEWBITS_AVX512

constexpr int LANES = 16;
using Floats = __m512;
using Ints = __m512i;

INLINE Floats zero() { return _mm512_setzero_ps(); }
INLINE Floats splat(float value) { return _mm512_set1_ps(value); }
INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
INLINE void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
INLINE Floats load_bf16(const void* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE Floats load_f16(const void* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
// as the upper halves of the lanes
INLINE Ints rounded_to_bf16(Floats v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits, _mm512_set1_epi32(1 << 22));
}
INLINE void store_bf16(void* to, Floats v) {
    const __m512i rounded = _mm512_srli_epi32(rounded_to_bf16(v), 16);
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
}
INLINE void store_f16(void* to, Floats v) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
INLINE Floats load_int8(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float sum(Floats v) { return _mm512_reduce_add_ps(v); }
INLINE Ints load_ints(const void* from) { return _mm512_loadu_si512(from); }
INLINE Ints spread(const uint8_t* codes) {
    int32_t words[2];
    memcpy(words, codes, 8);
    const __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(words[0]), 0xff00, words[1]);
    const __m512i shifts = _mm512_broadcast_i64x4(_mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
    return _mm512_srlv_epi32(both, shifts);
}
using Table = __m512;
INLINE Table table(const float* values) { return _mm512_loadu_ps(values); }
INLINE Floats lookup(Table t, Ints codes) { return _mm512_permutexvar_ps(codes, t); }

#elif FEWBITS_AVX2

constexpr int LANES = 8;
using Floats = __m256;
using Ints = __m256i;

INLINE Floats zero() { return _mm256_setzero_ps(); }
INLINE Floats splat(float value) { return _mm256_set1_ps(value); }
INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
INLINE void store(float* to, Floats v) { _mm256_storeu_ps(to, v); }
INLINE Floats load_bf16(const void* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE Floats load_f16(const void* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
INLINE void store_bf16(void* to, Floats v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(1 << 22));
    const __m256 chosen = _mm256_blendv_ps(
        _mm256_castsi256_ps(rounded), _mm256_castsi256_ps(nan), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
INLINE void store_f16(void* to, Floats v) {
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
INLINE Floats load_int8(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float sum(Floats v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE Ints load_ints(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
INLINE Ints spread(const uint8_t* codes) {
    int32_t word;
    memcpy(&word, codes, 4);
    return _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
}
struct Table {
    __m256 low, high;
};
INLINE Table table(const float* values) { return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)}; }
INLINE Floats lookup(const Table& t, Ints codes) {
    const __m256 bit3_first = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(t.low, codes), _mm256_permutevar8x32_ps(t.high, codes), bit3_first);
}

#else

constexpr int LANES = 4;
#if FEWBITS_NEON
using Floats = float32x4_t;
using Ints = uint32x4_t;
#else
typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Ints __attribute__((vector_size(16)));
#endif

INLINE Floats zero() { return Floats{0, 0, 0, 0}; }
INLINE Floats splat(float value) { return Floats{value, value, value, value}; }
INLINE Floats load(const float* from) {
    Floats v;
    memcpy(&v, from, 16);
    return v;
}
INLINE void store(float* to, Floats v) { memcpy(to, &v, 16); }
INLINE Ints load_ints(const void* from) {
    Ints v;
    memcpy(&v, from, 16);
    return v;
}
INLINE Ints spread(const uint8_t* codes) {
    const uint32_t a = codes[0], b = codes[1];
    return Ints{a >> 4, a, b >> 4, b};
}

INLINE Floats load_int8(const int8_t* from) {
    return Floats{static_cast<float>(from[0]), static_cast<float>(from[1]), static_cast<float>(from[2]),
                  static_cast<float>(from[3])};
}
INLINE Floats load_bf16(const void* from) {
    uint16_t h[4];
    memcpy(h, from, 8);
    const Ints wide = {h[0], h[1], h[2], h[3]};
    return (Floats)(wide << 16);
}
INLINE void store_bf16(void* to, Floats v) {
    const uint16_t h[4] = {to_bf16(v[0]), to_bf16(v[1]), to_bf16(v[2]), to_bf16(v[3])};
    memcpy(to, h, 8);
}

#if FEWBITS_NEON
INLINE Floats load_f16(const void* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(from))));
}
INLINE void store_f16(void* to, Floats v) {
    vst1_u16(static_cast<uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32(v)));
}
INLINE Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
INLINE float sum(Floats v) { return vaddvq_f32(v); }
using Table = uint8x16x4_t;
INLINE Table table(const float* values) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(values);
    return {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
}
INLINE Floats lookup(const Table& t, Ints codes) {
    const uint32x4_t code = vandq_u32(codes, vdupq_n_u32(15));
    const uint32x4_t bytes = vmlaq_u32(vdupq_n_u32(0x03020100), code, vdupq_n_u32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(t, vreinterpretq_u8_u32(bytes)));
}
#else
INLINE Floats load_f16(const void* from) {
    uint16_t h[4];
    memcpy(h, from, 8);
    return Floats{from_f16(h[0]), from_f16(h[1]), from_f16(h[2]), from_f16(h[3])};
}
INLINE void store_f16(void* to, Floats v) {
    const uint16_t h[4] = {to_f16(v[0]), to_f16(v[1]), to_f16(v[2]), to_f16(v[3])};
    memcpy(to, h, 8);
}
INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
INLINE float sum(Floats v) { return (v[0] + v[2]) + (v[1] + v[3]); }
using Table = const float*;
INLINE Table table(const float* values) { return values; }
INLINE Floats lookup(Table t, Ints codes) {
    return Floats{t[codes[0] & 15], t[codes[1] & 15], t[codes[2] & 15], t[codes[3] & 15]};
}
#endif
#endif

typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
INLINE Ints shift_right(Ints v, int bits) { return (Ints)((Words)v >> static_cast<uint32_t>(bits)); }

INLINE void store_ints(void* to, Ints v) { memcpy(to, &v, sizeof v); }

#if FEWBITS_AVX512 || FEWBITS_AVX2
constexpr bool TRANSPOSES = true;
#if FEWBITS_AVX512
INLINE Ints low_words(Ints a, Ints b) { return _mm512_unpacklo_epi32(a, b); }
INLINE Ints high_words(Ints a, Ints b) { return _mm512_unpackhi_epi32(a, b); }
INLINE Ints low_pairs(Ints a, Ints b) { return _mm512_unpacklo_epi64(a, b); }
INLINE Ints high_pairs(Ints a, Ints b) { return _mm512_unpackhi_epi64(a, b); }
#else
INLINE Ints low_words(Ints a, Ints b) { return _mm256_unpacklo_epi32(a, b); }
INLINE Ints high_words(Ints a, Ints b) { return _mm256_unpackhi_epi32(a, b); }
INLINE Ints low_pairs(Ints a, Ints b) { return _mm256_unpacklo_epi64(a, b); }
INLINE Ints high_pairs(Ints a, Ints b) { return _mm256_unpackhi_epi64(a, b); }
#endif
// Exchanges rows and columns of words: first within the quarters of 4 x 4, which are then put in place.
INLINE void transpose(Ints (&v)[LANES]) {
    UNROLL for (int i = 0; i < LANES; i += 4) {
        const Ints a = low_words(v[i], v[i + 1]), b = high_words(v[i], v[i + 1]);
        const Ints c = low_words(v[i + 2], v[i + 3]), d = high_words(v[i + 2], v[i + 3]);
        v[i] = low_pairs(a, c), v[i + 1] = high_pairs(a, c), v[i + 2] = low_pairs(b, d), v[i + 3] = high_pairs(b, d);
    }
    UNROLL for (int i = 0; i < 4; i++) {
#if FEWBITS_AVX512
        const Ints a = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x44), b = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xee);
        const Ints c = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x44);
        const Ints d = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xee);
        v[i] = _mm512_shuffle_i32x4(a, c, 0x88), v[i + 4] = _mm512_shuffle_i32x4(a, c, 0xdd);
        v[i + 8] = _mm512_shuffle_i32x4(b, d, 0x88), v[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
#else
        const Ints a = v[i], b = v[i + 4];
        v[i] = _mm256_permute2x128_si256(a, b, 0x20), v[i + 4] = _mm256_permute2x128_si256(a, b, 0x31);
#endif
    }
}
#else
constexpr bool TRANSPOSES = false;
INLINE void transpose(Ints (&)[LANES]) {}
#endif

// LANES numbers of a dtype from index on.
template <int64_t dtype>
INLINE Floats load_as(const void* from, int64_t index) {
    if (dtype == FLOAT32) return load(static_cast<const float*>(from) + index);
    const uint16_t* halves = static_cast<const uint16_t*>(from) + index;
    return dtype == FLOAT16 ? load_f16(halves) : load_bf16(halves);
}
template <int64_t dtype>
INLINE void store_as(void* to, int64_t index, Floats v) {
    if (dtype == FLOAT32) return store(static_cast<float*>(to) + index, v);
    uint16_t* halves = static_cast<uint16_t*>(to) + index;
    dtype == FLOAT16 ? store_f16(halves, v) : store_bf16(halves, v);
}

// fp32 from count numbers of a dtype, from index on.
INLINE void to_floats(int64_t dtype, const void* from, int64_t index, int64_t count, float* to) {
    int64_t i = 0;
    if (dtype == FLOAT32)
        memcpy(to, static_cast<const float*>(from) + index, static_cast<size_t>(count) * 4), i = count;
    else if (dtype == FLOAT16)
        for (; i + LANES <= count; i += LANES) store(to + i, load_as<FLOAT16>(from, index + i));
    else
        for (; i + LANES <= count; i += LANES) store(to + i, load_as<BFLOAT16>(from, index + i));
    for (; i < count; i++) to[i] = load_one(dtype, from, index + i);
}

// ------------------------------------------------------------------------------------------- products in bf16

#if FEWBITS_BF16
// c + the products of both bf16 of each lane. In assembly since GCC 12 spills the accumulators of the intrinsic.
INLINE Floats dot_bf16(Floats c, Ints a, Ints b) {
#ifdef FEWBITS_EMULATE
    return emulated::dpbf16(c, a, b);
#else
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "vm"(b));
    return c;
#endif
}
// in each lane the rounded low, and above it the rounded high
INLINE Ints pair_bf16(Floats low, Floats high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}
// 32 numbers of 16 bits in some order, with zeros past the first `count` ones; nothing is read there
struct Order16 {
    uint16_t of[32];
};
INLINE Ints ordered_16(const void* from, int64_t count, const Order16& order) {
    const Ints numbers =
        count >= 32 ? load_ints(from) : _mm512_maskz_loadu_epi16(count > 0 ? ~0u >> (32 - count) : 0, from);
    return _mm512_permutexvar_epi16(load_ints(order.of), numbers);
}
#endif

}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

// What the functions that quantize share: their tasks, where results go, and the largest of some numbers.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "parallel.h"
#include "reading.h"
#include "simd.h"

namespace fewbits {
namespace FEWBITS_LEVEL {
namespace {

// elements of a task: long ones, since what is fetched ahead in the end of one may be another thread's next, and a few
// for each thread
constexpr int64_t FEW_ELEMENTS = 1 << 15, MANY_ELEMENTS = 1 << 18, TASKS = 8;
constexpr int64_t BYTES = 1 << 19;     // of one that reads them first, to where they stay in a core's cache

// body(index of the first element, where it is, count) for parts of a multiple of `unit` elements each, of `count` in
// all. After an error of reading, which found->error tells, some are left out.
template <class Body>
void for_parts(const Source& w, int64_t count, int64_t unit, int64_t threads, Found* found, const Body& body) {
    const int64_t bytes = size_of(w.dtype);
    const int64_t elements = least(most(count / (TASKS * threads), FEW_ELEMENTS), MANY_ELEMENTS);
    const int64_t size = most(1, (w.memory ? elements : BYTES / bytes) / most(unit, 1)) * most(unit, 1);
    parallel_for(threads, ceil_div(count, size), [&](int64_t index) {
        const int64_t first = index * size, part = least(size, count - first);
        if (w.memory) return body(first, static_cast<const char*>(w.memory) + first * bytes, part);
        if (__atomic_load_n(&found->error, __ATOMIC_RELAXED)) return;
        char* buffer = static_cast<char*>(scratch(0, static_cast<size_t>(part * bytes)));
        const int64_t error = read_at(w.file, w.offset + first * bytes, buffer, part * bytes);
        if (error)
            __atomic_store_n(&found->error, error, __ATOMIC_RELAXED);
        else
            body(first, buffer, part);
    });
}

// How what is read once is fetched: to the first-level cache alone, so that scales stay in the others, and what the
// caller works with.
constexpr int ONCE = 0;

// Results of so many bytes and more go past the caches, which they would only leave for others: so the memory that they
// replace is not read first.
constexpr int64_t STREAMED = 1 << 21;

// unit: bytes of a row or block
INLINE bool streams(const void* to, int64_t bytes, int64_t unit) {
    return FEWBITS_AVX512 && bytes >= STREAMED && reinterpret_cast<uintptr_t>(to) % 32 == 0 && unit % 32 == 0;
}

// before others are told that it is there
INLINE void end_of_stream() {
#if FEWBITS_AVX512
    _mm_sfence();
#endif
}

#if FEWBITS_AVX512
template <bool streamed>
INLINE void put(void* to, __m128i v) {
    streamed ? _mm_stream_si128(static_cast<__m128i*>(to), v) : _mm_storeu_si128(static_cast<__m128i*>(to), v);
}
template <bool streamed>
INLINE void put(void* to, __m256i v) {
    streamed ? _mm256_stream_si256(static_cast<__m256i*>(to), v) : _mm256_storeu_si256(static_cast<__m256i*>(to), v);
}
#endif

INLINE int64_t magnitude(float value) { return to_bits(value) & 0x7fffffff; }  // in the order of |value|, NaN above all

#if FEWBITS_AVX2
// the lowest byte of each word
INLINE void store_low_bytes(void* to, __m256i words) {
    const __m256i bytes = _mm256_shuffle_epi8(words, _mm256_set1_epi32(0x0c080400));
    const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    _mm_storel_epi64(static_cast<__m128i*>(to), _mm_unpacklo_epi32(low, high));
}
#endif

typedef int16_t Halves __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));

// --------------------------------------------------------------------------------------------------------- the largest

template <class Vector>
INLINE Vector larger(Vector a, Vector b) {
    return a > b ? a : b;
}

INLINE int32_t largest(Words v) {
#if FEWBITS_AVX512
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t found = v[0];
    for (int i = 1; i < LANES; i++) found = v[i] > found ? v[i] : found;
    return found;
#endif
}

INLINE int32_t largest(Halves v) {  // none is negative
#if FEWBITS_AVX512 || FEWBITS_AVX2
#if FEWBITS_AVX512
    const __m256i half = _mm256_max_epi16(_mm512_castsi512_si256((__m512i)v), _mm512_extracti64x4_epi64((__m512i)v, 1));
#else
    const __m256i half = (__m256i)v;
#endif
    const __m128i quarter = _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i ones = _mm_set1_epi16(-1);  // there is an instruction for the least
    return ~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(quarter, ones)), 0) & 0xffff;
#else
    int32_t found = v[0];
    for (int i = 1; i < 2 * LANES; i++) found = v[i] > found ? v[i] : found;
    return found;
#endif
}

// Bits of the larger of the largest |x| so far and those from i on.
template <class Bits>
__attribute__((noinline)) int32_t largest_of_rest(const Bits* at, int64_t i, int64_t count, Bits mask, int32_t found) {
    for (; i < count; i++) found = (at[i] & mask) > found ? at[i] & mask : found;
    return found;
}

// The largest |x|, NaN if there is one: bits without a sign are in the order of the values, with NaN last.
template <int64_t dtype>
INLINE float absmax_of(const void* x, int64_t first, int64_t count) {
    using Bits = std::conditional_t<dtype == FLOAT32, int32_t, int16_t>;
    using Vector = std::conditional_t<dtype == FLOAT32, Words, Halves>;
    constexpr int64_t STEP = sizeof(Vector) / sizeof(Bits);
    constexpr Bits mask = dtype == FLOAT32 ? 0x7fffffff : 0x7fff;
    const Bits* at = static_cast<const Bits*>(x) + first;
    Vector found = {};
    int64_t i = 0;
    for (; i + STEP <= count; i += STEP) {
        Vector v;
        memcpy(&v, at + i, sizeof(v));
        found = larger(found, v & mask);
    }
    int32_t bits = largest(found);
    if (i < count) bits = largest_of_rest(at, i, count, mask, bits);
    if (dtype == FLOAT16) return from_f16(static_cast<uint16_t>(bits));
    return from_bits(static_cast<uint32_t>(bits) << (dtype == FLOAT32 ? 0 : 16));
}

}  // namespace
}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

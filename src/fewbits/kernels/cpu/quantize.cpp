// Quantizing, to the bytes that ../reference.py gives on a CPU: steps are rounded as there, and NaN goes where it does.
#include <type_traits>

#include "kernels.h"
#include "parallel.h"
#include "reading.h"
#include "simd.h"

namespace fewbits {
namespace FEWBITS_LEVEL {
namespace {

constexpr int64_t ELEMENTS = 1 << 15;  // of a task
constexpr int64_t BYTES = 1 << 19;     // of one that reads them first, to where they stay in a core's cache

int64_t element_size(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

// body(index of the first element, where it is, count) for parts of a multiple of `unit` elements each, of `count` in
// all. After an error of reading, which found->error tells, some are left out.
template <class Body>
void for_parts(const Source& w, int64_t count, int64_t unit, int64_t threads, Found* found, const Body& body) {
    const int64_t bytes = element_size(w.dtype);
    const int64_t size = most(1, (w.memory ? ELEMENTS : BYTES / bytes) / most(unit, 1)) * most(unit, 1);
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

int64_t magnitude(float value) { return to_bits(value) & 0x7fffffff; }  // in the order of |value|, NaN above all

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

// ------------------------------------------------------------------------------------------------------------- 4 bits

// Finds the code of the interval that a value is in, of 16 between 15 ascending bounds: above a bound, not at it; NaN
// in the first. Vectors go down a tree of comparisons, whose bounds on each floor are looked up by the way so far.
class Search {
  public:
    Search(const float* bounds, const uint8_t* codes) : bounds_(bounds), codes_(codes) {
        for (int floor = 0; floor < 4; floor++)
            for (int i = 0; i < 1 << floor; i++) floors_[floor][i] = bounds[(2 * i + 1) * (8 >> floor) - 1];
        for (int i = 0; i < 16; i++) wide_codes_[i] = codes[i];
#if FEWBITS_AVX512
        fill_buckets();
#endif
    }

    uint8_t code(float value) const {
        int interval = 0;
        for (int i = 0; i < 15; i++) interval += value > bounds_[i];
        return codes_[interval];
    }

#if FEWBITS_AVX512
    // Whether each of 32 buckets from -1 to 1 has one bound at most: then one comparison is enough.
    bool has_buckets() const { return has_buckets_; }

    __attribute__((always_inline)) Ints by_bucket(Floats v) const {
        const Ints bucket = _mm512_cvttps_epi32(fma(v, splat(BUCKETS), splat(16)));
        const Ints below = _mm512_permutex2var_epi32(bucket_codes_[0], bucket, bucket_codes_[1]);
        const Floats bound = _mm512_permutex2var_ps(bucket_bounds_[0], bucket, bucket_bounds_[1]);
        return _mm512_mask_add_epi32(below, _mm512_cmp_ps_mask(v, bound, _CMP_GT_OQ), below, _mm512_set1_epi32(1));
    }

    __attribute__((always_inline)) Ints by_tree(Floats v) const {
        Ints way = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(v, splat(floors_[0][0]), _CMP_GT_OQ), 1);
        UNROLL for (int floor = 1; floor < 4; floor++) {
            const Floats bound = _mm512_permutexvar_ps(way, _mm512_load_ps(floors_[floor]));
            way = _mm512_add_epi32(way, way);
            way = _mm512_mask_add_epi32(way, _mm512_cmp_ps_mask(v, bound, _CMP_GT_OQ), way, _mm512_set1_epi32(1));
        }
        return _mm512_permutexvar_epi32(way, _mm512_load_si512(wide_codes_));
    }
#elif FEWBITS_AVX2
    __attribute__((always_inline)) Ints by_tree(Floats v) const {
        __m256i way = _mm256_srli_epi32(_mm256_castps_si256(_mm256_cmp_ps(v, splat(floors_[0][0]), _CMP_GT_OQ)), 31);
        UNROLL for (int floor = 1; floor < 4; floor++) {
            const Floats bound = _mm256_permutevar8x32_ps(load(floors_[floor]), way);
            const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(v, bound, _CMP_GT_OQ));
            way = _mm256_sub_epi32(_mm256_add_epi32(way, way), above);
        }
        const __m256i low = _mm256_permutevar8x32_epi32(load_ints(wide_codes_), way);
        const __m256i high = _mm256_permutevar8x32_epi32(load_ints(wide_codes_ + 8), way);
        return _mm256_blendv_epi8(low, high, _mm256_cmpgt_epi32(way, _mm256_set1_epi32(7)));
    }
#endif

  private:
    const float* bounds_;
    const uint8_t* codes_;
    alignas(64) float floors_[4][16] = {};
    alignas(64) int32_t wide_codes_[16];

#if FEWBITS_AVX512
    static constexpr float BUCKETS = 15.99f;  // of a unit: 1 is in the last one, also if it is some ulp above
    Floats bucket_bounds_[2];
    Ints bucket_codes_[2];
    bool has_buckets_ = true;

    void fill_buckets() {
        const float margin = 1.0f / 1024;  // of a bucket, for the rounding of a value's
        float in_bucket[32];
        int32_t below[32];
        for (int i = 0; i < 16; i++) has_buckets_ &= codes_[i] == i;
        for (int bucket = 0; bucket < 32; bucket++) {
            in_bucket[bucket] = from_bits(0x7f800000);
            below[bucket] = 0;
            int inside = 0;
            for (int i = 0; i < 15; i++) {
                const float at = bounds_[i] * BUCKETS + 16 - static_cast<float>(bucket);
                below[bucket] += at < 0;
                if (at >= 0 && at < 1) in_bucket[bucket] = bounds_[i], inside++;
                has_buckets_ &= at < -margin || at > margin;
            }
            has_buckets_ &= inside <= 1;
        }
        memcpy(bucket_bounds_, in_bucket, sizeof(in_bucket));
        memcpy(bucket_codes_, below, sizeof(below));
    }
#endif
};

#if FEWBITS_AVX2
INLINE void store_low_bytes(void* to, __m256i words) {
    const __m256i bytes = _mm256_shuffle_epi8(words, _mm256_set1_epi32(0x0c080400));
    const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    _mm_storel_epi64(static_cast<__m128i*>(to), _mm_unpacklo_epi32(low, high));
}
#endif

// LANES codes, one in each word, to half as many bytes
INLINE void pack(Ints codes, uint8_t* to) {
#if FEWBITS_AVX512
    const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(codes, 4), _mm512_srli_epi64(codes, 32));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm512_cvtepi64_epi8(pairs));
#elif FEWBITS_AVX2
    const __m256i pairs = _mm256_or_si256(_mm256_slli_epi64(codes, 4), _mm256_srli_epi64(codes, 32));
    const __m256i order = _mm256_set1_epi64x(static_cast<int64_t>(0xffffffffffff0800u));
    const __m256i bytes = _mm256_shuffle_epi8(pairs, order);
    const uint32_t low = static_cast<uint32_t>(_mm256_cvtsi256_si32(bytes));
    const uint32_t high = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_extracti128_si256(bytes, 1)));
    const uint32_t all = (low & 0xffff) | high << 16;
    memcpy(to, &all, 4);
#else
    for (int i = 0; i < LANES; i += 2) to[i / 2] = static_cast<uint8_t>(codes[i] << 4 | codes[i + 1]);
#endif
}

#if FEWBITS_AVX512 || FEWBITS_AVX2
// LANES codes of even elements and as many of odd ones to as many bytes
INLINE void pack(Ints even, Ints odd, uint8_t* to) {
#if FEWBITS_AVX512
    const __m512i pairs = _mm512_or_si512(_mm512_slli_epi32(even, 4), odd);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(pairs));
#else
    store_low_bytes(to, _mm256_or_si256(_mm256_slli_epi32(even, 4), odd));
#endif
}
#endif

enum class How { BUCKETS, TREE };

// What is left of a block, from element i on.
template <int64_t dtype, bool divided>
__attribute__((noinline)) void quantize_rest(
    const Quantize4Bit& a, const Search& search, int64_t first, int64_t i, int64_t count, float factor) {
    for (; i < count; i += 2) {
        uint8_t codes[2];
        for (int64_t j = 0; j < 2; j++) {  // the unused last half of a byte holds the code of zero
            const float x = i + j < count ? load_one(dtype, a.w.memory, first + i + j) : 0.0f;
            codes[j] = search.code(i + j < count ? (divided ? x / factor : x * factor) : 0.0f);
        }
        a.packed[(first + i) / 2] = static_cast<uint8_t>(codes[0] << 4 | codes[1]);
    }
}

// One block to bytes, multiplied by the factor, or divided by it.
template <int64_t dtype, How how, bool divided>
INLINE void quantize_block(const Quantize4Bit& a, const Search& search, int64_t first, int64_t count, float factor) {
    int64_t i = 0;
#if FEWBITS_AVX512 || FEWBITS_AVX2
    const Floats factors = splat(factor);
    const auto codes_of = [&](Floats x) __attribute__((always_inline)) {
        const Floats v = divided ? x / factors : x * factors;
#if FEWBITS_AVX512
        if (how == How::BUCKETS) return search.by_bucket(v);
#endif
        return search.by_tree(v);
    };
    uint8_t* packed = a.packed + first / 2;
    if (dtype == BFLOAT16) {
        const char* from = static_cast<const char*>(a.w.memory) + 2 * first;
        const auto two = [&](int64_t at) __attribute__((always_inline)) {
            const Words both = (Words)load_ints(from + 4 * at);
            pack(codes_of((Floats)(both << 16)), codes_of((Floats)(both & ~0xffff)), packed + at);
        };
        for (; i + 4 * LANES <= count; i += 4 * LANES, from += 8 * LANES, packed += 2 * LANES) two(0), two(LANES);
        for (; i + 2 * LANES <= count; i += 2 * LANES, from += 4 * LANES, packed += LANES) two(0);
    }
    for (; i + LANES <= count; i += LANES, packed += LANES / 2)
        pack(codes_of(load_as<dtype>(a.w.memory, first + i)), packed);
#endif
    if (i < count) quantize_rest<dtype, divided>(a, search, first, i, count, factor);
}

INLINE float floored(float absmax) { return absmax < 1e-38f ? 1e-38f : absmax; }  // finite as a divisor

template <int64_t dtype, How how>
void quantize_blocks(const Quantize4Bit& arguments, const Search& rule) {
    constexpr int64_t BATCH = 16;  // of blocks, whose absmax is found first: no division is waited for
    const Quantize4Bit a = arguments;  // copies: for all that the compiler knows, a byte written may be one of theirs
    const Search search = rule;
    const int64_t whole = a.count / a.block_size;
    for (int64_t batch = 0; batch < whole; batch += BATCH) {
        const int64_t blocks = least(BATCH, whole - batch);
        float factors[BATCH];
        for (int64_t i = 0; i < blocks; i++)
            a.absmax[batch + i] = absmax_of<dtype>(a.w.memory, (batch + i) * a.block_size, a.block_size);
        for (int64_t i = 0; i < blocks; i++) factors[i] = 1.0f / floored(a.absmax[batch + i]);
        for (int64_t i = 0; i < blocks; i++)
            quantize_block<dtype, how, false>(a, search, (batch + i) * a.block_size, a.block_size, factors[i]);
    }
    if (whole * a.block_size < a.count) {  // the last block is not a whole one: bitsandbytes divides it
        const int64_t first = whole * a.block_size, count = a.count - first;
        a.absmax[whole] = floored(absmax_of<dtype>(a.w.memory, first, count));
        quantize_block<dtype, how, true>(a, search, first, count, a.absmax[whole]);
    }
}

template <How how>
void quantize_blocks_of(const Quantize4Bit& a, const Search& search) {
    if (a.w.dtype == FLOAT32)
        quantize_blocks<FLOAT32, how>(a, search);
    else if (a.w.dtype == FLOAT16)
        quantize_blocks<FLOAT16, how>(a, search);
    else
        quantize_blocks<BFLOAT16, how>(a, search);
}

// ------------------------------------------------------------------------------------------------------------- 8 bits

// LANES numbers below 128 to integers, the nearest or the even one; NaN to 0
INLINE void store_rounded(int8_t* to, Floats v) {
#if FEWBITS_AVX512
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
#elif FEWBITS_AVX2
    store_low_bytes(to, _mm256_cvtps_epi32(v));
#else
    const Floats moved = v + splat(12582912.0f);  // 1.5 * 2^23: the integer is in the last bits, and in NaN's are zeros
    for (int i = 0; i < LANES; i++) to[i] = static_cast<int8_t>(to_bits(moved[i]));
#endif
}

INLINE Floats rounded_to_f16(Floats v) {
    uint16_t halves[LANES];
    store_f16(halves, v);
    return load_f16(halves);
}

template <int64_t dtype, bool exact>
void quantize_row_as(const void* w, int64_t first, int64_t count, int8_t* q, float scale) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Floats v = load_as<dtype>(w, first + i);
        store_rounded(q + i, (exact ? v : rounded_to_f16(v)) * splat(scale));
    }
    if (i < count) {
        float rest[LANES] = {};
        int8_t codes[LANES];
        for (int64_t j = i; j < count; j++) rest[j - i] = load_one(dtype, w, first + j);
        store_rounded(codes, rounded_to_f16(load(rest)) * splat(scale));
        memcpy(q + i, codes, static_cast<size_t>(count - i));
    }
}

// The format quantizes what fp16 holds. A bf16 number from 2^-14 on, fp16's normal ones, is one of fp16, too; a smaller
// one has the code 0, rounded or not, if 127 of them are less than half of the largest. Returns the largest |x|.
template <int64_t dtype>
float quantize_row(const void* w, int64_t first, int64_t count, int8_t* q, float* absmax) {
    const float found = absmax_of<dtype>(w, first, count);
    const float largest = from_f16(to_f16(found)), scale = 1.0f / largest * 127.0f;
    *absmax = largest;
    if (dtype == FLOAT16 || (dtype == BFLOAT16 && largest > 0.016f && largest <= 65504))
        quantize_row_as<dtype, true>(w, first, count, q, scale);
    else
        quantize_row_as<dtype, false>(w, first, count, q, scale);
    return found;
}

}  // namespace

void quantize_4bit(const Quantize4Bit& a) {
    const Search search(a.bounds, a.codes);
    for_parts(a.w, a.count, a.block_size, a.threads, a.found, [&](int64_t first, const char* w, int64_t count) {
        Quantize4Bit part = a;
        part.w.memory = w;
        part.count = count;
        part.packed += first / 2;
        part.absmax += first / a.block_size;
#if FEWBITS_AVX512
        if (search.has_buckets())
            quantize_blocks_of<How::BUCKETS>(part, search);
        else
#endif
            quantize_blocks_of<How::TREE>(part, search);
        keep_larger(&a.found->largest, magnitude(absmax_of<FLOAT32>(part.absmax, 0, ceil_div(count, a.block_size))));
    });
}

void quantize_absmax(const QuantizeAbsmax& a) {
    parallel_for(a.threads, ceil_div(a.count, 16 * NESTED_BLOCK), [&](int64_t index) {
        const float offset = *a.offset;
        const uint8_t* table = a.steps;
        uint8_t* codes = a.codes;  // a byte written might otherwise be one of the arguments, to the compiler
        const int64_t end = least((index + 1) * 16 * NESTED_BLOCK, a.count);
        for (int64_t first = index * 16 * NESTED_BLOCK; first < end; first += NESTED_BLOCK) {
            const int64_t count = least(NESTED_BLOCK, end - first);
            float values[NESTED_BLOCK];
            int32_t steps[NESTED_BLOCK];
            for (int64_t i = 0; i < count; i++) values[i] = a.absmax[first + i] - offset;
            const float nested = absmax_of<FLOAT32>(values, 0, count), factor = 1.0f / nested;
            a.nested_absmax[first / NESTED_BLOCK] = nested;
            for (int64_t i = 0; i < count; i++) {
                // of 65536 steps from -1 to 1 the nearest; NaN, as 0 / 0, is the first
                float step = (values[i] * factor + 1.0f) * 32767.5f + 0.5f;
                step = step > 0.0f ? step : 0.0f;
                steps[i] = static_cast<int32_t>(step < 65535.0f ? step : 65535.0f);
            }
            for (int64_t i = 0; i < count; i++) codes[first + i] = table[steps[i]];
        }
    });
}

void quantize_int8(const QuantizeInt8& a) {
    for_parts(a.w, a.n * a.k, a.k, a.threads, a.found, [&](int64_t first, const char* w, int64_t count) {
        int64_t largest = 0;
        for (int64_t i = 0; i < count; i += a.k) {
            int8_t* q = a.q + first + i;
            float* absmax = a.absmax + (first + i) / a.k;
            float found;
            if (a.w.dtype == FLOAT32)
                found = quantize_row<FLOAT32>(w, i, a.k, q, absmax);
            else if (a.w.dtype == FLOAT16)
                found = quantize_row<FLOAT16>(w, i, a.k, q, absmax);
            else
                found = quantize_row<BFLOAT16>(w, i, a.k, q, absmax);
            largest = most(largest, magnitude(found));
        }
        keep_larger(&a.found->largest, largest);
    });
}

}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

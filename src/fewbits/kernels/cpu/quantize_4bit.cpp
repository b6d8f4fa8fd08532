// Quantizing to 4 bits, to the bytes that ../reference.py gives on a CPU: steps are rounded as there, and NaN goes where it does.
#include "quantizing.h"

namespace fewbits {
namespace FEWBITS_LEVEL {
namespace {

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
        for (float per_unit = 16380; has_buckets_ && per_integer_ == 0 && per_unit > 15360; per_unit--)
            fill_integers(per_unit);
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

    // What a block's factor is multiplied by, for products that tell codes as integers of 16 bits; 0: they do not.
    float per_integer() const { return per_integer_; }

    // Codes of 32 numbers of bf16, one in each half of a word, in their order, by their products with a factor, rounded
    // down to integers of 16 bits. `even` is per_integer() times the block's factor, `odd` 65536 times that. A code is
    // unsure where a bound, times per_integer(), rounds to the same integer.
    __attribute__((always_inline)) Ints by_integer(Words both, Floats even, Floats odd, __mmask32& unsure) const {
        constexpr int DOWN = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
        const Ints low = _mm512_cvt_roundps_epi32((Floats)(both << 16) * even, DOWN);
        const Ints high = _mm512_cvtps_epi32((Floats)(both & ~0xffff) * odd);  // whose upper half is rounded down
        const Ints v = _mm512_mask_blend_epi16(0xaaaaaaaa, low, high), bucket = _mm512_srli_epi16(v, 10);
        const Ints bound = _mm512_permutexvar_epi16(bucket, integer_bounds_);
        const Ints below = _mm512_permutexvar_epi16(bucket, integer_codes_);
        unsure = _kor_mask32(unsure, _mm512_cmpeq_epi16_mask(v, bound));
        return _mm512_mask_add_epi16(below, _mm512_cmpgt_epi16_mask(v, bound), below, _mm512_set1_epi16(1));
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
    Ints integer_bounds_, integer_codes_;
    float per_integer_ = 0;

    // With so many integers to a unit, 1024 to a bucket. A product is off by 0.004 at most, so a bound must not lie as
    // close to an integer.
    void fill_integers(float per_unit) {
        int16_t in_bucket[32], below[32] = {};
        for (int16_t& none : in_bucket) none = 0x7fff;
        for (int i = 0; i < 15; i++) {
            const float at = bounds_[i] * per_unit, whole = __builtin_floorf(at);
            int16_t& bound = in_bucket[static_cast<int>(whole) >> 10 & 31];
            if (at - whole < 0.02f || at - whole > 0.98f || bound != 0x7fff) return;
            bound = static_cast<int16_t>(whole);
        }
        for (int bucket = -16; bucket < 16; bucket++)
            for (int i = 0; i < 15; i++)
                below[bucket & 31] += static_cast<int>(__builtin_floorf(bounds_[i] * per_unit)) >> 10 < bucket;
        memcpy(&integer_bounds_, in_bucket, sizeof(in_bucket));
        memcpy(&integer_codes_, below, sizeof(below));
        per_integer_ = per_unit;
    }

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
template <bool streamed>
INLINE void pack(Ints even, Ints odd, uint8_t* to) {
#if FEWBITS_AVX512
    put<streamed>(to, _mm512_cvtepi32_epi8(_mm512_or_si512(_mm512_slli_epi32(even, 4), odd)));
#else
    store_low_bytes(to, _mm256_or_si256(_mm256_slli_epi32(even, 4), odd));
#endif
}
#endif

enum class How { BUCKETS, TREE };

constexpr int64_t AHEAD = 4096;  // bytes, that are fetched before they are looked at

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
template <int64_t dtype, How how, bool divided, bool streamed>
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
            pack<streamed>(codes_of((Floats)(both << 16)), codes_of((Floats)(both & ~0xffff)), packed + at);
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

#if FEWBITS_AVX512
// the largest |x| of each of 16 blocks of 32 * VECTORS numbers of bf16
template <int VECTORS>
INLINE Floats absmax_of_16(const char* from) {
    const Halves mask = (Halves)_mm512_set1_epi16(0x7fff);
    Halves v[16];
    UNROLL for (int block = 0; block < 16; block++) {
        v[block] = (Halves)load_ints(from + block * VECTORS * 64) & mask;
        UNROLL for (int i = 1; i < VECTORS; i++)
            v[block] = larger(v[block], (Halves)load_ints(from + (block * VECTORS + i) * 64) & mask);
    }
    // Vectors of neighbours are halved together: a vector then has some of both.
    const auto halved = [](Halves a, Halves b, auto first, auto second) __attribute__((always_inline)) {
        return larger((Halves)first((Ints)a, (Ints)b), (Halves)second((Ints)a, (Ints)b));
    };
    const auto low = [](Ints a, Ints b) { return _mm512_shuffle_i32x4(a, b, 0x88); };
    const auto high = [](Ints a, Ints b) { return _mm512_shuffle_i32x4(a, b, 0xdd); };
    UNROLL for (int i = 0; i < 8; i++) v[i] = halved(v[2 * i], v[2 * i + 1], low_words, high_words);
    UNROLL for (int i = 0; i < 4; i++) v[i] = halved(v[2 * i], v[2 * i + 1], low_pairs, high_pairs);
    UNROLL for (int i = 0; i < 2; i++) v[i] = halved(v[2 * i], v[2 * i + 1], low, high);
    const Words both = (Words)halved(v[0], v[1], low, high);  // two halves of a word are left of each
    return (Floats)((Words)larger((Halves)both, (Halves)(both << 16)) & ~0xffff);
}

// As many whole blocks of 32 * VECTORS numbers of bf16 as are a multiple of 16; how many. The bytes are those of
// quantize_block, by fewer instructions.
template <int VECTORS, bool streamed>
int64_t quantize_batches(const Quantize4Bit& a, const Search& search, int64_t blocks) {
    const Floats per_integer = splat(search.per_integer());
    int64_t batch = 0;
    for (; batch + 16 <= blocks; batch += 16) {
        const char* from = static_cast<const char*>(a.w.memory) + batch * VECTORS * 64;
        uint8_t* packed = a.packed + batch * VECTORS * 16;
        const Floats absmax = absmax_of_16<VECTORS>(from);
        store(a.absmax + batch, absmax);
        // neither an infinite number or a NaN among them nor products beyond integers
        const __mmask16 usual = _mm512_cmp_ps_mask(absmax, splat(1e-28f), _CMP_GT_OQ) &
                                _mm512_cmp_ps_mask(absmax, splat(1e30f), _CMP_LT_OQ);
        float factors[16], per_factors[16];
        const Floats factor = splat(1) / _mm512_max_ps(splat(1e-38f), absmax);
        store(factors, factor);
        store(per_factors, factor * per_integer);
        for (int block = 0; block < 16; block++, from += VECTORS * 64, packed += VECTORS * 16) {
            const Floats even = splat(per_factors[block]), odd = even * splat(65536);
            __mmask32 unsure = 0;
            UNROLL for (int i = 0; i < VECTORS; i++) {
                __builtin_prefetch(from + i * 64 + AHEAD, 0, ONCE);
                const Ints codes = search.by_integer((Words)load_ints(from + i * 64), even, odd, unsure);
                const Ints pairs = _mm512_madd_epi16(codes, _mm512_set1_epi32(1 << 16 | 16));  // the first times 16
                put<streamed>(packed + i * 16, _mm512_cvtepi32_epi8(pairs));
            }
            if (unsure != 0 || !(usual >> block & 1))
                quantize_block<BFLOAT16, How::BUCKETS, false, streamed>(
                    a, search, (batch + block) * VECTORS * 32, VECTORS * 32, factors[block]);
        }
    }
    return batch;
}
#endif

template <int64_t dtype, How how, bool streamed>
void quantize_blocks(const Quantize4Bit& arguments, const Search& rule) {
    constexpr int64_t BATCH = 16;  // of blocks, whose absmax is found first: no division is waited for
    const Quantize4Bit a = arguments;  // copies: for all that the compiler knows, a byte written may be one of theirs
    const Search search = rule;
    const int64_t whole = a.count / a.block_size;
    int64_t batch = 0;
#if FEWBITS_AVX512
    if (dtype == BFLOAT16 && how == How::BUCKETS && search.per_integer() != 0) {
        if (a.block_size == 32) batch = quantize_batches<1, streamed>(a, search, whole);
        if (a.block_size == 64) batch = quantize_batches<2, streamed>(a, search, whole);
        if (a.block_size == 128) batch = quantize_batches<4, streamed>(a, search, whole);
    }
#endif
    for (; batch < whole; batch += BATCH) {
        const int64_t blocks = least(BATCH, whole - batch);
        float factors[BATCH];
        for (int64_t i = 0; i < blocks; i++)
            a.absmax[batch + i] = absmax_of<dtype>(a.w.memory, (batch + i) * a.block_size, a.block_size);
        for (int64_t i = 0; i < blocks; i++) factors[i] = 1.0f / floored(a.absmax[batch + i]);
        for (int64_t i = 0; i < blocks; i++) {
            const int64_t first = (batch + i) * a.block_size;
            quantize_block<dtype, how, false, streamed>(a, search, first, a.block_size, factors[i]);
        }
    }
    if (whole * a.block_size < a.count) {  // the last block is not a whole one: bitsandbytes divides it
        const int64_t first = whole * a.block_size, count = a.count - first;
        a.absmax[whole] = floored(absmax_of<dtype>(a.w.memory, first, count));
        quantize_block<dtype, how, true, false>(a, search, first, count, a.absmax[whole]);
    }
}

template <How how, bool streamed>
void quantize_blocks_of(const Quantize4Bit& a, const Search& search) {
    if (a.w.dtype == FLOAT32)
        quantize_blocks<FLOAT32, how, false>(a, search);
    else if (a.w.dtype == FLOAT16)
        quantize_blocks<FLOAT16, how, false>(a, search);
    else
        quantize_blocks<BFLOAT16, how, streamed>(a, search);
}

}  // namespace

void quantize_4bit(const Quantize4Bit& a) {
    const Search search(a.bounds, a.codes);
    const auto blocks = [&](auto streamed) {
        for_parts(a.w, a.count, a.block_size, a.threads, a.found, [&](int64_t first, const char* w, int64_t count) {
            Quantize4Bit part = a;
            part.w.memory = w;
            part.count = count;
            part.packed += first / 2;
            part.absmax += first / a.block_size;
#if FEWBITS_AVX512
            if (search.has_buckets())
                quantize_blocks_of<How::BUCKETS, streamed>(part, search);
            else
#endif
                quantize_blocks_of<How::TREE, streamed>(part, search);
            if (streamed) end_of_stream();
            const float largest = absmax_of<FLOAT32>(part.absmax, 0, ceil_div(count, a.block_size));
            keep_larger(&a.found->largest, magnitude(largest));
        });
    };
    streams(a.packed, a.count / 2, a.block_size) ? blocks(std::true_type()) : blocks(std::false_type());
}

}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

// Quantizing to 8 bits, to the bytes that ../reference.py gives on a CPU: steps are rounded as there, and NaN goes where it does.
#include "quantizing.h"

namespace fewbits {
namespace FEWBITS_LEVEL {
namespace {

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

constexpr int64_t ROW_IN_CACHE = 8192;  // bytes, of which two fit into a first-level cache

template <int64_t dtype, bool exact, bool streamed>
void quantize_row_as(const void* w, int64_t first, int64_t count, int8_t* q, float scale) {
    int64_t i = 0;
#if FEWBITS_AVX512
    const auto integers = [&](Floats v) __attribute__((always_inline)) {
        return _mm512_cvtps_epi32((exact ? v : rounded_to_f16(v)) * splat(scale));
    };
    const bool near = count * size_of(dtype) <= ROW_IN_CACHE;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        const char* next = static_cast<const char*>(w) + size_of(dtype) * (first + i + count);  // of the next row
        near ? __builtin_prefetch(next, 0, ONCE) : __builtin_prefetch(next);
        if (dtype == BFLOAT16) {
            const Words both = (Words)load_ints(static_cast<const char*>(w) + 2 * (first + i));
            const Ints even = integers((Floats)(both << 16)), odd = integers((Floats)(both & ~0xffff));
            const Ints words = _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
            put<streamed>(q + i, _mm512_cvtepi16_epi8(words));
        } else {
            for (int64_t at = i; at < i + 2 * LANES; at += LANES)
                put<streamed>(q + at, _mm512_cvtepi32_epi8(integers(load_as<dtype>(w, first + at))));
        }
    }
#endif
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
template <int64_t dtype, bool streamed>
float quantize_row(const void* w, int64_t first, int64_t count, int8_t* q, float* absmax) {
    const float found = absmax_of<dtype>(w, first, count);
    const float largest = from_f16(to_f16(found)), scale = 1.0f / largest * 127.0f;
    *absmax = largest;
    if (dtype == FLOAT16 || (dtype == BFLOAT16 && largest > 0.016f && largest <= 65504))
        quantize_row_as<dtype, true, streamed>(w, first, count, q, scale);
    else
        quantize_row_as<dtype, false, streamed>(w, first, count, q, scale);
    return found;
}

}  // namespace

void quantize_int8(const QuantizeInt8& a) {
    const auto rows = [&](auto streamed) {
        for_parts(a.w, a.n * a.k, a.k, a.threads, a.found, [&](int64_t first, const char* w, int64_t count) {
            int64_t largest = 0;
            for (int64_t i = 0; i < count; i += a.k) {
                int8_t* q = a.q + first + i;
                float* absmax = a.absmax + (first + i) / a.k;
                float found;
                if (a.w.dtype == FLOAT32)
                    found = quantize_row<FLOAT32, streamed>(w, i, a.k, q, absmax);
                else if (a.w.dtype == FLOAT16)
                    found = quantize_row<FLOAT16, streamed>(w, i, a.k, q, absmax);
                else
                    found = quantize_row<BFLOAT16, streamed>(w, i, a.k, q, absmax);
                largest = most(largest, magnitude(found));
            }
            if (streamed) end_of_stream();
            keep_larger(&a.found->largest, largest);
        });
    };
    streams(a.q, a.n * a.k, a.k) ? rows(std::true_type()) : rows(std::false_type());
}

}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

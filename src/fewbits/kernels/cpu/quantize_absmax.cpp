// Double quantization, of the scales of blocks, to the bytes that ../reference.py gives on a CPU.
#include "quantizing.h"

namespace fewbits {
namespace FEWBITS_LEVEL {
namespace {

#if FEWBITS_AVX512
// The codes of 32 steps, one in each half of a word, down a tree of comparisons with the first steps of codes.
class CodeOfStep {
  public:
    explicit CodeOfStep(const uint16_t* firsts) {
        for (int floor = 0; floor < 8; floor++)
            for (int i = 0; i < 128; i++) floors_[floor][i] = firsts[(2 * (i % (1 << floor)) + 1) * (128 >> floor)];
    }

    // Some vectors go down at once: on each floor a look-up and a comparison wait for those above.
    template <int N>
    INLINE_METHOD void operator()(const Ints (&steps)[N], Ints (&ways)[N]) const {
        UNROLL for (int i = 0; i < N; i++) ways[i] = _mm512_setzero_si512();
        UNROLL for (int floor = 0; floor < 8; floor++) {
            const uint16_t* at = floors_[floor];
            UNROLL for (int i = 0; i < N; i++) {
                const Ints way = ways[i];
                Ints first = _mm512_permutexvar_epi16(way, load_ints(at));
                if (floor >= 6) first = _mm512_permutex2var_epi16(load_ints(at), way, load_ints(at + 32));
                if (floor == 7) {
                    const Ints later = _mm512_permutex2var_epi16(load_ints(at + 64), way, load_ints(at + 96));
                    first = _mm512_mask_mov_epi16(first, _mm512_test_epi16_mask(way, _mm512_set1_epi16(64)), later);
                }
                const __mmask32 above = _mm512_cmpge_epu16_mask(steps[i], first);
                const Ints twice = _mm512_add_epi16(way, way);
                ways[i] = _mm512_mask_add_epi16(twice, above, twice, _mm512_set1_epi16(1));
            }
        }
    }

  private:
    alignas(64) uint16_t floors_[8][128];  // repeated
};
#endif

}  // namespace

#if FEWBITS_AVX512
// A whole block: its codes, and the largest of its differences from the offset.
INLINE float quantize_nested_block(const float* absmax, float offset, const CodeOfStep& code_of_step, uint8_t* codes) {
    constexpr int VECTORS = NESTED_BLOCK / LANES;
    Floats v[VECTORS];
    UNROLL for (int i = 0; i < VECTORS; i++) v[i] = load(absmax + i * LANES) - splat(offset);
    Ints largest = _mm512_setzero_si512();  // bits without a sign are in the order of the values, with NaN last
    UNROLL for (int i = 0; i < VECTORS; i++)
        largest = _mm512_max_epi32(largest, _mm512_and_si512((Ints)v[i], _mm512_set1_epi32(0x7fffffff)));
    const float nested = from_bits(_mm512_reduce_max_epi32(largest));
    const Floats factor = splat(1.0f / nested);
    const auto step_of = [&](Floats value) __attribute__((always_inline)) {
        const Floats step = (value * factor + splat(1)) * splat(32767.5f) + splat(0.5f);
        return _mm512_cvttps_epi32(_mm512_min_ps(_mm512_max_ps(step, splat(0)), splat(65535)));
    };
    Halves low_halves;
    for (int i = 0; i < 2 * LANES; i++) low_halves[i] = static_cast<int16_t>(2 * i);
    constexpr int AT_ONCE = 4;
    for (int i = 0; i < VECTORS; i += 2 * AT_ONCE) {
        Ints steps[AT_ONCE], found[AT_ONCE];
        UNROLL for (int j = 0; j < AT_ONCE; j++)
            steps[j] = _mm512_permutex2var_epi16(step_of(v[i + 2 * j]), (Ints)low_halves, step_of(v[i + 2 * j + 1]));
        code_of_step(steps, found);
        UNROLL for (int j = 0; j < AT_ONCE; j++) put<false>(codes + (i + 2 * j) * LANES, _mm512_cvtepi16_epi8(found[j]));
    }
    return nested;
}
#endif

void quantize_absmax(const QuantizeAbsmax& a) {
#if FEWBITS_AVX512
    const CodeOfStep code_of_step(a.firsts);
#endif
    parallel_for(a.threads, ceil_div(a.count, 16 * NESTED_BLOCK), [&](int64_t index) {
        const float offset = *a.offset;
        const uint8_t* table = a.steps;
        uint8_t* codes = a.codes;  // a byte written might otherwise be one of the arguments, to the compiler
        const int64_t end = least((index + 1) * 16 * NESTED_BLOCK, a.count);
        for (int64_t first = index * 16 * NESTED_BLOCK; first < end; first += NESTED_BLOCK) {
            const int64_t count = least(NESTED_BLOCK, end - first);
#if FEWBITS_AVX512
            if (count == NESTED_BLOCK) {
                a.nested_absmax[first / NESTED_BLOCK] =
                    quantize_nested_block(a.absmax + first, offset, code_of_step, codes + first);
                continue;
            }
#endif
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

}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

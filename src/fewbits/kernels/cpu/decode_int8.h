// Rows of an 8-bit weight as floating point.
#pragma once

#include "simd.h"

namespace fewbits {
namespace FEWBITS_LEVEL {

template <int64_t dtype>
INLINE void decode_int8_as(const int8_t* q, float scale, int64_t count, void* out, int64_t first) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store_as<dtype>(out, first + i, load_int8(q + i) * splat(scale));
    for (; i < count; i++) store_one(dtype, out, first + i, static_cast<float>(q[i]) * scale);
}

// A row to out, from element first on.
INLINE void decode_int8(const WeightInt8& w, int64_t row, int64_t dtype, void* out, int64_t first) {
    const int8_t* q = w.q + row * w.k;
    const float scale = w.absmax[row] * (1.0f / 127);
    if (dtype == FLOAT32)
        decode_int8_as<FLOAT32>(q, scale, w.k, out, first);
    else if (dtype == FLOAT16)
        decode_int8_as<FLOAT16>(q, scale, w.k, out, first);
    else
        decode_int8_as<BFLOAT16>(q, scale, w.k, out, first);
}

}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

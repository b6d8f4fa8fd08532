// Parts of a 4-bit weight as floating point.
#pragma once

#include "simd.h"

namespace fewbits {
namespace FEWBITS_LEVEL {

INLINE float scale_of(const Weight4Bit& w, int64_t block) {
    if (w.nested_absmax == nullptr) return static_cast<const float*>(w.absmax)[block];
    const float value = w.dynamic[static_cast<const uint8_t*>(w.absmax)[block]];
    return value * w.nested_absmax[block / NESTED_BLOCK] + *w.nested_offset;
}

INLINE float value_of(const Weight4Bit& w, int64_t index) {
    const uint8_t byte = w.packed[index / 2];
    return w.values[index % 2 ? byte & 15 : byte >> 4];
}

// count elements of the flattened weight from first on, to the beginning of out.
template <int64_t dtype>
INLINE void decode_span_as(const Weight4Bit& w, int64_t first, int64_t count, void* out) {
    const Table values = table(w.values);
    const int64_t end = first + count;
    int64_t block = first / w.block_size;
    for (int64_t i = first; i < end; block++) {
        const int64_t stop = least(end, (block + 1) * w.block_size);
        const float scale = scale_of(w, block);
        const Floats scales = splat(scale);
        if (i % 2 == 1) store_one(dtype, out, i - first, value_of(w, i) * scale), i++;
        for (; i + LANES <= stop; i += LANES)
            store_as<dtype>(out, i - first, lookup(values, spread(w.packed + i / 2)) * scales);
        for (; i < stop; i++) store_one(dtype, out, i - first, value_of(w, i) * scale);
    }
}

INLINE void decode_span(const Weight4Bit& w, int64_t first, int64_t count, int64_t dtype, void* out) {
    if (dtype == FLOAT32)
        decode_span_as<FLOAT32>(w, first, count, out);
    else if (dtype == FLOAT16)
        decode_span_as<FLOAT16>(w, first, count, out);
    else
        decode_span_as<BFLOAT16>(w, first, count, out);
}

}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

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

// Scales of count blocks from first on: where they lie already, or decoded into the buffer.
INLINE const float* scales_of(const Weight4Bit& w, int64_t first, int64_t count, float* buffer) {
    if (w.nested_absmax == nullptr) return static_cast<const float*>(w.absmax) + first;
    const uint8_t* codes = static_cast<const uint8_t*>(w.absmax) + first;
    for (int64_t i = 0; i < count;) {
        const int64_t nested = (first + i) / NESTED_BLOCK, stop = least(count, (nested + 1) * NESTED_BLOCK - first);
        const float scale = w.nested_absmax[nested], offset = *w.nested_offset;
        const int64_t begin = i;
        for (; i < stop; i++) buffer[i] = w.dynamic[codes[i]];  // by vectors it takes longer
        for (i = begin; i + LANES <= stop; i += LANES)
            store(buffer + i, load(buffer + i) * splat(scale) + splat(offset));
        for (; i < stop; i++) buffer[i] = buffer[i] * scale + offset;
    }
    return buffer;
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

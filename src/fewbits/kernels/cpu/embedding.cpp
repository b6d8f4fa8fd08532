// Rows of a quantized weight, by their numbers.
#include "decode_4bit.h"
#include "decode_int8.h"
#include "kernels.h"
#include "parallel.h"

namespace fewbits {
namespace FEWBITS_LEVEL {
namespace {

constexpr int64_t ELEMENTS = 1 << 15;  // of a task

}  // namespace

void embedding_4bit(const Embedding4Bit& a) {
    const int64_t k = a.w.k, rows = most(1, ELEMENTS / most(k, 1));
    parallel_for(a.threads, ceil_div(a.count, rows), [&](int64_t index) {
        for (int64_t i = index * rows; i < least((index + 1) * rows, a.count); i++)
            decode_span(a.w, a.ids[i] * k, k, a.dtype, static_cast<char*>(a.out) + i * k * size_of(a.dtype));
    });
}

void embedding_int8(const EmbeddingInt8& a) {
    const int64_t k = a.w.k, rows = most(1, ELEMENTS / most(k, 1));
    parallel_for(a.threads, ceil_div(a.count, rows), [&](int64_t index) {
        for (int64_t i = index * rows; i < least((index + 1) * rows, a.count); i++)
            decode_int8(a.w, a.ids[i], a.dtype, a.out, i * k);
    });
}

}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

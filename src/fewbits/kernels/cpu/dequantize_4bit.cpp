#include "decode_4bit.h"
#include "parallel.h"

namespace fewbits {
namespace FEWBITS_LEVEL {

void dequantize_4bit(const Dequantize4Bit& a) {
    const int64_t elements = a.w.n * a.w.k, piece = ceil_div(32768, a.w.block_size) * a.w.block_size;
    parallel_for(a.threads, ceil_div(elements, piece), [&](int64_t index) {
        const int64_t first = index * piece;
        decode_span(a.w, first, least(piece, elements - first), a.dtype,
                    static_cast<char*>(a.out) + first * size_of(a.dtype));
    });
}

}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

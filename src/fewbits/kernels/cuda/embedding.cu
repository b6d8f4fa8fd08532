// out[i] = row ids[i] of a quantized weight [N, K], in fp32 and rounded once, bit for bit as dequantizing it.
//
// A thread decodes eight neighbours of a row. An id that no row has ends the kernel with an error, as torch's does.
//
// Compiled for: BITS (4 or 8), OUT (bytes of a number: 2 or 4), BF16 (which of the 16-bit types), and for 4 bits
// FORMAT_BLOCK and NESTED.

struct Arguments {
  const long long* ids;  // [count]
  const u8* packed;      // [N * K / 2], or [N, K] in 8 bits; K a multiple of 8
  const void* scales;    // 4 bits: fp32 by block, or codes in 8 bits; 8 bits: [N] fp32
  const float* nested;   // scale of each 256 of those
  const float* offset;   // added to each scale
  const float* dynamic;  // the values of the 256 codes of scales
  const float* values;   // of the 16 codes
  void* out;             // [count, K]
  long long count;
  int n, k;
};

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) embedding(const __grid_constant__ Arguments a) {
  wait_for_previous_kernel();
  const int pieces = a.k / 8;
  const long long all = a.count * pieces, step = (long long)gridDim.x * THREADS;
  for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < all; i += step) {
    const long long id = a.ids[i / pieces];
    if (id < 0 || id >= a.n) stop_with_error();
    const long long first = id * a.k + i % pieces * 8;
    float value[8];
#if BITS == 4
    const u32 codes = *(const u32*)(a.packed + first / 2);
    const long long block = first / FORMAT_BLOCK;
#if NESTED
    const float scale = __fadd_rn(
        __fmul_rn(a.dynamic[((const u8*)a.scales)[block]], a.nested[block >> 8]), *a.offset);
#else
    const float scale = ((const float*)a.scales)[block];
#endif
#pragma unroll
    for (int j = 0; j < 8; j++) value[j] = __fmul_rn(a.values[codes >> (j ^ 1) * 4 & 15], scale);  // the high half first
#else
    const uint2 codes = *(const uint2*)(a.packed + first);
    const float scale = __fmul_rn(((const float*)a.scales)[id], 1.0f / 127);
#pragma unroll
    for (int j = 0; j < 8; j++) value[j] = __fmul_rn((float)(signed char)((j < 4 ? codes.x : codes.y) >> j % 4 * 8), scale);
#endif
    if constexpr (OUT == 4) {
      float4* out = (float4*)((float*)a.out + i * 8);
      out[0] = make_float4(value[0], value[1], value[2], value[3]);
      out[1] = make_float4(value[4], value[5], value[6], value[7]);
    } else {
      *(uint4*)((u16*)a.out + i * 8) = make_uint4(pair_of_two(value[0], value[1]), pair_of_two(value[2], value[3]),
                                                  pair_of_two(value[4], value[5]), pair_of_two(value[6], value[7]));
    }
  }
}

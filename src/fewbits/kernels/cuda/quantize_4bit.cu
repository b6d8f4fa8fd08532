// Codes and scales of a weight in 4 bits: blocks of neighbours are divided by their largest magnitude, and each value
// takes the code of the nearest one; bit for bit as the reference.
//
// A thread works on eight neighbours at a time, a block's threads share their largest magnitude by shuffles. No two
// bounds between codes lie within 1/16 of each other: rounding 16 times a value finds the one that it must be compared
// with, in a table that has a copy for each of 16 lanes, so that no two that are served together meet in a bank.
//
// Compiled for: IN (bytes of an element), BF16 (which of the 16-bit types), FORMAT_BLOCK (32 … 256).

struct Arguments {
  const void* w;          // [n]
  const float2* buckets;  // [33]: the bound near -16/16 … 16/16 (or infinity), and the code below it
  u32* packed;            // [n / 8]
  float* absmax;          // [n / FORMAT_BLOCK], rounded up
  long long n;            // a multiple of 8
};

constexpr int THREADS = 256, WORDS = 4;  // of eight elements, that a thread reads before it works on the first
constexpr int LANES = FORMAT_BLOCK / 8;  // that share a block

struct Eight {
  uint4 words[IN / 2];
};

DEVICE float element(const Eight& eight, int i) {
  const u32* words = &eight.words[0].x;
  if constexpr (IN == 4) return __uint_as_float(((const u32*)&eight.words[i >> 2])[i & 3]);
  const u32 pair = words[i >> 1];
  return widened((u16)(i & 1 ? pair >> 16 : pair));
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize_4bit(const __grid_constant__ Arguments a) {
  __shared__ float2 table[64][16];  // of which a NaN may find any
  const int thread = threadIdx.x, lane = thread & 31;
  for (int i = thread; i < 64 * 16; i += THREADS) table[i >> 4][i & 15] = a.buckets[min(i >> 4, 32)];
  __syncthreads();
  wait_for_previous_kernel();
  const u8* own = (const u8*)&table[0][lane & 15];
  const long long words = a.n / 8, step = (long long)gridDim.x * THREADS * WORDS;
  const long long begin = (long long)blockIdx.x * THREADS * WORDS + (thread - lane) * WORDS;  // of the warp
  for (long long first = begin; first < words; first += step) {
    Eight eights[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      const long long word = first + i * 32 + lane;
      eights[i] = {};
      if (word < words) eights[i] = ((const Eight*)a.w)[word];
    }
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      const long long word = first + i * 32 + lane;
      float value[8];
      u32 largest = 0;  // floats that are not negative are ordered as their bits are, with NaN above infinity
#pragma unroll
      for (int j = 0; j < 8; j++) {
        value[j] = element(eights[i], j);
        largest = max(largest, __float_as_uint(value[j]) & 0x7FFFFFFF);
      }
#pragma unroll
      for (int other = 1; other < LANES; other *= 2) largest = max(largest, __shfl_xor_sync(0xFFFFFFFF, largest, other));
      const float inverse = __frcp_rn(__uint_as_float(max(largest, __float_as_uint(1e-38f))));
      u32 codes = 0;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float scaled = __fmul_rn(value[j], inverse);
        // 1.5 * 2^23 and a whole number: its last bits are that number
        const u32 bucket = __float_as_uint(fmaf(scaled, 16.0f, 12582912.0f + 16.0f)) << 7 & 0x1F80;
        const float2 bound = *(const float2*)(own + bucket);
        u32 code = __float_as_uint(bound.y) + (scaled > bound.x);
        if (scaled != scaled) code = 15;
        codes |= code << ((j & 6) * 4 + (j & 1 ? 0 : 4));
      }
      if (word < words) {
        a.packed[word] = codes;
        if (lane % LANES == 0) a.absmax[word / LANES] = __uint_as_float(largest);
      }
    }
  }
}

// out[n] = the values of n 4-bit codes times their blocks' scales, in fp32 and rounded once, bit for bit as the reference.
//
// A thread decodes eight neighbouring codes at a time, so that a warp reads 128 bytes and writes 512 (of 16-bit numbers)
// that lie together. Pairs of values are looked up by the byte, in a table with a copy for each of 16 lanes: no two of
// the lanes that are served together meet in a bank.
//
// Compiled for: OUT (bytes of a number: 2 or 4), BF16 (which of the 16-bit types), FORMAT_BLOCK, NESTED.

struct Arguments {
  const u8* packed;      // [(n + 1) / 2]
  const void* scales;    // from the first element's block on: fp32, or codes in 8 bits
  const float* nested;   // scale of each 256 of all scales
  const float* offset;   // added to each scale
  const float* dynamic;  // the values of the 256 codes
  const float* values;   // of the 16 codes
  void* out;
  long long first, n;    // the first element's block, and how many elements
};

constexpr int THREADS = 256, WORDS = 4;  // words of eight codes that a thread reads before it decodes the first

extern "C" __global__ void __launch_bounds__(THREADS) dequantize_4bit(const __grid_constant__ Arguments a) {
  __shared__ float2 table[256][16];
  __shared__ float dynamic[256];
  const int thread = threadIdx.x, lane = thread & 31;
  for (int i = thread; i < 256 * 16; i += THREADS) table[i >> 4][i & 15] = make_float2(a.values[i >> 8], a.values[i >> 4 & 15]);
  if (NESTED) dynamic[thread] = a.dynamic[thread];
  __syncthreads();
  wait_for_previous_kernel();  // which may still read what is written here
  const float offset = NESTED ? *a.offset : 0.0f;
  const long long words = a.n / 8, step = (long long)gridDim.x * THREADS * WORDS;
  const u8* own = (const u8*)&table[0][lane & 15];

  auto scale_of = [&](long long block) {
    if constexpr (NESTED) {
      const float scale = dynamic[((const u8*)a.scales)[block]];
      return __fadd_rn(__fmul_rn(scale, a.nested[(a.first + block) >> 8]), offset);
    } else {
      return ((const float*)a.scales)[block];
    }
  };
  auto write = [&](long long word, u32 codes, float scale) {
    float value[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 pair = *(const float2*)(own + ((codes >> 8 * i & 255) << 7));
      value[2 * i] = __fmul_rn(pair.x, scale), value[2 * i + 1] = __fmul_rn(pair.y, scale);
    }
    if constexpr (OUT == 4) {
      float4* out = (float4*)((float*)a.out + word * 8);
      out[0] = make_float4(value[0], value[1], value[2], value[3]);
      out[1] = make_float4(value[4], value[5], value[6], value[7]);
    } else {
      uint4 out;
      u32* pairs = &out.x;
#pragma unroll
      for (int i = 0; i < 4; i++) pairs[i] = pair_of_two(value[2 * i], value[2 * i + 1]);
      *(uint4*)((u16*)a.out + word * 8) = out;
    }
  };

  for (long long first = (long long)blockIdx.x * THREADS * WORDS + (thread - lane) * WORDS + lane; first < words; first += step) {
    u32 codes[WORDS];
    float scale[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      if (first + i * 32 < words) codes[i] = ((const u32*)a.packed)[first + i * 32];
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      if (first + i * 32 < words) scale[i] = scale_of((first + i * 32) * 8 / FORMAT_BLOCK);
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      if (first + i * 32 < words) write(first + i * 32, codes[i], scale[i]);
  }
  if (blockIdx.x == 0 && thread < (a.n & 7)) {  // what is left of eight
    const long long i = words * 8 + thread;
    const int code = thread & 1 ? a.packed[i / 2] & 15 : a.packed[i / 2] >> 4;
    const float value = __fmul_rn(a.values[code], scale_of(i / FORMAT_BLOCK));
    if constexpr (OUT == 4)
      ((float*)a.out)[i] = value;
    else
      ((u16*)a.out)[i] = narrowed(value);
  }
}

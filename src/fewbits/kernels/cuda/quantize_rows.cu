// x[M, K] in 8 bits with a scale for each row, for LLM.int8(): codes = round(x * 127 / absmax), to the nearest, a tie
// to the even one. Outliers, numbers of at least `threshold` in size, get zeros and do not count for absmax; the columns
// that have any are listed. A row with a NaN gets a scale of NaN.
//
// A block takes rows in turn; a thread eight neighbours at a time, which it reads a second time, from the cache, once
// their row's absmax is known. Blocks take together what columns they found, and the last one makes the list.
//
// Compiled for: BF16. The grid: blocks, no more than rows. Dynamic shared memory: a word for each 32 columns.

struct Arguments {
  const u16* x;      // [M, K], rows x_stride apart, each at a multiple of 16 bytes; K a multiple of 16
  u8* codes;         // [M, K]
  float* scales;     // [M]: absmax / 127
  int* outliers;     // [1 + K]: how many columns have outliers, and which, in their order
  u32* found;        // [1 + (K + 31) / 32], zeros before and after: blocks that have ended; a bit for each column
  long long x_stride;
  int m, k;
  float threshold;
};

constexpr int THREADS = 256, WARPS = THREADS / 32;

// the bits of the greater of two numbers, neither below 0, as fp32
DEVICE u32 size_of_pair(u32 pair) { return __float_as_uint(widened((u16)max(pair & 0xFFFF, pair >> 16))); }

// its low byte is the nearest integer of a number from -128 to 127, a tie's the even one: the sum's last bit is worth 1.
// Conversions run at a fourth of the rate of additions.
DEVICE u32 nearest(float value) { return __float_as_uint(__fadd_rn(value, 12582912.0f)); }

DEVICE u32 low_bytes(u32 a, u32 b, u32 c, u32 d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize_rows(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ u32 largest[2][WARPS];
  __shared__ int listed[WARPS];
  __shared__ bool last;
  u32* found = (u32*)shared;  // by this block
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, words = (a.k + 31) / 32;
  const u32 bits_of_threshold = __float_as_uint(a.threshold);
  for (int i = thread; i < words; i += THREADS) found[i] = 0;
  wait_for_previous_kernel();
  __syncthreads();

  int turn = 0;
  for (int row = blockIdx.x; row < a.m; row += gridDim.x, turn ^= 1) {
    const u16* from = a.x + row * a.x_stride;
    u32 size = 0;     // the order of fp32's sizes is that of their bits, and a NaN's are above all
    u32 sizes = 0;    // so it is with 16 bits: of the even columns and the odd ones
    u32 special = 0;  // bit i: the thread's i-th eight hold outliers or NaNs; the last bit stands for all after it
    u32 bit = 1;
    for (int column = thread * 8; column < a.k; column += THREADS * 8) {
      const uint4 read = load_16_bytes(from + column);
      const u32 word[4] = {read.x & 0x7FFF7FFF, read.y & 0x7FFF7FFF, read.z & 0x7FFF7FFF, read.w & 0x7FFF7FFF};
      const u32 most = __vmaxu2(__vmaxu2(word[0], word[1]), __vmaxu2(word[2], word[3]));
      if (size_of_pair(most) < bits_of_threshold) {
        sizes = __vmaxu2(sizes, most);
      } else {
        special |= bit;
        u32 bits = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float value = widened((u16)(word[i / 2] >> i % 2 * 16));
          const bool outlier = value >= a.threshold;
          bits |= outlier << i;
          size = max(size, outlier ? 0u : __float_as_uint(value));
        }
        if (bits != 0) atomicOr(found + (column >> 5), bits << (column & 31));
      }
      bit = max(bit, bit << 1);
    }
    size = __reduce_max_sync(0xFFFFFFFF, max(size, size_of_pair(sizes)));
    if (lane == 0) largest[turn][warp] = size;
    __syncthreads();  // and the row after the next one uses the same words: all have read them by then
#pragma unroll
    for (int w = 0; w < WARPS; w++) size = max(size, largest[turn][w]);
    const float absmax = __uint_as_float(size), factor = 127.0f / fmaxf(absmax, 1e-30f);
    if (thread == 0) a.scales[row] = absmax * (1.0f / 127);
    bit = 1;
    for (int column = thread * 8; column < a.k; column += THREADS * 8) {
      const uint4 read = load_16_bytes(from + column);
      const u32 word[4] = {read.x, read.y, read.z, read.w};
      u32 code[8];
#pragma unroll
      for (int i = 0; i < 8; i++) code[i] = nearest(__fmul_rn(widened((u16)(word[i / 2] >> i % 2 * 16)), factor));
      if (special & bit)
#pragma unroll
        for (int i = 0; i < 8; i++)
          if (fabsf(widened((u16)(word[i / 2] >> i % 2 * 16))) >= a.threshold) code[i] = 0;
      *(uint2*)(a.codes + (long long)row * a.k + column) =
          make_uint2(low_bytes(code[0], code[1], code[2], code[3]), low_bytes(code[4], code[5], code[6], code[7]));
      bit = max(bit, bit << 1);
    }
  }

  __syncthreads();
  for (int i = thread; i < words; i += THREADS)
    if (found[i] != 0) atomicOr(a.found + 1 + i, found[i]);
  __syncthreads();
  if (thread == 0) last = count_up(a.found, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;

  // threads count what is in their words, and list it where those before them end
  const int each = (words + THREADS - 1) / THREADS, begin = min(thread * each, words), end = min(begin + each, words);
  int count = 0;
  for (int i = begin; i < end; i++) {
    found[i] = __ldcg(a.found + 1 + i);
    a.found[1 + i] = 0;
    count += __popc(found[i]);
  }
  int before = count;  // up to this lane
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_sync(0xFFFFFFFF, before, max(lane - step, 0));
    if (lane >= step) before += other;
  }
  if (lane == 31) listed[warp] = before;
  __syncthreads();
  before -= count;
  for (int w = 0; w < warp; w++) before += listed[w];
  for (int i = begin; i < end; i++)
    for (u32 bits = found[i]; bits != 0; bits &= bits - 1) a.outliers[1 + before++] = i * 32 + __ffs(bits) - 1;
  if (thread == THREADS - 1) a.outliers[0] = before;
}

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

extern "C" __global__ void __launch_bounds__(THREADS) quantize_rows(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ u32 largest[2][WARPS];
  __shared__ int listed[WARPS];
  __shared__ bool last;
  u32* found = (u32*)shared;  // by this block
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, words = (a.k + 31) / 32;
  for (int i = thread; i < words; i += THREADS) found[i] = 0;
  wait_for_previous_kernel();
  __syncthreads();

  int turn = 0;
  for (int row = blockIdx.x; row < a.m; row += gridDim.x, turn ^= 1) {
    const u16* from = a.x + row * a.x_stride;
    u32 size = 0;  // the order of fp32's sizes is that of their bits, and a NaN's are above all
    for (int column = thread * 8; column < a.k; column += THREADS * 8) {
      const uint4 read = load_16_bytes(from + column);
      const u32 word[4] = {read.x, read.y, read.z, read.w};
      u32 bits = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float value = fabsf(widened((u16)(word[i / 2] >> i % 2 * 16)));
        const bool outlier = value >= a.threshold;
        bits |= outlier << i;
        size = max(size, outlier ? 0u : __float_as_uint(value));
      }
      if (bits != 0) atomicOr(found + (column >> 5), bits << (column & 31));
    }
    size = __reduce_max_sync(0xFFFFFFFF, size);
    if (lane == 0) largest[turn][warp] = size;
    __syncthreads();  // and the row after the next one uses the same words: all have read them by then
#pragma unroll
    for (int w = 0; w < WARPS; w++) size = max(size, largest[turn][w]);
    const float absmax = __uint_as_float(size), factor = 127.0f / fmaxf(absmax, 1e-30f);
    if (thread == 0) a.scales[row] = absmax * (1.0f / 127);
    for (int column = thread * 8; column < a.k; column += THREADS * 8) {
      const uint4 read = load_16_bytes(from + column);
      const u32 word[4] = {read.x, read.y, read.z, read.w};
      u32 codes[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float value = widened((u16)(word[i / 2] >> i % 2 * 16));
        const int code = fabsf(value) >= a.threshold ? 0 : __float2int_rn(value * factor);
        codes[i / 4] |= (code & 255) << i % 4 * 8;
      }
      *(uint2*)(a.codes + (long long)row * a.k + column) = make_uint2(codes[0], codes[1]);
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

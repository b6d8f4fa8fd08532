// Double quantization: scales less their mean, 256 to a scale of their own, to the nearest of 256 values; bit for bit as
// the reference on a GPU.

struct Arguments {
  const float* absmax;  // [n]
  const float* offset;  // their mean
  const float* bounds;  // [255], between the values
  u8* codes;            // [n]
  float* nested;        // [n / 256], rounded up
  long long n;
};

extern "C" __global__ void __launch_bounds__(256) quantize_absmax(const __grid_constant__ Arguments a) {
  __shared__ float bounds[255];
  __shared__ u32 largest_of_warp[8];
  const int thread = threadIdx.x;
  const long long i = (long long)blockIdx.x * 256 + thread;
  if (thread < 255) bounds[thread] = a.bounds[thread];
  wait_for_previous_kernel();
  const float value = i < a.n ? __fsub_rn(a.absmax[i], *a.offset) : 0.0f;
  const u32 own = __reduce_max_sync(0xFFFFFFFF, __float_as_uint(value) & 0x7FFFFFFF);
  if ((thread & 31) == 0) largest_of_warp[thread >> 5] = own;
  __syncthreads();
  u32 largest = 0;
#pragma unroll
  for (int w = 0; w < 8; w++) largest = max(largest, largest_of_warp[w]);
  if (thread == 0) a.nested[blockIdx.x] = __uint_as_float(largest);
  if (i >= a.n) return;
  float scaled = __fmul_rn(value, __frcp_rn(__uint_as_float(largest)));
  if (scaled != scaled) scaled = -1.0f;  // 0 / 0, every scale equal to the mean: bitsandbytes writes code 0
  int code = 0;
#pragma unroll
  for (int step = 128; step > 0; step /= 2)
    if (scaled > bounds[code + step - 1]) code += step;
  a.codes[i] = (u8)code;
}

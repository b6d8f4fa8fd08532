// Shows that kernels can be compiled here.

extern "C" __global__ void probe(float* out) { *out = widened(narrowed(*out)); }

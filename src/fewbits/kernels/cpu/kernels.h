// The interface of the native kernels: what Python passes in, and the functions that each instruction set has.
//
// A function takes one struct, whose fields are 8 bytes each (pointers, int64_t, double), so that Python writes it with
// struct.pack. Layouts and arithmetic are those of ../reference.py. Every level (an instruction set) compiles the same
// sources into a namespace of its own, FEWBITS_LEVEL; nothing compiled for one may be merged with another's code, so
// no inline function or template of these sources stands outside of that namespace.
#pragma once

#include <cstdint>

namespace fewbits {

enum DType : int64_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

constexpr int64_t NESTED_BLOCK = 256;  // scales per second-level scale

// A weight [n, k] in 4 bits, any other shape as [1, elements]. Blocks run over the flattened weight.
struct Weight4Bit {
    const uint8_t* packed;       // [(n * k + 1) / 2], element 2i in the high nibble
    const void* absmax;          // fp32 by block; with nested_absmax uint8 codes of the dynamic map
    const float* nested_absmax;  // by NESTED_BLOCK of absmax, or null
    const float* nested_offset;  // one
    const float* dynamic;        // the dynamic map [256]
    const float* values;         // by code [16]
    int64_t block_size, n, k;    // block_size % 8 == 0
};

// out [rows, n] = x [rows, k] W^T + bias; transposed: out [rows, k] = x [rows, n] W, without a bias.
struct Linear4Bit {
    Weight4Bit w;
    const void* x;  // rows begin x_stride elements apart, each is contiguous
    int64_t x_stride, rows, dtype;
    const void* bias;  // [n] or null
    int64_t bias_dtype;
    void* out;  // contiguous, of dtype
    int64_t threads;
};

struct Dequantize4Bit {
    Weight4Bit w;
    void* out;
    int64_t dtype, threads;
};

struct Embedding4Bit {
    Weight4Bit w;
    const int64_t* ids;  // [count], each in [0, n)
    int64_t count;
    void* out;  // [count, k]
    int64_t dtype, threads;
};

// A weight [n, k] in 8 bits: q * absmax / 127.
struct WeightInt8 {
    const int8_t* q;
    const float* absmax;  // [n]
    int64_t n, k;
};

struct LinearInt8 {
    WeightInt8 w;
    const void* x;
    int64_t x_stride, rows, dtype;
    const void* bias;
    int64_t bias_dtype;
    void* out;
    double threshold;  // 0: x is not quantized; not used by the transposed product
    int64_t digits;    // of x in 8 bits, where it is quantized: 1 or 2
    int64_t threads;
};

struct DequantizeInt8 {
    WeightInt8 w;
    void* out;
    int64_t dtype, threads;
};

struct EmbeddingInt8 {
    WeightInt8 w;
    const int64_t* ids;
    int64_t count;
    void* out;
    int64_t dtype, threads;
};

// Where the elements to quantize are: in memory, or in a file, from which each thread reads a little at a time, so that
// what it quantizes is still in its cache and exists nowhere else.
struct Source {
    const void* memory;  // contiguous; null: in the file
    int64_t file;        // a descriptor
    int64_t offset;      // of the first element's bytes in the file
    int64_t dtype;
};

// What a kernel that quantizes has found, besides.
struct Found {
    int64_t largest;  // bits of the largest |x| as fp32, those of a NaN if there is one
    int64_t error;    // errno of reading the file, or -1 for a file that ended
};

struct Quantize4Bit {
    Source w;  // [count]
    int64_t count, block_size;
    const float* bounds;   // [15], ascending: decision_rule of ../codebooks.py
    const uint8_t* codes;  // [16], of each interval
    uint8_t* packed;       // [(count + 1) / 2]
    float* absmax;         // [ceil(count / block_size)]
    Found* found;
    int64_t threads;
};

struct QuantizeAbsmax {
    const float* absmax;  // [count]
    int64_t count;
    const float* offset;     // its mean
    const uint8_t* steps;    // [65536]: the code of each step from -1 to 1, ascending
    const uint16_t* firsts;  // [256]: of each code the first step that has it or a higher one
    uint8_t* codes;          // [count]
    float* nested_absmax;    // [ceil(count / NESTED_BLOCK)]
    int64_t threads;
};

struct QuantizeInt8 {
    Source w;  // [n, k]
    int64_t n, k;
    int8_t* q;
    float* absmax;
    Found* found;
    int64_t threads;
};

// Name and argument of every kernel.
#define FEWBITS_KERNELS(KERNEL)              \
    KERNEL(linear_4bit, Linear4Bit)          \
    KERNEL(linear_4bit_t, Linear4Bit)        \
    KERNEL(dequantize_4bit, Dequantize4Bit)  \
    KERNEL(embedding_4bit, Embedding4Bit)    \
    KERNEL(linear_int8, LinearInt8)          \
    KERNEL(linear_int8_t, LinearInt8)        \
    KERNEL(dequantize_int8, DequantizeInt8)  \
    KERNEL(embedding_int8, EmbeddingInt8)    \
    KERNEL(quantize_4bit, Quantize4Bit)      \
    KERNEL(quantize_absmax, QuantizeAbsmax)  \
    KERNEL(quantize_int8, QuantizeInt8)

// The kernels of one level.
struct Kernels {
#define KERNEL(name, Arguments) void (*name)(const Arguments&);
    FEWBITS_KERNELS(KERNEL)
#undef KERNEL
};

#ifdef FEWBITS_LEVEL
namespace FEWBITS_LEVEL {
#define KERNEL(name, Arguments) void name(const Arguments&) __attribute__((weak));
FEWBITS_KERNELS(KERNEL)
#undef KERNEL
}  // namespace FEWBITS_LEVEL
#endif

}  // namespace fewbits

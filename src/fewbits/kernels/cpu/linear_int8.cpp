// Products with a weight in 8 bits, W [n, k] = q * absmax / 127, read as it is stored, and its dequantizing.
//
// There are three ways. All of them multiply some rows of x by 4 rows of q at a time:
//   few rows       q is made fp32 in registers: what takes the time is reading it
//   LLM.int8()     rows of x in one 8-bit digit or two, sums of integers; columns with outliers are added in fp32. With
//                  many rows of x, 64 rows of q are put in an order first in which nothing is added up across lanes, or,
//                  with AMX, multiplied by tiles
//   fp32           a block of q is made fp32 first: without a threshold, or with outliers in very many columns
// Sums over a block of columns are added up in fp32, scaled, and rounded once.
#include "decode_int8.h"
#include "dots_int8.h"
#include "kernels.h"
#include "parallel.h"
#include "tiles_int8.h"

namespace fewbits {
namespace FEWBITS_LEVEL {
namespace {

constexpr int64_t FEW_ROWS = 4;           // of x, up to which q is made fp32 in registers
constexpr int64_t PANEL_BYTES = 1 << 18;  // of the rows of q that a task takes: they stay in the second-level cache
constexpr int64_t ROW_BLOCK = 512;        // rows of x that are prepared at a time, at most
constexpr int64_t X_BYTES = 12 << 10;     // of rows of x that are multiplied at a time: they stay in the first cache
constexpr int64_t CODE_BYTES = LANES == 16 ? 24 << 10 : X_BYTES;  // in 8 bits, where adding up is a share of the time
constexpr int64_t PADDING = 64;           // rows of x are filled up to multiples of it
constexpr int64_t OUTLIERS = 8;           // with more than 1/8 of the columns, fp32 alone is faster
constexpr int32_t NO_OFFSETS[PANEL] = {};

INLINE int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

constexpr int64_t WIDTH = 4 * LANES;  // columns of an outer product
constexpr int OUTER_ROWS = LANES == 16 ? 6 : LANES == 8 ? 3 : 2;

// sums [ROWS, WIDTH] += a [ROWS, steps] b [steps, WIDTH]
template <int ROWS>
void outer(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t steps, float* sums,
           int64_t sums_stride) {
    Floats acc[ROWS][4];
    UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int c = 0; c < 4; c++) acc[r][c] = load(sums + r * sums_stride + c * LANES);
    }
    for (int64_t s = 0; s < steps; s++, b += b_stride) {
        Floats w[4];
        UNROLL for (int c = 0; c < 4; c++) w[c] = load(b + c * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const Floats v = splat(a[r * a_stride + s]);
            UNROLL for (int c = 0; c < 4; c++) acc[r][c] = fma(v, w[c], acc[r][c]);
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int c = 0; c < 4; c++) store(sums + r * sums_stride + c * LANES, acc[r][c]);
    }
}

// sums [rows, WIDTH] += a [rows, steps] b [steps, WIDTH]
void add_outer(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride, int64_t steps,
               float* sums, int64_t sums_stride) {
    int64_t row = 0;
    for (; row + OUTER_ROWS <= rows; row += OUTER_ROWS)
        outer<OUTER_ROWS>(a + row * a_stride, a_stride, b, b_stride, steps, sums + row * sums_stride, sums_stride);
    for (; row < rows; row++)
        outer<1>(a + row * a_stride, a_stride, b, b_stride, steps, sums + row * sums_stride, sums_stride);
}

// ------------------------------------------------------------------------------------------------------- preparing x

template <int64_t dtype>
void widen_as(const void* from, int64_t first, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load_as<dtype>(from, first + i));
    for (; i < count; i++) to[i] = load_one(dtype, from, first + i);
}

void widen(int64_t dtype, const void* from, int64_t first, int64_t count, float* to) {
    if (dtype == FLOAT32) return widen_as<FLOAT32>(from, first, count, to);
    dtype == FLOAT16 ? widen_as<FLOAT16>(from, first, count, to) : widen_as<BFLOAT16>(from, first, count, to);
}

void widen_int8(const int8_t* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load_int8(from + i));
    for (; i < count; i++) to[i] = from[i];
}

template <int64_t dtype>
void narrow_as(const float* from, int64_t count, void* to, int64_t first) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store_as<dtype>(to, first + i, load(from + i));
    for (; i < count; i++) store_one(dtype, to, first + i, from[i]);
}

void narrow(int64_t dtype, const float* from, int64_t count, void* to, int64_t first) {
    if (dtype == FLOAT32) return narrow_as<FLOAT32>(from, count, to, first);
    dtype == FLOAT16 ? narrow_as<FLOAT16>(from, count, to, first) : narrow_as<BFLOAT16>(from, count, to, first);
}

// To prepare x: little work is done before other threads have come.
int64_t threads_for(const LinearInt8& a) { return a.rows * a.w.k < 1 << 16 ? 1 : a.threads; }

// What all rows of a call to linear_int8 share.
struct Outliers {
    int32_t* columns;  // ascending
    int64_t count;
};

#if FEWBITS_INTEGERS
using Code = Integers::X;

constexpr float SMALLEST = 4.3e-37f;  // scale of a row: 127 divided by it is finite

// The largest |x| below the threshold; marks columns with others. Bits of |x| are in the order of its values, NaN last.
float find_outliers(const float* x, int64_t k, float threshold, uint8_t* marks) {
    const int32_t limit = static_cast<int32_t>(to_bits(threshold)), infinity = 0x7f800000;
    int32_t largest = 0;
    for (int64_t first = 0; first < k; first += 128) {  // few of these have any
        const int64_t end = least(first + 128, k);
        int32_t any = 0;
        for (int64_t i = first; i < end; i++) {
            int32_t bits;
            memcpy(&bits, x + i, 4);
            bits &= 0x7fffffff;
            const int32_t outlier = -static_cast<int32_t>((bits >= limit) & (bits <= infinity));
            any |= outlier;
            bits &= ~outlier;
            largest = bits > largest ? bits : largest;
        }
        if (any)
            for (int64_t i = first; i < end; i++)
                if (x[i] >= threshold || x[i] <= -threshold)
                    __atomic_store_n(marks + i, 1, __ATOMIC_RELAXED);  // other threads may at the same time
    }
    const float absmax = from_bits(static_cast<uint32_t>(largest));
    return absmax < SMALLEST ? SMALLEST : absmax;
}

// x * 127 / absmax, rounded, and with two digits what is left of it, in 254ths.
void quantize_row(const float* x, int64_t k, float absmax, int64_t digits, Code* first, Code* second) {
    const float factor = 127.0f / absmax, magic = 12582912.0f;  // 1.5 * 2^23: rounds to integers
    for (int64_t i = 0; i < k; i++) {
        const float rounded = x[i] * factor + magic;
        int32_t bits;
        memcpy(&bits, &rounded, 4);
        first[i] = static_cast<Code>(static_cast<int8_t>(bits) + Integers::OFFSET);
    }
    if (digits < 2) return;
    for (int64_t i = 0; i < k; i++) {
        const float value = x[i] * factor, rounded = (value - (value + magic - magic)) * 254.0f + magic;
        int32_t bits;
        memcpy(&bits, &rounded, 4);
        second[i] = static_cast<Code>(static_cast<int8_t>(bits) + Integers::OFFSET);
    }
}
#endif

// ------------------------------------------------------------------------------------------------------------ panels

int64_t panel_rows(const WeightInt8& w, int64_t threads) {
    const int64_t fitting = least(PANEL_BYTES / most(w.k, 1), w.n / (4 * threads)) / GROUP * GROUP;
    return most(GROUP, least(PANEL, fitting));
}

// Elements from a row to the next: rows that lie whole pages apart would share the same lines of the caches.
int64_t row_stride(int64_t k, int64_t bytes) {
    const int64_t stride = round_up(k, PADDING);
    return stride * bytes % 2048 ? stride : stride + 5 * PADDING;
}

// Columns that are multiplied at a time, of rows of x that have so many bytes for each.
int64_t column_block(int64_t k, int64_t row_bytes, int64_t bytes) {
    const int64_t blocks = ceil_div(k, most(bytes / row_bytes, PADDING));
    return most(round_up(ceil_div(k, most(blocks, 1)), PADDING), PADDING);
}

// out = sums * absmax / 127 + bias, for rows of x and of q
void finish(const LinearInt8& a, float* sums, int64_t row, int64_t rows, int64_t first, int64_t count) {
    float scale[PANEL], bias[PANEL] = {};
    for (int64_t i = 0; i < count; i++) scale[i] = a.w.absmax[first + i] * (1.0f / 127);
    if (a.bias != nullptr) widen(a.bias_dtype, a.bias, first, count, bias);
    const int64_t item = a.dtype == FLOAT32 ? 4 : 2;
    for (int64_t m = 0; m < rows; m++) {
        fetch_rows_ahead(a.out, row + m, row + rows - 1, a.w.n * item, first * item, count * item);
        float* of_row = sums + m * PANEL;
        for (int64_t i = 0; i < count; i++) of_row[i] = of_row[i] * scale[i] + bias[i];
        narrow(a.dtype, of_row, count, a.out, (row + m) * a.w.n + first);
    }
}

// ROW_BLOCK rows from ``row`` on, x as it is
void linear_fp32(const LinearInt8& a, int64_t row, int64_t rows) {
    const int64_t n = a.w.n, k = a.w.k, stride = row_stride(k, sizeof(float));
    float* x = static_cast<float*>(scratch(4, rows * stride * sizeof(float) + 64));
    const auto prepare = [&](int64_t m) {
        widen(a.dtype, a.x, (row + m) * a.x_stride, k, x + m * stride);
        memset(x + m * stride + k, 0, (stride - k) * sizeof(float));
    };
    parallel_for(threads_for(a), rows, prepare);

    const int64_t panel = panel_rows(a.w, a.threads);
    parallel_for(a.threads, ceil_div(n, panel), [&](int64_t index) {
        const int64_t first = index * panel, count = least(panel, n - first);
        float* sums = static_cast<float*>(scratch(0, (rows + 1) * PANEL * sizeof(float)));
        memset(sums, 0, rows * PANEL * sizeof(float));
        float scale[ROW_BLOCK];
        for (int64_t m = 0; m < rows; m++) scale[m] = 1;
        const int8_t* q = a.w.q + first * k;
        if (rows <= FEW_ROWS) {
            const Ahead ahead = {reinterpret_cast<const char*>(q) + 2 * GROUP * k, count * k / 64};
            add_products<InRegisters>(x, stride, scale, rows, q, k, count, k, NO_OFFSETS, sums, ahead);
        } else {
            const int64_t block = column_block(k, Fp32::ROWS * sizeof(float), X_BYTES);
            const int64_t wide_stride = row_stride(block, sizeof(float));
            float* wide = static_cast<float*>(scratch(1, count * wide_stride * sizeof(float)));
            for (int64_t at = 0; at < k; at += block) {
                const int64_t columns = least(block, k - at);
                for (int64_t i = 0; i < count; i++) widen_int8(q + i * k + at, columns, wide + i * wide_stride);
                add_products<Fp32>(
                    x + at, stride, scale, rows, wide, wide_stride, count, columns, NO_OFFSETS, sums, {});
            }
        }
        finish(a, sums, row, rows, first, count);
    });
}

#if FEWBITS_INTEGERS
// Rows of x in 8 bits: codes [digits, rows, stride], with zeros past the last column, and scales [digits, rows].
struct CodedRows {
    const Code* codes;
    int64_t stride, rows, digits;
    const float* scale;
    int64_t all() const { return digits * rows; }
};

// Some rows of q that are multiplied together, and those that this thread probably takes next.
struct Panel {
    const int8_t* q;
    int64_t k, count;
    const int8_t* next;
    int64_t next_count;
};

// Each of these adds x q^T to sums [rows, PANEL]: integers are exact, so what is added are the same bits.

void add_panel_by_rows(const CodedRows& x, const Panel& w, int64_t block, float* sums) {
    const int64_t k = w.k, parts = ceil_div(k, block) * x.digits;
    const Ahead ahead = {reinterpret_cast<const char*>(w.next), w.next_count * k / 64};
    int32_t offsets[PANEL] = {};
    for (int64_t at = 0, part = 0; at < k; at += block) {
        const int64_t columns = least(block, k - at);
#if FEWBITS_AVX512
        row_offsets(w.q + at, k, w.count, columns, offsets);
#endif
        for (int64_t digit = 0; digit < x.digits; digit++, part++)
            add_products<Integers>(x.codes + digit * x.rows * x.stride + at, x.stride, x.scale + digit * x.rows, x.rows,
                                   w.q + at, k, w.count, columns, offsets, sums, ahead.part(part, parts));
    }
}

#if FEWBITS_AVX512 && !FEWBITS_AMX
void add_panel_in_order(const CodedRows& x, const Panel& w, int64_t block, float* sums) {
    const int64_t k = w.k;
    int8_t* packed = static_cast<int8_t*>(scratch(2, PANEL * round_up(block, 64)));
    int32_t offsets[PANEL] = {};
    for (int64_t at = 0; at < k; at += block) {
        const int64_t columns = least(block, k - at);
        row_offsets(w.q + at, k, w.count, columns, offsets);
        pack(w.q + at, k, w.count, columns, packed);
        const int64_t later = at + block < k ? at + block : 0;  // of this panel, or the next one's first
        const int64_t rows_later = later ? w.count : w.next_count, lines = ceil_div(least(block, k - later), 64);
        Coming coming = {later ? w.q + later : w.next, k, rows_later, lines, 0};
        const int64_t steps = ceil_div(x.all(), Integers::ROWS) * ceil_div(columns, 64);
        const int64_t burst = ceil_div(rows_later * lines, steps);
        for (int64_t digit = 0; digit < x.digits; digit++)
            add_packed(x.codes + digit * x.rows * x.stride + at, x.stride, x.scale + digit * x.rows, x.rows, packed,
                       columns, offsets, sums, coming, burst);
    }
}
#endif

// ROW_BLOCK rows from ``row`` on, x in 8 bits; absmax: by row of x
void linear_integers(const LinearInt8& a, int64_t row, int64_t rows, const float* absmax, const Outliers& outliers) {
    const int64_t n = a.w.n, k = a.w.k, stride = row_stride(k, sizeof(Code));
    const int64_t all = rows * a.digits;
    Code* codes = static_cast<Code*>(scratch(6, all * stride * sizeof(Code)));
    float* scale = static_cast<float*>(scratch(7, (all + rows * outliers.count) * sizeof(float)));
    float* kept = scale + all;  // x in the columns with outliers [rows, count]
    parallel_for(threads_for(a), rows, [&](int64_t m) {
        float* x = static_cast<float*>(scratch(0, k * sizeof(float)));
        Code *first = codes + m * stride, *second = a.digits > 1 ? first + rows * stride : nullptr;
        widen(a.dtype, a.x, (row + m) * a.x_stride, k, x);
        quantize_row(x, k, absmax[row + m], a.digits, first, second);
        scale[m] = absmax[row + m] * (1.0f / 127);
        if (second != nullptr) scale[rows + m] = scale[m] * (1.0f / 254);
        for (int64_t i = 0; i < outliers.count; i++) {
            const int64_t column = outliers.columns[i];
            kept[m * outliers.count + i] = x[column];
            first[column] = Integers::OFFSET;
            if (second != nullptr) second[column] = Integers::OFFSET;
        }
        for (int64_t i = k; i < stride; i++) {
            first[i] = Integers::OFFSET;
            if (second != nullptr) second[i] = Integers::OFFSET;
        }
    });

    const CodedRows x = {codes, stride, rows, a.digits, scale};
    const int64_t block = column_block(k, Integers::ROWS * sizeof(Code), CODE_BYTES);
    bool by_rows = true;
    int64_t panel = PANEL;
#if FEWBITS_AMX
    if (n < 2 * PANEL * a.threads) panel = BLOCK;
    char* x_tiles = nullptr;
    if (k <= MOST_COLUMNS) {
        by_rows = false;
        const int64_t pair_bytes = round_up(k, ROW_BYTES) * BLOCK;
        x_tiles = static_cast<char*>(scratch(5, ceil_div(all, BLOCK) * pair_bytes));
        parallel_for(threads_for(a), ceil_div(all, SIDE), [&](int64_t tile) {
            order_tiles(codes + tile * SIDE * stride, stride, least(SIDE, all - tile * SIDE), k,
                        x_tiles + tile / 2 * pair_bytes + tile % 2 * TILE);
        });
    }
#elif FEWBITS_AVX512
    by_rows = all < (k > block ? 32 : 96) || n < 2 * PANEL * a.threads;  // measured on a Zen 4
#endif
    if (by_rows) panel = panel_rows(a.w, a.threads);
    parallel_for(a.threads, ceil_div(n, panel), [&](int64_t index) {
        const int64_t first = index * panel, count = least(panel, n - first), next = first + panel * a.threads;
        float* sums = static_cast<float*>(scratch(0, (rows + 1) * PANEL * sizeof(float)));
        memset(sums, 0, rows * PANEL * sizeof(float));
        const int8_t* q = a.w.q + first * k;
        const Panel w = {q, k, count, a.w.q + next * k, most(least(panel, n - next), 0)};
        if (by_rows) add_panel_by_rows(x, w, block, sums);
#if FEWBITS_AMX
        else add_panel_by_tiles(x_tiles, scale, rows, all, q, k, count, w.next, w.next_count, sums);
#elif FEWBITS_AVX512
        else add_panel_in_order(x, w, block, sums);
#endif
        if (outliers.count) {
            float* w = static_cast<float*>(scratch(1, outliers.count * PANEL * sizeof(float)));
            memset(w, 0, outliers.count * PANEL * sizeof(float));
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < outliers.count; j++) w[j * PANEL + i] = q[i * k + outliers.columns[j]];
            for (int64_t at = 0; at < count; at += WIDTH)
                add_outer(kept, outliers.count, rows, w + at, PANEL, outliers.count, sums + at, PANEL);
        }
        finish(a, sums, row, rows, first, count);
    });
}
#endif

}  // namespace

void linear_int8(const LinearInt8& a) {
    bool quantized = false;
#if FEWBITS_INTEGERS
    const int64_t k = a.w.k;
    float* absmax = nullptr;
    Outliers outliers = {};
    if (a.rows > FEW_ROWS && a.threshold > 0) {
        absmax = static_cast<float*>(scratch(4, (a.rows + k) * sizeof(float) + k));
        outliers.columns = reinterpret_cast<int32_t*>(absmax + a.rows);
        uint8_t* marks = reinterpret_cast<uint8_t*>(outliers.columns + k);
        memset(marks, 0, k);
        parallel_for(threads_for(a), a.rows, [&](int64_t m) {
            float* x = static_cast<float*>(scratch(0, k * sizeof(float)));
            widen(a.dtype, a.x, m * a.x_stride, k, x);
            absmax[m] = find_outliers(x, k, static_cast<float>(a.threshold), marks);
        });
        for (int64_t i = 0; i < k; i++)
            if (marks[i]) outliers.columns[outliers.count++] = static_cast<int32_t>(i);
        quantized = outliers.count * OUTLIERS <= k;
    }
#endif
    for (int64_t row = 0; row < a.rows; row += ROW_BLOCK) {
        const int64_t rows = least(ROW_BLOCK, a.rows - row);
#if FEWBITS_INTEGERS
        if (quantized) linear_integers(a, row, rows, absmax, outliers);
#endif
        if (!quantized) linear_fp32(a, row, rows);
    }
}

// ------------------------------------------------------------------------------------------ the other way, decoding

namespace {

constexpr int64_t T_COLUMNS = 256;  // of q, that a task takes, at most
constexpr int64_t T_DEPTH = 64;     // rows of q that are made fp32 at a time
constexpr int64_t T_ROWS = 128;     // of g, that a task takes, at most

}  // namespace

// out [rows, k] = x [rows, n] W: outer products of x * absmax / 127, whose rows are long, and rows of q
void linear_int8_t(const LinearInt8& a) {
    const int64_t n = a.w.n, k = a.w.k;
    int64_t columns = T_COLUMNS;
    while (columns > WIDTH && ceil_div(k, columns) < 4 * a.threads) columns /= 2;
    for (int64_t row = 0; row < a.rows; row += ROW_BLOCK) {
        const int64_t block = least(ROW_BLOCK, a.rows - row);
        float* x = static_cast<float*>(scratch(4, block * n * sizeof(float)));
        parallel_for(a.threads, block, [&](int64_t m) {
            float* of_row = x + m * n;
            widen(a.dtype, a.x, (row + m) * a.x_stride, n, of_row);
            for (int64_t i = 0; i < n; i++) of_row[i] *= a.w.absmax[i] * (1.0f / 127);
        });
        const int64_t strips = ceil_div(k, columns);
        parallel_for(a.threads, strips * ceil_div(block, T_ROWS), [&](int64_t index) {
            const int64_t first = index % strips * columns, count = least(columns, k - first);
            const int64_t from = index / strips * T_ROWS, rows = least(T_ROWS, block - from);
            float* sums = static_cast<float*>(scratch(0, rows * columns * sizeof(float)));
            float* wide = static_cast<float*>(scratch(1, T_DEPTH * columns * sizeof(float)));
            memset(sums, 0, rows * columns * sizeof(float));
            memset(wide, 0, T_DEPTH * columns * sizeof(float));  // what is past the last column
            for (int64_t at = 0; at < n; at += T_DEPTH) {
                const int64_t depth = least(T_DEPTH, n - at);
                for (int64_t i = 0; i < depth; i++) widen_int8(a.w.q + (at + i) * k + first, count, wide + i * columns);
                for (int64_t c = 0; c < count; c += WIDTH)
                    add_outer(x + from * n + at, n, rows, wide + c, columns, depth, sums + c, columns);
            }
            for (int64_t m = 0; m < rows; m++)
                narrow(a.dtype, sums + m * columns, count, a.out, (row + from + m) * k + first);
        });
    }
}

void dequantize_int8(const DequantizeInt8& a) {
    const int64_t k = a.w.k, rows = most(1, (1 << 16) / most(k, 1));  // in a task
    parallel_for(a.threads, ceil_div(a.w.n, rows), [&](int64_t index) {
        for (int64_t row = index * rows; row < least((index + 1) * rows, a.w.n); row++)
            decode_int8(a.w, row, a.dtype, a.out, row * k);
    });
}

}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

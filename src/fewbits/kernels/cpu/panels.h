// Products with many rows of x: parts of the weight are decoded into panels [depth, width], which all rows of x are
// multiplied by while they are in the cache.
//
// A panel's numbers are words of 32 bits: an fp32 number, or two in bf16 whose columns of x are 4 apart (a Step says
// which). It lies in strips of TILE_WIDTH columns, [width / TILE_WIDTH, depth, TILE_WIDTH], which are read in one line.
// x is put in the same order, in tiles of some rows: [tiles, depth, rows of the tile].
#pragma once

#include "parallel.h"
#include "simd.h"
#include "tiles.h"

namespace fewbits {
namespace FEWBITS_LEVEL {

#if FEWBITS_AVX512
constexpr int TILE_ROWS = 14, TILE_VECTORS = 2;  // 28 of 32 registers for sums
#elif FEWBITS_AVX2
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;
#elif FEWBITS_NEON
constexpr int TILE_ROWS = 10, TILE_VECTORS = 2;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;
#endif
constexpr int64_t TILE_WIDTH = TILE_VECTORS * LANES;
constexpr int64_t MOST_DEPTH = LANES == 16 ? 1024 : 512;  // of a panel, in columns of x (measured on a Zen 4)
constexpr int64_t PANEL_WIDTH = LANES == 16 ? 64 : 128;
constexpr int64_t PANEL_ROWS = 1024;  // of x that share a decoded panel

struct Product {
    const void* x;
    int64_t x_stride, rows, dtype;
    const void* bias;
    int64_t bias_dtype;
    void* out;
    int64_t threads;
};

// How a panel holds numbers, and what multiplies them.
//     put      8 rows of LANES columns
//     add      a sum and the products of a row of the panel with a word of x
//     order    rows first to first + count of x, columns from k on, of which so many are there: [depth, count]
struct Float32Step {
    static constexpr int64_t PER_WORD = 1;
    static INLINE_METHOD void put(const Floats (&numbers)[8], uint32_t* panel) {
        UNROLL for (int j = 0; j < 8; j++) store(reinterpret_cast<float*>(panel + j * TILE_WIDTH), numbers[j]);
    }
    static INLINE_METHOD Floats add(Floats sum, Ints w, uint32_t x) {
        return fma((Floats)w, splat(from_bits(x)), sum);
    }
    static void order(const Product& p, int64_t first, int64_t count, int64_t k, int64_t depth, int64_t there,
                      uint32_t* to) {
        float row[MOST_DEPTH];
        for (int64_t m = 0; m < count; m++) {
            to_floats(p.dtype, p.x, (first + m) * p.x_stride + k, there, row);
            for (int64_t i = there; i < depth; i++) row[i] = 0;
            for (int64_t i = 0; i < depth; i++) to[i * count + m] = to_bits(row[i]);
        }
    }
};

#if FEWBITS_BF16
struct Bf16Step {
    static constexpr int64_t PER_WORD = 2;
    static INLINE_METHOD void put(const Floats (&numbers)[8], uint32_t* panel) {
        UNROLL for (int j = 0; j < 4; j++) store_ints(panel + j * TILE_WIDTH, pair_bf16(numbers[j], numbers[j + 4]));
    }
    static INLINE_METHOD Floats add(Floats sum, Ints w, uint32_t x) {
        return dot_bf16(sum, w, _mm512_set1_epi32(static_cast<int>(x)));
    }
    static constexpr Order16 PAIRS = {{0,  4,  1,  5,  2,  6,  3,  7,  8,  12, 9,  13, 10, 14, 11, 15,
                                       16, 20, 17, 21, 18, 22, 19, 23, 24, 28, 25, 29, 26, 30, 27, 31}};
    // of bf16, 32 columns at a time
    static void order(const Product& p, int64_t first, int64_t count, int64_t k, int64_t depth, int64_t there,
                      uint32_t* to) {
        static_assert(TILE_ROWS <= LANES);
        const uint16_t* from = static_cast<const uint16_t*>(p.x) + first * p.x_stride + k;
        const __mmask16 rows = static_cast<__mmask16>((1 << count) - 1);
        for (int64_t i = 0; i < depth; i += 32, to += LANES * count) {
            Ints v[LANES];
            UNROLL for (int m = 0; m < LANES; m++)
                v[m] = m < count ? ordered_16(from + m * p.x_stride + i, there - i, PAIRS) : Ints{};
            transpose(v);
            const int64_t words = least(LANES, (depth - i) / 2);
            UNROLL for (int w = 0; w < LANES; w++)
                if (w < words) _mm512_mask_storeu_epi32(to + w * count, rows, v[w]);
        }
    }
};
#endif

// Rows of x in tiles: about as many in each.
struct Tiles {
    int64_t rows, count;
    explicit Tiles(int64_t rows) : rows(rows), count(ceil_div(rows, TILE_ROWS)) {}
    int64_t first(int64_t tile) const { return rows * tile / count; }
};

// sums [M, TILE_WIDTH] += x [depth, M]^T times a strip [depth, TILE_WIDTH]
template <class Step, int M>
INLINE void multiply_tile(const uint32_t* x, const uint32_t* strip, int64_t depth, float* sums, int64_t sums_stride) {
    Floats sum[M][TILE_VECTORS];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < TILE_VECTORS; v++) sum[m][v] = load(sums + m * sums_stride + v * LANES);
    for (int64_t i = 0; i < depth; i++) {
        Ints w[TILE_VECTORS];
        UNROLL for (int v = 0; v < TILE_VECTORS; v++) w[v] = load_ints(strip + i * TILE_WIDTH + v * LANES);
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int v = 0; v < TILE_VECTORS; v++) sum[m][v] = Step::add(sum[m][v], w[v], x[i * M + m]);
    }
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < TILE_VECTORS; v++) store(sums + m * sums_stride + v * LANES, sum[m][v]);
}

template <class Step, int M = TILE_ROWS>
static void multiply_rows(int64_t rows, const uint32_t* x, const uint32_t* panel, int64_t width, int64_t depth,
                          float* sums) {
    if constexpr (M > 1)
        if (rows < M) return multiply_rows<Step, M - 1>(rows, x, panel, width, depth, sums);
    for (int64_t column = 0; column < width; column += TILE_WIDTH)
        multiply_tile<Step, M>(x, panel + column * depth, depth, sums + column, width);
}

// Rows first to first + tiles.rows of x: [depth / MOST_DEPTH][tile][depth, rows of the tile]
template <class Step>
static void order_for_tiles(const Product& p, int64_t first, const Tiles& tiles, int64_t depth, uint32_t* to) {
    const int64_t padded = ceil_div(depth, 8) * 8;
    parallel_for(p.threads, tiles.count, [&](int64_t tile) {
        const int64_t begin = tiles.first(tile), count = tiles.first(tile + 1) - begin;
        for (int64_t k = 0; k < padded; k += MOST_DEPTH) {
            const int64_t part = least(MOST_DEPTH, padded - k), there = least(part, depth - k);
            Step::order(p, first + begin, count, k, part, there,
                        to + (k * tiles.rows + part * begin) / Step::PER_WORD);
        }
    });
}

static void store_rows(const Product& p, int64_t first, int64_t rows, int64_t column, int64_t width, int64_t columns,
                       const float* sums) {
    const int64_t count = least(width, columns - column);
    float bias[PANEL_WIDTH] = {};
    if (p.bias != nullptr) to_floats(p.bias_dtype, p.bias, column, count, bias);
    const int64_t item = p.dtype == FLOAT32 ? 4 : 2;
    for (int64_t m = 0; m < rows; m++) {
        const int64_t at = (first + m) * columns + column;
        fetch_rows_ahead(p.out, first + m, first + rows - 1, columns * item, column * item, count * item);
        const float* from = sums + m * width;
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) {
            const Floats v = load(from + i) + load(bias + i);
            if (p.dtype == FLOAT32)
                store_as<FLOAT32>(p.out, at + i, v);
            else if (p.dtype == FLOAT16)
                store_as<FLOAT16>(p.out, at + i, v);
            else
                store_as<BFLOAT16>(p.out, at + i, v);
        }
        for (; i < count; i++) store_one(p.dtype, p.out, at + i, from[i] + bias[i]);
    }
}

// Columns of a panel: fewer if that leaves threads without work.
static int64_t panel_width(int64_t columns, int64_t threads) {
    int64_t width = PANEL_WIDTH;
    while (width > TILE_WIDTH && ceil_div(columns, width) < 4 * threads) width /= 2;
    return width;
}

template <class Step, class Weight>
static void multiply_panels_as(const Weight& weight, const Product& p) {
    const int64_t depth = weight.depth(), columns = weight.width(), padded = ceil_div(depth, 8) * 8;
    const int64_t width = panel_width(columns, p.threads);
    for (int64_t first = 0; first < p.rows; first += PANEL_ROWS) {
        const Tiles tiles(least(PANEL_ROWS, p.rows - first));
        uint32_t* x = static_cast<uint32_t*>(scratch(4, static_cast<size_t>(tiles.rows * padded / Step::PER_WORD) * 4));
        order_for_tiles<Step>(p, first, tiles, depth, x);
        parallel_for(p.threads, ceil_div(columns, width), [&](int64_t index) {
            const size_t words = static_cast<size_t>(MOST_DEPTH * width);
            uint32_t* panel = static_cast<uint32_t*>(scratch(0, words * 4));
            float* sums = static_cast<float*>(scratch(2, static_cast<size_t>(tiles.rows * width) * 4));
            memset(sums, 0, static_cast<size_t>(tiles.rows * width) * 4);
            for (int64_t k = 0; k < padded; k += MOST_DEPTH) {
                const int64_t part = least(MOST_DEPTH, padded - k);
                for (int64_t column = 0; column < width; column += TILE_WIDTH)
                    weight.template decode<Step>(k, part, index * width + column,
                                                 panel + column * (part / Step::PER_WORD));
                for (int64_t tile = 0; tile < tiles.count; tile++) {
                    const int64_t begin = tiles.first(tile), count = tiles.first(tile + 1) - begin;
                    multiply_rows<Step>(count, x + (k * tiles.rows + part * begin) / Step::PER_WORD, panel, width,
                                        part / Step::PER_WORD, sums + begin * width);
                }
            }
            store_rows(p, first, tiles.rows, index * width, width, columns, sums);
        });
    }
}

#if FEWBITS_AMX
// The same in bf16 by tiles: the left operand is x, with zeros past its last row and column, the right one a strip.
template <class Weight>
static void multiply_panels_by_tiles(const Weight& weight, const Product& p) {
    constexpr int64_t STEP = 32;  // columns of a tile of x
    static_assert(TILE_WIDTH == BLOCK && MOST_DEPTH % STEP == 0);
    const int64_t depth = weight.depth(), columns = weight.width(), padded = ceil_div(depth, STEP) * STEP;
    const int64_t width = panel_width(columns, p.threads);
    for (int64_t first = 0; first < p.rows; first += PANEL_ROWS) {
        const int64_t rows = least(PANEL_ROWS, p.rows - first), pairs = ceil_div(rows, BLOCK);
        char* x = static_cast<char*>(scratch(4, static_cast<size_t>(pairs * padded * BLOCK) * 2));
        parallel_for(p.threads, pairs, [&](int64_t pair) {
            const uint16_t* from = static_cast<const uint16_t*>(p.x) + (first + pair * BLOCK) * p.x_stride;
            const int64_t there = least(BLOCK, rows - pair * BLOCK);
            char* to = x + pair * padded * BLOCK * 2;
            for (int64_t k = 0; k < padded; k += STEP)
                for (int64_t m = 0; m < BLOCK; m++, to += ROW_BYTES) {
                    const uint16_t* of_row = from + m * p.x_stride + k;
                    store_ints(to, m < there ? ordered_16(of_row, depth - k, Bf16Step::PAIRS) : Ints{});
                }
        });
        parallel_for(p.threads, ceil_div(columns, width), [&](int64_t index) {
            uint32_t* strip = static_cast<uint32_t*>(scratch(0, static_cast<size_t>(MOST_DEPTH * TILE_WIDTH) * 2));
            float* sums = static_cast<float*>(scratch(2, static_cast<size_t>(pairs * BLOCK * BLOCK) * 4));
            const TilesInUse in_use;
            for (int64_t column = index * width; column < least(columns, (index + 1) * width); column += TILE_WIDTH) {
                for (int64_t k = 0; k < padded; k += MOST_DEPTH) {
                    const int64_t part = least(MOST_DEPTH, padded - k), there = least(part, ceil_div(depth - k, 8) * 8);
                    weight.template decode<Bf16Step>(k, there, column, strip);
                    memset(strip + there / 2 * TILE_WIDTH, 0, static_cast<size_t>((part - there) / 2 * TILE_WIDTH) * 4);
                    const TileRows right = {reinterpret_cast<const char*>(strip), SIDE * 2 * ROW_BYTES, ROW_BYTES,
                                            2 * ROW_BYTES};
                    for (int64_t pair = 0; pair < pairs; pair++) {
                        const TileRows left = tiles_in_order(x + (pair * padded + k) * BLOCK * 2);
                        float* to = sums + pair * BLOCK * BLOCK;
                        const auto nothing = [](int64_t) {};
                        if (rows - pair * BLOCK > SIDE)
                            multiply_tiles<Bf16Tiles, true, true>(left, right, part / STEP, to, k == 0, nothing);
                        else
                            multiply_tiles<Bf16Tiles, false, true>(left, right, part / STEP, to, k == 0, nothing);
                    }
                }
                for (int64_t m = 0; m < rows; m += BLOCK)
                    store_rows(p, first + m, least(BLOCK, rows - m), column, BLOCK, columns, sums + m * BLOCK);
            }
        });
    }
}
#endif

// out [rows, width] = x [rows, depth] times the panels of a weight [depth, width], which has
//     depth(), width()
//     decode<Step>(k, depth, column, strip)   for depth % 8 == 0, with zeros past the weight's edges
template <class Weight>
static void multiply_panels(const Weight& weight, const Product& p) {
#if FEWBITS_AMX
    if (p.dtype == BFLOAT16) return multiply_panels_by_tiles(weight, p);
#elif FEWBITS_BF16
    if (p.dtype == BFLOAT16) return multiply_panels_as<Bf16Step>(weight, p);
#endif
    multiply_panels_as<Float32Step>(weight, p);
}

}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

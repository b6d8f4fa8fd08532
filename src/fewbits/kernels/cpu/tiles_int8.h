// Products of rows of x in 8 bits with those of a weight in 8 bits, by tiles.
//
// The weight is the left operand, whose tiles are read as they lie in it. x, the right one, is put in order once.
#pragma once

#include "dots_int8.h"
#include "parallel.h"
#include "tiles.h"

#if FEWBITS_AMX

namespace fewbits {
namespace FEWBITS_LEVEL {
namespace {

constexpr int64_t MOST_COLUMNS = 1 << 17;  // whose products' sum has 31 bits

// 16 rows of codes of x, of which so many are there, without their offset: every second one of the tiles
// [columns / 64][2][16, 16, 4], zeros past the last row. Rows have codes of zero as far as whole tiles.
void order_tiles(const uint8_t* x, int64_t x_stride, int64_t rows, int64_t columns, char* to) {
    const Ints offset = _mm512_set1_epi8(static_cast<char>(Integers::OFFSET));
    for (int64_t at = 0; at < columns; at += ROW_BYTES, to += 2 * TILE) {
        Ints v[LANES];
        UNROLL for (int m = 0; m < LANES; m++)
            v[m] = m < rows ? _mm512_xor_si512(load_ints(x + m * x_stride + at), offset) : Ints{};
        transpose(v);
        UNROLL for (int i = 0; i < LANES; i++) store_ints(to + i * ROW_BYTES, v[i]);
    }
}

// BLOCK rows of q, of which so many are there: tiles [columns / 64][2][16, 64], zeros past the last column and any
// numbers past the last row.
void copy_tiles(const int8_t* q, int64_t rows, int64_t columns, char* to) {
    for (int64_t r = 0; r < BLOCK; r++, to += ROW_BYTES) {
        const int8_t* from = q + least(r, rows - 1) * columns;
        for (int64_t at = 0; at < columns; at += ROW_BYTES) {
            const int64_t there = least(ROW_BYTES, columns - at);
            store_ints(to + at / ROW_BYTES * 2 * TILE, _mm512_maskz_loadu_epi8(~0ull >> (64 - there), from + at));
        }
    }
}

// sums [rows, PANEL] += x q^T * scale for all rows of codes, the first digit's and then the second's, and up to PANEL
// rows of q [count, k]. So many rows from `next` on are what this thread probably takes next.
void add_panel_by_tiles(const char* x, const float* scale, int64_t rows, int64_t all, const int8_t* q, int64_t k,
                        int64_t count, const int8_t* next, int64_t rows_next, float* sums) {
    const TilesInUse in_use;
    const int64_t steps = ceil_div(k, ROW_BYTES), pairs = ceil_div(all, BLOCK);
    alignas(64) int32_t products[BLOCK * BLOCK];
    for (int64_t n = 0; n < count; n += BLOCK) {
        const bool last = n + BLOCK >= count;
        const int8_t* later = last ? next : q + (n + BLOCK) * k;
        const int64_t rows_later = most(0, least(BLOCK, last ? rows_next : count - n - BLOCK));
        TileRows left = {reinterpret_cast<const char*>(q + n * k), ROW_BYTES, SIDE * k, k};
        if (k % ROW_BYTES != 0 || count - n < BLOCK) {  // no whole tiles
            char* copied = static_cast<char*>(scratch(2, static_cast<size_t>(steps * 2 * TILE)));
            copy_tiles(q + n * k, count - n, k, copied);
            left = tiles_in_order(copied);
        }
        for (int64_t pair = 0; pair < pairs; pair++) {
            const TileRows right = tiles_in_order(x + pair * steps * 2 * TILE);
            const int64_t first = rows_later * pair / pairs, end = rows_later * (pair + 1) / pairs;
            const auto fetch = [&](int64_t step) __attribute__((always_inline)) {
                for (int64_t r = first; r < end; r++) __builtin_prefetch(later + r * k + step * ROW_BYTES, 0, 2);
            };
            const int64_t m = pair * BLOCK;
            if (all - m > SIDE)
                multiply_tiles<Int8Tiles, true, true>(left, right, steps, products, true, fetch);
            else
                multiply_tiles<Int8Tiles, true, false>(left, right, steps, products, true, fetch);
            for (int64_t column = 0; column < BLOCK; column += LANES)
                for (int64_t r = 0; r < least(BLOCK, all - m); r += LANES) {
                    Ints v[LANES];
                    UNROLL for (int i = 0; i < LANES; i++) v[i] = load_ints(products + (column + i) * BLOCK + r);
                    transpose(v);
                    for (int64_t i = 0; i < least(LANES, all - m - r); i++) {
                        float* to = sums + (m + r + i) % rows * PANEL + n + column;
                        store(to, load(to) + _mm512_cvtepi32_ps(v[i]) * splat(scale[m + r + i]));
                    }
                }
        }
    }
}

}  // namespace
}  // namespace FEWBITS_LEVEL
}  // namespace fewbits
#endif

// Products of several rows of x in bf16 with a 4-bit weight, by tiles.
//
// The weight is the left operand. Its rows are decoded along their columns, as they lie: a table has the values of two
// blocks, scaled and rounded to bf16, and 32 codes are looked up at once. x, the right operand, is put in the order of
// the codes once. Sums are of rows of the weight, and are turned as they are stored.
#pragma once

#include "few_rows_4bit.h"
#include "tiles.h"

#if FEWBITS_AMX

namespace fewbits {
namespace FEWBITS_LEVEL {
namespace {

constexpr int64_t FEW_TILES = 2;        // of x, up to which sums stay in tiles from the first column to the last
constexpr int64_t ROWS_AT_ONCE = 512;   // of x that a decoded part of the weight is multiplied by
constexpr int64_t TASK_WIDTH = 256;     // rows of the weight in a task, at most
constexpr int64_t TASK_SUMS = 1 << 17;  // at most: they stay in the second-level cache, with what x has for a part
constexpr int64_t PART = 1024;          // columns that are decoded at a time (all four measured on a Sapphire Rapids)
constexpr int64_t STEPS = Bf16Codes::STEPS, HALF = CHUNK / 2;  // of a chunk: its steps, and columns in one block

bool serves_tiles(const Linear4Bit& a) {
    return a.dtype == BFLOAT16 && a.w.block_size % HALF == 0 && a.w.k % a.w.block_size == 0;
}

// Scales of the half chunks of a row from column k on, zeros past its end.
void scales_of_row(const Weight4Bit& w, int64_t n, int64_t k, int64_t count, float* scales) {
    const int64_t first = (n * w.k + k) / HALF, there = least(count, (w.k - k) / HALF), per_block = w.block_size / HALF;
    if (per_block > 1) {
        for (int64_t i = 0; i < there; i++) scales[i] = scale_of(w, (first + i) / per_block);
    } else if (w.nested_absmax == nullptr) {
        memcpy(scales, static_cast<const float*>(w.absmax) + first, static_cast<size_t>(there) * 4);
    } else {
        const uint8_t* codes = static_cast<const uint8_t*>(w.absmax) + first;
        const Floats offset = splat(*w.nested_offset);
        for (int64_t i = 0; i < there; i += LANES) {
            const int64_t here = least(LANES, there - i), nested = (first + i) / NESTED_BLOCK;
            const int64_t same = least(here, (nested + 1) * NESTED_BLOCK - first - i);  // scale of scales
            const __mmask16 present = static_cast<__mmask16>((1 << here) - 1);
            const Ints code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(present, codes + i));
            Floats nested_scale = splat(w.nested_absmax[nested]);
            if (same < here)
                nested_scale = _mm512_mask_mov_ps(splat(w.nested_absmax[nested + 1]),
                                                  static_cast<__mmask16>((1 << same) - 1), nested_scale);
            store(scales + i, _mm512_i32gather_ps(code, w.dynamic, 4) * nested_scale + offset);
        }
    }
    for (int64_t i = there; i < count; i++) scales[i] = 0;
}

// Scales of so many elements that are wanted later: too few of a row for the hardware to foresee.
INLINE void fetch_scales(const Weight4Bit& w, int64_t element, int64_t count) {
    const int64_t size = w.nested_absmax == nullptr ? 4 : 1;
    const int64_t begin = element / w.block_size * size, end = (element + count) / w.block_size * size;
    const uint8_t* at = static_cast<const uint8_t*>(w.absmax);
    for (int64_t i = begin; i < end; i += 64) fetch(at + i);
    fetch(at + most(begin, end - 1));
}

// Decodes a chunk of a row, or what it has of one, to a row of each of its tiles.
struct TileDecoder {
    Floats values;
    Ints low_four, second_half;

    explicit INLINE_METHOD TileDecoder(const Weight4Bit& w)
        : values(load(w.values)), low_four(_mm512_set1_epi16(15)),
          second_half(_mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1)) {}

    INLINE_METHOD void decode(const uint8_t* codes, int64_t columns, const float* scales, char* to) const {
        const Ints words = columns >= CHUNK ? load_ints(codes) : _mm512_maskz_loadu_epi8(0xffffffff, codes);
        const Floats first = values * splat(scales[0]), second = values * splat(scales[1]);
        const Ints table = reinterpret_cast<Ints>(_mm512_cvtne2ps_pbh(second, first));
        UNROLL for (int step = 0; step < STEPS; step++) {
            // (a & b) | c
            const Ints index = _mm512_ternarylogic_epi32(shift_right(words, 4 * step), low_four, second_half, 0xea);
            store_ints(to + step * 2 * TILE, _mm512_permutexvar_epi16(index, table));
        }
    }
};

// BLOCK rows of the weight from n on, columns k to k + depth, whole chunks: to tiles [depth / 32][2][16, 32], zeros
// past the last row and column. It is decoded a chunk of a row at a time, row by row; as it is, so many rows of what is
// wanted later, from an element on, come into the second-level cache.
struct WeightPart {
    const Weight4Bit* w;
    int64_t n, k, depth;
    char* tiles;
    int64_t later, rows_later;
    int64_t row = 0, column = 0;
    float scales[PART / HALF] = {};

    int64_t chunks() const { return BLOCK * (depth / CHUNK); }

    INLINE_METHOD void decode(const TileDecoder& decoder, int64_t count) {
        if (depth == 0) return;
        for (; count > 0 && row < BLOCK; count--) {
            char* to = tiles + column * 2 * BLOCK + row * ROW_BYTES;
            if (n + row >= w->n) {
                UNROLL for (int step = 0; step < STEPS; step++) store_ints(to + step * 2 * TILE, Ints{});
            } else {
                const int64_t ahead = later + row * w->k + column;
                if (column == 0) {
                    scales_of_row(*w, n + row, k, depth / HALF, scales);
                    if (row < rows_later) fetch_scales(*w, ahead, least(depth, w->k - ahead % w->k));
                }
                if (row < rows_later) fetch(w->packed + ahead / 2);
                const uint8_t* codes = w->packed + ((n + row) * w->k + k + column) / 2;
                decoder.decode(codes, w->k - k - column, scales + column / HALF, to);
            }
            column += CHUNK;
            if (column == depth) column = 0, row++;
        }
    }
};

// 16 rows of x, of which so many are there: every second one of the tiles [columns / 32][2][16, 16, 2], zeros past the
// last row and column.
void order_tiles(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t columns, char* to) {
    uint32_t words[SIDE][Bf16Codes::WORDS] = {};
    for (int64_t k = 0; k < columns; k += CHUNK) {
        for (int64_t m = 0; m < rows; m++) Bf16Codes::order(x + m * x_stride + k, columns - k, words[m]);
        for (int64_t step = 0; step < STEPS; step++, to += 2 * TILE) {
            Ints v[LANES];
            UNROLL for (int m = 0; m < LANES; m++) v[m] = load_ints(words[m] + step * LANES);
            transpose(v);
            UNROLL for (int i = 0; i < LANES; i++) store_ints(to + i * ROW_BYTES, v[i]);
        }
    }
}

// Sums [BLOCK, BLOCK] of rows of the weight from n on, with the bias, to rows of the output.
void store_turned(const Linear4Bit& a, int64_t row, int64_t rows, int64_t n, const float* sums) {
    for (int64_t column = 0; column < least(BLOCK, a.w.n - n); column += LANES) {
        const int64_t count = least(LANES, a.w.n - n - column);
        float bias[LANES] = {};
        if (a.bias != nullptr) to_floats(a.bias_dtype, a.bias, n + column, count, bias);
        const Floats more = load(bias);
        for (int64_t m = 0; m < rows; m += LANES) {
            Ints v[LANES];
            UNROLL for (int i = 0; i < LANES; i++) v[i] = load_ints(sums + (column + i) * BLOCK + m);
            transpose(v);
            for (int64_t i = 0; i < least(LANES, rows - m); i++) {
                uint16_t out[LANES];
                store_bf16(out, (Floats)v[i] + more);
                memcpy(static_cast<uint16_t*>(a.out) + (row + m + i) * a.w.n + n + column, out,
                       static_cast<size_t>(count) * 2);
            }
        }
    }
}

// sums [BLOCK, BLOCK] of rows of the weight from n on and one or two tiles of x: a chunk of them is decoded while the
// one before is multiplied. Rows from `next` on are what this thread probably takes next.
template <bool two>
void multiply_few(const Weight4Bit& w, int64_t n, int64_t next, const char* x, float* sums) {
    constexpr int64_t ROWS_A_STEP = BLOCK / STEPS;
    constexpr int64_t DISTANCE = 8;  // chunks: how far ahead of where they are needed codes are fetched
    alignas(64) char tiles[2][STEPS * 2 * TILE];
    alignas(64) float scales[BLOCK][PART / HALF] = {};
    const TileDecoder decoder(w);
    const int64_t chunks = ceil_div(w.k, CHUNK), row_bytes = w.k / 2;
    const int64_t rows = least(BLOCK, w.n - n), rows_next = least(BLOCK, w.n - next);
    if (rows < BLOCK) memset(tiles, 0, sizeof tiles);
    zero_sums<true, two>();
    for (int64_t c = 0; c <= chunks; c++) {
        const int64_t k = c * CHUNK;
        if (c < chunks && k % PART == 0)
            for (int64_t r = 0; r < rows; r++)
                scales_of_row(w, n + r, k, least(PART, (chunks - c) * CHUNK) / HALF, scales[r]);
        // scales of the rows that come next, evenly over all chunks of these
        const int64_t fetched = rows_next * w.k * c / (chunks + 1), more = rows_next * w.k * (c + 1) / (chunks + 1);
        if (rows_next > 0) fetch_scales(w, next * w.k + fetched, more - fetched);
        const uint8_t* codes = w.packed + n * row_bytes + k / 2;
        const bool within = c + DISTANCE < chunks;
        const uint8_t* ahead = within ? codes + DISTANCE * (CHUNK / 2)
                                      : w.packed + next * row_bytes + (c + DISTANCE - chunks) * (CHUNK / 2);
        const int64_t rows_ahead = within ? rows : rows_next;
        const TileRows left = tiles_in_order(tiles[(c + 1) % 2]);
        const TileRows right = tiles_in_order(x + (c - 1) * STEPS * 2 * TILE);
        UNROLL for (int64_t step = 0; step < STEPS; step++) {
            for (int64_t r = step * ROWS_A_STEP; c < chunks && r < least(rows, (step + 1) * ROWS_A_STEP); r++) {
                if (r < rows_ahead) __builtin_prefetch(ahead + r * row_bytes, 0, 2);
                decoder.decode(codes + r * row_bytes, w.k - k, &scales[r][k % PART / HALF],
                               tiles[c % 2] + r * ROW_BYTES);
            }
            if (c > 0) add_step<Bf16Tiles, true, two>(left, right, step);
        }
    }
    store_sums<true, two>(sums);
}

// Rows of the weight from n on with many tiles of x: a part of BLOCK rows is decoded while the one before is
// multiplied.
void multiply_many(const Linear4Bit& a, int64_t row, int64_t rows, int64_t n, int64_t width, int64_t next,
                   const char* x) {
    const Weight4Bit& w = a.w;
    const int64_t padded = ceil_div(w.k, CHUNK) * CHUNK, pairs = ceil_div(rows, BLOCK);
    char* parts = static_cast<char*>(scratch(0, static_cast<size_t>(2 * PART * BLOCK) * 2));
    float* sums = static_cast<float*>(scratch(2, static_cast<size_t>(width * pairs * BLOCK) * 4));
    const TileDecoder decoder(w);
    int64_t made = 0;
    const auto part_from = [&](int64_t s, int64_t k) {
        const int64_t depth = most(0, least(PART, padded - k));
        char* tiles = parts + made++ % 2 * PART * BLOCK * 2;
        const bool last = k + depth >= padded;
        const int64_t first = (last ? next : n) + s, column = last ? 0 : k + depth;
        return WeightPart{&w, n + s, k, depth, tiles, first * w.k + column, w.n - first};
    };
    WeightPart part = part_from(0, 0);
    part.decode(decoder, part.chunks());
    for (int64_t k = 0; k < padded; k += PART) {
        for (int64_t s = 0; s < width; s += BLOCK) {
            const TileRows left = tiles_in_order(part.tiles);
            const int64_t steps = part.depth / 32;
            part = s + BLOCK < width ? part_from(s + BLOCK, k) : part_from(0, k + PART);
            const int64_t burst = ceil_div(part.chunks(), pairs * steps);
            const auto decode = [&](int64_t) __attribute__((always_inline)) { part.decode(decoder, burst); };
            for (int64_t pair = 0; pair < pairs; pair++) {
                const TileRows right = tiles_in_order(x + (pair * padded + k) * BLOCK * 2);
                float* to = sums + (s * pairs + pair * BLOCK) * BLOCK;
                if (rows - pair * BLOCK > SIDE)
                    multiply_tiles<Bf16Tiles, true, true>(left, right, steps, to, k == 0, decode);
                else
                    multiply_tiles<Bf16Tiles, true, false>(left, right, steps, to, k == 0, decode);
            }
        }
    }
    for (int64_t s = 0; s < width; s += BLOCK)
        for (int64_t m = 0; m < rows; m += BLOCK)
            store_turned(a, row + m, least(BLOCK, rows - m), n + s, sums + (s * pairs + m) * BLOCK);
}

void linear_tiles(const Linear4Bit& a) {
    const Weight4Bit& w = a.w;
    const int64_t padded = ceil_div(w.k, CHUNK) * CHUNK;
    for (int64_t row = 0; row < a.rows; row += ROWS_AT_ONCE) {
        const int64_t rows = least(ROWS_AT_ONCE, a.rows - row);
        const int64_t tiles = ceil_div(rows, SIDE), pairs = ceil_div(tiles, 2);
        char* x = static_cast<char*>(scratch(4, static_cast<size_t>(pairs * padded * BLOCK) * 2));
        parallel_for(a.threads, tiles, [&](int64_t tile) {
            const int64_t first = row + tile * SIDE;
            order_tiles(static_cast<const uint16_t*>(a.x) + first * a.x_stride, a.x_stride, least(SIDE, a.rows - first),
                        w.k, x + tile / 2 * padded * BLOCK * 2 + tile % 2 * TILE);
        });
        int64_t width = tiles <= FEW_TILES ? BLOCK : TASK_WIDTH;  // less if that leaves threads without work
        while (width > BLOCK && (width * pairs * BLOCK > TASK_SUMS || ceil_div(w.n, width) < 4 * a.threads)) width /= 2;
        parallel_for(a.threads, ceil_div(w.n, width), [&](int64_t index) {
            const int64_t n = index * width, next = n + width * a.threads;
            const TilesInUse in_use;
            if (tiles > FEW_TILES) return multiply_many(a, row, rows, n, width, next, x);
            alignas(64) float sums[BLOCK * BLOCK];
            tiles > 1 ? multiply_few<true>(w, n, next, x, sums) : multiply_few<false>(w, n, next, x, sums);
            store_turned(a, row, rows, n, sums);
        });
    }
}

}  // namespace
}  // namespace FEWBITS_LEVEL
}  // namespace fewbits
#endif

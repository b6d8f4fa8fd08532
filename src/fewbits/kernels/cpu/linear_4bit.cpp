// Products with a 4-bit weight: a few rows of x as it is decoded, more through decoded panels or, in bf16, by tiles.
#include "few_rows_4bit.h"
#include "panels.h"
#include "tiles_4bit.h"

namespace fewbits {
namespace FEWBITS_LEVEL {
namespace {

// Words of LANES rows of the weight from n on, columns from k on: [count / 8, LANES], zeros past the last row.
void gather_words(const Weight4Bit& w, int64_t n, int64_t k, int64_t count, uint32_t* words) {
    const int64_t rows = least(LANES, w.n - n), row_bytes = w.k / 2;
    const uint8_t* from = w.packed + n * row_bytes + k / 2;
    int64_t i = 0;
    for (; TRANSPOSES && rows == LANES && i + CHUNK <= count; i += CHUNK) {
        Ints v[LANES];
        UNROLL for (int r = 0; r < LANES; r++) {
            __builtin_prefetch(from + r * row_bytes + i / 2 + MOST_DEPTH / 2, 0, 2);  // of the next panel
            v[r] = load_ints(from + r * row_bytes + i / 2);
        }
        transpose(v);
        UNROLL for (int r = 0; r < LANES; r++) store_ints(words + (i / 8 + r) * LANES, v[r]);
    }
    for (; i < count; i += 8) {
        for (int64_t r = 0; r < LANES; r++) {
            uint32_t word = 0;
            if (r < rows) memcpy(&word, from + r * row_bytes + i / 2, 4);
            words[i / 8 * LANES + r] = word;
        }
    }
}

// Columns k to k + depth of the rows from n on.
struct Rows4Bit {
    const Weight4Bit& w;

    int64_t depth() const { return w.k; }
    int64_t width() const { return w.n; }

    template <class Step>
    void decode(int64_t k, int64_t depth, int64_t n, uint32_t* strip) const {
        for (int64_t column = 0; column < TILE_WIDTH; column += LANES) {
            if (w.k % 8 == 0)
                decode_words<Step>(k, depth, n + column, strip + column);
            else
                decode_any<Step>(k, depth, n + column, strip + column);
        }
    }

    template <class Step>
    void decode_words(int64_t k, int64_t depth, int64_t n, uint32_t* strip) const {
        const Table values = table(w.values);
        uint32_t words[MOST_DEPTH / 8 * LANES];
        gather_words(w, n, k, depth, words);
        const auto put = [&](int64_t i, Floats scales) __attribute__((always_inline)) {
            const Ints word = load_ints(words + i / 8 * LANES);
            Floats column[8];
            UNROLL for (int j = 0; j < 8; j++) column[j ^ 1] = lookup(values, shift_right(word, 4 * j)) * scales;
            Step::put(column, strip + i / Step::PER_WORD * TILE_WIDTH);
        };
        const int64_t rows = least(LANES, w.n - n);
        if (w.k % w.block_size == 0) {  // scales are the same along a block
            float scales[MOST_DEPTH / 8 + 1][LANES];
            const int64_t first = k / w.block_size, blocks = (k + depth - 1) / w.block_size - first + 1;
            gather_scales(n, rows, first, blocks, scales[0]);
            int64_t i = 0, stop = (first + 1) * w.block_size - k;
            for (int64_t block = 0; block < blocks; block++, stop += w.block_size)
                for (const Floats of_block = load(scales[block]); i < least(depth, stop); i += 8) put(i, of_block);
            return;
        }
        for (int64_t i = 0; i < depth; i += 8) {  // or along a word, if blocks begin anywhere
            float scale[LANES] = {};
            for (int64_t r = 0; r < rows; r++) scale[r] = scale_of(w, ((n + r) * w.k + k + i) / w.block_size);
            put(i, load(scale));
        }
    }

    // Scales of some blocks of the rows from n on: [blocks, LANES], zeros past the last row.
    void gather_scales(int64_t n, int64_t rows, int64_t first, int64_t blocks, float* scales) const {
        const int64_t row_blocks = w.k / w.block_size;
        int64_t block = 0;
        if (TRANSPOSES && rows == LANES && w.nested_absmax == nullptr) {
            const float* from = static_cast<const float*>(w.absmax) + n * row_blocks + first;
            for (; block + LANES <= blocks; block += LANES) {
                Ints v[LANES];
                UNROLL for (int r = 0; r < LANES; r++) v[r] = load_ints(from + r * row_blocks + block);
                transpose(v);
                UNROLL for (int r = 0; r < LANES; r++) store_ints(scales + (block + r) * LANES, v[r]);
            }
        }
        for (int64_t r = 0; r < LANES; r++)
            for (int64_t b = block; b < blocks; b++)
                scales[b * LANES + r] = r < rows ? scale_of(w, (n + r) * row_blocks + first + b) : 0.0f;
    }

    // Rows that are not whole words: one number after the other.
    template <class Step>
    void decode_any(int64_t k, int64_t depth, int64_t n, uint32_t* strip) const {
        float buffer[LANES][MOST_DEPTH] = {};
        for (int64_t r = 0; r < least(LANES, w.n - n); r++)
            decode_span_as<FLOAT32>(w, (n + r) * w.k + k, least(depth, w.k - k), buffer[r]);
        for (int64_t i = 0; i < depth; i += 8) {
            Floats column[8];
            for (int64_t j = 0; j < 8; j++) {
                float numbers[LANES];
                for (int64_t r = 0; r < LANES; r++) numbers[r] = buffer[r][i + j];
                column[j] = load(numbers);
            }
            Step::put(column, strip + i / Step::PER_WORD * TILE_WIDTH);
        }
    }
};

// Rows n to n + depth, their columns from k on: for the transposed product.
struct Columns4Bit {
    const Weight4Bit& w;

    int64_t depth() const { return w.n; }
    int64_t width() const { return w.k; }

    template <class Step>
    void decode(int64_t n, int64_t depth, int64_t k, uint32_t* strip) const {
        const bool within_block = w.k % w.block_size == 0 && w.block_size % TILE_WIDTH == 0 && k < w.k;
        for (int64_t i = 0; i < depth; i += 8) {
            Floats numbers[8][TILE_VECTORS];
            if (within_block && n + i + 8 <= w.n)
                decode_within_block(n + i, k, numbers);
            else
                decode_any(n + i, k, numbers);
            UNROLL for (int v = 0; v < TILE_VECTORS; v++) {
                Floats column[8];
                UNROLL for (int j = 0; j < 8; j++) column[j] = numbers[j][v];
                Step::put(column, strip + i / Step::PER_WORD * TILE_WIDTH + v * LANES);
            }
        }
    }

    INLINE_METHOD void decode_within_block(int64_t n, int64_t k, Floats (&numbers)[8][TILE_VECTORS]) const {
        const Table values = table(w.values);
        const int64_t blocks = w.k / w.block_size, block = n * blocks + k / w.block_size;
        const uint8_t* packed = w.packed + (n * w.k + k) / 2;
        UNROLL for (int j = 0; j < 8; j++) {
            const Floats scale = splat(scale_of(w, block + j * blocks));
            UNROLL for (int v = 0; v < TILE_VECTORS; v++)
                numbers[j][v] = lookup(values, spread(packed + j * (w.k / 2) + v * (LANES / 2))) * scale;
        }
    }

    // Any rows, with zeros past the weight's edges.
    void decode_any(int64_t n, int64_t k, Floats (&numbers)[8][TILE_VECTORS]) const {
        const int64_t count = most(0, least(TILE_WIDTH, w.k - k));
        for (int64_t j = 0; j < 8; j++) {
            float row[TILE_WIDTH] = {};
            if (n + j < w.n) decode_span_as<FLOAT32>(w, (n + j) * w.k + k, count, row);
            for (int v = 0; v < TILE_VECTORS; v++) numbers[j][v] = load(row + v * LANES);
        }
    }
};

}  // namespace

void linear_4bit(const Linear4Bit& a) {
#if FEWBITS_AMX
    constexpr int64_t LESS = 3;  // rows of x that other products take less time for (measured on a Sapphire Rapids)
    if (a.rows > LESS && serves_tiles(a)) return linear_tiles(a);
#elif FEWBITS_BF16
    if (a.dtype == BFLOAT16 && serves_few(a, FEW) && linear_few<Bf16Codes>(a)) return;
#elif FEWBITS_AVX2
    if (a.dtype != FLOAT32 && serves_few(a, FEW) && linear_few<Int16Codes>(a)) return;
#endif
    if (serves_few(a, ExactCodes::GROUP) && linear_few<ExactCodes>(a)) return;
    multiply_panels(Rows4Bit{a.w}, Product{a.x, a.x_stride, a.rows, a.dtype, a.bias, a.bias_dtype, a.out, a.threads});
}

void linear_4bit_t(const Linear4Bit& a) {
    multiply_panels(Columns4Bit{a.w}, Product{a.x, a.x_stride, a.rows, a.dtype, nullptr, 0, a.out, a.threads});
}

}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

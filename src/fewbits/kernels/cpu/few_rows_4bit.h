// Products of a few rows of x with a 4-bit weight, row by row as it is decoded.
#pragma once

#include "decode_4bit.h"
#include "parallel.h"

namespace fewbits {
namespace FEWBITS_LEVEL {
namespace {

// A chunk is LANES words of the packed weight, 8 codes each. Shifted right by 4 j, lane i's lowest four bits are the
// code of element 8 i + (j ^ 1): x is put in that order once, and codes are looked up without any shuffle of them.

constexpr int64_t CHUNK = 8 * LANES;
constexpr int ROWS = FEWBITS_AVX2 ? 2 : 4;      // of the weight at a time, as registers allow
constexpr int64_t FEW = FEWBITS_BF16 ? 32 : FEWBITS_AVX2 ? 8 : 4;  // rows of x: with more, panels are faster
constexpr int64_t AHEAD = 4096;                 // bytes: how far ahead of where they are needed codes are fetched

// Into the second-level cache: the first has room for few lines that are on their way (measured on a Zen 4). Those of
// the next few chunks go on from there to the first one, but for AVX2, which waits for its own instructions anyway.
INLINE void fetch(const uint8_t* codes) { __builtin_prefetch(codes, 0, 2); }

// How a chunk is multiplied by as much of x: in STEPS steps, for each of which x has a word a lane.
//     WORDS                words of x for a chunk
//     GROUP                rows of x at a time, at most; or 4 and fewer
//     order(x, to)         puts a chunk of x in order; false if it cannot be
//     weights(word, step)  the weights of a step
//     Part, add, floats    a sum of products, without scales
//     factor()             what all sums are to be multiplied by
struct ExactCodes {
    static constexpr int STEPS = 8, WORDS = STEPS * LANES, GROUP = 4;
    static constexpr bool PAIRS = false;
    using Part = Floats;
    const Table values;
    explicit ExactCodes(const float* values) : values(table(values)) {}
    static bool order(const float* x, uint32_t* to) {
        for (int i = 0; i < LANES; i++)
            UNROLL for (int j = 0; j < STEPS; j++) to[j * LANES + i] = to_bits(x[8 * i + (j ^ 1)]);
        return true;
    }
    INLINE_METHOD Floats weights(Ints word, int step) const { return lookup(values, shift_right(word, 4 * step)); }
    static INLINE_METHOD Floats add(Floats sum, Floats w, Ints x) { return fma(w, (Floats)x, sum); }
    static INLINE_METHOD Floats floats(Floats part, const uint32_t*) { return part; }
    static INLINE_METHOD float factor() { return 1.0f; }
};

#if FEWBITS_BF16
struct Bf16Codes {  // two weights a lane; the values in bf16, twice: the look-up asks for five bits
    static constexpr int STEPS = 4, WORDS = STEPS * LANES, GROUP = 8;
    static constexpr bool PAIRS = true;
    using Part = Floats;
    Ints values;
    explicit Bf16Codes(const float* from) {
        uint16_t twice[32];
        for (int i = 0; i < 32; i++) twice[i] = to_bf16(from[i % 16]);
        values = load_ints(twice);
    }
    // of bf16, so many of which there are
    static void order(const uint16_t* x, int64_t count, uint32_t* to) {
        // of 32 numbers the words of step j in the j-th four lanes
        static constexpr Order16 BY_STEP = {{1, 5, 9, 13, 17, 21, 25, 29, 0, 4, 8, 12, 16, 20, 24, 28,
                                             3, 7, 11, 15, 19, 23, 27, 31, 2, 6, 10, 14, 18, 22, 26, 30}};
        Ints v[STEPS];
        UNROLL for (int i = 0; i < STEPS; i++) v[i] = ordered_16(x + 32 * i, count - 32 * i, BY_STEP);
        const Ints a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
        const Ints c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
        store_ints(to, _mm512_shuffle_i32x4(a, c, 0x88)), store_ints(to + LANES, _mm512_shuffle_i32x4(a, c, 0xdd));
        to += 2 * LANES;
        store_ints(to, _mm512_shuffle_i32x4(b, d, 0x88)), store_ints(to + LANES, _mm512_shuffle_i32x4(b, d, 0xdd));
    }
    INLINE_METHOD Ints weights(Ints word, int step) const {
        return _mm512_permutexvar_epi16(shift_right(word, 4 * step), values);
    }
    static INLINE_METHOD Floats add(Floats sum, Ints w, Ints x) { return dot_bf16(sum, w, x); }
    static INLINE_METHOD Floats floats(Floats part, const uint32_t*) { return part; }
    static INLINE_METHOD float factor() { return 1.0f; }
};
#endif

#if FEWBITS_AVX2
// Weights and x as integers of 16 bits, two a lane. Of the weights, whose bytes are looked up 32 at a time, FP4's are
// exact and NF4's within 6.2e-5. x is within 3.1e-5 of the largest of its chunk, where results in 16 bits are rounded by
// 2.4e-4 or 2e-3. Eight products of a lane are at most 8 * 8064 * 16383, half of what it holds.
struct Int16Codes {
    static constexpr int STEPS = 4, WORDS = STEPS * LANES + LANES;  // the last ones: what a chunk of x is multiplied by
    static constexpr int GROUP = 4;
    static constexpr bool PAIRS = true;
    static constexpr float UNIT = 8064, X_UNIT = 16383;  // 42 * 192: FP4's values are multiples of 1 / 192
    using Part = Ints;
    __m256i low, high;
    explicit Int16Codes(const float* values) {
        uint8_t bytes[2][16];
        for (int i = 0; i < 16; i++) {
            const float scaled = values[i] * UNIT;
            const int16_t integer = static_cast<int16_t>(scaled < 0 ? scaled - 0.5f : scaled + 0.5f);
            bytes[0][i] = static_cast<uint8_t>(integer & 255), bytes[1][i] = static_cast<uint8_t>(integer >> 8 & 255);
        }
        low = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[0])));
        high = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[1])));
    }
    static bool order(const float* x, uint32_t* to) {
        uint32_t bits = 0;  // of the largest: in the order of magnitudes, infinity and NaN above all
        for (int i = 0; i < CHUNK; i++) {
            const uint32_t found = to_bits(x[i]) & 0x7fffffff;
            bits = found > bits ? found : bits;
        }
        const float largest = from_bits(bits);
        if (bits != 0 && !(largest > 1e-30f && largest < 1e38f)) return false;
        const float factor = bits == 0 ? 0.0f : X_UNIT / largest;
        uint16_t integers[CHUNK];
        for (int i = 0; i < CHUNK; i++) {
            const float scaled = x[i] * factor;
            integers[i] = static_cast<uint16_t>(static_cast<int32_t>(scaled < 0 ? scaled - 0.5f : scaled + 0.5f));
        }
        for (int i = 0; i < LANES; i++)
            UNROLL for (int j = 0; j < STEPS; j++) {
                const uint16_t* at = integers + 2 * (i / 4 * 16 + (j & 1) * 8 + i % 4 * 2) + (j < 2);
                to[j * LANES + i] = static_cast<uint32_t>(at[0]) | static_cast<uint32_t>(at[2]) << 16;
            }
        to[STEPS * LANES] = to_bits(largest / X_UNIT);
        return true;
    }
    // steps: bit 1, the half byte; bit 0, which half of 16 bytes
    INLINE_METHOD Ints weights(Ints word, int step) const {
        const __m256i codes = _mm256_and_si256(step < 2 ? word : _mm256_srli_epi16(word, 4), _mm256_set1_epi8(15));
        const __m256i l = _mm256_shuffle_epi8(low, codes), h = _mm256_shuffle_epi8(high, codes);
        return step & 1 ? _mm256_unpackhi_epi8(l, h) : _mm256_unpacklo_epi8(l, h);
    }
    static INLINE_METHOD Ints add(Ints sum, Ints w, Ints x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }
    static INLINE_METHOD Floats floats(Ints part, const uint32_t* x) {
        return _mm256_cvtepi32_ps(part) * splat(from_bits(x[STEPS * LANES]));
    }
    static INLINE_METHOD float factor() { return 1.0f / UNIT; }
};
#endif

bool serves_few(const Linear4Bit& a, int64_t most_rows) {
    const int64_t block = a.w.block_size;
    const bool aligned = block % CHUNK == 0 || (CHUNK % block == 0 && CHUNK / block <= 4 && block >= 32);
    return a.rows <= most_rows && a.w.k % block == 0 && aligned;
}

// How many rows of x from one on are multiplied together.
template <class Codes>
INLINE int64_t group_of(int64_t left) {
    return left >= Codes::GROUP ? Codes::GROUP : least(4, left);
}

// Where words of a group of rows of x are: from a row to the next, and from a chunk to the next. Of few rows each is a
// stream of its own; of more those of a chunk lie one after the other (with two rows that took 5 % longer on a Zen 4).
template <class Codes>
struct Layout {
    int64_t row, chunk;
    INLINE_METHOD Layout(int64_t k, int64_t count) {
        const bool together = Codes::GROUP > 4 && count >= 4;
        row = together ? Codes::WORDS : ceil_div(k, CHUNK) * Codes::WORDS;
        chunk = together ? count * Codes::WORDS : Codes::WORDS;
    }
};

// A row of x as words [chunks, WORDS] of so many `apart`, with zeros past the end.
template <class Codes>
bool order_for_chunks(const Linear4Bit& a, int64_t row, uint32_t* to, int64_t apart) {
    const int64_t k = a.w.k, padded = ceil_div(k, CHUNK) * CHUNK;
    bool ordered = true;
    if constexpr (FEWBITS_BF16 && Codes::PAIRS) {
        const uint16_t* from = static_cast<const uint16_t*>(a.x) + row * a.x_stride;
        for (int64_t c = 0; c < k; c += CHUNK, to += apart) Codes::order(from + c, k - c, to);
    } else {
        float* from = static_cast<float*>(scratch(0, static_cast<size_t>(padded) * 4));
        to_floats(a.dtype, a.x, row * a.x_stride, k, from);
        for (int64_t i = k; i < padded; i++) from[i] = 0;
        for (int64_t c = 0; c < padded; c += CHUNK, to += apart) ordered &= Codes::order(from + c, to);
    }
    return ordered;
}

// The lanes' values of a chunk's scales, where a chunk has so many (1: it lies within one block).
template <int PER_CHUNK>
INLINE Floats lane_scales(const float* scales) {
#if FEWBITS_AVX512
    if (PER_CHUNK == 2) return _mm512_mask_blend_ps(0xff00, splat(scales[0]), splat(scales[1]));
    if (PER_CHUNK == 4) {
        const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(scales)));
    }
#elif FEWBITS_AVX2
    if (PER_CHUNK == 2) return _mm256_set_m128(_mm_set1_ps(scales[1]), _mm_set1_ps(scales[0]));
#endif
    return splat(scales[0]);
}

// The lanes of a chunk's first half from one vector, of its second from another.
INLINE Floats halves(Floats first, Floats second) {
#if FEWBITS_AVX512
    return _mm512_mask_blend_ps(0xff00, first, second);
#elif FEWBITS_AVX2
    return _mm256_blend_ps(first, second, 0xf0);
#else
    return Floats{first[0], first[1], second[2], second[3]};
#endif
}

#if FEWBITS_AVX512
// Of two vectors sums of lanes that are two apart, those of the first in even lanes and of the second in odd ones: no
// lane leaves its four, which are in one block.
INLINE Floats folded(Floats a, Floats b) { return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b); }

// The sums of eight vectors that are folded in four.
INLINE __m256 sums_of_folds(Floats a, Floats b, Floats c, Floats d) {
    const auto pairs = [](Floats a, Floats b) __attribute__((always_inline)) {
        const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
        return _mm512_castpd_ps(_mm512_unpacklo_pd(x, y)) + _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    };
    const Floats first = pairs(a, b), second = pairs(c, d);
    const Floats halves = _mm512_shuffle_f32x4(first, second, 0x88) + _mm512_shuffle_f32x4(first, second, 0xdd);
    const Floats all = halves + _mm512_shuffle_f32x4(halves, halves, 0xb1);
    return _mm512_castps512_ps256(_mm512_shuffle_f32x4(all, all, 0x08));
}
#endif

// Scales of R streams of blocks, each of which goes on where it was. Of scales of scales, a stream has those of all 256
// codes in a table, which serves until the second-level scale changes.
template <bool NESTED, int R>
struct Scales {
    const Weight4Bit w;
    float tables[R][NESTED ? 256 : 1];
    int64_t known[R];

    explicit INLINE_METHOD Scales(const Weight4Bit& w) : w(w) {
        UNROLL for (int r = 0; r < R; r++) known[r] = -1;
    }

    // For a stream's blocks from one on: how many are served.
    INLINE_METHOD int64_t prepare(int r, int64_t block) {
        if (!NESTED) return INT64_MAX;
        const int64_t nested = block / NESTED_BLOCK;
        if (known[r] != nested) {
            const Floats absmax = splat(w.nested_absmax[nested]), offset = splat(*w.nested_offset);
            for (int i = 0; i < 256; i += LANES) store(tables[r] + i, load(w.dynamic + i) * absmax + offset);
            known[r] = nested;
        }
        return NESTED_BLOCK - block % NESTED_BLOCK;
    }

    // Those of blocks that are wanted later, which are too few for the hardware to foresee.
    INLINE_METHOD void fetch_later(int64_t block, int64_t count) const {
        const int64_t size = NESTED ? 1 : 4;
        const uint8_t* at = static_cast<const uint8_t*>(w.absmax) + block * size;
        for (int64_t i = 0; i < count * size; i += 64) fetch(at + i);
    }

    INLINE_METHOD float operator()(int r, int64_t block) const {
        return NESTED ? tables[r][static_cast<const uint8_t*>(w.absmax)[block]]
                      : static_cast<const float*>(w.absmax)[block];
    }
};

// Of R rows of the weight and M rows of x.
template <class Codes, int M, int R, int PER_CHUNK>
struct Sums {
    // For one row of x what a chunk adds is summed for each of its blocks in all lanes, those of the other block among
    // them, and the block's own are chosen at the end: to make a vector of two blocks' scales takes longer.
    static constexpr bool BY_BLOCK = M == 1 && PER_CHUNK <= 2;
    // What a chunk adds for two rows of x is folded into one vector before it is scaled: products and scaling keep the
    // same units busy, folding and adding others. With two or three rows memory is what takes the time.
    static constexpr bool FOLDED = FEWBITS_BF16 && M >= 4 && Codes::PAIRS;
    static constexpr int COUNT = BY_BLOCK ? PER_CHUNK : FOLDED ? M / 2 : M;
    Floats of[R][COUNT];

    INLINE_METHOD Sums() {
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < COUNT; i++) of[r][i] = zero();
    }

    // Adds a chunk; scale(r, b) is that of its b-th block in a row.
    template <class Scale>
    INLINE_METHOD void add(const Codes& codes, const Ints (&words)[R], const uint32_t* x, int64_t x_stride, Scale scale) {
        Floats scales[R];
        if constexpr (!BY_BLOCK)
            UNROLL for (int r = 0; r < R; r++) {
                float values[PER_CHUNK];
                UNROLL for (int b = 0; b < PER_CHUNK; b++) values[b] = scale(r, b);
                scales[r] = lane_scales<PER_CHUNK>(values);
            }
#if FEWBITS_BF16
        if constexpr (FOLDED) {
            constexpr int AT_ONCE = 4;
            static_assert(M % AT_ONCE == 0);
            Ints w[Codes::STEPS][R];
            UNROLL for (int j = 0; j < Codes::STEPS; j++)
                UNROLL for (int r = 0; r < R; r++) w[j][r] = codes.weights(words[r], j);
            UNROLL for (int first = 0; first < M; first += AT_ONCE) {
                Floats part[R][AT_ONCE];
                UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int m = 0; m < AT_ONCE; m++) part[r][m] = zero();
                UNROLL for (int j = 0; j < Codes::STEPS; j++)
                    UNROLL for (int m = 0; m < AT_ONCE; m++) {
                        Ints xs = load_ints(x + (first + m) * x_stride + j * LANES);
                        KEEP(xs);  // once for all rows
                        UNROLL for (int r = 0; r < R; r++) part[r][m] = Codes::add(part[r][m], w[j][r], xs);
                    }
                UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int m = 0; m < AT_ONCE; m += 2) {
                        Floats& sum = of[r][(first + m) / 2];
                        sum = fma(folded(part[r][m], part[r][m + 1]), scales[r], sum);
                    }
            }
            return;
        }
#endif
        if constexpr (M == 1 || Codes::PAIRS) {  // scales are applied to what the chunk adds
            typename Codes::Part part[R][M];
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) part[r][m] = typename Codes::Part{};
            UNROLL for (int j = 0; j < Codes::STEPS; j++) {
                decltype(codes.weights(words[0], j)) w[R];
                UNROLL for (int r = 0; r < R; r++) w[r] = codes.weights(words[r], j);
                UNROLL for (int m = 0; m < M; m++) {
                    Ints xs = load_ints(x + m * x_stride + j * LANES);
                    if (R > 1) KEEP(xs);  // once for all rows
                    UNROLL for (int r = 0; r < R; r++) part[r][m] = Codes::add(part[r][m], w[r], xs);
                }
            }
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int m = 0; m < M; m++) {
                    const Floats added = Codes::floats(part[r][m], x + m * x_stride);
                    if constexpr (BY_BLOCK)
                        UNROLL for (int b = 0; b < COUNT; b++) of[r][b] = fma(added, splat(scale(r, b)), of[r][b]);
                    else
                        of[r][m] = fma(added, scales[r], of[r][m]);
                }
        } else {  // or to the weights, which takes no registers for a chunk's own sums
            UNROLL for (int j = 0; j < Codes::STEPS; j++) {
                Floats w[R];
                UNROLL for (int r = 0; r < R; r++) w[r] = codes.weights(words[r], j) * scales[r];
                UNROLL for (int m = 0; m < M; m++) {
                    const Floats xs = load(reinterpret_cast<const float*>(x + m * x_stride + j * LANES));
                    UNROLL for (int r = 0; r < R; r++) of[r][m] = fma(w[r], xs, of[r][m]);
                }
            }
        }
    }

    // Of a row of the weight by all rows of x.
    INLINE_METHOD void totals(int r, float (&to)[M]) const {
#if FEWBITS_BF16
        if constexpr (FOLDED) {
            float all[8];
            _mm256_storeu_ps(all, sums_of_folds(of[r][0], of[r][1], of[r][COUNT - 2], of[r][COUNT - 1]));
            UNROLL for (int m = 0; m < M; m++) to[m] = all[m];
            return;
        }
#endif
        UNROLL for (int m = 0; m < M; m++) to[m] = total(r, m);
    }

private:
    INLINE_METHOD float total(int r, int m) const {
        return sum(BY_BLOCK && PER_CHUNK == 2 ? halves(of[r][0], of[r][COUNT - 1]) : of[r][m]) * Codes::factor();
    }
};

// R rows of the weight, so many apart, from n on.
template <class Codes, bool NESTED, int M, int R, int PER_CHUNK>
INLINE void few_rows(const Linear4Bit& a, const uint32_t* x, int64_t row, int64_t n, int64_t apart,
                     Scales<NESTED, R>& scales) {
    const Weight4Bit w = a.w;  // a copy, which nothing that is written can change
    const int64_t row_bytes = w.k / 2, apart_bytes = apart * row_bytes, blocks = w.k / w.block_size;
    const Layout<Codes> layout(w.k, M);
    const int64_t x_stride = layout.row, step = layout.chunk;
    const int64_t together = PER_CHUNK > 1 ? 1 : most(1, w.block_size / CHUNK);  // chunks in one block
    const uint8_t* packed = w.packed + n * row_bytes;
    const Codes codes(w.values);
    Sums<Codes, M, R, PER_CHUNK> sums;
    Ints words[R];
    int64_t block = n * blocks;
    const auto block_of = [&](int r, int b) __attribute__((always_inline)) { return block + r * apart * blocks + b; };
    const auto read = [&]() __attribute__((always_inline)) {
        UNROLL for (int r = 0; r < R; r++) {
            words[r] = load_ints(packed + r * apart_bytes);
            fetch(packed + r * apart_bytes + AHEAD);
            if (FEWBITS_AVX512) __builtin_prefetch(packed + r * apart_bytes + (M == 1 ? 1024 : 512), 0, 3);
            KEEP(words[r]);
        }
    };
    if (row == 0)
        UNROLL for (int r = 0; r < R; r++) scales.fetch_later(block_of(r, 0) + 2 * blocks, blocks);
    for (int64_t left = w.k / CHUNK; left > 0;) {
        int64_t served = INT64_MAX;  // blocks whose scales are at hand in every row
        UNROLL for (int r = 0; r < R; r++) served = least(served, scales.prepare(r, block_of(r, 0)));
        if (PER_CHUNK > 1 && served < PER_CHUNK) {  // blocks of one chunk with different scales of scales
            read();
            sums.add(codes, words, x, x_stride, [&](int r, int b) { return scale_of(w, block_of(r, b)); });
            packed += CHUNK / 2, x += step, block += PER_CHUNK, left--;
            continue;
        }
        const int64_t end = served / PER_CHUNK >= left ? 0 : most(0, left - served / PER_CHUNK * together);
        for (; left > end; block += PER_CHUNK) {
            for (int64_t i = 0; i < together; i++, left--) {
                read();
                sums.add(codes, words, x, x_stride, [&](int r, int b) __attribute__((always_inline)) {
                    return scales(r, block_of(r, b));
                });
                packed += CHUNK / 2, x += step;
            }
        }
    }
    const int64_t rest = w.k % CHUNK;  // only where a chunk has several blocks, or one
    if (rest > 0) {
        UNROLL for (int r = 0; r < R; r++) {
            uint8_t bytes[CHUNK / 2] = {};
            memcpy(bytes, packed + r * apart_bytes, static_cast<size_t>(rest / 2));
            words[r] = load_ints(bytes);
        }
        sums.add(codes, words, x, x_stride, [&](int r, int b) {
            return b * w.block_size < rest ? scale_of(w, block_of(r, b)) : 0.0f;
        });
    }
    UNROLL for (int r = 0; r < R; r++) {
        const int64_t column = n + r * apart;
        const float bias = a.bias == nullptr ? 0.0f : load_one(a.bias_dtype, a.bias, column);
        float totals[M];
        sums.totals(r, totals);
        UNROLL for (int m = 0; m < M; m++) store_one(a.dtype, a.out, (row + m) * w.n + column, totals[m] + bias);
    }
}

template <class Codes, bool NESTED, int M, int R, int PER_CHUNK>
INLINE void few_rows_from(const Linear4Bit& a, const uint32_t* x, int64_t row, int64_t first, int64_t count,
                          int64_t apart) {
    Scales<NESTED, R> scales(a.w);
    for (int64_t n = first; n < first + count; n++)
        few_rows<Codes, NESTED, M, R, PER_CHUNK>(a, x, row, n, apart, scales);
}

// Several rows share what is read of x. They are far apart, so that each is one of few long streams, which the hardware
// foresees; rows that follow each other were read at two thirds of the speed.
template <class Codes, bool NESTED, int M, int PER_CHUNK>
void few_rows_between(const Linear4Bit& a, const uint32_t* x, int64_t row, int64_t first, int64_t last) {
    constexpr int R = M == 1 ? ROWS : M == 2 || Codes::PAIRS ? 2 : ROWS;
    const int64_t apart = (last - first) / R;
    few_rows_from<Codes, NESTED, M, R, PER_CHUNK>(a, x, row, first, apart, apart);
    few_rows_from<Codes, NESTED, M, 1, PER_CHUNK>(a, x, row, first + R * apart, last - first - R * apart, 0);
}

template <class Codes, bool NESTED, int PER_CHUNK>
void few_rows_between(const Linear4Bit& a, const uint32_t* x, int64_t first, int64_t last) {
    const int64_t row_words = ceil_div(a.w.k, CHUNK) * Codes::WORDS;
    for (int64_t row = 0, count; row < a.rows; row += count, x += count * row_words) {
        count = group_of<Codes>(a.rows - row);
        switch (count) {
            case 1: few_rows_between<Codes, NESTED, 1, PER_CHUNK>(a, x, row, first, last); break;
            case 2: few_rows_between<Codes, NESTED, 2, PER_CHUNK>(a, x, row, first, last); break;
            case 3: few_rows_between<Codes, NESTED, 3, PER_CHUNK>(a, x, row, first, last); break;
            case 4: few_rows_between<Codes, NESTED, 4, PER_CHUNK>(a, x, row, first, last); break;
            default: few_rows_between<Codes, NESTED, Codes::GROUP, PER_CHUNK>(a, x, row, first, last);
        }
    }
}

template <class Codes, int PER_CHUNK>
void few_rows_between(const Linear4Bit& a, const uint32_t* x, int64_t first, int64_t last) {
    if (a.w.nested_absmax == nullptr) return few_rows_between<Codes, false, PER_CHUNK>(a, x, first, last);
    few_rows_between<Codes, true, PER_CHUNK>(a, x, first, last);
}

// False, with nothing done, if x cannot be put in order for these codes.
template <class Codes>
bool linear_few(const Linear4Bit& a) {
    const int64_t row_words = ceil_div(a.w.k, CHUNK) * Codes::WORDS;
    uint32_t* x = static_cast<uint32_t*>(scratch(4, static_cast<size_t>(a.rows * row_words) * 4));
    bool ordered = true;
    parallel_for(a.threads, a.rows, [&](int64_t row) {
        int64_t first = 0, count = group_of<Codes>(a.rows);  // of its group
        while (first + count <= row) first += count, count = group_of<Codes>(a.rows - first);
        const Layout<Codes> layout(a.w.k, count);
        uint32_t* to = x + first * row_words + (row - first) * layout.row;
        if (!order_for_chunks<Codes>(a, row, to, layout.chunk)) __atomic_store_n(&ordered, false, __ATOMIC_RELAXED);
    });
    if (!ordered) return false;
    // long streams, but at most so many rows that a second group of rows of x finds them in the second-level cache
    const int64_t most_rows = a.rows <= Codes::GROUP ? 256 : 64;
    const int64_t piece = most(16, least(most_rows, a.w.n / (8 * a.threads) / ROWS * ROWS));
    parallel_for(a.threads, ceil_div(a.w.n, piece), [&](int64_t index) {
        const int64_t first = index * piece, last = least(a.w.n, first + piece), blocks = CHUNK / a.w.block_size;
        if (CHUNK >= 128 && blocks == 4) return few_rows_between<Codes, CHUNK >= 128 ? 4 : 1>(a, x, first, last);
        if (CHUNK >= 64 && blocks == 2) return few_rows_between<Codes, CHUNK >= 64 ? 2 : 1>(a, x, first, last);
        few_rows_between<Codes, 1>(a, x, first, last);
    });
    return true;
}

}  // namespace
}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

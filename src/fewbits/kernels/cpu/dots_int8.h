// Products of some rows of x with some rows of a weight in 8 bits, q, as dot products or, once these are packed, with four
// bytes of x in all lanes.
#pragma once

#include "decode_int8.h"
#include "simd.h"

namespace fewbits {
namespace FEWBITS_LEVEL {
namespace {

#define FORGET(pointer) asm("" : "+r"(pointer))

constexpr int GROUP = 4;       // rows of q that are multiplied at a time
constexpr int64_t PANEL = 64;  // rows of q that a task takes, at most

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

// -------------------------------------------------------------------------------------------------- kinds of products
// X, Q         what x and q are stored as
// STEP         elements of a register, and ROWS of x for which there are enough of them
// FITS         whether the elements of x fit in registers as well
// OFFSET       what is added to each element of x
// total        the sums of four registers, less the offsets

#if FEWBITS_AVX512
#define FEWBITS_INTEGERS 1
struct Integers {
    using X = uint8_t;
    using Q = int8_t;
    using Register = __m512i;
    static constexpr int STEP = 64, ROWS = 6, OFFSET = 128;
    static constexpr bool FITS = true;
    INLINE Register zero() { return _mm512_setzero_si512(); }
    INLINE Register load_x(const X* x) { return _mm512_loadu_si512(x); }
    INLINE Register load_q(const Q* q) { return _mm512_loadu_si512(q); }
    // in assembly since GCC 12 spills the accumulators of the intrinsic
    INLINE void add(Register& sum, Register x, Register q) {
#ifdef FEWBITS_EMULATE
        sum = emulated::dpbusd(sum, x, q);
#else
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(q));
#endif
    }
    INLINE FourInts total(Register a, Register b, Register c, Register d) {
        a = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        c = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        a = _mm512_add_epi32(_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c));
        const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
        return (FourInts)_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    }
    INLINE Four total(Register a, Register b, Register c, Register d, FourInts offsets) {
        return __builtin_convertvector(total(a, b, c, d) - offsets, Four);
    }
};
#elif FEWBITS_AVX2
#define FEWBITS_INTEGERS 1
struct Integers {  // in 16 bits: vpmaddubsw, of bytes, saturates
    using X = int16_t;
    using Q = int8_t;
    using Register = __m256i;
    static constexpr int STEP = 16, ROWS = 3, OFFSET = 0;
    static constexpr bool FITS = false;
    INLINE Register zero() { return _mm256_setzero_si256(); }
    INLINE Register load_x(const X* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
    INLINE Register load_q(const Q* q) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    }
    INLINE void add(Register& sum, Register x, Register q) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, q));
    }
    INLINE Four total(Register a, Register b, Register c, Register d, FourInts) {
        a = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
        const __m128i all = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        return (Four)_mm_cvtepi32_ps(all);
    }
};
#endif

struct InRegisters {  // fp32, q converted as it is read
    using X = float;
    using Q = int8_t;
    using Register = Floats;
    static constexpr int STEP = LANES, ROWS = LANES == 16 ? 4 : 2, OFFSET = 0;
    static constexpr bool FITS = true;
    INLINE Register zero() { return FEWBITS_LEVEL::zero(); }
    INLINE Register load_x(const X* x) { return load(x); }
    INLINE Register load_q(const Q* q) { return load_int8(q); }
    INLINE void add(Register& sum, Register x, Register q) { sum = fma(x, q, sum); }
    INLINE Four total(Register a, Register b, Register c, Register d, FourInts) {
#if FEWBITS_AVX512
        a = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        c = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const __m512d ab = _mm512_castps_pd(a), cd = _mm512_castps_pd(c);
        a = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
        return (Four)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif FEWBITS_AVX2
        a = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        return (Four)_mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
#else
        return Four{sum(a), sum(b), sum(c), sum(d)};
#endif
    }
};

struct Fp32 : InRegisters {  // q has been made fp32
    using Q = float;
    static constexpr int ROWS = LANES == 16 ? 6 : LANES == 8 ? 3 : 2;
    INLINE Register load_q(const Q* q) { return load(q); }
};

// ---------------------------------------------------------------------------------------------------------- products

// Brings memory that is wanted later into the second-level cache, some of it at a time.
struct Ahead {
    const char* at;
    int64_t lines;

    Ahead part(int64_t index, int64_t parts) const {
        const int64_t first = lines * index / parts;
        return {at + 64 * first, lines * (index + 1) / parts - first};
    }
    void fetch(int64_t count) {
        for (count = least(count, lines), lines -= count; count > 0; count--, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// sums [ROWS, PANEL] (4 of a row) += (x [ROWS, k] q [4, k]^T - offsets) * scale
template <class Kind, int ROWS>
void dots(const typename Kind::X* x, int64_t x_stride, const typename Kind::Q* const* q, int64_t k,
          const int32_t* offsets, const float* scale, float* sums, Ahead ahead) {
    constexpr int STEP = Kind::STEP;
    using Q = typename Kind::Q;
    using X = typename Kind::X;
    typename Kind::Register acc[ROWS][GROUP];
    UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int c = 0; c < GROUP; c++) acc[r][c] = Kind::zero();
    }
    const Q *q0 = q[0], *q1 = q[1], *q2 = q[2], *q3 = q[3];
    const X* upper = x + 3 * x_stride;  // addresses of six rows from two pointers and two multiples of the stride
    const auto step = [&](int64_t at, const Q* w0, const Q* w1, const Q* w2, const Q* w3)
                          __attribute__((always_inline)) {
        if constexpr (LANES == 16) {  // enough registers for those of q
            typename Kind::Register w[GROUP] = {Kind::load_q(w0), Kind::load_q(w1), Kind::load_q(w2), Kind::load_q(w3)};
            UNROLL for (int c = 0; c < GROUP; c++) KEEP(w[c]);
            UNROLL for (int r = 0; r < ROWS; r++) {
                auto v = Kind::load_x((r < 3 ? x : upper) + r % 3 * x_stride + at);
                KEEP(v);
                UNROLL for (int c = 0; c < GROUP; c++) Kind::add(acc[r][c], v, w[c]);
            }
        } else {
            const Q* const rows[GROUP] = {w0, w1, w2, w3};
            UNROLL for (int c = 0; c < GROUP; c++) {
                const auto w = Kind::load_q(rows[c]);
                const X *here = x + at, *above = upper + at;
                if (!Kind::FITS) FORGET(here);  // x is read again for each row of q, not kept
                UNROLL for (int r = 0; r < ROWS; r++) {
                    Kind::add(acc[r][c], Kind::load_x((r < 3 ? here : above) + r % 3 * x_stride), w);
                }
            }
        }
    };
    const int64_t whole = k / STEP * STEP, burst = whole ? ceil_div(ahead.lines * STEP, whole) : 0;
    for (int64_t at = 0; at < whole; at += STEP) {
        if (ahead.lines) ahead.fetch(burst);
        step(at, q0 + at, q1 + at, q2 + at, q3 + at);
    }
    if (whole < k) {  // x has zeros there, or what stands for them
        Q rest[GROUP][STEP] = {};
        for (int c = 0; c < GROUP; c++) memcpy(rest[c], q[c] + whole, (k - whole) * sizeof(Q));
        step(whole, rest[0], rest[1], rest[2], rest[3]);
    }
    FourInts less = {};
    if (Kind::OFFSET) memcpy(&less, offsets, 16);
    UNROLL for (int r = 0; r < ROWS; r++) {
        Four sum;
        memcpy(&sum, sums + r * PANEL, 16);
        sum += Kind::total(acc[r][0], acc[r][1], acc[r][2], acc[r][3], less) * scale[r];
        memcpy(sums + r * PANEL, &sum, 16);
    }
}

template <class Kind>
struct DotsOf {
    using Function = void (*)(const typename Kind::X*, int64_t, const typename Kind::Q* const*, int64_t, const int32_t*,
                              const float*, float*, Ahead);
    static Function of(int64_t rows) {
        switch (rows) {
            case 1: return dots<Kind, 1>;
            case 2: return dots<Kind, 2>;
            case 3: return dots<Kind, Kind::ROWS < 3 ? 1 : 3>;
            case 4: return dots<Kind, Kind::ROWS < 4 ? 1 : 4>;
            case 5: return dots<Kind, Kind::ROWS < 5 ? 1 : 5>;
            default: return dots<Kind, Kind::ROWS < 6 ? 1 : 6>;
        }
    }
};

#if FEWBITS_AVX512
// OFFSET times the sum of each of some rows
void row_offsets(const int8_t* q, int64_t q_stride, int64_t rows, int64_t k, int32_t* offsets) {
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(Integers::OFFSET));
    const __mmask64 rest = k % 64 ? ~0ull >> (64 - k % 64) : 0;
    for (int64_t row = 0; row < rows; row++, q += q_stride) {
        __m512i even = _mm512_setzero_si512(), odd = even;
        int64_t at = 0;
        for (; at + 128 <= k; at += 128) {
            Integers::add(even, offset, _mm512_loadu_si512(q + at));
            Integers::add(odd, offset, _mm512_loadu_si512(q + at + 64));
        }
        if (at + 64 <= k) Integers::add(even, offset, _mm512_loadu_si512(q + at)), at += 64;
        if (rest) Integers::add(odd, offset, _mm512_maskz_loadu_epi8(rest, q + at));
        offsets[row] = _mm512_reduce_add_epi32(_mm512_add_epi32(even, odd));
    }
}
#endif

// sums [rows, PANEL] += x [rows, k] q [q_rows, k]^T * scale
template <class Kind>
void add_products(const typename Kind::X* x, int64_t x_stride, const float* scale, int64_t rows,
                  const typename Kind::Q* q, int64_t q_stride, int64_t q_rows, int64_t k, const int32_t* offsets,
                  float* sums, Ahead ahead) {
    const int64_t tiles = ceil_div(rows, Kind::ROWS), groups = ceil_div(q_rows, GROUP);
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
        const auto function = DotsOf<Kind>::of(count);
        for (int64_t group = 0; group < groups; group++) {
            const typename Kind::Q* w[GROUP];  // past the last row the last one again, for sums that nobody reads
            for (int64_t c = 0; c < GROUP; c++) w[c] = q + least(group * GROUP + c, q_rows - 1) * q_stride;
            function(x + first * x_stride, x_stride, w, k, offsets + group * GROUP, scale + first,
                     sums + first * PANEL + group * GROUP, ahead.part(tile * groups + group, tiles * groups));
        }
    }
}

#if FEWBITS_AVX512 && !FEWBITS_AMX
// A block of q that is wanted next: comes into the second-level cache, some lines at a time.
struct Coming {
    const int8_t* at;
    int64_t stride, rows, lines, line;  // lines of a row

    void fetch(int64_t count) {
        for (; count > 0 && rows > 0; count--) {
            __builtin_prefetch(at + 64 * line, 0, 2);
            if (++line == lines) line = 0, at += stride, rows--;
        }
    }
};

// Of each 4 columns of q the bytes of all PANEL rows: packed [columns / 4, PANEL, 4], zeros past the last column and
// any numbers past the last row.
void pack(const int8_t* q, int64_t q_stride, int64_t rows, int64_t columns, int8_t* packed) {
    for (int64_t at = 0; at < columns; at += 64) {
        const __mmask64 there = columns - at < 64 ? ~0ull >> (64 - (columns - at)) : ~0ull;
        for (int64_t first = 0; first < PANEL; first += LANES) {
            Ints words[LANES];
            UNROLL for (int i = 0; i < LANES; i++)
                words[i] = (Ints)_mm512_maskz_loadu_epi8(there, q + least(first + i, rows - 1) * q_stride + at);
            transpose(words);
            UNROLL for (int i = 0; i < LANES; i++)
                store_ints(packed + (at / 4 + i) * PANEL * 4 + first * 4, words[i]);
        }
    }
}

// sums [ROWS, PANEL] += (x [ROWS, columns] q [PANEL, columns]^T - offsets) * scale: as dots, with four bytes of a row
// of x in all lanes, whose sums are of a row of q each and need not be added up.
template <int ROWS>
void packed_dots(const uint8_t* x, int64_t x_stride, const int8_t* packed, int64_t columns, const int32_t* offsets,
                 const float* scale, float* sums, Coming& coming, int64_t burst) {
    static_assert(PANEL == 64);
    __m512i acc[ROWS][4];
    UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int c = 0; c < 4; c++) acc[r][c] = _mm512_setzero_si512();
    }
    const uint8_t* upper = x + 3 * x_stride;
    for (int64_t at = 0; at < columns; at += 64) {
        coming.fetch(burst);
        for (int64_t i = at; i < at + 64; i += 4, packed += PANEL * 4) {
            __m512i w[4];
            UNROLL for (int c = 0; c < 4; c++) {
                w[c] = _mm512_loadu_si512(packed + c * 64);
                KEEP(w[c]);
            }
            UNROLL for (int r = 0; r < ROWS; r++) {
                int32_t four;
                memcpy(&four, (r < 3 ? x : upper) + r % 3 * x_stride + i, 4);
                __m512i v = _mm512_set1_epi32(four);
                KEEP(v);
                UNROLL for (int c = 0; c < 4; c++) Integers::add(acc[r][c], v, w[c]);
            }
        }
    }
    UNROLL for (int c = 0; c < 4; c++) {
        const __m512i less = _mm512_loadu_si512(offsets + c * 16);
        UNROLL for (int r = 0; r < ROWS; r++) {
            float* to = sums + r * PANEL + c * 16;
            store(to, load(to) + _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][c], less)) * splat(scale[r]));
        }
    }
}

// sums [rows, PANEL] += (x [rows, columns] q [PANEL, columns]^T - offsets) * scale
void add_packed(const uint8_t* x, int64_t x_stride, const float* scale, int64_t rows, const int8_t* packed,
                int64_t columns, const int32_t* offsets, float* sums, Coming& coming, int64_t burst) {
    const int64_t tiles = ceil_div(rows, Integers::ROWS);
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
        const auto function = count == 6 ? packed_dots<6> : count == 5 ? packed_dots<5> : count == 4 ? packed_dots<4> :
                              count == 3 ? packed_dots<3> : count == 2 ? packed_dots<2> : packed_dots<1>;
        function(x + first * x_stride, x_stride, packed, columns, offsets, scale + first, sums + first * PANEL, coming,
                 burst);
    }
}
#endif

}  // namespace
}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

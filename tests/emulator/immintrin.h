// AVX-512 and AMX for CPUs that have AVX2: what kernels/cpu uses of them, a lane after the other, so that these levels
// are tested on any x86-64 (CMake's FEWBITS_EMULATE). Semantics are those of Intel's intrinsics guide.
#pragma once

#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

// calls, or the code of a kernel takes minutes to compile
#define EMULATED __attribute__((noinline)) inline

namespace emulated {

template <class T>
struct Lanes {
    static constexpr int COUNT = 64 / sizeof(T);
    T of[COUNT];
};
template <class T, class V>
inline Lanes<T> lanes(const V& v) {
    static_assert(sizeof v == 64);
    Lanes<T> l;
    memcpy(&l, &v, 64);
    return l;
}
template <class V, class T>
inline V vector_of(const Lanes<T>& l) {
    V v;
    memcpy(&v, &l, 64);
    return v;
}
template <class To, class From>
inline To cast(const From& from) {  // the first bytes, or zeros above them
    To to = {};
    memcpy(&to, &from, sizeof to < sizeof from ? sizeof to : sizeof from);
    return to;
}

// f(lane) for every lane of a new vector
template <class V, class T, class F>
inline V each(F f) {
    Lanes<T> l;
    for (int i = 0; i < Lanes<T>::COUNT; i++) l.of[i] = static_cast<T>(f(i));
    return vector_of<V>(l);
}
template <class T, class F>
inline uint64_t mask_of(F f) {
    uint64_t mask = 0;
    for (int i = 0; i < Lanes<T>::COUNT; i++) mask |= static_cast<uint64_t>(static_cast<bool>(f(i))) << i;
    return mask;
}
inline bool in(uint64_t mask, int i) { return mask >> i & 1; }

// ---------------------------------------------------------------------------------------------- making and moving

template <class V>
EMULATED V load(const void* from) {
    V v;
    memcpy(&v, from, 64);
    return v;
}
template <class V, class T>
EMULATED V set1(T value) {
    return each<V, T>([&](int) { return value; });
}
template <class T, class V>
EMULATED V mask_mov(V a, uint64_t mask, V b) {
    const auto x = lanes<T>(a), y = lanes<T>(b);
    return each<V, T>([&](int i) { return in(mask, i) ? y.of[i] : x.of[i]; });
}
template <class T>
EMULATED __m512i maskz_loadu(uint64_t mask, const void* from) {
    const char* at = static_cast<const char*>(from);
    return each<__m512i, T>([&](int i) {
        T value = 0;
        if (in(mask, i)) memcpy(&value, at + i * sizeof(T), sizeof(T));
        return value;
    });
}
EMULATED void mask_storeu_epi32(void* to, uint64_t mask, __m512i v) {
    const auto l = lanes<int32_t>(v);
    for (int i = 0; i < 16; i++)
        if (in(mask, i)) memcpy(static_cast<char*>(to) + 4 * i, &l.of[i], 4);
}
EMULATED __m512i setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l, int m,
                          int n, int o, int p) {
    const int32_t all[16] = {a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
    return load<__m512i>(all);
}
template <class... Values>
EMULATED __m512i set_epi16(Values... values) {
    static_assert(sizeof...(values) == 32);
    const int backwards[] = {values...};
    return each<__m512i, int16_t>([&](int i) { return backwards[31 - i]; });
}
template <class Half, class V>
EMULATED Half half(V v, int which) {
    Half h;
    memcpy(&h, reinterpret_cast<const char*>(&v) + 32 * which, 32);
    return h;
}
EMULATED __m512i insert_half(__m512i v, __m256i h, int which) {
    memcpy(reinterpret_cast<char*>(&v) + 32 * which, &h, 32);
    return v;
}

// ---------------------------------------------------------------------------------------------- permuting

template <class T, class V>
EMULATED V permute(__m512i index, V v) {
    using Index = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    const auto from = lanes<T>(v);
    const auto at = lanes<Index>(index);
    return each<V, T>([&](int i) { return from.of[at.of[i] % Lanes<T>::COUNT]; });
}
template <class T, class V>
EMULATED V permute2(V a, __m512i index, V b) {
    using Index = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    const auto x = lanes<T>(a), y = lanes<T>(b);
    const auto at = lanes<Index>(index);
    constexpr int COUNT = Lanes<T>::COUNT;
    return each<V, T>([&](int i) { return (at.of[i] & COUNT ? y : x).of[at.of[i] % COUNT]; });
}
template <class V>
EMULATED V shuffle_quarters(V a, V b, int imm) {
    const auto x = lanes<uint64_t>(a), y = lanes<uint64_t>(b);
    return each<V, uint64_t>([&](int i) {
        const int quarter = imm >> i / 2 * 2 & 3;
        return (i < 4 ? x : y).of[2 * quarter + i % 2];
    });
}
template <class T, class V>
EMULATED V unpack(V a, V b, int high) {
    const auto x = lanes<T>(a), y = lanes<T>(b);
    constexpr int QUARTER = 16 / sizeof(T);
    return each<V, T>([&](int i) {
        const int at = i / QUARTER * QUARTER + i % QUARTER / 2 + high * QUARTER / 2;
        return (i % 2 ? y : x).of[at];
    });
}

// ---------------------------------------------------------------------------------------------- arithmetic

template <class T, class V, class F>
EMULATED V with(V a, V b, F f) {
    const auto x = lanes<T>(a), y = lanes<T>(b);
    return each<V, T>([&](int i) { return f(x.of[i], y.of[i]); });
}
template <class T, class F>
EMULATED uint64_t compare(__m512i a, __m512i b, F f) {
    const auto x = lanes<T>(a), y = lanes<T>(b);
    return mask_of<T>([&](int i) { return f(x.of[i], y.of[i]); });
}
EMULATED uint64_t cmp_ps(__m512 a, __m512 b, int how) {
    const auto x = lanes<float>(a), y = lanes<float>(b);
    return mask_of<float>([&](int i) {
        const float p = x.of[i], q = y.of[i];
        switch (how) {
            case _CMP_GT_OQ: return p > q;
            case _CMP_GE_OQ: return p >= q;
            case _CMP_LT_OQ: return p < q;
            case _CMP_LE_OQ: return p <= q;
            case _CMP_UNORD_Q: return p != p || q != q;
            default: __builtin_trap();
        }
    });
}
EMULATED __m512 fmadd(__m512 a, __m512 b, __m512 c) {
    __m512 sum;
    for (int h = 0; h < 2; h++) {
        const __m256 part = _mm256_fmadd_ps(half<__m256>(a, h), half<__m256>(b, h), half<__m256>(c, h));
        memcpy(reinterpret_cast<char*>(&sum) + 32 * h, &part, 32);
    }
    return sum;
}
EMULATED __m512i madd_epi16(__m512i a, __m512i b) {
    const auto x = lanes<int16_t>(a), y = lanes<int16_t>(b);
    return each<__m512i, int32_t>([&](int i) { return x.of[2 * i] * y.of[2 * i] + x.of[2 * i + 1] * y.of[2 * i + 1]; });
}
EMULATED __m512i dpbusd(__m512i sum, __m512i a, __m512i b) {
    const auto s = lanes<int32_t>(sum);
    const auto x = lanes<uint8_t>(a);
    const auto y = lanes<int8_t>(b);
    return each<__m512i, int32_t>([&](int i) {
        int32_t all = s.of[i];
        for (int j = 4 * i; j < 4 * i + 4; j++) all += x.of[j] * y.of[j];
        return all;
    });
}
EMULATED __m512i ternarylogic(__m512i a, __m512i b, __m512i c, int imm) {
    const auto x = lanes<uint64_t>(a), y = lanes<uint64_t>(b), z = lanes<uint64_t>(c);
    return each<__m512i, uint64_t>([&](int i) {
        uint64_t out = 0;
        for (int row = 0; row < 8; row++)
            if (imm >> row & 1)
                out |= (row & 4 ? x.of[i] : ~x.of[i]) & (row & 2 ? y.of[i] : ~y.of[i]) & (row & 1 ? z.of[i] : ~z.of[i]);
        return out;
    });
}
template <class T, class F>
EMULATED T reduced(__m512i v, F f) {
    const auto l = lanes<T>(v);
    T all = l.of[0];
    for (int i = 1; i < Lanes<T>::COUNT; i++) all = f(all, l.of[i]);
    return all;
}
EMULATED float reduce_add_ps(__m512 v) {  // in a tree
    auto l = lanes<float>(v);
    for (int count = 8; count > 0; count /= 2)
        for (int i = 0; i < count; i++) l.of[i] = l.of[i] + l.of[i + count];
    return l.of[0];
}
EMULATED __m512 i32gather_ps(__m512i index, const float* from) {
    const auto at = lanes<int32_t>(index);
    return each<__m512, float>([&](int i) { return from[at.of[i]]; });
}

// ---------------------------------------------------------------------------------------------- converting

template <class Narrow, class Wide, class To>
EMULATED To narrowed(__m512i v) {
    const auto wide = lanes<Wide>(v);
    Narrow out[Lanes<Wide>::COUNT];
    for (int i = 0; i < Lanes<Wide>::COUNT; i++) out[i] = static_cast<Narrow>(wide.of[i]);
    To to = {};
    memcpy(&to, out, sizeof out);
    return to;
}
template <class Narrow, class From>
EMULATED __m512i widened(From v) {
    Narrow in[16];
    memcpy(in, &v, sizeof in);
    return each<__m512i, int32_t>([&](int i) { return static_cast<int32_t>(in[i]); });
}
EMULATED __m512i rounded(__m512 v, int how) {
    const auto l = lanes<float>(v);
    return each<__m512i, int32_t>([&](int i) {
        const float x = l.of[i];
        const float integer = how == 0 ? nearbyintf(x) : how == 1 ? floorf(x) : how == 2 ? ceilf(x) : truncf(x);
        return integer >= -0x1p31f && integer < 0x1p31f ? static_cast<int32_t>(integer) : INT32_MIN;
    });
}
EMULATED __m512 cvtph_ps(__m256i v) {
    __m512 out;
    for (int h = 0; h < 2; h++) {
        __m128i part;
        memcpy(&part, reinterpret_cast<const char*>(&v) + 16 * h, 16);
        const __m256 wide = _mm256_cvtph_ps(part);
        memcpy(reinterpret_cast<char*>(&out) + 32 * h, &wide, 32);
    }
    return out;
}
EMULATED __m256i cvtps_ph(__m512 v) {
    __m256i out;
    for (int h = 0; h < 2; h++) {
        const __m128i part = _mm256_cvtps_ph(half<__m256>(v, h), _MM_FROUND_TO_NEAREST_INT);
        memcpy(reinterpret_cast<char*>(&out) + 16 * h, &part, 16);
    }
    return out;
}
EMULATED uint16_t bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    if ((bits & 0x7f800000) == 0) return static_cast<uint16_t>(bits >> 16 & 0x8000);  // subnormal ones are zeros
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
EMULATED __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
    const auto x = lanes<float>(low), y = lanes<float>(high);
    return each<__m512i, uint16_t>([&](int i) { return bf16(i < 16 ? x.of[i] : y.of[i - 16]); });
}
EMULATED float from_bf16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
EMULATED __m512 dpbf16(__m512 sum, __m512i a, __m512i b) {
    const auto s = lanes<float>(sum);
    const auto x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
    return each<__m512, float>([&](int i) {
        const float odd = fmaf(from_bf16(x.of[2 * i + 1]), from_bf16(y.of[2 * i + 1]), s.of[i]);
        return fmaf(from_bf16(x.of[2 * i]), from_bf16(y.of[2 * i]), odd);
    });
}

// ---------------------------------------------------------------------------------------------- tiles

struct Tile {
    uint8_t of[16][64];
};
EMULATED Tile (&tiles())[8] {
    static thread_local Tile all[8];
    return all;
}
EMULATED bool& configured() {
    static thread_local bool is = false;
    return is;
}
EMULATED Tile& tile(int index) {
    if (!configured()) __builtin_trap();  // what a CPU does
    return tiles()[index];
}
EMULATED void use_tiles(bool use) {
    configured() = use;
    memset(tiles(), 0, sizeof tiles());
}
EMULATED void tile_load(int index, const void* from, int64_t row_bytes) {
    for (int r = 0; r < 16; r++) memcpy(tile(index).of[r], static_cast<const char*>(from) + r * row_bytes, 64);
}
EMULATED void tile_store(int index, void* to, int64_t row_bytes) {
    for (int r = 0; r < 16; r++) memcpy(static_cast<char*>(to) + r * row_bytes, tile(index).of[r], 64);
}
template <class Sum, class T, class F>
EMULATED void multiply_tiles(int sums, int left, int right, F product) {
    constexpr int PER_WORD = 4 / sizeof(T);
    Sum s[16][16];
    T x[16][64 / sizeof(T)], w[16][64 / sizeof(T)];
    memcpy(s, tile(sums).of, sizeof s), memcpy(x, tile(left).of, sizeof x), memcpy(w, tile(right).of, sizeof w);
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++)
                for (int j = 0; j < PER_WORD; j++) s[m][n] += product(x[m][PER_WORD * k + j], w[k][PER_WORD * n + j]);
    memcpy(tile(sums).of, s, sizeof s);
}
EMULATED void dpbf16_tiles(int sums, int left, int right) {
    multiply_tiles<float, uint16_t>(sums, left, right, [](uint16_t a, uint16_t b) { return from_bf16(a) * from_bf16(b); });
}
EMULATED void dpbssd_tiles(int sums, int left, int right) {
    multiply_tiles<int32_t, int8_t>(sums, left, right, [](int8_t a, int8_t b) { return int32_t{a} * b; });
}

// ---------------------------------------------------------------------------------------------- by their names
#define EMULATED_BINARY(name, V, T, expression) \
    EMULATED V name(V a, V b) {                   \
        return with<T>(a, b, [](T x, T y) { return static_cast<T>(expression); }); \
    }
#define EMULATED_SHIFT(name, T, expression) \
    EMULATED __m512i name(__m512i v, unsigned n) { \
        return with<T>(v, v, [&](T x, T) { return static_cast<T>(expression); }); \
    }
EMULATED __m512 setzero_ps() { return __m512{}; }
EMULATED __m512i setzero_si512() { return __m512i{}; }
EMULATED __m512 set1_ps(float x) { return set1<__m512, float>(x); }
EMULATED __m512i set1_epi8(int8_t x) { return set1<__m512i, int8_t>(x); }
EMULATED __m512i set1_epi16(int16_t x) { return set1<__m512i, int16_t>(x); }
EMULATED __m512i set1_epi32(int32_t x) { return set1<__m512i, int32_t>(x); }
EMULATED __m512 loadu_ps(const void* p) { return load<__m512>(p); }
EMULATED __m512 load_ps(const void* p) { return load<__m512>(p); }
EMULATED __m512i loadu_si512(const void* p) { return load<__m512i>(p); }
EMULATED __m512i load_si512(const void* p) { return load<__m512i>(p); }
EMULATED void storeu_ps(void* p, __m512 v) { memcpy(p, &v, 64); }
EMULATED __m512i maskz_loadu_epi8(uint64_t k, const void* p) { return maskz_loadu<int8_t>(k, p); }
EMULATED __m512i maskz_loadu_epi16(uint64_t k, const void* p) { return maskz_loadu<int16_t>(k, p); }
EMULATED __m128i maskz_loadu_epi8_16(uint64_t k, const void* p) { return cast<__m128i>(maskz_loadu<int8_t>(k & 0xffff, p)); }
EMULATED __m512 mask_mov_ps(__m512 a, uint64_t k, __m512 b) { return mask_mov<float>(a, k, b); }
EMULATED __m512i mask_mov_epi16(__m512i a, uint64_t k, __m512i b) { return mask_mov<int16_t>(a, k, b); }
EMULATED __m512 mask_blend_ps(uint64_t k, __m512 a, __m512 b) { return mask_mov<float>(a, k, b); }
EMULATED __m512i mask_blend_epi16(uint64_t k, __m512i a, __m512i b) { return mask_mov<int16_t>(a, k, b); }
EMULATED __m512i mask_set1_epi32(__m512i a, uint64_t k, int32_t x) { return mask_mov<int32_t>(a, k, set1_epi32(x)); }
EMULATED __m512i maskz_set1_epi32(uint64_t k, int32_t x) { return mask_mov<int32_t>(__m512i{}, k, set1_epi32(x)); }
EMULATED_BINARY(add_epi16, __m512i, uint16_t, x + y)
EMULATED_BINARY(add_epi32, __m512i, uint32_t, x + y)
EMULATED_BINARY(sub_epi32, __m512i, uint32_t, x - y)
EMULATED_BINARY(max_epi32, __m512i, int32_t, x > y ? x : y)
EMULATED_BINARY(and_si512, __m512i, uint64_t, x & y)
EMULATED_BINARY(or_si512, __m512i, uint64_t, x | y)
EMULATED_BINARY(xor_si512, __m512i, uint64_t, x ^ y)
EMULATED_BINARY(srlv_epi32, __m512i, uint32_t, y < 32 ? x >> y : 0)
EMULATED_BINARY(add_ps, __m512, float, x + y)
EMULATED_BINARY(max_ps, __m512, float, x > y ? x : y)
EMULATED_BINARY(min_ps, __m512, float, x < y ? x : y)
EMULATED_SHIFT(srli_epi16, uint16_t, x >> n)
EMULATED_SHIFT(srli_epi32, uint32_t, x >> n)
EMULATED_SHIFT(srli_epi64, uint64_t, x >> n)
EMULATED_SHIFT(slli_epi32, uint32_t, x << n)
EMULATED_SHIFT(slli_epi64, uint64_t, x << n)
EMULATED __m512i mask_or_epi32(__m512i s, uint64_t k, __m512i a, __m512i b) { return mask_mov<int32_t>(s, k, or_si512(a, b)); }
EMULATED __m512i mask_add_epi32(__m512i s, uint64_t k, __m512i a, __m512i b) { return mask_mov<int32_t>(s, k, add_epi32(a, b)); }
EMULATED __m512i mask_add_epi16(__m512i s, uint64_t k, __m512i a, __m512i b) { return mask_mov<int16_t>(s, k, add_epi16(a, b)); }
EMULATED __m512i castps_si512(__m512 v) { return cast<__m512i>(v); }
EMULATED __m512 castsi512_ps(__m512i v) { return cast<__m512>(v); }
EMULATED __m512d castps_pd(__m512 v) { return cast<__m512d>(v); }
EMULATED __m512 castpd_ps(__m512d v) { return cast<__m512>(v); }
EMULATED __m256i castsi512_si256(__m512i v) { return cast<__m256i>(v); }
EMULATED __m256 castps512_ps256(__m512 v) { return cast<__m256>(v); }
EMULATED __m512 castps128_ps512(__m128 v) { return cast<__m512>(v); }
EMULATED __m256i extracti64x4_epi64(__m512i v, int i) { return half<__m256i>(v, i); }
EMULATED __m256 extractf32x8_ps(__m512 v, int i) { return half<__m256>(v, i); }
EMULATED __m512i inserti64x4(__m512i v, __m256i h, int i) { return insert_half(v, h, i); }
EMULATED __m512i broadcast_i64x4(__m256i h) { return insert_half(insert_half(__m512i{}, h, 0), h, 1); }
EMULATED __m512i permutexvar_epi16(__m512i i, __m512i v) { return permute<int16_t>(i, v); }
EMULATED __m512i permutex2var_epi16(__m512i a, __m512i i, __m512i b) { return permute2<int16_t>(a, i, b); }
EMULATED __m512i permutexvar_epi32(__m512i i, __m512i v) { return permute<int32_t>(i, v); }
EMULATED __m512i permutex2var_epi32(__m512i a, __m512i i, __m512i b) { return permute2<int32_t>(a, i, b); }
EMULATED __m512 permutexvar_ps(__m512i i, __m512 v) { return permute<float>(i, v); }
EMULATED __m512 permutex2var_ps(__m512 a, __m512i i, __m512 b) { return permute2<float>(a, i, b); }
EMULATED __m512i shuffle_i32x4(__m512i a, __m512i b, int i) { return shuffle_quarters(a, b, i); }
EMULATED __m512 shuffle_f32x4(__m512 a, __m512 b, int i) { return shuffle_quarters(a, b, i); }
EMULATED __m512i unpacklo_epi32(__m512i a, __m512i b) { return unpack<int32_t>(a, b, 0); }
EMULATED __m512i unpackhi_epi32(__m512i a, __m512i b) { return unpack<int32_t>(a, b, 1); }
EMULATED __m512i unpacklo_epi64(__m512i a, __m512i b) { return unpack<int64_t>(a, b, 0); }
EMULATED __m512i unpackhi_epi64(__m512i a, __m512i b) { return unpack<int64_t>(a, b, 1); }
EMULATED __m512 unpacklo_ps(__m512 a, __m512 b) { return unpack<float>(a, b, 0); }
EMULATED __m512 unpackhi_ps(__m512 a, __m512 b) { return unpack<float>(a, b, 1); }
EMULATED __m512d unpacklo_pd(__m512d a, __m512d b) { return unpack<double>(a, b, 0); }
EMULATED __m512d unpackhi_pd(__m512d a, __m512d b) { return unpack<double>(a, b, 1); }
EMULATED int32_t reduce_add_epi32(__m512i v) { return reduced<int32_t>(v, [](int32_t x, int32_t y) { return x + y; }); }
EMULATED int32_t reduce_max_epi32(__m512i v) { return reduced<int32_t>(v, [](int32_t x, int32_t y) { return x > y ? x : y; }); }
EMULATED __m512 i32gather_ps_scaled(__m512i i, const float* p, int) { return i32gather_ps(i, p); }
EMULATED __mmask32 cmpeq_epi16_mask(__m512i a, __m512i b) { return static_cast<__mmask32>(compare<int16_t>(a, b, [](int16_t x, int16_t y) { return x == y; })); }
EMULATED __mmask32 cmpgt_epi16_mask(__m512i a, __m512i b) { return static_cast<__mmask32>(compare<int16_t>(a, b, [](int16_t x, int16_t y) { return x > y; })); }
EMULATED __mmask32 cmpge_epu16_mask(__m512i a, __m512i b) { return static_cast<__mmask32>(compare<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x >= y; })); }
EMULATED __mmask32 test_epi16_mask(__m512i a, __m512i b) { return static_cast<__mmask32>(compare<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return (x & y) != 0; })); }
EMULATED __mmask32 kor_mask32(__mmask32 a, __mmask32 b) { return a | b; }
EMULATED __m128i cvtepi32_epi8(__m512i v) { return narrowed<int8_t, int32_t, __m128i>(v); }
EMULATED __m128i cvtepi64_epi8(__m512i v) { return narrowed<int8_t, int64_t, __m128i>(v); }
EMULATED __m256i cvtepi16_epi8(__m512i v) { return narrowed<int8_t, int16_t, __m256i>(v); }
EMULATED __m256i cvtepi32_epi16(__m512i v) { return narrowed<int16_t, int32_t, __m256i>(v); }
EMULATED __m512i cvtepi8_epi32(__m128i v) { return widened<int8_t>(v); }
EMULATED __m512i cvtepu8_epi32(__m128i v) { return widened<uint8_t>(v); }
EMULATED __m512i cvtepu16_epi32(__m256i v) { return widened<uint16_t>(v); }
EMULATED __m512 cvtepi32_ps(__m512i v) {
    const auto l = lanes<int32_t>(v);
    return each<__m512, float>([&](int i) { return static_cast<float>(l.of[i]); });
}
EMULATED __m512i cvtps_epi32(__m512 v) { return rounded(v, 0); }
EMULATED __m512i cvttps_epi32(__m512 v) { return rounded(v, 3); }
EMULATED __m512i cvt_roundps_epi32(__m512 v, int how) { return rounded(v, how & 3); }
EMULATED __m256i cvtps_ph_how(__m512 v, int) { return cvtps_ph(v); }

}  // namespace emulated

#undef _kor_mask32
#define _kor_mask32 emulated::kor_mask32
#undef _mm512_add_epi16
#define _mm512_add_epi16 emulated::add_epi16
#undef _mm512_add_epi32
#define _mm512_add_epi32 emulated::add_epi32
#undef _mm512_add_ps
#define _mm512_add_ps emulated::add_ps
#undef _mm512_and_si512
#define _mm512_and_si512 emulated::and_si512
#undef _mm512_broadcast_i64x4
#define _mm512_broadcast_i64x4 emulated::broadcast_i64x4
#undef _mm512_castpd_ps
#define _mm512_castpd_ps emulated::castpd_ps
#undef _mm512_castps128_ps512
#define _mm512_castps128_ps512 emulated::castps128_ps512
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256 emulated::castps512_ps256
#undef _mm512_castps_pd
#define _mm512_castps_pd emulated::castps_pd
#undef _mm512_castps_si512
#define _mm512_castps_si512 emulated::castps_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emulated::castsi512_ps
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 emulated::castsi512_si256
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated::cmp_ps
#undef _mm512_cmpeq_epi16_mask
#define _mm512_cmpeq_epi16_mask emulated::cmpeq_epi16_mask
#undef _mm512_cmpge_epu16_mask
#define _mm512_cmpge_epu16_mask emulated::cmpge_epu16_mask
#undef _mm512_cmpgt_epi16_mask
#define _mm512_cmpgt_epi16_mask emulated::cmpgt_epi16_mask
#undef _mm512_cvt_roundps_epi32
#define _mm512_cvt_roundps_epi32 emulated::cvt_roundps_epi32
#undef _mm512_cvtepi16_epi8
#define _mm512_cvtepi16_epi8 emulated::cvtepi16_epi8
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#undef _mm512_cvtepi64_epi8
#define _mm512_cvtepi64_epi8 emulated::cvtepi64_epi8
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated::cvtps_ph_how
#undef _mm512_cvttps_epi32
#define _mm512_cvttps_epi32 emulated::cvttps_epi32
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 emulated::extracti64x4_epi64
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated::fmadd
#undef _mm512_i32gather_ps
#define _mm512_i32gather_ps emulated::i32gather_ps_scaled
#undef _mm512_inserti64x4
#define _mm512_inserti64x4 emulated::inserti64x4
#undef _mm512_load_ps
#define _mm512_load_ps emulated::load_ps
#undef _mm512_load_si512
#define _mm512_load_si512 emulated::load_si512
#undef _mm512_loadu_ps
#define _mm512_loadu_ps emulated::loadu_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emulated::loadu_si512
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 emulated::madd_epi16
#undef _mm512_mask_add_epi16
#define _mm512_mask_add_epi16 emulated::mask_add_epi16
#undef _mm512_mask_add_epi32
#define _mm512_mask_add_epi32 emulated::mask_add_epi32
#undef _mm512_mask_blend_epi16
#define _mm512_mask_blend_epi16 emulated::mask_blend_epi16
#undef _mm512_mask_blend_ps
#define _mm512_mask_blend_ps emulated::mask_blend_ps
#undef _mm512_mask_mov_epi16
#define _mm512_mask_mov_epi16 emulated::mask_mov_epi16
#undef _mm512_mask_mov_ps
#define _mm512_mask_mov_ps emulated::mask_mov_ps
#undef _mm512_mask_or_epi32
#define _mm512_mask_or_epi32 emulated::mask_or_epi32
#undef _mm512_mask_set1_epi32
#define _mm512_mask_set1_epi32 emulated::mask_set1_epi32
#undef _mm512_mask_storeu_epi32
#define _mm512_mask_storeu_epi32 emulated::mask_storeu_epi32
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8 emulated::maskz_loadu_epi8
#undef _mm512_maskz_set1_epi32
#define _mm512_maskz_set1_epi32 emulated::maskz_set1_epi32
#undef _mm512_max_epi32
#define _mm512_max_epi32 emulated::max_epi32
#undef _mm512_max_ps
#define _mm512_max_ps emulated::max_ps
#undef _mm512_min_ps
#define _mm512_min_ps emulated::min_ps
#undef _mm512_or_si512
#define _mm512_or_si512 emulated::or_si512
#undef _mm512_permutex2var_epi16
#define _mm512_permutex2var_epi16 emulated::permutex2var_epi16
#undef _mm512_permutex2var_epi32
#define _mm512_permutex2var_epi32 emulated::permutex2var_epi32
#undef _mm512_permutex2var_ps
#define _mm512_permutex2var_ps emulated::permutex2var_ps
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#undef _mm512_permutexvar_epi32
#define _mm512_permutexvar_epi32 emulated::permutexvar_epi32
#undef _mm512_permutexvar_ps
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#undef _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32 emulated::reduce_add_epi32
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#undef _mm512_reduce_max_epi32
#define _mm512_reduce_max_epi32 emulated::reduce_max_epi32
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 emulated::set1_epi16
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated::set1_epi32
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 emulated::set1_epi8
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated::set1_ps
#undef _mm512_set_epi16
#define _mm512_set_epi16 emulated::set_epi16
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated::setr_epi32
#undef _mm512_setzero_ps
#define _mm512_setzero_ps emulated::setzero_ps
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 emulated::setzero_si512
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 emulated::shuffle_i32x4
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#undef _mm512_slli_epi64
#define _mm512_slli_epi64 emulated::slli_epi64
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 emulated::srli_epi16
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#undef _mm512_srli_epi64
#define _mm512_srli_epi64 emulated::srli_epi64
#undef _mm512_srlv_epi32
#define _mm512_srlv_epi32 emulated::srlv_epi32
#undef _mm512_storeu_ps
#define _mm512_storeu_ps emulated::storeu_ps
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 emulated::ternarylogic
#undef _mm512_test_epi16_mask
#define _mm512_test_epi16_mask emulated::test_epi16_mask
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 emulated::unpackhi_epi32
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 emulated::unpackhi_epi64
#undef _mm512_unpackhi_pd
#define _mm512_unpackhi_pd emulated::unpackhi_pd
#undef _mm512_unpackhi_ps
#define _mm512_unpackhi_ps emulated::unpackhi_ps
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 emulated::unpacklo_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 emulated::unpacklo_epi64
#undef _mm512_unpacklo_pd
#define _mm512_unpacklo_pd emulated::unpacklo_pd
#undef _mm512_unpacklo_ps
#define _mm512_unpacklo_ps emulated::unpacklo_ps
#undef _mm512_xor_si512
#define _mm512_xor_si512 emulated::xor_si512
#undef _mm_maskz_loadu_epi8
#define _mm_maskz_loadu_epi8 emulated::maskz_loadu_epi8_16

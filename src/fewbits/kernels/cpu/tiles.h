// AMX: products of tiles of 16 rows of 64 bytes, whose sums are tiles of 16 rows of 16 numbers of 32 bits.
//
// The left operand has its rows in a tile's, 64 bytes at a time. The right one has four bytes of each of its 16 columns
// in each of the tile's rows, two numbers in bf16 or four in 8 bits, which meet the same four of a row of the left.
#pragma once

#include "simd.h"

#if FEWBITS_AMX

namespace fewbits {
namespace FEWBITS_LEVEL {

constexpr int64_t SIDE = 16;                // rows of a tile, and columns of sums
constexpr int64_t ROW_BYTES = 64;           // of a row
constexpr int64_t TILE = SIDE * ROW_BYTES;  // bytes
constexpr int64_t BLOCK = 2 * SIDE;         // rows and columns of the sums that are in tiles at a time

#ifdef FEWBITS_EMULATE
#define TILES(emulated, ...) emulated
#else
#define TILES(emulated, ...) asm volatile(__VA_ARGS__)
#endif

// This thread's tiles while it lives. Before and after they are empty, and cost nothing to save.
class TilesInUse {
   public:
    TilesInUse() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int i = 0; i < 8; i++) shapes.row_bytes[i] = ROW_BYTES, shapes.rows[i] = SIDE;
        TILES(emulated::use_tiles(true), "ldtilecfg %0" ::"m"(shapes));
    }
    ~TilesInUse() { TILES(emulated::use_tiles(false), "tilerelease" ::: "memory"); }
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
};

// In assembly since the intrinsics of GCC 12 do not tell the compiler that they read and write memory.
template <int tile>
INLINE void tile_zero() {
    TILES(emulated::tile(tile) = {}, "tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
INLINE void tile_load(const void* from, int64_t row_bytes) {
    TILES(emulated::tile_load(tile, from, row_bytes), "tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes),
          "i"(tile) : "memory");
}
template <int tile>
INLINE void tile_store(void* to, int64_t row_bytes) {
    TILES(emulated::tile_store(tile, to, row_bytes), "tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes),
          "i"(tile) : "memory");
}

struct Bf16Tiles {
    template <int sums, int left, int right>
    static INLINE_METHOD void add() {
        TILES(emulated::dpbf16_tiles(sums, left, right), "tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums),
              "i"(left), "i"(right));
    }
};
struct Int8Tiles {
    template <int sums, int left, int right>
    static INLINE_METHOD void add() {
        TILES(emulated::dpbssd_tiles(sums, left, right), "tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(left),
              "i"(right));
    }
};

// Two rows of tiles: bytes from a tile to the next, to the one of the other row, and from a row of a tile to the next.
struct TileRows {
    const char* at;
    int64_t step, other, row_bytes;
};

// Where they are put in order: [steps][2][SIDE][ROW_BYTES].
INLINE TileRows tiles_in_order(const void* at) { return {static_cast<const char*>(at), 2 * TILE, TILE, ROW_BYTES}; }

// Sums are in tiles 0 to 3, of the upper and the lower row of tiles of the left operand with the first and the second
// one of the right. Without the other of an operand, what is in its tiles is not touched.
template <bool two_left, bool two_right>
INLINE void zero_sums() {
    tile_zero<0>();
    if (two_right) tile_zero<1>();
    if (two_left) tile_zero<2>();
    if (two_left && two_right) tile_zero<3>();
}

template <class Kind, bool two_left, bool two_right>
INLINE void add_step(const TileRows& left, const TileRows& right, int64_t step) {
    const char *of_left = left.at + step * left.step, *of_right = right.at + step * right.step;
    tile_load<6>(of_right, right.row_bytes);
    tile_load<4>(of_left, left.row_bytes);
    Kind::template add<0, 4, 6>();
    if (two_left) {
        tile_load<5>(of_left + left.other, left.row_bytes);
        Kind::template add<2, 5, 6>();
    }
    if (two_right) {
        tile_load<7>(of_right + right.other, right.row_bytes);
        Kind::template add<1, 4, 7>();
        if (two_left) Kind::template add<3, 5, 7>();
    }
}

// [BLOCK, BLOCK]
template <bool two_left, bool two_right>
INLINE void load_sums(const void* from) {
    constexpr int64_t row = 2 * ROW_BYTES;
    const char *upper = static_cast<const char*>(from), *lower = upper + SIDE * row;
    tile_load<0>(upper, row);
    if (two_right) tile_load<1>(upper + ROW_BYTES, row);
    if (two_left) tile_load<2>(lower, row);
    if (two_left && two_right) tile_load<3>(lower + ROW_BYTES, row);
}

template <bool two_left, bool two_right>
INLINE void store_sums(void* to) {
    constexpr int64_t row = 2 * ROW_BYTES;
    char *upper = static_cast<char*>(to), *lower = upper + SIDE * row;
    tile_store<0>(upper, row);
    if (two_right) tile_store<1>(upper + ROW_BYTES, row);
    if (two_left) tile_store<2>(lower, row);
    if (two_left && two_right) tile_store<3>(lower + ROW_BYTES, row);
}

// sums [BLOCK, BLOCK] of both rows of tiles, or one, of the left operand with those of the right one: with two of each
// there are as few loads as there are products. Fresh sums begin at zero. `meanwhile` is called with each step.
template <class Kind, bool two_left, bool two_right, class Meanwhile>
INLINE void multiply_tiles(const TileRows& left, const TileRows& right, int64_t steps, void* sums, bool fresh,
                           const Meanwhile& meanwhile) {
    if (fresh)
        zero_sums<two_left, two_right>();
    else
        load_sums<two_left, two_right>(sums);
    for (int64_t step = 0; step < steps; step++) {
        meanwhile(step);
        add_step<Kind, two_left, two_right>(left, right, step);
    }
    store_sums<two_left, two_right>(sums);
}

}  // namespace FEWBITS_LEVEL
}  // namespace fewbits
#endif

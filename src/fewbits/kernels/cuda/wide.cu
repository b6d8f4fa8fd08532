// out[M, N] = x[M, K] @ weight[N, K].T + bias for a weight in 4 or 8 bits and many rows of x: a prompt, or many texts.
// For sm_90a.
//
// Warpgroups multiply, each 64 rows of the weight by TILE_M rows of x, whose sums stay in registers while K goes
// by. One more fills a ring of slots in shared memory, each of 64 (4 bits) or 128 columns (8 bits): of x, which the
// copy engine brings box by box, and of the weight. Barriers say which slots are full, and which are free again.
//
// 4 bits: the third warpgroup decodes the scales, too. A multiplying warp looks up the two values of a byte, multiplies
// them by the scale in fp32 and rounds the products to x's dtype, as dequantizing does; in registers they are the first
// operand of the matrix units (wgmma), x in shared memory is the second. While these multiply the columns of one slot,
// the warp decodes those of the next. What limits this is how long that takes a warp, since the matrix units take half
// of shared memory's bandwidth: so it asks for values a step before it wants them, and where there are registers for
// codes too (AHEAD). The loop's slots must be the same for all lanes as the compiler sees it: then they, and what
// describes x to the matrix units, lie in registers of a warp. A condition by warp anywhere around the loop ends that.
//
// 8 bits: x is there in 8 bits as well, with a scale for each row (quantize_rows.cu), and sums are of integers. In
// columns with outliers what x lost is multiplied by the weight's codes at the end, in x's own dtype: three warps gather
// both while the tile's other columns are multiplied. Where more than MOST_OUTLIERS columns have any, x is taken as it was
// instead, and the weight's codes are widened as 4 bits are decoded.
//
// The tiles stand in an order in which blocks that run at the same time share rows of x and of the weight in the
// second-level cache. The last ones are shared by blocks (see all_added in hopper.cuh), so that none is idle. Or all tiles
// are shared by SPLIT blocks each, a cluster, which add up sums in each other's shared memory (add_in_cluster).
//
// Compiled for: BF16, BITS, TILE_M (64, 128 or 256 rows of x), WARPGROUPS (that multiply: 2; or 3 in 4 bits, for 128 rows
// of x), STAGES (slots), SPLIT (1, 2 or 4: TILE_M / SPLIT is 32 or more), and for 4 bits FORMAT_BLOCK (elements of a
// quantization block, 64 or more) and NESTED (double quantization), for 8 bits MOST_OUTLIERS (16 at most). The grid:
// blocks, no more than there are chunks of tiles; SPLIT for each tile where that is not 1.

#include "hopper.cuh"

#if BITS == 4
typedef u16 Number;
#else
typedef u8 Number;
#endif

struct Arguments {
  Map x_map;                // of x [M, K], 16-bit numbers or 8-bit codes; boxes: TILE_M rows by 128 bytes
  Map weight_map;           // of packed, in bytes; boxes: ROWS by 32, or by 128
#if BITS == 8
  Map exact_map;            // of exact; boxes: TILE_M rows by 64 columns
#endif
  const u8* packed;         // [N, K / 2], or [N, K] in 8 bits
  const void* scales;       // 4 bits: [N, K / FORMAT_BLOCK] fp32, or codes in 8 bits; 8 bits: [N] fp32
  const float* nested;      // scale of each 256 of those
  const float* offset;      // added to each scale
  const float* dynamic;     // the values of the 256 codes of scales
  const float* values;      // [16]: of the codes, but for the scale and the shift below
  const Number* x;          // [M, K], rows x_stride apart
  const void* bias;         // [N]
  u16* out;                 // [M, N]
  long long x_stride;
  int m, n, k, bias_bytes;
  u32* workspace;           // [2 * blocks, ROWS * TILE_M]: sums of parts of tiles
  u32* counters;            // [tiles]: zeros, before and after
#if BITS == 4
  float value_scale;
  float value_shift;        // comes first, and has 10 bits; where it is SHIFTED
#else
  const float* x_scales;    // [M, at least to a multiple of TILE_M]
  const u16* exact;         // [M, K]: x as it was, rows exact_stride apart
  const int* outliers;      // how many columns have any, and which, in their order
  long long exact_stride;
#endif
};

constexpr int CONSUMERS = 128 * WARPGROUPS, ROWS = 64 * WARPGROUPS, PRODUCERS = 128, THREADS = CONSUMERS + PRODUCERS;
// registers of a thread; more than the block has would be waited for forever
constexpr int PRODUCER_REGISTERS = BITS == 8 ? 56 : WARPGROUPS == 2 ? 40 : 32;
constexpr int CONSUMER_REGISTERS = BITS == 8 ? 224 : WARPGROUPS == 2 ? 232 : 160;
constexpr int X_BYTES = TILE_M * 128;                       // of a slot: 128 bytes of each row
constexpr int ROW_BYTES = BITS == 4 ? 32 : 128;             // of a row of the weight, in a slot
constexpr int CODE_BYTES = ROWS * ROW_BYTES, SCALE_BYTES = BITS == 4 ? ROWS * 4 : 0;
constexpr int SUMS = TILE_M / 2;                            // of a thread: 64 rows by TILE_M over 128 threads
constexpr int TABLE_BYTES = BITS == 4 ? 65536 : 0;          // a Pair for each byte and lane, 256 bytes apart
constexpr int DYNAMIC_BYTES = BITS == 4 ? 1024 : 0;
constexpr int EXACT_BYTES = BITS == 8 ? X_BYTES : 0;        // columns of outliers: 128 bytes for each row of x
constexpr int GROUP = 1024 / TILE_M;                        // tiles of x that blocks work on at a time
// Values of codes are shifted: in bf16, but with three warpgroups, whose time would be 4 to 8 % longer (else 1 to 2 %).
constexpr bool SHIFTED = BF16 && WARPGROUPS == 2;
constexpr bool AHEAD = TILE_M < 256 && WARPGROUPS == 2;     // there are registers for codes that are not wanted yet
constexpr int SCALE_TURNS = (ROWS + PRODUCERS - 1) / PRODUCERS;
constexpr int SHARE = TILE_M / SPLIT;                       // rows of x that a block of a cluster gives out
constexpr int GATHERERS = PRODUCERS - 32;                   // 8 bits: all but the warp that asks for boxes

// How a chunk of 128 columns is multiplied: at one go as integers, or in two halves with the weight as 16-bit numbers.
struct Integers {
  typedef int Sum;
  static constexpr int SLOTS = 1;
};
struct Decoded {
  typedef float Sum;
  static constexpr int SLOTS = 2;
};
typedef u32 Operand[4][4];  // of 64 columns of the weight

// Columns of outliers, of one part in the first half of the lines and of the next in the second: a row of x has its 16
// numbers in two pieces of 16 bytes of a line, as second_operand says. In the two after these are the weight's codes, of
// 16 columns of the rows `line` and, where there are as many, `line` + TILE_M.
DEVICE int piece_of_line(int line, int piece) { return line * 128 + ((piece ^ line) & 7) * 16; }
DEVICE int codes_of_row(int buffer, int row) { return piece_of_line(row % TILE_M, buffer * 4 + 2 + row / TILE_M); }

#if BITS == 4

// Scales of a row as they are stored, as many as are read at a time: each row's are in a line of their own, and a read of
// many lines holds up look-ups. What is read is only looked at when it is wanted, as it is on its way until then.
constexpr int MOST_SCALES = NESTED && SCALE_TURNS == 1 ? 16 : 4;  // there are no registers for more

struct RawScales {
#if NESTED
  u32 codes[MOST_SCALES / 4];
  float scale;  // of their 256
#else
  float value[MOST_SCALES];
#endif
};

DEVICE int scales_of_read(int row_blocks) {
  return row_blocks % MOST_SCALES == 0 ? MOST_SCALES : row_blocks % 4 == 0 ? 4 : 1;
}

DEVICE void read_scales(RawScales& raw, const Arguments& a, int row, int block, int count) {
  const long long at = (long long)row * (a.k / FORMAT_BLOCK) + (block & -count);
#if NESTED
  const u8* codes = (const u8*)a.scales + at;
  if (count == 1) {
    raw.codes[0] = *codes;
  } else if (MOST_SCALES == 4 || count == 4) {
    raw.codes[0] = *(const u32*)codes;
  } else {
    const uint4 words = *(const uint4*)codes;
    raw.codes[0] = words.x;
    if constexpr (MOST_SCALES > 4) raw.codes[1] = words.y, raw.codes[2] = words.z, raw.codes[3] = words.w;
  }
  raw.scale = a.nested[at >> 8];
#else
  const float* values = (const float*)a.scales + at;
  if (count == 1) {
    raw.value[0] = *values;
  } else {
    const float4 four = *(const float4*)values;
    raw.value[0] = four.x, raw.value[1] = four.y, raw.value[2] = four.z, raw.value[3] = four.w;
  }
#endif
}

template <typename T>
DEVICE T one_of(const T (&values)[4], int index) {
  const T low = index & 1 ? values[1] : values[0], high = index & 1 ? values[3] : values[2];
  return index & 2 ? high : low;
}

template <typename T>
DEVICE T one_of(const T (&values)[1], int) {
  return values[0];
}

DEVICE float scale_of(const RawScales& raw, int block, int count, const float* dynamic, float offset) {
  const int index = block & (count - 1);
#if NESTED
  return dynamic[one_of(raw.codes, index >> 2) >> 8 * (index & 3) & 255] * raw.scale + offset;
#else
  return one_of(raw.value, index);
#endif
}

// Rounded to 14 bits, so that its product with a shift of 10 is exact: then the shift of a zero is taken back to the bit.
DEVICE float shortened(float scale) { return __uint_as_float((__float_as_uint(scale) + 0x200) & ~0x3ffu); }

// The two values of a byte in the table: in fp32 for fp16, and halves for bf16, so that look-ups take half the bandwidth.
// A factor and, where they are SHIFTED, an offset make all values of the format nearly halves. The one goes with the
// scales, the other is taken back by fused additions.
#if BF16
typedef u32 Pair;
DEVICE Pair as_pair(float first, float second) { return half_narrowed(first) | (u32)half_narrowed(second) << 16; }
DEVICE float2 values_of(Pair pair) { return make_float2(half_widened((u16)pair), half_widened((u16)(pair >> 16))); }
#else
typedef float2 Pair;
DEVICE Pair as_pair(float first, float second) { return make_float2(first, second); }
DEVICE float2 values_of(Pair pair) { return pair; }
#endif
#endif

extern "C" __global__ void OF_CLUSTER __launch_bounds__(THREADS, 1) wide(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) u8 shared[];
  const int thread = threadIdx.x, lane = kept(thread & 31), warp = kept(thread >> 5);
  const int chunks = (a.k + 127) / 128;
  const int weight_tiles = (a.n + ROWS - 1) / ROWS, x_tiles = (a.m + TILE_M - 1) / TILE_M;

  // Each block works on so many whole tiles; of those that are left over the chunks stand in a line, and each takes an
  // equal stretch of it, half a tile at least where there are so many.
  const int tiles = weight_tiles * x_tiles, blocks = gridDim.x;
  const bool few_left = tiles % blocks * 2 < blocks && tiles % blocks > 0 && tiles > blocks;
  const int whole = tiles / blocks - few_left, line_first = whole * blocks;
  const u32 line = (tiles - line_first) * chunks;
  const int begin = stretch_begin(line, blockIdx.x, blocks), end = stretch_begin(line, blockIdx.x + 1, blocks);
  const int all_chunks = whole * chunks + end - begin;  // of this block
  const int parts = whole + (end > begin ? (end - 1) / chunks - begin / chunks + 1 : 0);
  struct Part {
    int tile, begin, end;  // chunks
  };
  auto is_tile = [&](const Part& part) { return part.end - part.begin == chunks; };  // and not a part of one
  auto part_of = [&](int index) {
    if (index < whole) return Part{index * blocks + (int)blockIdx.x, 0, chunks};
    const int tile = begin / chunks + index - whole, start = tile * chunks;
    return Part{line_first + tile, max(begin - start, 0), min(end - start, chunks)};
  };

  // tiles of the weight one after the other, by some tiles of x each
  struct Place {
    int weight_row, x_row;
  };
  auto place_of = [&](int tile) {
    const int group = tile / (weight_tiles * GROUP), width = min(GROUP, x_tiles - group * GROUP);
    const int within = tile - group * weight_tiles * GROUP, weight_tile = within / width;
    return Place{weight_tile * ROWS, (group * GROUP + within - weight_tile * width) * TILE_M};
  };

  // The slots' parts, each at a multiple of 1024 bytes: x, codes; then all slots' scales.
  u8* table = shared;
  u8* ring = table + TABLE_BYTES;
  u8* exact = ring + STAGES * (X_BYTES + CODE_BYTES);
  float* slot_scales = (float*)(exact + EXACT_BYTES);
  float* dynamic = slot_scales + STAGES * SCALE_BYTES / 4;
  Barrier* full = (Barrier*)((u8*)dynamic + DYNAMIC_BYTES);
  Barrier* free = full + STAGES;
  [[maybe_unused]] Barrier* gathered = free + STAGES;  // columns of outliers, by buffer
  [[maybe_unused]] Barrier* taken = gathered + 2;
  u32* last_to_come = (u32*)(taken + 2);
  const u32 ring_address = shared_address(ring);
  auto x_address = [&](int slot) { return ring_address + slot * (X_BYTES + CODE_BYTES); };
  int slot = 0;
  u32 phase = 0;
  auto advance = [&] {
    if (++slot == STAGES) {
      slot = 0;
      phase ^= 1;
    }
  };

  if (thread == 0)
    for (int s = 0; s < STAGES; s++) {
      full[s].init(1 + (BITS == 4 ? PRODUCERS / 32 : 0));
      free[s].init(CONSUMERS / 32);
    }
  if (BITS == 8 && thread == 0)
    for (int buffer = 0; buffer < 2; buffer++) {
      gathered[buffer].init(GATHERERS / 32);
      taken[buffer].init(CONSUMERS / 32);
    }
  if (thread == 0) show_matrix_units();  // and the copy engine: that there are barriers
#if BITS == 4 && NESTED
  if (thread < 256) dynamic[thread] = a.dynamic[thread];
#endif
  __syncthreads();

  // ------------------------------------------------------------------------------------------ filling
  if (thread >= CONSUMERS) {
    give_registers<PRODUCER_REGISTERS>();
    const int own = thread - CONSUMERS;  // a row of the weight, and the one 128 further
#if BITS == 8
    if (own >= PRODUCERS - GATHERERS) {  // columns of outliers, for one part after the other
      wait_for_previous_kernel();
      const int outliers = a.outliers[0];
      if (outliers == 0 || outliers > MOST_OUTLIERS) return;
      // a thread takes eight of the columns, of every so many rows
      const int gatherer = own - (PRODUCERS - GATHERERS), halves = outliers > 8 ? 2 : 1, half = gatherer & (halves - 1);
      int column[8];
#pragma unroll
      for (int j = 0; j < 8; j++) column[j] = half * 8 + j < outliers ? a.outliers[1 + half * 8 + j] : -1;
      if (halves == 1)
        for (int i = gatherer; i < SHARE * 2; i += GATHERERS)
          store_for_matrix_units(shared_address(exact) + piece_of_line(i / 2, i % 2 * 4 + 1), make_uint4(0, 0, 0, 0));
      // the part whose sums are left for the last of its blocks comes at the end
      const int last = parts > whole + 1 && !is_tile(part_of(whole)) ? whole : parts;
      auto place_of_fill = [&](int fill) {
        return place_of(part_of(fill < last ? fill : fill + 1 < parts ? fill + 1 : last).tile);
      };
      auto weight_row = [&](const Place& place, int row) {
        return a.packed + (long long)min(place.weight_row + row, a.n - 1) * a.k;
      };
      for (int fill = 0; fill < parts; fill++) {
        const Place place = place_of_fill(fill);
        const int x_row = place.x_row + (SPLIT > 1 ? blockIdx.x % SPLIT * SHARE : 0), buffer = fill & 1;
        if (fill > 1) taken[buffer].wait(fill >> 1 & 1 ^ 1);
#pragma unroll 1
        for (int i = gatherer; i < SHARE * halves; i += GATHERERS) {
          const int row = i / halves;
          const long long at = min(x_row + row, a.m - 1);
          const float scale = a.x_scales[at];
          auto lost = [&](int j) {  // past the last column: nothing
            const int code = column[j] < 0 ? 0 : (signed char)a.x[at * a.x_stride + column[j]];
            return column[j] < 0 ? 0.0f : widened(a.exact[at * a.exact_stride + column[j]]) - code * scale;
          };
          store_for_matrix_units(shared_address(exact) + piece_of_line(row, buffer * 4 + half),
                                 make_uint4(pair_of_two(lost(0), lost(1)), pair_of_two(lost(2), lost(3)),
                                            pair_of_two(lost(4), lost(5)), pair_of_two(lost(6), lost(7))));
        }
#pragma unroll 1
        for (int i = gatherer; i < ROWS * halves; i += GATHERERS) {
          const u8* from = weight_row(place, i / halves);
          u32 codes[2] = {0, 0};
#pragma unroll
          for (int j = 0; j < 8; j++) codes[j / 4] |= (column[j] < 0 ? 0u : from[column[j]]) << j % 4 * 8;
          *(uint2*)(exact + codes_of_row(buffer, i / halves) + half * 8) = make_uint2(codes[0], codes[1]);
        }
        show_matrix_units();
        __syncwarp();
        if (lane == 0) gathered[buffer].arrive();
      }
      return;
    }
    if (own > 0) return;
#endif
#if BITS == 4
    // What does not come from the kernel before is on its way while that ends.
    const Part first = part_of(0);
    const int first_row = place_of(first.tile).weight_row;
    if (own < STAGES) fetch_box(a.weight_map, first.begin * 64 + own * 32, first_row);
    RawScales raw[SCALE_TURNS];
    const int row_blocks = a.k / FORMAT_BLOCK, scales = scales_of_read(row_blocks);
    auto read = [&](int row, int block) {
#pragma unroll
      for (int turn = 0; turn < SCALE_TURNS; turn++)
        read_scales(raw[turn], a, min(row + min(own + turn * PRODUCERS, ROWS - 1), a.n - 1), block, scales);
    };
    read(first_row, first.begin * 128 / FORMAT_BLOCK);
#endif
    wait_for_previous_kernel();
#if BITS == 8
    const bool integers = a.outliers[0] <= MOST_OUTLIERS;
    const Map& x_map = integers ? a.x_map : a.exact_map;
#else
    const bool integers = false;
    const Map& x_map = a.x_map;
#endif
    const int slots_of_chunk = integers ? Integers::SLOTS : Decoded::SLOTS, slots = all_chunks * slots_of_chunk;
    int half = 0, index = 0;
    Part part = part_of(0);
    Place place = place_of(part.tile);
    auto column = [&] { return part.begin * 128 + half * 64; };
    auto go_on = [&] {
      if (++half == slots_of_chunk) half = 0;
      if (half == 0 && ++part.begin == part.end && ++index < parts) {
        part = part_of(index);
        place = place_of(part.tile);
      }
    };
    auto wait_and_copy = [&] {
      free[slot].wait(phase ^ 1);
      if (own == 0) {
        full[slot].arrive_and_expect(X_BYTES + CODE_BYTES);
        copy_box(x_address(slot), x_map, column(), place.x_row, full[slot]);
        // 8 bits: of both halves, so that slots are alike
        const int code_column = BITS == 4 ? column() / 2 : part.begin * 128;
        copy_box(x_address(slot) + X_BYTES, a.weight_map, code_column, place.weight_row, full[slot]);
      }
      go_on();
    };
#if BITS == 8
    for (int i = 0; i < slots; i++) {
      wait_and_copy();
      advance();
    }
#else
    const float offset = NESTED ? *a.offset : 0.0f;
    int weight_row = first_row, block = first.begin * 128 / FORMAT_BLOCK;
    for (int i = 0; i < slots; i++) {
      wait_and_copy();
#pragma unroll
      for (int turn = 0; turn < SCALE_TURNS; turn++) {
        float scale = scale_of(raw[turn], block, scales, dynamic, offset) * a.value_scale;
        if (SHIFTED && a.value_shift != 0.0f) scale = shortened(scale);
        if (const int row = own + turn * PRODUCERS; row < ROWS) slot_scales[slot * ROWS + row] = scale;
      }
      __syncwarp();
      if (lane == 0) full[slot].arrive();
      // the next slot's, long before it is free; past the last one any
      const int next = min(column() / FORMAT_BLOCK, row_blocks - 1);
      if (place.weight_row != weight_row || (next & -scales) != (block & -scales))
        read(place.weight_row, next);
      weight_row = place.weight_row, block = next;
      advance();
    }
#endif
    return;
  }

  // ------------------------------------------------------------------------------------------ multiplying
  take_registers<CONSUMER_REGISTERS>();
  const int g = lane >> 2, t = lane & 3, row_of_tile = warp * 16 + g;
  auto release = [&](int slot) {
    if (lane == 0) free[slot].arrive();
  };
#if BITS == 4
  for (int i = thread; i < 256 * 8; i += CONSUMERS) {  // an eighth of an entry
    const Pair pair = as_pair(a.values[i >> 7], a.values[i >> 3 & 15]);
    Pair* to = (Pair*)(table + (i >> 3) * 256) + (i & 7) * 4;
#pragma unroll
    for (int j = 0; j < 4; j++) to[j] = pair;
  }
  meet_consumers<CONSUMERS>();
  wait_for_previous_kernel();

  // Of the 8 bytes of 16 columns of a row, bytes t and t + 4 belong to a thread. It reads all, as do the three
  // neighbours that have the others, and takes its own byte of each word.
  const u32 own_place = kept(lane * sizeof(Pair)), own_byte = kept(0x5504 | t << 4);
  struct Codes {
    uint4 words[2][2];  // 32 columns each, rows g and g + 8
    float scales[2];
  };
  struct Values {
    Codes codes;
    Pair pairs[2][2][4];
  } values;
  constexpr bool EARLY = sizeof(Pair) == 4;  // larger ones would take too many registers on their way
  auto pair_of_code = [&](const Codes& codes, int r, int p, int i) {
    const uint4 words = codes.words[r][p];
    const u32 word = i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
    return *(const Pair*)(table + __byte_perm(word, own_place, own_byte));
  };
  auto read_codes = [&](int) {
    full[slot].wait(phase);
    __syncwarp();
    const u8* from = ring + slot * (X_BYTES + CODE_BYTES) + X_BYTES + row_of_tile * 32;
    Codes codes;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      codes.scales[r] = slot_scales[slot * ROWS + row_of_tile + r * 8];
#pragma unroll
      for (int p = 0; p < 2; p++) codes.words[r][p] = *(const uint4*)(from + r * 256 + p * 16);
    }
    advance();
    return codes;
  };
  auto look_up = [&](const Codes& codes) {
    values.codes = codes;
    if constexpr (EARLY)
#pragma unroll
      for (int i = 0; i < 16; i++) values.pairs[i >> 3][i >> 2 & 1][i & 3] = pair_of_code(codes, i >> 3, i >> 2 & 1, i & 3);
  };
  auto make_operand = [&](Operand& operand) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float scale = values.codes.scales[r], shift = SHIFTED ? scale * a.value_shift : 0.0f;
#pragma unroll
      for (int p = 0; p < 2; p++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float2 two = values_of(EARLY ? values.pairs[r][p][i] : pair_of_code(values.codes, r, p, i));
          const float first = SHIFTED ? fmaf(two.x, scale, shift) : two.x * scale;
          const float second = SHIFTED ? fmaf(two.y, scale, shift) : two.y * scale;
          operand[p * 2 + i / 2][i % 2 * 2 + r] = pair_of_two(first, second);
        }
    }
  };
#else
  wait_for_previous_kernel();
  const int outliers = a.outliers[0];  // columns that have any
  const bool gathering = outliers > 0 && outliers <= MOST_OUTLIERS;
  int fill = 0;  // of a buffer with columns of outliers, that is used next

  // The pieces of 16 columns of 8 rows lie as second_operand says: a thread finds two neighbours, and those 8 further.
  struct Codes {
    u32 words[4][2];
  } values;
  auto read_codes = [&](int half) {
    full[slot].wait(phase);
    __syncwarp();
    const u8* from = ring + slot * (X_BYTES + CODE_BYTES) + X_BYTES + row_of_tile * 128 + t * 2;
    Codes codes;
#pragma unroll
    for (int s = 0; s < 4; s++) {
      const u8* piece = from + ((half * 4 + s) ^ g) * 16;
#pragma unroll
      for (int r = 0; r < 2; r++)
        codes.words[s][r] = *(const u16*)(piece + r * 1024) | (u32)*(const u16*)(piece + r * 1024 + 8) << 16;
    }
    advance();
    return codes;
  };
  auto look_up = [&](const Codes& codes) { values = codes; };
  auto make_operand = [&](Operand& operand) {
#pragma unroll
    for (int s = 0; s < 4; s++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        operand[s][r] = pair_of_bytes<0>(values.words[s][r]);
        operand[s][2 + r] = pair_of_bytes<1>(values.words[s][r]);
      }
  };
#endif

#if BITS == 8
  auto await_outliers = [&] {
    gathered[fill & 1].wait(fill >> 1 & 1);
    __syncwarp();
  };
  auto leave_outliers = [&] {  // or what has been done with them
    if (lane == 0) taken[fill & 1].arrive();
    fill++;
  };
  // What x lost in columns with outliers, times the weight's codes, is added to sums of so many rows of x.
  auto add_outliers = [&](auto& sums, int warp, int g, int t) {
    await_outliers();
    u32 operand[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u8* two = exact + codes_of_row(fill & 1, warp * 16 + g + i % 2 * 8) + t * 2 + i / 2 * 8;
      operand[i] = pair_of_two((signed char)two[0], (signed char)two[1]);
    }
    begin_products();
    multiply_16(sums, operand, second_operand(shared_address(exact) + (fill & 1) * 64), 1);
    commit_products();
    wait_for_products<0>();
    sums_are_there(sums);
    __syncwarp();
    leave_outliers();
  };
  auto skip_outliers = [&] {
    if (!gathering) return;
    await_outliers();  // or a later wait would take these for its own
    leave_outliers();
  };
#else
  auto skip_outliers = [] {};
#endif

  auto multiply = [&](auto kind) {
    typedef decltype(kind) Kind;
    constexpr bool DECODED = Kind::SLOTS == Decoded::SLOTS;
    typename Kind::Sum sums[SUMS];
    Operand operands[2];  // of the slot in work, and of the next one
    int left = all_chunks * Kind::SLOTS;  // slots whose products have not begun
    if constexpr (DECODED) {
      look_up(read_codes(0));
      make_operand(operands[0]);
      look_up(read_codes(1));
    }
    int now = 0, before = 0;  // the slot in work, and the one whose products may still be under way
    auto shared_by = [&](int tile, bool whole) {
      const int in_line = (tile - line_first) * chunks;
      const u32 first = whole ? blockIdx.x : stretch_of(line, in_line, blocks);
      const u32 last = whole ? blockIdx.x : stretch_of(line, in_line + chunks - 1, blocks);
      return Shared{a.workspace, a.counters + tile, last_to_come, first, last};
    };
    auto give_out = [&](auto& sums, const Place& place, int rows) {  // of x
      constexpr int SUMS = sizeof(sums) / 4;
      const int thread = thread_again(), g = thread >> 2 & 7, t = thread & 3;
      const int m = min(rows, a.m - place.x_row), row = place.weight_row + (thread >> 5) * 16;
#if BITS == 8
      if constexpr (!DECODED) {  // from here on the bits of fp32
#pragma unroll
        for (int c = 0; c < SUMS / 4; c++) {
          const float2 scale = *(const float2*)(a.x_scales + place.x_row + c * 8 + t * 2);
#pragma unroll
          for (int i = 0; i < 4; i++)
            set_float(sums[c * 4 + i], (float)sums[c * 4 + i] * (i % 2 ? scale.y : scale.x));
        }
        if (gathering) add_outliers(sums, thread >> 5, g, t);
      }
      const float* scales = (const float*)a.scales;
      const float scale0 = scales[min(row + g, a.n - 1)] * (1.0f / 127);
      const float scale1 = scales[min(row + g + 8, a.n - 1)] * (1.0f / 127);
#pragma unroll
      for (int i = 0; i < SUMS; i++) set_float(sums[i], as_float(sums[i]) * (i & 2 ? scale1 : scale0));
#endif
      const bool whole = m == rows && place.weight_row + ROWS <= a.n;
      write_sums(sums, a.out + (long long)place.x_row * a.n, m, a.n, row, a.bias, a.bias_bytes, g, t, whole);
    };
    int left_part = -1;  // whose sums were left for the last of its blocks
    u32 came_before = 0;
    for (int index = 0; index < parts; index++) {
      const Part part = part_of(index);
      const Place place = place_of(part.tile);
#pragma unroll
      for (int i = 0; i < SUMS; i++) sums[i] = 0;
#pragma unroll 1
      for (int chunk = part.begin; chunk < part.end; chunk++) {
#pragma unroll
        for (int half = 0; half < Kind::SLOTS; half++) {
          if constexpr (!DECODED) {
            full[slot].wait(phase);
            __syncwarp();
            advance();
          }
          const u64 x = second_operand(x_address(now));
          begin_products();
#pragma unroll
          for (int s = 0; s < 4; s++) {
            if constexpr (DECODED) {
              multiply_16(sums, operands[half][s], x + s * (32 >> 4), 1);
            } else {
              const u64 weight = second_operand(x_address(now) + X_BYTES + warp / 4 * 64 * 128);
              multiply_32(sums, weight + s * (32 >> 4), x + s * (32 >> 4), 1);
            }
          }
          commit_products();
          wait_for_products<1>();  // those of the slot before: it is free, and so is their operand
          if (half > 0 || chunk > part.begin) release(before);
          before = now;
          if (++now == STAGES) now = 0;
          left--;
          if constexpr (DECODED) {
            // What memory answers is asked for one step before it is wanted: the codes of the slot after the next one,
            // and then the values of these, while the next slot's are made an operand, and products go on.
            if constexpr (AHEAD) {
              Codes codes;
              if (left > 1) codes = read_codes(half);
              if (left > 0) make_operand(operands[half ^ 1]);
              if (left > 1) look_up(codes);
            } else {
              if (left > 0) make_operand(operands[half ^ 1]);
              if (left > 1) look_up(read_codes(half));
            }
          }
        }
      }
      wait_for_products<0>();
      sums_are_there(sums);
      release(before);

      if constexpr (SPLIT > 1) {
        typename Kind::Sum share[SUMS / SPLIT];
        add_in_cluster<SPLIT, 1, CONSUMERS>(share, sums, shared, blockIdx.x % SPLIT);
        const int x_row = place.x_row + blockIdx.x % SPLIT * SHARE;
        if (x_row < a.m) give_out(share, Place{place.weight_row, x_row}, SHARE);
        return;
      }
      const Shared shared_tile = shared_by(part.tile, index < whole);
      if (index + 1 < parts && shared_tile.first != shared_tile.last) {
        came_before = leave_part<CONSUMERS>(sums, shared_tile);
        left_part = index;
      } else if (all_added<CONSUMERS, 1>(sums, shared_tile)) {
        give_out(sums, place, TILE_M);
      } else {
        skip_outliers();
      }
    }
    if (left_part >= 0) {
      const int tile = part_of(left_part).tile;
      if (left_for_last<CONSUMERS, 1>(sums, shared_by(tile, false), came_before)) give_out(sums, place_of(tile), TILE_M);
    }
  };
#if BITS == 8
  if (outliers <= MOST_OUTLIERS) return multiply(Integers());
#endif
  multiply(Decoded());
}

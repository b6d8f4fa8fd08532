// out[M, N] = x[M, K] @ weight[N, K].T + bias for a quantized weight and up to 32 rows of x: decoding texts.
//
// The weight is read once, as it lies. A block works on tiles of 16 * ROW_TILES rows of it, one after the other. Each of
// its 16 warps takes chunks of LINE bytes of these rows, every 16th. Their codes come by asynchronous copies through a ring
// of the warp's own, whose slots are 16 rows of a chunk, some slots ahead. A lane turns its codes into pairs of 16-bit
// numbers that are operands of the matrix units as they come: which of the 16 columns of a step is which does not matter
// to a sum, as long as x is permuted alike. Eight bits fit into bf16 and fp16; pairs of four bits are looked up (see
// fill_pair_table). The sums of each quantization block of 4-bit codes are scaled in fp32. A row of 8-bit codes has one
// scale, and it comes last.
//
// Scales of 4-bit codes are decoded by all threads for all warps, one chunk ahead: 16 neighbours read those of a row for
// 16 chunks, which lie together. If each warp read those of its own chunk, 2 bytes of each of 32 rows, a read would take
// the first-level cache 32 passes, on the path of all the look-ups: a seventh of all time.
//
// What decides the time is not the memory but the instructions that decoding takes, and the look-ups. So loops are
// unrolled until slots and chunks are constants, and warps wait for each other no closer than a chunk apart. Where a
// block has one tile (TILES = 1) the warps' sums are added in the memory of tables and rings; where it has few (TILES of
// them) each tile's have a place, and are added at the end; with more (TILES = 0) those of a tile are added when the next
// one is done. In a fixed order, always.
//
// A tile of a block of its own may be shared by SPLIT blocks, a cluster: each takes the warps' chunks of every SPLIT-th
// row of chunks, and they add up their sums in each other's shared memory. So a block reads less of x, for more rows of
// the weight.
//
// Compiled for: BF16, BITS (4 or 8), FORMAT_BLOCK (elements of a quantization block), NESTED (double quantization),
// COLUMN_TILES (8 rows of x each), ROW_TILES, LINE (64, or 128 in 4 bits with blocks of 64 and more), CHUNKS (that a warp
// takes of a row), STAGES (slots of the ring, at most one more than a tile has), WHOLE (N is a multiple of a tile's rows,
// and a row's bytes of 16 * LINE * SPLIT), WHOLE_CHUNKS (a row's bytes are a multiple of LINE), TILES, SPLIT (1, or with
// one tile 2 or 4), X_EARLY (x is read before the tables are filled: it pays where a block has one tile). The grid: with
// one tile SPLIT blocks for each, else any number.

struct Arguments {
  const u8* packed;         // [N, K / 2], or [N, K] in 8 bits
  const void* scales;       // [N, K / FORMAT_BLOCK]: fp32, or codes in 8 bits; [N] fp32 for a weight in 8 bits
  const float* nested;      // scale of each 256 of those
  const float* offset;      // added to each scale
  const float* dynamic;     // the values of the 256 codes
  const u32* pairs;         // the values of each byte's two codes, as 16-bit numbers
  const u16* x;             // [M, K], rows x_stride apart
  const void* bias;         // [N]
  u16* out;                 // [M, N]
  long long x_stride;
  int m, n, k, bias_bytes;
};

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr bool SINGLE = TILES == 1, ALL_KEPT = TILES > 1;  // sums
constexpr int ROWS = 16 * ROW_TILES;
constexpr int CHUNK = LINE * 8 / BITS;                 // columns
constexpr int UNIT = FORMAT_BLOCK < 64 ? 32 : 64;      // columns that share a scale and go to the matrix units together
constexpr int UNITS = CHUNK / UNIT, STEPS = UNIT / 16;
constexpr int CHUNK_SCALES = FORMAT_BLOCK < CHUNK ? CHUNK / FORMAT_BLOCK : 1;
constexpr bool AT_ONCE = WHOLE_CHUNKS && CHUNK_SCALES > 1;  // a thread reads all of a chunk's scales in a row
constexpr int SLOT = 16 * LINE, RING = STAGES * SLOT;
constexpr int TILE_SLOTS = CHUNKS * ROW_TILES;
constexpr int SCALES = (ROWS + 1) * CHUNK_SCALES;      // floats of a chunk; one more row: chunks begin at other banks
constexpr int SCALE_BUFFERS = LINE == 64 ? 4 : 3;      // each of a chunk of every warp; 3 do, 4 are quicker to count
constexpr int SCALE_TURNS = (ROW_TILES + 1) / 2;       // a thread reads the scales of one row and chunk in each
// The values of scales' codes, for each lane: in the gaps of the table of pairs, so that no two lanes meet in a bank. With
// fewer scales such copies take longer to make than they save (measured on an H200).
constexpr bool DYNAMIC_COPIES = NESTED && ROW_TILES > 3;
// Scales are read two chunks before they are decoded, not one: where it pays (measured on an H200), and where a chunk's
// number says which of two places is its own.
constexpr int SCALES_AHEAD = NESTED && COLUMN_TILES == 2 && !SINGLE && CHUNKS % 2 == 0 ? 2 : 1;
constexpr int KEPT_ROWS = ALL_KEPT ? TILES * ROWS : ROWS;  // whose sums are in a buffer
constexpr int PARTIAL_STRIDE = KEPT_ROWS + 4;          // floats: what a warp writes at once lies in 32 banks
constexpr int X_WORDS = UNITS * COLUMN_TILES * 2 * STEPS;  // of a chunk
// in registers: all of x, or what is wanted now and, where there is room, next; or the next takes its place unit by unit;
// the bounds were measured on an H200
constexpr bool X_STAYS = CHUNKS * X_WORDS <= 64 && TILE_SLOTS * SLOT <= (BITS == 8 ? 16384 : 8192);
constexpr bool X_AHEAD = !X_STAYS && X_WORDS <= (BITS == 8 ? 24 : SINGLE && ROW_TILES <= 2 ? 32 : 16);
constexpr bool X_IN_PLACE = !X_STAYS && !X_AHEAD;
constexpr int X_KEPT = X_STAYS ? CHUNKS : 1 + X_AHEAD;

// one row's codes of a unit
struct __align__(UNIT * BITS / 32) Codes {
  u32 word[UNIT * BITS / 128];
};

// of a row and a chunk
struct __align__(4 * CHUNK_SCALES) Scales {
  float of[CHUNK_SCALES];
};

// the same as stored, on its way: what is read at once stays in the first, since taking it apart would wait for it
struct RawScales {
  u32 codes[CHUNK_SCALES];
  float nested[CHUNK_SCALES];
  float plain[CHUNK_SCALES];
};

// a constant where a row is whole chunks of all warps
DEVICE int columns(const Arguments& a) { return WHOLE ? CHUNKS * SPLIT * WARPS * CHUNK : a.k; }

// of a lane of the matrix units: UNIT / 4 neighbouring columns of row g of x; two words are the b operands of a step
typedef u32 Operands[UNITS][COLUMN_TILES][2 * STEPS];
typedef float Sums[ROW_TILES][COLUMN_TILES][4];

DEVICE void load_unit(Operands& to, const Arguments& a, int chunk, int u, int lane) {
  const int g = lane >> 2, t = lane & 3, column = chunk * CHUNK + u * UNIT + t * (UNIT / 4);
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++) {
    // columns of the output past the last row of x are not written, whatever is read for them
    const int row = min(c * 8 + g, a.m - 1);
    const bool there = WHOLE_CHUNKS || column < a.k;
    const u16* from = a.x + (there ? row * a.x_stride + column : 0);
#pragma unroll
    for (int s = 0; s < STEPS; s += 2) {
      const uint4 words = there ? load_16_bytes(from + s * 4) : make_uint4(0, 0, 0, 0);
      to[u][c][2 * s] = words.x, to[u][c][2 * s + 1] = words.y;
      to[u][c][2 * s + 2] = words.z, to[u][c][2 * s + 3] = words.w;
    }
  }
}

// chunk: one that is there, if all are whole
DEVICE void load_x(Operands& to, const Arguments& a, int chunk, int lane) {
#pragma unroll
  for (int u = 0; u < UNITS; u++) load_unit(to, a, chunk, u, lane);
}

#if BITS == 8

// codes: of a slot, at the lane's row g and columns; done: called when a unit of x is no longer wanted
template <typename Done>
DEVICE void multiply(float (&sums)[COLUMN_TILES][4], const Operands& x, const u8* codes, Done done) {
  const Codes upper = *(const Codes*)codes, lower = *(const Codes*)(codes + 8 * LINE);
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    const u32 operand[4] = {pair_of_bytes<0>(upper.word[s]), pair_of_bytes<0>(lower.word[s]),
                            pair_of_bytes<1>(upper.word[s]), pair_of_bytes<1>(lower.word[s])};
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++) multiply_add(sums[c], operand, x[0][c][2 * s], x[0][c][2 * s + 1]);
  }
  done(0);
}

#else

// codes: of a slot, at the lane's row g and columns by unit; scales: of the chunk, at row g; done: as above
template <typename Done>
DEVICE void multiply(float (&sums)[COLUMN_TILES][4], const Operands& x, const u8* codes, const int (&unit_at)[UNITS],
                     const float* scales, const u8* table, u32 lane4, Done done) {
  const Scales upper_scales = *(const Scales*)scales, lower_scales = *(const Scales*)(scales + 8 * CHUNK_SCALES);
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const u8* from = codes + unit_at[u];
    const Codes upper = *(const Codes*)from, lower = *(const Codes*)(from + 8 * LINE);
    float part[COLUMN_TILES][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      const u32 w0 = upper.word[s / 2], w1 = lower.word[s / 2];
      u32 operand[4];
      if (s & 1) {
        operand[0] = pair_of<2>(table, w0, lane4), operand[2] = pair_of<3>(table, w0, lane4);
        operand[1] = pair_of<2>(table, w1, lane4), operand[3] = pair_of<3>(table, w1, lane4);
      } else {
        operand[0] = pair_of<0>(table, w0, lane4), operand[2] = pair_of<1>(table, w0, lane4);
        operand[1] = pair_of<0>(table, w1, lane4), operand[3] = pair_of<1>(table, w1, lane4);
      }
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; c++) multiply_add(part[c], operand, x[u][c][2 * s], x[u][c][2 * s + 1]);
    }
    done(u);
    const float scale0 = upper_scales.of[u * CHUNK_SCALES / UNITS];
    const float scale1 = lower_scales.of[u * CHUNK_SCALES / UNITS];
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++) {
      sums[c][0] += scale0 * part[c][0], sums[c][1] += scale0 * part[c][1];
      sums[c][2] += scale1 * part[c][2], sums[c][3] += scale1 * part[c][3];
    }
  }
}

#endif

extern "C" __global__ void OF_CLUSTER __launch_bounds__(THREADS, 1) decode(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ Barrier scaled;  // all warps have written their part of a chunk's scales
  __shared__ Barrier summed[2], added[2];  // the warps' sums of a tile are there; they have been added
  __shared__ float dynamic[256];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const u32 lane4 = lane * 4;
  const int row_bytes = columns(a) * BITS / 8, row_blocks = columns(a) / FORMAT_BLOCK;
  const int chunks = (columns(a) + CHUNK - 1) / CHUNK, tiles = (a.n + ROWS - 1) / ROWS;
  const int own_tiles = SINGLE ? 1 : (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
  const int partials = WARPS * a.m * PARTIAL_STRIDE;  // floats of a buffer
  const u32 rank = blockIdx.x % SPLIT;
  auto row_of = [&](int index) { return (SINGLE ? (int)blockIdx.x / SPLIT : (int)(blockIdx.x + index * gridDim.x)) * ROWS; };
  const int own_chunk = rank * WARPS + warp;
  auto chunk_of = [&](int i) { return i * (SPLIT * WARPS) + own_chunk; };
  auto chunk_to_load = [&](int i) { return WHOLE || !WHOLE_CHUNKS ? chunk_of(i) : min(chunk_of(i), chunks - 1); };
  if constexpr (SPLIT > 1) arrive_in_cluster();  // before others write here

  u8* table = shared;
  u8* rings = table + (BITS == 4 ? PAIR_TABLE_BYTES : 0);
  u8* ring = rings + warp * RING;
  float* scales = (float*)(rings + WARPS * RING);
  constexpr int BEFORE = (BITS == 4 ? PAIR_TABLE_BYTES + WARPS * SCALE_BUFFERS * SCALES * 4 : 0) + WARPS * RING;
  constexpr int OVER_IT = SINGLE ? WARPS * COLUMN_TILES * 8 * PARTIAL_STRIDE * 4 : 0;  // the warps' sums
  float* partial = (float*)(shared + max(BEFORE, OVER_IT));

  // ------------------------------------------------------------------------------------------ codes on their way
  // A lane copies 16 bytes of a row, and of each COPY_ROWS below it. Within a row the pieces change places so that lanes
  // that read 8 (or 4) bytes each of 8 rows below find them in different banks; 16 they do as it is.
  constexpr int PIECES = LINE / 16, COPY_ROWS = 32 / PIECES;
  const int piece = lane % PIECES, copy_row = lane / PIECES;
  auto swizzle = [](int row) {
    return BITS == 8 ? 0 : LINE == 64 ? (row >> 1 & 1) * 2 | (row >> 2 & 1) : (row & 3) * 2 | (row >> 2 & 1);
  };
  const u32 copy_to = shared_address(ring) + copy_row * LINE + (piece ^ swizzle(copy_row)) * 16;
  const u32 own_place = (u32)copy_row * row_bytes + own_chunk * LINE + piece * 16;
  const long long tile_bytes = (long long)gridDim.x * ROWS * row_bytes;
  const u8* tile_begin = a.packed + (long long)row_of(0) * row_bytes;
  const u8* lane_begin = tile_begin + own_place;
  // slot r of chunk i of the tile that the warp is at, or of the next one
  auto copy = [&](int index, int i, int r, int slot) {
    const bool next = i >= CHUNKS;
    if (next) i -= CHUNKS;
    if ((!next || index + 1 < own_tiles) && (WHOLE || chunk_of(i) < chunks)) {
      // What is added last: a lane's place to a block's address, or a block's rows to a lane's address. With one tile the
      // first takes fewer registers, with several the second fewer instructions: 3 to 8 % of time on an H200 either way.
      const u8* from = (SINGLE && !WHOLE ? tile_begin : lane_begin + (next ? tile_bytes : 0)) + i * (SPLIT * WARPS * LINE);
      const int last = WHOLE ? 0 : a.n - 1 - row_of(index + next) - copy_row;
      const bool there = WHOLE_CHUNKS || chunk_of(i) * LINE + piece * 16 < row_bytes;
#pragma unroll
      for (int j = 0; j < 16 / COPY_ROWS; j++) {
        int row = r * 16 + j * COPY_ROWS;
        if (!WHOLE) row = min(row, last);  // rows past the last are read as the last, and not written
        long long at = (long long)row * row_bytes;
        if constexpr (SINGLE && !WHOLE) at = (u32)at + own_place;
        copy_async((copy_to ^ swizzle(j * COPY_ROWS) * 16) + slot * SLOT + j * 512, there ? from + at : a.packed,
                   there ? 16 : 0);
      }
    }
    commit_copies();
  };
  // what is wanted at the very end is on its way
  if (BITS == 8 || a.bias_bytes)
    for (int i = thread; i < own_tiles * ROWS; i += THREADS) {
      const int row = min(row_of(i / ROWS) + i % ROWS, a.n - 1);
      if (BITS == 8) fetch((const float*)a.scales + row);
      if (a.bias_bytes) fetch((const u8*)a.bias + row * a.bias_bytes);
    }
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) copy(0, s / ROW_TILES, s % ROW_TILES, s);

  // ------------------------------------------------------------------------------------------ scales
  // A thread reads those of one row and chunk at a time, and writes them SCALES_AHEAD of a warp's chunks later, one before
  // they are wanted.
#if BITS == 4
  const float offset = NESTED ? *a.offset : 0.0f;
  auto read_scales = [&](int index, int i, int turn) {
    RawScales raw = {};
    index += i / CHUNKS, i %= CHUNKS;
    const int at = turn * THREADS + thread, row_of_tile = at / WARPS, chunk = (i * SPLIT + rank) * WARPS + at % WARPS;
    if (index < own_tiles && (WHOLE || chunk < chunks) && (ROWS % 32 == 0 || row_of_tile < ROWS)) {
      int row = row_of(index) + row_of_tile;
      if (!WHOLE) row = min(row, a.n - 1);
      const int column = FORMAT_BLOCK < CHUNK ? chunk * CHUNK_SCALES : chunk / (FORMAT_BLOCK / CHUNK);
      const u32 block = (u32)row * row_blocks + column;
      if constexpr (AT_ONCE && NESTED) {  // neighbours in one read, under one scale of scales
        raw.codes[0] = CHUNK_SCALES == 2 ? *(const u16*)((const u8*)a.scales + block)
                                         : *(const u32*)((const u8*)a.scales + block);
        raw.nested[0] = a.nested[block >> 8];
      } else if constexpr (AT_ONCE) {
        const Scales plain = *(const Scales*)((const float*)a.scales + block);
#pragma unroll
        for (int s = 0; s < CHUNK_SCALES; s++) raw.plain[s] = plain.of[s];
      } else {
#pragma unroll
        for (int s = 0; s < CHUNK_SCALES; s++)
          if (WHOLE_CHUNKS || column + s < row_blocks) {
            if constexpr (NESTED) {
              raw.codes[s] = ((const u8*)a.scales)[block + s];
              raw.nested[s] = a.nested[(block + s) >> 8];
            } else {
              raw.plain[s] = ((const float*)a.scales)[block + s];
            }
          }
      }
    }
    return raw;
  };
  auto scale_of = [&](const RawScales& raw, int s) {
    if (!NESTED) return raw.plain[s];
    const u32 code = AT_ONCE ? raw.codes[0] >> 8 * s & 255 : raw.codes[s];
    const float value = DYNAMIC_COPIES ? *(const float*)(table + PAIR_TABLE_GAP + code * 256 + lane4) : dynamic[code];
    return value * raw.nested[AT_ONCE ? 0 : s] + offset;
  };
  auto write_scales = [&](u32 step, const RawScales& raw, int turn) {
    const int at = turn * THREADS + thread, row_of_tile = at / WARPS;
    if (ROWS % 32 == 0 || row_of_tile < ROWS) {
      Scales decoded;
#pragma unroll
      for (int s = 0; s < CHUNK_SCALES; s++) decoded.of[s] = scale_of(raw, s);
      *(Scales*)(scales + (step % SCALE_BUFFERS * WARPS + at % WARPS) * SCALES + row_of_tile * CHUNK_SCALES) = decoded;
    }
  };
  auto scales_are_written = [&] {
    __syncwarp();
    if (lane == 0) scaled.arrive();
  };
  RawScales first[SCALE_TURNS], raw[SCALES_AHEAD][SCALE_TURNS];
#pragma unroll
  for (int turn = 0; turn < SCALE_TURNS; turn++) {
    first[turn] = read_scales(0, 0, turn);
#pragma unroll
    for (int i = 1; i <= SCALES_AHEAD; i++) raw[i % SCALES_AHEAD][turn] = read_scales(0, i, turn);
  }
#endif

  // ------------------------------------------------------------------------------------------ x and the tables
  if (thread == 0) {
    scaled.init(WARPS);
    for (int b = 0; b < 2; b++) summed[b].init(WARPS), added[b].init(WARPS);
  }
#if BITS == 4
  // kept before the table, or after it: this way or that 1 to 2 % of time on an H200
  constexpr bool DYNAMIC_FIRST = COLUMN_TILES == 1;
  const int own_value = DYNAMIC_COPIES ? thread / 2 : DYNAMIC_FIRST ? thread : thread & 255;
  const float value = NESTED && (!DYNAMIC_FIRST || DYNAMIC_COPIES || thread < 256) ? a.dynamic[own_value] : 0.0f;
  const auto own_pairs = read_pairs<THREADS>(a.pairs);
#endif
  Operands x[X_KEPT];
  auto load_first_x = [&] {
    wait_for_previous_kernel();
#pragma unroll
    for (int i = 0; i < (X_STAYS ? CHUNKS : 1); i++) load_x(x[i], a, chunk_to_load(i), lane);
  };
  if (X_EARLY) load_first_x();
#if BITS == 4
  auto keep_value = [&] {
    if (NESTED && !DYNAMIC_COPIES && thread < 256) dynamic[thread] = value;
  };
  if (DYNAMIC_FIRST) keep_value();
  fill_pair_table<THREADS>(table, own_pairs);
  if (!DYNAMIC_FIRST) keep_value();
  if (DYNAMIC_COPIES) fill_pair_table<THREADS>(table + PAIR_TABLE_GAP, {__float_as_uint(value)});
#endif
  __syncthreads();
#if BITS == 4
#pragma unroll
  for (int turn = 0; turn < SCALE_TURNS; turn++) write_scales(0, first[turn], turn);
  scales_are_written();
#endif
  if (!X_EARLY) load_first_x();
  // ------------------------------------------------------------------------------------------ tile after tile
#if BITS == 4
  int unit_at[UNITS];
#pragma unroll
  for (int u = 0; u < UNITS; u++)
    unit_at[u] = UNIT == 64 ? ((u * 2 + (t >> 1)) ^ swizzle(g)) * 16 + (t & 1) * 8 : (u ^ swizzle(g)) * 16 + t * 4;
#endif
  const u8* own_codes = ring + g * LINE;
  int slot = 0;
  u32 step = 0;  // chunks that the warp has taken, of all tiles
  Sums sums;
  // last: the block's last chunk, where that is known; where it would have to be asked, that takes longer than it saves
  auto take = [&](int index, int i, Operands& operands, bool last) {
#if BITS == 4
    scaled.wait(step & 1);
    auto scales_of = [&](int row) { return scales + (step % SCALE_BUFFERS * WARPS + warp) * SCALES + row * CHUNK_SCALES; };
    const float* first_scales = scales_of(g);
    if (!last) {
      // a warp may still be reading the scales of the step before, none those of two before
#pragma unroll
      for (int turn = 0; turn < SCALE_TURNS; turn++) {
        RawScales& next = raw[(i + 1) % SCALES_AHEAD][turn];
        write_scales(step + 1, next, turn);
        next = read_scales(index, i + 1 + SCALES_AHEAD, turn);
      }
      scales_are_written();
    }
#endif
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
      wait_for_copies<STAGES - 2>();
      __syncwarp();
      copy(index, i + (r + STAGES - 1) / ROW_TILES, (r + STAGES - 1) % ROW_TILES, slot == 0 ? STAGES - 1 : slot - 1);
      const bool there = WHOLE || chunk_of(i) < chunks;
      auto x_is_done = [&](int u) {
        if constexpr (X_IN_PLACE)
          if (r == ROW_TILES - 1 && (i + 1 < CHUNKS || index + 1 < own_tiles))
            load_unit(operands, a, chunk_to_load(i + 1 < CHUNKS ? i + 1 : 0), u, lane);
      };
#if BITS == 4
      // with one tile found anew, which takes a register less; with several kept: 1 to 3 % of time on an H200 either way
      const float* row_scales = SINGLE ? scales_of(r * 16 + g) : first_scales + r * 16 * CHUNK_SCALES;
      if (there) multiply(sums[r], operands, own_codes + slot * SLOT, unit_at, row_scales, table, lane4, x_is_done);
#else
      if (there) multiply(sums[r], operands, own_codes + slot * SLOT + t * 16, x_is_done);
#endif
      if (!there)
#pragma unroll
        for (int u = 0; u < UNITS; u++) x_is_done(u);
      slot = slot == STAGES - 1 ? 0 : slot + 1;
    }
    step++;
  };
  auto keep_sums = [&](float* to) {  // where all the warps' of a tile lie
    to += (warp * a.m + 2 * t) * PARTIAL_STRIDE + g;
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int column = c * 8 + (e & 1);
        if (2 * t + column < a.m) {
#pragma unroll
          for (int r = 0; r < ROW_TILES; r++) to[column * PARTIAL_STRIDE + r * 16 + (e >> 1) * 8] = sums[r][c][e];
        }
      }
  };
  // of element i of a tile's part of the output: the columns one after the other
  auto sum_of_warps = [&](const float* from, int i) {
    from += i / KEPT_ROWS * PARTIAL_STRIDE + i % KEPT_ROWS;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += from[w * a.m * PARTIAL_STRIDE];
    return sum;
  };
  auto give_out = [&](int index, int i, float sum) {
    const int n = row_of(index + i % KEPT_ROWS / ROWS) + i % ROWS;
    if (BITS == 8) sum *= n < a.n ? ((const float*)a.scales)[n] * (1.0f / 127.0f) : 0.0f;
    if (WHOLE || n < a.n) a.out[(long long)(i / KEPT_ROWS) * a.n + n] = narrowed(sum + bias_at(a.bias, a.bias_bytes, n));
  };
  auto add = [&](int index) {  // the sums of one of the block's tiles
    summed[index & 1].wait(index >> 1 & 1);
    const float* from = partial + (index & 1) * partials;
    for (int i = thread; i < a.m * ROWS; i += THREADS) give_out(index, i, sum_of_warps(from, i));
    __syncwarp();
    if (lane == 0) added[index & 1].arrive();
  };
  for (int index = 0; index < own_tiles; index++) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[r][c][e] = 0.0f;
    if (TILE_SLOTS % STAGES == 0) slot = 0;  // as it is: so the compiler knows
    if constexpr (X_STAYS) {
#pragma unroll
      for (int i = 0; i < CHUNKS; i++) take(index, i, x[i], SINGLE && i == CHUNKS - 1);
    } else if constexpr (X_AHEAD) {
      auto load_ahead = [&](Operands& to, int i) {  // past the last chunk: the next tile's first
        if (i < CHUNKS)
          load_x(to, a, chunk_to_load(i), lane);
        else if (!SINGLE)
          load_x(to, a, chunk_to_load(0), lane);
      };
#pragma unroll 1
      for (int i = 0; i + 1 < CHUNKS; i += 2) {
        load_ahead(x[1], i + 1);
        take(index, i, x[0], false);
        load_ahead(x[0], i + 2);
        take(index, i + 1, x[1], false);
      }
      if constexpr (CHUNKS % 2) {
        load_ahead(x[1], CHUNKS);
        take(index, CHUNKS - 1, x[0], SINGLE);
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
          for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
            for (int w = 0; w < 2 * STEPS; w++) x[0][u][c][w] = x[1][u][c][w];
      }
    } else {
#pragma unroll 1
      for (int i = 0; i + 1 < CHUNKS; i += 2) {
        take(index, i, x[0], false);
        take(index, i + 1, x[0], false);
      }
      if constexpr (CHUNKS % 2) take(index, CHUNKS - 1, x[0], SINGLE);
    }
    if constexpr (SINGLE) break;
    lane_begin += tile_bytes;
    if constexpr (ALL_KEPT) {
      keep_sums(partial + index * ROWS);
      continue;
    }
    added[index & 1].wait(index >> 1 & 1 ^ 1);
    keep_sums(partial + (index & 1) * partials);
    __syncwarp();
    if (lane == 0) summed[index & 1].arrive();
    if (index > 0) add(index - 1);
  }
  if constexpr (ALL_KEPT) {
    __syncthreads();
    for (int i = thread; i < a.m * KEPT_ROWS; i += THREADS)
      if (i % KEPT_ROWS < own_tiles * ROWS) give_out(0, i, sum_of_warps(partial, i));
  } else if constexpr (!SINGLE) {
    add(own_tiles - 1);
  } else {
    float* sums_of_warps = (float*)shared;
    __syncthreads();  // all are done with what lay there
    keep_sums(sums_of_warps);
    __syncthreads();
    const int all = a.m * ROWS;
    if constexpr (SPLIT == 1) {
      for (int i = thread; i < all; i += THREADS) give_out(0, i, sum_of_warps(sums_of_warps, i));
    } else {
      // 32 elements after the other belong to each block in turn, which gets the sums of all blocks and adds these
      const int share = (all + 32 * SPLIT - 1) / (32 * SPLIT) * 32;
      auto place = [&](u32 block, int i) { return partial + block * share + i / (32 * SPLIT) * 32 + i % 32; };
      wait_for_cluster();  // all have begun
      for (int i = thread; i < all; i += THREADS)
        store_in_cluster(address_in_cluster(place(rank, i), i / 32 % SPLIT), sum_of_warps(sums_of_warps, i));
      arrive_in_cluster();
      wait_for_cluster();
      for (int i = thread; i < all; i += THREADS) {
        if (i / 32 % SPLIT != rank) continue;
        float sum = 0.0f;
#pragma unroll
        for (u32 block = 0; block < SPLIT; block++) sum += *place(block, i);
        give_out(0, i, sum);
      }
    }
  }
}

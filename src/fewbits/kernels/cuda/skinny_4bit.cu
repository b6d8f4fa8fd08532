// out[M, N] = x[M, K] @ weight[N, K].T + bias for a weight in 4 bits and some tens of rows of x: a batch of texts, or a
// short prompt. For sm_90a.
//
// The weight is read once for TILE_M rows of x. A block works on tiles of 64 rows of the weight per warpgroup, 16 per
// warp, in chunks of 128 columns. Asynchronous copies fill a ring of chunks in shared memory ahead: each warp copies
// the codes of its own rows, all together copy x. A lane turns its codes into pairs of 16-bit numbers (see
// fill_pair_table); in registers, as they come, these are the first operand of the matrix units (wgmma), and x in
// shared memory is the second. While these multiply some columns, the warp decodes the next ones.
//
// At each chunk warps wait until all of x has come, and until none still reads the part of the ring that is filled
// next. To say that one is ready and to wait for the others are two steps: much of the decoding lies between them.
//
// The chunks of all tiles stand in one line, tile after tile, and each block takes an equal stretch of it, wherever
// that begins and ends: so no number of tiles leaves a part of the GPU idle. Where several blocks share a tile, each
// leaves its sums in the workspace, and the last of them adds all, in the order of the columns: which one that is does
// not matter to the result.
//
// The sums of each 64 columns are scaled in fp32: scales in the pairs, all in 16 bits, would take less time, and be less
// exact.
//
// Compiled for: BF16, FORMAT_BLOCK (elements of a quantization block, 64 or more), NESTED (double quantization), TILE_M
// (32 or 64 rows of x), WARPGROUPS, STAGES (chunks in the ring). The grid: blocks, no more than there are chunks; tiles
// of x.

#include "hopper.cuh"

struct Arguments {
  const u8* packed;         // [N, K / 2]
  const void* scales;       // [N, K / FORMAT_BLOCK]: fp32, or codes in 8 bits
  const float* nested;      // scale of each 256 of those
  const float* offset;      // added to each scale
  const float* dynamic;     // the values of the 256 codes
  const u32* pairs;         // the values of each byte's two codes, as 16-bit numbers
  const u16* x;             // [M, K], rows x_stride apart, each at a multiple of 16 bytes
  const void* bias;         // [N]
  u16* out;                 // [M, N]
  long long x_stride;
  int m, n, k, bias_bytes;
  u32* workspace;           // [tiles of x, 2 * blocks, ROWS * TILE_M]: sums of parts of tiles
  u32* counters;            // [tiles of x, tiles of the weight]: zeros, before and after
};

constexpr int WARPS = 4 * WARPGROUPS, THREADS = 32 * WARPS;
constexpr int ROWS = 64 * WARPGROUPS;                   // of the weight, in a tile
constexpr int CHUNK = 128;                              // columns
constexpr int X_HALF = TILE_M * 128;                    // bytes of 64 columns of x
constexpr int X_BYTES = 2 * X_HALF, SLOT = X_BYTES + ROWS * CHUNK / 2;
constexpr int LEAD = STAGES - 2;                        // chunks ahead of the one in work that are copied
constexpr int SUMS = TILE_M / 2;                        // of a thread: 64 rows by TILE_M over 128 threads
constexpr int WINDOW = 8 * FORMAT_BLOCK / CHUNK;        // chunks that eight scales of a row are for
constexpr int STEPS = 4, GROUPS = 8 / STEPS;            // steps of 16 columns that share an operand
constexpr int PARTS_AT_ONCE = TILE_M == 32 ? 4 : 2;  // read when blocks' sums are added up
static_assert(FORMAT_BLOCK >= 64 && STAGES >= 3 && SLOT % 1024 == 0);

// ---------------------------------------------------------------------------------------------- groups

typedef u32 Operand[STEPS][4];

// STEPS of them, together one group to wait for; x is the address of these columns of x
DEVICE void multiply_group(float (&sums)[SUMS], const Operand& operand, u32 x, bool accumulate) {
  const u64 second = second_operand(x);
  begin_products();
#pragma unroll
  for (int s = 0; s < STEPS; s++) multiply_16(sums, operand[s], second + s * (32 >> 4), accumulate || s > 0);
  commit_products();
}

// ---------------------------------------------------------------------------------------------- scales

// four neighbouring scales of a row, as stored
struct RawScales {
#if NESTED
  u32 low, high;      // two aligned words that hold the four codes
  float scale, next;  // of the first code's 256, and of the last one's where these are others
#else
  float value[4];
#endif
};

// the four from `first` on, of `all` in memory: nothing is read past them
DEVICE RawScales read_scales(const Arguments& a, long long first, long long all) {
  RawScales raw;
#if NESTED
  const u8* codes = (const u8*)a.scales + first;
  const int before = (u64)codes & 3;
  raw.low = *(const u32*)(codes - before);
  raw.high = before != 0 && first - before + 4 < all ? *(const u32*)(codes - before + 4) : 0;
  raw.scale = a.nested[first >> 8];
  raw.next = a.nested[min(first + 3, all - 1) >> 8];
#else
  const float* plain = (const float*)a.scales + first;
  if (((u64)plain & 15) == 0 && first + 4 <= all) {
    const float4 four = *(const float4*)plain;
    raw.value[0] = four.x, raw.value[1] = four.y, raw.value[2] = four.z, raw.value[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) raw.value[i] = first + i < all ? plain[i] : 0.0f;
  }
#endif
  return raw;
}

// Each 256 bytes of the table of pairs have 128 unused: there the scales lie, and what their codes mean.
DEVICE u8* gap(u8* table, int i) { return table + i * 256 + 128; }
DEVICE u8* scale_at(u8* table, int warp, int row, int i) {  // scale i of the eight of a row of a warp's 16
  return gap(table, warp * 4 + (i >> 2) * 2 + (row >> 3)) + (row & 7) * 16 + (i & 3) * 4;
}
DEVICE float* value_of_code(u8* table, int code) { return (float*)gap(table, WARPS * 4 + (code >> 5)) + (code & 31); }

DEVICE void decode_scales(float (&value)[4], const RawScales& raw, const Arguments& a, u8* table, long long first) {
#if NESTED
  const u32 codes = __funnelshift_r(raw.low, raw.high, 8 * ((u32)(u64)a.scales + (u32)first & 3));
  const float offset = *value_of_code(table, 256);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float scale = ((u32)first & 255) + i > 255 ? raw.next : raw.scale;
    value[i] = *value_of_code(table, codes >> 8 * i & 255) * scale + offset;
  }
#else
#pragma unroll
  for (int i = 0; i < 4; i++) value[i] = raw.value[i];
#endif
}


// ---------------------------------------------------------------------------------------------- the kernel

extern "C" __global__ void __launch_bounds__(THREADS, 1) skinny_4bit(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) u8 shared[];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const u32 lane4 = lane * 4;
  const int row_blocks = a.k / FORMAT_BLOCK;  // quantization blocks of a row
  const int chunks = (a.k + CHUNK - 1) / CHUNK, row_bytes = a.k / 2;
  const int tiles = (a.n + ROWS - 1) / ROWS;

  // this block's stretch of all chunks; where the blocks are a multiple of the tiles, none goes over a tile's end
  const u32 all_chunks = tiles * chunks;
  auto begin_of = [&](u32 block) { return stretch_begin(all_chunks, block, gridDim.x); };
  auto block_of = [&](u32 chunk) { return stretch_of(all_chunks, chunk, gridDim.x); };
  const int begin = begin_of(blockIdx.x);
  int left = begin_of(blockIdx.x + 1) - begin, tile = begin / chunks, chunk = begin - tile * chunks;

  u8* table = shared;
  u8* ring = table + PAIR_TABLE_BYTES;
  const u32 ring_address = shared_address(ring);
  Barrier& barrier = *(Barrier*)(ring + STAGES * SLOT);
  u32* last_to_come = (u32*)(ring + STAGES * SLOT + 8);

  // ------------------------------------------------------------------------------------------ copies
  // A lane copies 16 bytes of row lane / 4 and of the eighth after it. Within a row's 64 bytes the four pieces change
  // places so that one piece of eight rows lies in different banks.
  const int piece = lane & 3;
  const u32 codes_to = X_BYTES + warp * 1024 + g * 64 + (piece ^ g >> 1) * 16;
  int codes_tile = tile, codes_chunk = chunk;
  auto copy_codes = [&](int slot) {
    const u32 to = ring_address + slot * SLOT + codes_to;
    const int row = codes_tile * ROWS + warp * 16 + g, at = codes_chunk * 64 + piece * 16;
    const int rows = at < row_bytes ? a.n - row : 0;  // from this one on: what is past the last one gets zeros
    const u8* from = a.packed + (long long)row * row_bytes + at;
    copy_codes_async(to, from, rows > 0 ? 16 : 0);
    copy_codes_async(to + 512, from + 8 * row_bytes, rows > 8 ? 16 : 0);
    if (++codes_chunk == chunks) {
      codes_chunk = 0;
      codes_tile++;
    }
  };

  // x: 16 neighbouring threads copy the 256 bytes of a row to two places of 128 bytes, whose eight pieces are permuted
  // by the row's number, as the matrix units want it.
  constexpr int X_ROWS = THREADS / 16, X_COPIES = TILE_M / X_ROWS;
  const int x_row = thread >> 4, x_piece = thread & 15;
  const u32 x_to = (x_piece >> 3) * X_HALF + x_row * 128 + ((x_piece ^ x_row) & 7) * 16;
  const u16* x_from = a.x + (blockIdx.y * TILE_M + x_row) * a.x_stride + x_piece * 8;
  const int m = min(TILE_M, a.m - (int)blockIdx.y * TILE_M);
  auto copy_x = [&](int slot, int chunk) {
    const u32 to = ring_address + slot * SLOT + x_to;
    const int rows = chunk * CHUNK + x_piece * 8 < a.k ? m : 0;
#pragma unroll
    for (int c = 0; c < X_COPIES; c++)
      copy_async(to + c * X_ROWS * 128, x_from + chunk * CHUNK + c * X_ROWS * a.x_stride,
                 x_row + c * X_ROWS < rows ? 16 : 0);
  };

  // ------------------------------------------------------------------------------------------ scales
  // A warp decodes eight scales of each of its 16 rows at a time, a lane four of them. What is stored is read when the
  // eight before begin.
  const long long all_scales = (long long)a.n * row_blocks;
  auto window_row = [&](int tile) {
    return (long long)min(tile * ROWS + warp * 16 + (lane & 15), a.n - 1) * row_blocks;
  };
  auto window_first = [&](int chunk) { return chunk / WINDOW * 8 + (lane >> 4) * 4; };
  auto read_window = [&](int tile, int chunk) {
    return read_scales(a, window_row(tile) + min(window_first(chunk), row_blocks - 1), all_scales);
  };
  RawScales raw = read_window(tile, chunk);
  auto write_window = [&] {
    const int first = window_first(chunk);
    float value[4];
    decode_scales(value, raw, a, table, window_row(tile) + min(first, row_blocks - 1));
#pragma unroll
    for (int i = 0; i < 4; i++)  // columns past the last one: x is 0 there, and so is the scale
      value[i] = first + i < row_blocks ? value[i] : 0.0f;
    *(float4*)scale_at(table, warp, lane & 15, (lane >> 4) * 4) = make_float4(value[0], value[1], value[2], value[3]);
    __syncwarp();
    const int following = (chunk / WINDOW + 1) * WINDOW;
    const bool next_tile = following >= chunks;
    raw = read_window(tile + next_tile, next_tile ? 0 : following);
  };
  float scales[2][2];  // of a chunk's halves, rows g and g + 8 of the warp's
  auto take_scales = [&] {
    const int block = chunk * CHUNK / FORMAT_BLOCK & 7;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const u8* from = scale_at(table, warp, g + r * 8, block);
      if constexpr (FORMAT_BLOCK < CHUNK) {
        const float2 two = *(const float2*)from;
        scales[0][r] = two.x, scales[1][r] = two.y;
      } else {
        scales[0][r] = scales[1][r] = *(const float*)from;
      }
    }
  };
  auto next_scales = [&] {
    if (chunk % WINDOW == 0) write_window();
    take_scales();
  };

  // ------------------------------------------------------------------------------------------ codes to operands
  // Of the 8 bytes of 16 columns of a row, bytes t and t + 4 belong to a thread. It reads all, as do the three
  // neighbours that have the others, and takes its own byte of each word.
  const u32 own_byte = 0x5504 | t << 4;
  const u32 own_codes = X_BYTES + warp * 1024 + g * 64;
  auto decode = [&](Operand& operand, int slot, int group) {
    const u8* codes = ring + slot * SLOT + own_codes;
#pragma unroll
    for (int q = 0; q < STEPS / 2; q++) {
      const int piece = group * (STEPS / 2) + q;  // 16 bytes: 32 columns
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const uint4 words = *(const uint4*)(codes + r * 512 + (piece ^ g >> 1) * 16);
        const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          u32 pair = *(const u32*)(table + __byte_perm(word[i], lane4, own_byte));
          operand[q * 2 + i / 2][i % 2 * 2 + r] = pair;
        }
      }
    }
  };

  // ------------------------------------------------------------------------------------------ sums
  float sums[SUMS];
  auto clear_sums = [&] {
#pragma unroll
    for (int i = 0; i < SUMS; i++) sums[i] = 0.0f;
  };
  float part[SUMS];  // of 64 columns
  auto add_part = [&](int half) {
    wait_for_products<0>();
    sums_are_there(part);
#pragma unroll
    for (int i = 0; i < SUMS; i++) sums[i] += scales[half][i >> 1 & 1] * part[i];
  };
  auto multiply = [&](const Operand& operand, int slot, int group) {
    const int column = group * STEPS * 16;
    const u32 x = ring_address + slot * SLOT + column / 64 * X_HALF + column % 64 * 2;
    multiply_group(part, operand, x, false);
  };

  auto finish = [&] {
    const int first = block_of(tile * chunks), last = block_of(tile * chunks + chunks - 1);
    u32* parts = a.workspace + (long long)blockIdx.y * 2 * gridDim.x * ROWS * TILE_M;
    u32* counter = a.counters + blockIdx.y * tiles + tile;
    if (all_added<THREADS, PARTS_AT_ONCE>(sums, parts, counter, last_to_come, first, last, thread))
      write_sums(sums, a.out + (long long)blockIdx.y * TILE_M * a.n, m, a.n, tile * ROWS + warp * 16, a.bias, a.bias_bytes, g, t);
  };

  // ------------------------------------------------------------------------------------------ first copies
#pragma unroll
  for (int s = 0; s < LEAD; s++)
    if (s < left) copy_codes(s);
  commit_copies();
  if (thread == 0) barrier.init(WARPS);
  const float value = NESTED && thread < 256 ? a.dynamic[thread] : 0.0f, offset = NESTED ? *a.offset : 0.0f;
  const auto own_pairs = read_pairs<THREADS>(a.pairs);
  wait_for_previous_kernel();
  for (int s = 0, at = chunk; s < LEAD; s++) {
    if (s < left) copy_x(s, at);
    commit_copies();
    if (++at == chunks) at = 0;
  }
  fill_pair_table<THREADS>(table, own_pairs);
  if (NESTED && thread < 256) *value_of_code(table, thread) = value;
  if (NESTED && thread == 0) *value_of_code(table, 256) = offset;
  __syncthreads();
  write_window();
  take_scales();
  Operand operands[2];  // of the group in work, and of the next one
  wait_for_copies<LEAD>();
  __syncwarp();
  decode(operands[0], 0, 0);
  auto ready = [&] {
    show_matrix_units();
    __syncwarp();
    if (lane == 0) barrier.arrive();
  };
  wait_for_copies<LEAD - 1>();
  ready();

  // ------------------------------------------------------------------------------------------ chunk by chunk
  int slot = 0;
  u32 parity = 0;
  while (true) {
    clear_sums();
    const int tile_end = min(chunks, chunk + left);
#pragma unroll 1
    while (chunk < tile_end) {
      barrier.wait(parity);
      __syncwarp();
      parity ^= 1;
#pragma unroll
      for (int group = 0; group < GROUPS; group++) {
        Operand& next = operands[(group + 1) % 2];
        multiply(operands[group % 2], slot, group);
        if (group == 0) {
          if (left > LEAD) {  // none is still at the chunk before the last one: its place is free
            const int free = slot < 2 ? slot + LEAD : slot - 2;
            copy_x(free, codes_chunk);
            copy_codes(free);
          }
          commit_copies();
        }
        if (group + 1 < GROUPS) {
          decode(next, slot, group + 1);
          add_part(group);
          continue;
        }
        if (++slot == STAGES) slot = 0;
        if (--left > 0) {
          wait_for_copies<LEAD - 1>();
          ready();
        }
        const bool more = ++chunk < tile_end;
        if (more) decode(next, slot, 0);
        add_part(group);
        if (more) next_scales();
      }
    }
    finish();
    if (left == 0) break;
    tile++;
    chunk = 0;
    next_scales();
    decode(operands[0], slot, 0);
  }
}

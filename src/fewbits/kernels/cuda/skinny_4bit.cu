// out[M, N] = x[M, K] @ weight[N, K].T + bias for a weight in 4 bits and some tens of rows of x: a batch of texts, or a
// short prompt. For sm_90a.
//
// The weight is read once for TILE_M rows of x. A block works on tiles of 64 rows of the weight per warpgroup, 16 per
// warp, in chunks of 128 columns. One more warp has the copy engine fill a ring of chunks in shared memory, of x and of
// codes; barriers say which chunks are full, and which are free again. A lane turns its codes into pairs of 16-bit
// numbers (see fill_pair_table); in registers, as they come, these are the first operand of the matrix units (wgmma),
// and x in shared memory is the second. While these multiply half a chunk, the warp decodes the next half, and adds up
// the sums of the half before.
//
// The chunks of all tiles stand in one line, tile after tile, and each block takes an equal stretch of it, wherever
// that begins and ends: so no number of tiles leaves a part of the GPU idle. Where several blocks share a tile, each
// leaves its sums in the workspace, and the last of them adds all, in the order of the columns: which one that is does
// not matter to the result. Or each tile is shared by SPLIT blocks, a cluster, and in each of them by GROUPS, parts of
// its warpgroups that work on the same rows and different columns: they add up sums in each other's shared memory
// (add_in_cluster in hopper.cuh).
//
// The sums of each 64 columns are scaled in fp32: scales in the pairs, all in 16 bits, would take less time, and be less
// exact.
//
// Compiled for: BF16, FORMAT_BLOCK (elements of a quantization block, 64 or more), NESTED (double quantization), TILE_M
// (32 or 64 rows of x), WARPGROUPS, GROUPS (that these are in), STAGES (slots of the ring, with a chunk for each
// group), SPLIT (1 to 8: TILE_M / SPLIT / GROUPS is 8 or more). The grid: blocks, no more than there are chunks, or SPLIT
// for each tile where tiles are shared in clusters; tiles of x.

#include "hopper.cuh"

struct Arguments {
  Map x_map;                // of x [M, K]; boxes: TILE_M rows by 64 columns
  Map weight_map;           // of packed, in bytes; boxes: ROWS by 64
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

constexpr int WARPS = 4 * WARPGROUPS, CONSUMERS = 32 * WARPS, THREADS = CONSUMERS + 128;
// registers of a thread; more than the block has would be waited for forever
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = WARPGROUPS == 4 ? 112 : WARPGROUPS == 3 ? 160 : 216;
static_assert(WARPGROUPS * CONSUMER_REGISTERS + PRODUCER_REGISTERS <= (WARPGROUPS + 1) * (65536 / THREADS / 8 * 8));
constexpr int ROWS = 64 * WARPGROUPS / GROUPS;          // of the weight, in a tile
constexpr int TILE_WARPS = WARPS / GROUPS;              // of a group
constexpr int PARTS = SPLIT * GROUPS;                   // that share a tile, if it is not stretches of one line
constexpr int CHUNK = 128;                              // columns
constexpr int X_HALF = TILE_M * 128;                    // bytes of 64 columns of x
constexpr int X_BYTES = 2 * X_HALF, CHUNK_BYTES = X_BYTES + ROWS * CHUNK / 2, SLOT = GROUPS * CHUNK_BYTES;
constexpr int SUMS = TILE_M / 2;                        // of a thread: 64 rows by TILE_M over 128 threads
constexpr int WINDOW = 8 * FORMAT_BLOCK / CHUNK;        // chunks that eight scales of a row are for
constexpr int STEPS = 4;                                // of 16 columns, in half a chunk
constexpr int PARTS_AT_ONCE = TILE_M == 32 ? 4 : 2;  // read when blocks' sums are added up
static_assert(FORMAT_BLOCK >= 64 && STAGES >= 2 && CHUNK_BYTES % 1024 == 0 && WARPGROUPS % GROUPS == 0 && SUMS % (4 * PARTS) == 0);

// ---------------------------------------------------------------------------------------------- halves of chunks

typedef u32 Operand[STEPS][4];

// x is the address of these columns of x
DEVICE void multiply_half(float (&sums)[SUMS], const Operand& operand, u32 x) {
  const u64 second = second_operand(x);
  begin_products();
#pragma unroll
  for (int s = 0; s < STEPS; s++) multiply_16(sums, operand[s], second + s * (32 >> 4), s > 0);
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

extern "C" __global__ void OF_CLUSTER __launch_bounds__(THREADS, 1) skinny_4bit(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) u8 shared[];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const u32 lane4 = lane * 4;
  const int row_blocks = a.k / FORMAT_BLOCK;  // quantization blocks of a row
  const int chunks = (a.k + CHUNK - 1) / CHUNK;
  const int tiles = (a.n + ROWS - 1) / ROWS;

  // a group's stretch of all chunks; where the groups are a multiple of the tiles, none goes over a tile's end
  const u32 all_chunks = tiles * chunks;
  auto begin_of = [&](u32 group) { return stretch_begin(all_chunks, group, gridDim.x * GROUPS); };
  auto block_of = [&](u32 chunk) { return stretch_of(all_chunks, chunk, gridDim.x); };

  u8* table = shared;
  u8* ring = table + PAIR_TABLE_BYTES;
  const u32 ring_address = shared_address(ring);
  Barrier* full = (Barrier*)(ring + STAGES * SLOT);
  Barrier* free = full + STAGES;
  u32* last_to_come = (u32*)(free + STAGES);
  if (thread == 0) {
    for (int s = 0; s < STAGES; s++) {
      full[s].init(1);
      free[s].init(WARPS);
    }
    show_matrix_units();  // and the copy engine: that there are barriers
  }
  __syncthreads();

  // ------------------------------------------------------------------------------------------ filling
  if (thread >= CONSUMERS) {
    give_registers<PRODUCER_REGISTERS>();
    if (thread > CONSUMERS) return;
    struct Place {
      int tile, chunk, left;
    };
    Place begin[GROUPS];
    int left = 0;  // slots to fill
#pragma unroll
    for (int q = 0; q < GROUPS; q++) {
      const int first = begin_of(blockIdx.x * GROUPS + q), count = begin_of(blockIdx.x * GROUPS + q + 1) - first;
      begin[q] = {first / chunks, first % chunks, count};
      left = max(left, count);
    }
    auto copy_codes = [&](int slot, const Place (&place)[GROUPS]) {
      int bytes = 0;
#pragma unroll
      for (int q = 0; q < GROUPS; q++) bytes += place[q].left > 0 ? CHUNK_BYTES : 0;
      full[slot].arrive_and_expect(bytes);
#pragma unroll
      for (int q = 0; q < GROUPS; q++)
        if (place[q].left > 0)
          copy_box(ring_address + slot * SLOT + q * CHUNK_BYTES + X_BYTES, a.weight_map, place[q].chunk * 64,
                   place[q].tile * ROWS, full[slot]);
    };
    auto copy_x = [&](int slot, const Place (&place)[GROUPS]) {
      const int row = blockIdx.y * TILE_M;
#pragma unroll
      for (int q = 0; q < GROUPS; q++) {
        if (place[q].left <= 0) continue;
        const u32 to = ring_address + slot * SLOT + q * CHUNK_BYTES;
        copy_box(to, a.x_map, place[q].chunk * CHUNK, row, full[slot]);
        copy_box(to + X_HALF, a.x_map, place[q].chunk * CHUNK + 64, row, full[slot]);
      }
    };
    auto go_on = [&](Place (&place)[GROUPS]) {
#pragma unroll
      for (int q = 0; q < GROUPS; q++) {
        place[q].left--;
        if (++place[q].chunk == chunks) {
          place[q].chunk = 0;
          place[q].tile++;
        }
      }
    };
    const int at_once = min(STAGES, left);
    Place place[GROUPS];
    auto start = [&] {
#pragma unroll
      for (int q = 0; q < GROUPS; q++) place[q] = begin[q];
    };
    start();
    for (int slot = 0; slot < at_once; slot++, go_on(place)) copy_codes(slot, place);
    wait_for_previous_kernel();
    start();
    for (int slot = 0; slot < at_once; slot++, go_on(place)) copy_x(slot, place);
    u32 phase = 0;
    for (int slot = 0; left > STAGES; left--, go_on(place)) {
      free[slot].wait(phase);
      copy_codes(slot, place);
      copy_x(slot, place);
      if (++slot == STAGES) {
        slot = 0;
        phase ^= 1;
      }
    }
    return;
  }

  take_registers<CONSUMER_REGISTERS>();
  const int group = GROUPS == 1 ? 0 : same_of_warp(warp / TILE_WARPS), tile_warp = warp - group * TILE_WARPS;
  const int begin = begin_of(blockIdx.x * GROUPS + group);
  int left = begin_of(blockIdx.x * GROUPS + group + 1) - begin, tile = begin / chunks, chunk = begin - tile * chunks;
  // ------------------------------------------------------------------------------------------ scales
  const int m = min(TILE_M, a.m - (int)blockIdx.y * TILE_M);
  // A warp decodes eight scales of each of its 16 rows at a time, a lane four of them. What is stored is read when the
  // eight before begin.
  const long long all_scales = (long long)a.n * row_blocks;
  auto window_row = [&](int tile) {
    return (long long)min(tile * ROWS + tile_warp * 16 + (lane & 15), a.n - 1) * row_blocks;
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
  const u32 own_codes = group * CHUNK_BYTES + X_BYTES + tile_warp * 1024 + g * 64;
  auto decode = [&](Operand& operand, int slot, int half) {
    const u8* codes = ring + slot * SLOT + own_codes;
#pragma unroll
    for (int q = 0; q < STEPS / 2; q++) {
      const int piece = half * (STEPS / 2) + q;  // 16 bytes: 32 columns; a row's four are permuted by its number
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const uint4 words = *(const uint4*)(codes + r * 512 + (piece ^ g >> 1) * 16);
        const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
          operand[q * 2 + i / 2][i % 2 * 2 + r] = *(const u32*)(table + __byte_perm(word[i], lane4, own_byte));
      }
    }
  };

  // ------------------------------------------------------------------------------------------ sums
  float sums[SUMS];
  auto clear_sums = [&] {
#pragma unroll
    for (int i = 0; i < SUMS; i++) sums[i] = 0.0f;
  };
  float parts[2][SUMS];  // of the halves of a chunk
  auto add_part = [&](int half) {
    sums_are_there(parts[half]);
#pragma unroll
    for (int i = 0; i < SUMS; i++) sums[i] += scales[half][i >> 1 & 1] * parts[half][i];
  };
  auto multiply = [&](const Operand& operand, int slot, int half) {
    multiply_half(parts[half], operand, ring_address + slot * SLOT + group * CHUNK_BYTES + half * X_HALF);
  };

  auto shared_tile = [&](int tile) {
    const u32 first = block_of(tile * chunks), last = block_of(tile * chunks + chunks - 1);
    u32* parts = a.workspace + (long long)blockIdx.y * 2 * gridDim.x * ROWS * TILE_M;
    return Shared{parts, a.counters + blockIdx.y * tiles + tile, last_to_come, first, last};
  };
  auto write = [&](int tile) {
    u16* out = a.out + (long long)blockIdx.y * TILE_M * a.n;
    write_sums(sums, out, m, a.n, tile * ROWS + warp * 16, a.bias, a.bias_bytes, g, t);
  };
  auto finish_in_cluster = [&] {
    constexpr int SHARE = TILE_M / PARTS;  // rows of x
    float share[SUMS / PARTS];
    add_in_cluster<PARTS, GROUPS, 32 * TILE_WARPS>(share, sums, shared, blockIdx.x % SPLIT);
    const int first = (blockIdx.x % SPLIT * GROUPS + group) * SHARE;
    u16* out = a.out + (long long)(blockIdx.y * TILE_M + first) * a.n;
    write_sums(share, out, min(m - first, SHARE), a.n, tile * ROWS + tile_warp * 16, a.bias, a.bias_bytes, g, t);
  };
  int left_tile = -1;  // whose sums were left for the last of its blocks
  u32 came_before = 0;
  auto finish = [&] {
    const Shared shared = shared_tile(tile);
    if (left > 0 && shared.first != shared.last) {
      came_before = leave_part<CONSUMERS>(sums, shared);
      left_tile = tile;
    } else if (all_added<CONSUMERS, PARTS_AT_ONCE>(sums, shared)) {
      write(tile);
    }
  };

  // ------------------------------------------------------------------------------------------ tables
  const float value = NESTED && thread < 256 ? a.dynamic[thread] : 0.0f, offset = NESTED ? *a.offset : 0.0f;
  fill_pair_table<CONSUMERS>(table, read_pairs<CONSUMERS>(a.pairs));
  if (NESTED && thread < 256) *value_of_code(table, thread) = value;
  if (NESTED && thread == 0) *value_of_code(table, 256) = offset;
  meet_consumers<CONSUMERS>();
  wait_for_previous_kernel();
  write_window();
  take_scales();

  // ------------------------------------------------------------------------------------------ chunk by chunk
  int slot = 0;
  u32 phase = 0;
  Operand operands[2];  // of the half in work, and of the next one
  auto decode_first_half = [&] {
    full[slot].wait(phase);
    __syncwarp();
    decode(operands[0], slot, 0);
  };
  decode_first_half();
  while (true) {
    clear_sums();
    const int tile_end = min(chunks, chunk + left);
#pragma unroll 1
    while (chunk < tile_end) {
      const int now = slot;
      if (++slot == STAGES) {
        slot = 0;
        phase ^= 1;
      }
      multiply(operands[0], now, 0);
      decode(operands[1], now, 1);
      multiply(operands[1], now, 1);
      wait_for_products<1>();
      add_part(0);
      if (--left > 0) decode_first_half();
      wait_for_products<0>();
      add_part(1);
      if (lane == 0) free[now].arrive();
      if (++chunk < tile_end) next_scales();
    }
    if constexpr (PARTS > 1) return finish_in_cluster();
    finish();
    if (left == 0) break;
    tile++;
    chunk = 0;
    next_scales();
  }
  if (left_tile >= 0 && left_for_last<CONSUMERS, PARTS_AT_ONCE>(sums, shared_tile(left_tile), came_before)) write(left_tile);
}

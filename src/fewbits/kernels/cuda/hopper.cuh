// What the kernels share that multiply with Hopper's matrix units (wgmma): their sums of 64 rows of the weight by some
// tens or hundreds of rows of x lie in the registers of a warpgroup. For sm_90a.

// a matrix in global memory, and the size of the boxes that are copied from it (the driver's CUtensorMap)
struct __align__(64) Map {
  u64 words[16];
};

#ifndef EMULATED

// sums[64 x SUMS * 2] += a[64 x 16] * x[SUMS * 2 x 16].T by the four warps of a warpgroup, each with 16 of the 64 rows;
// the operand a and, eight columns at a time, the sums lie in registers as in multiply_add. accumulate = 0: no sums
// before. The address of x is given by second_operand.
#define LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LIST_32 LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST_64                                                                                        \
  LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49" \
          ", %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LIST_128                                                                                               \
  LIST_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81"         \
          ", %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99"         \
          ", %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115"   \
          ", %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_4(kind, i) kind(sums[i]), kind(sums[i + 1]), kind(sums[i + 2]), kind(sums[i + 3])
#define SUMS_16(kind, i) SUMS_4(kind, i), SUMS_4(kind, i + 4), SUMS_4(kind, i + 8), SUMS_4(kind, i + 12)
#define SUMS_64(kind, i) SUMS_16(kind, i), SUMS_16(kind, i + 16), SUMS_16(kind, i + 32), SUMS_16(kind, i + 48)
#define WGMMA(shape, sums, a0, a1, a2, a3, x, accumulate)         \
  "{ .reg .pred p; setp.ne.b32 p, " accumulate ", 0;"             \
  "wgmma.mma_async.sync.aligned." shape ".f32." NARROW "." NARROW \
  " {" sums "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " x ", p, 1, 1, 0; }"
#define WGMMA_INT8(shape, sums, weight, x, accumulate) \
  "{ .reg .pred p; setp.ne.b32 p, " accumulate ", 0;"  \
  "wgmma.mma_async.sync.aligned." shape ".s32.s8.s8 {" sums "}, " weight ", " x ", p; }"
#define FLOAT(value) "+f"(value)
#define INT(value) "+r"(value)

// Sums may stand in the registers of integers, bit for bit: those of multiply_32 that were converted go on there.
#define MULTIPLY_16(type, kind)                                                                                       \
  DEVICE void multiply_16(type(&sums)[16], const u32 (&a)[4], u64 x, int accumulate) {                                \
    asm volatile(WGMMA("m64n32k16", LIST_16, "%16", "%17", "%18", "%19", "%20", "%21")                                \
                 : SUMS_16(kind, 0)                                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(accumulate));                              \
  }                                                                                                                   \
  DEVICE void multiply_16(type(&sums)[32], const u32 (&a)[4], u64 x, int accumulate) {                                \
    asm volatile(WGMMA("m64n64k16", LIST_32, "%32", "%33", "%34", "%35", "%36", "%37")                                \
                 : SUMS_16(kind, 0), SUMS_16(kind, 16)                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(accumulate));                              \
  }                                                                                                                   \
  DEVICE void multiply_16(type(&sums)[64], const u32 (&a)[4], u64 x, int accumulate) {                                \
    asm volatile(WGMMA("m64n128k16", LIST_64, "%64", "%65", "%66", "%67", "%68", "%69")                               \
                 : SUMS_64(kind, 0)                                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(accumulate));                              \
  }                                                                                                                   \
  DEVICE void multiply_16(type(&sums)[128], const u32 (&a)[4], u64 x, int accumulate) {                               \
    asm volatile(WGMMA("m64n256k16", LIST_128, "%128", "%129", "%130", "%131", "%132", "%133")                        \
                 : SUMS_64(kind, 0), SUMS_64(kind, 64)                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(accumulate));                              \
  }
MULTIPLY_16(float, FLOAT)
MULTIPLY_16(int, INT)

// the same of 32 columns of 8-bit integers, both operands in shared memory
DEVICE void multiply_32(int (&sums)[32], u64 weight, u64 x, int accumulate) {
  asm volatile(WGMMA_INT8("m64n64k32", LIST_32, "%32", "%33", "%34")
               : SUMS_16(INT, 0), SUMS_16(INT, 16)
               : "l"(weight), "l"(x), "r"(accumulate));
}
DEVICE void multiply_32(int (&sums)[64], u64 weight, u64 x, int accumulate) {
  asm volatile(WGMMA_INT8("m64n128k32", LIST_64, "%64", "%65", "%66")
               : SUMS_64(INT, 0)
               : "l"(weight), "l"(x), "r"(accumulate));
}
DEVICE void multiply_32(int (&sums)[128], u64 weight, u64 x, int accumulate) {
  asm volatile(WGMMA_INT8("m64n256k32", LIST_128, "%128", "%129", "%130")
               : SUMS_64(INT, 0), SUMS_64(INT, 64)
               : "l"(weight), "l"(x), "r"(accumulate));
}

DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// What is done with the sums is not to come before the wait for them.
template <int SUMS>
DEVICE void sums_are_there(float (&sums)[SUMS]) {
#pragma unroll
  for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(sums[i])::"memory");
}
template <int SUMS>
DEVICE void sums_are_there(int (&sums)[SUMS]) {
#pragma unroll
  for (int i = 0; i < SUMS; i++) asm volatile("" : "+r"(sums[i])::"memory");
}

// the matrix units read shared memory on a path of their own: what this thread wrote is to be there, too
DEVICE void show_matrix_units() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 16 bytes that the matrix units will read
DEVICE void store_for_matrix_units(u32 to, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// fp16, whatever x is
DEVICE float half_widened(u16 value) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value));
  return out;
}
DEVICE u16 half_narrowed(float value) {
  u16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}

// an 8 x 8 matrix of 16-bit numbers, two of row lane / 4 in each lane, transposed
DEVICE u32 transposed(u32 pair) {
  u32 out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

// 16 bytes of codes; the codes of the next chunks are fetched as far as the second-level cache
DEVICE void copy_codes_async(u32 to, const u8* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

// One thread starts the copy of a box that begins at this row and column to shared memory, as second_operand describes
// it; what lies outside the matrix gets zeros. The barrier's phase waits for its bytes (Barrier::arrive_and_expect).
// The matrix units see it without more ado.
DEVICE void copy_box(u32 to, const Map& map, int column, int row, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

// the same box as far as the second-level cache
DEVICE void fetch_box(const Map& map, int column, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(&map), "r"(column), "r"(row) : "memory");
}

// the first THREADS threads of a block wait for each other
template <int THREADS>
DEVICE void meet_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// a warpgroup goes on with so many registers a thread: more than before, or less
template <int COUNT>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#endif

// A number that is the same in all lanes: so the compiler knows, and keeps it where it takes one register of a warp.
DEVICE int same_of_warp(int value) {
#ifndef EMULATED
  value = __shfl_sync(0xFFFFFFFF, value, 0);
#endif
  return value;
}

// threadIdx.x, asked for anew: to keep what follows from it may take registers that loops want
DEVICE int thread_again() {
#ifdef EMULATED
  return threadIdx.x;
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

// The compiler is not to compute it again wherever it is used.
DEVICE int kept(int value) {
#ifndef EMULATED
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// 64 columns of x at a multiple of 1024 bytes of shared memory, and following ones at 32 bytes each 16 columns: 128
// bytes of each of 8 rows lie together, their pieces of 16 bytes permuted by the row's number; the next 8 rows 1024
// bytes further.
DEVICE u64 second_operand(u32 address) { return 1ull << 62 | (u64)(1024 >> 4) << 32 | 1 << 16 | address >> 4; }

// ---------------------------------------------------------------------------------------------- tiles in parts

// The chunks of all tiles stand in one line, and each block takes an equal stretch of it: where a block's begins, and
// whose a chunk is. Chunks times blocks are less than 2^32.
DEVICE int stretch_begin(u32 all_chunks, u32 block, u32 blocks) { return (int)(block * all_chunks / blocks); }
DEVICE int stretch_of(u32 all_chunks, u32 chunk, u32 blocks) { return (int)(((chunk + 1) * blocks - 1) / all_chunks); }

DEVICE u32 bits_of(float value) { return __float_as_uint(value); }
DEVICE u32 bits_of(int value) { return (u32)value; }
DEVICE void add_bits(float& sum, u32 bits) { sum += __uint_as_float(bits); }
DEVICE void add_bits(int& sum, u32 bits) { sum += (int)bits; }

// Where several blocks have chunks of a tile, they leave their sums in `parts`, two places a block (for a tile that it
// did not begin, and for the one that it does not end), and only the last of them goes on, with all added up in the
// order of the columns: which one that is does not matter to the result. `counter` is the tile's: how many came in its
// low half, and in the high one how many have written, if they come before they write; it is left a zero.
//
// With many sums a block comes before it writes, so that the last one need not write its own. It then waits for blocks
// that have come and are still writing, never for one that may not have begun. With few a second counting takes longer.
template <int SUMS>
constexpr bool COME_FIRST = SUMS >= 128;

struct Shared {
  u32* parts;
  u32* counter;
  u32* last_to_come;  // in shared memory
  u32 first, last;    // blocks

  DEVICE u32* place(u32 block, int part) const { return parts + (u64)(2 * block + (block == first)) * part + threadIdx.x * 4; }
};

template <int THREADS, int SUMS, typename Sum>
DEVICE void write_part(const Sum (&sums)[SUMS], const Shared& tile) {
  u32* to = tile.place(blockIdx.x, THREADS * SUMS);
#pragma unroll
  for (int c = 0; c < SUMS / 4; c++)
    __stcg((uint4*)(to + c * THREADS * 4), make_uint4(bits_of(sums[4 * c]), bits_of(sums[4 * c + 1]),
                                                      bits_of(sums[4 * c + 2]), bits_of(sums[4 * c + 3])));
}

// One's own sums can be begun with (keep) if they are the first or the second ones: x + y is y + x.
template <int THREADS, int AT_ONCE, int SUMS, typename Sum>
DEVICE void add_parts(Sum (&sums)[SUMS], const Shared& tile, bool keep) {
  if (!keep)
#pragma unroll
    for (int i = 0; i < SUMS; i++) sums[i] = 0;
#pragma unroll AT_ONCE
  for (u32 i = tile.first; i <= tile.last - keep; i++) {
    const u32* part = tile.place(i + (keep && i >= blockIdx.x), THREADS * SUMS);
#pragma unroll
    for (int c = 0; c < SUMS / 4; c++) {
      const uint4 four = __ldcg((const uint4*)(part + c * THREADS * 4));
      add_bits(sums[4 * c], four.x), add_bits(sums[4 * c + 1], four.y);
      add_bits(sums[4 * c + 2], four.z), add_bits(sums[4 * c + 3], four.w);
    }
  }
}

template <int THREADS, int AT_ONCE, int SUMS, typename Sum>
DEVICE bool all_added(Sum (&sums)[SUMS], const Shared& tile) {
  if (tile.first == tile.last) return true;
  const u32 own = blockIdx.x, others = tile.last - tile.first;
  auto come = [&] {
    if (threadIdx.x == 0) *tile.last_to_come = (add_up(tile.counter, 1) & 0xFFFF) == others;
    meet_consumers<THREADS>();
    return *tile.last_to_come != 0;
  };
  bool goes_on = COME_FIRST<SUMS> && come();
  const bool keep = own - tile.first <= 1;
  if (!goes_on || !keep) write_part<THREADS>(sums, tile);
  if (COME_FIRST<SUMS> && goes_on && threadIdx.x == 0) wait_for_count(tile.counter, others << 16 | (others + 1));
  meet_consumers<THREADS>();
  if constexpr (!COME_FIRST<SUMS>)
    goes_on = come();
  else if (!goes_on && threadIdx.x == 0)
    add_up(tile.counter, 1 << 16);
  if (!goes_on) return false;
  if (threadIdx.x == 0) *tile.counter = 0;
  add_parts<THREADS, AT_ONCE>(sums, tile, keep);
  return true;
}

// A block that goes on with another tile leaves its sums without waiting for an answer: how many had come before it,
// which the first thread gets, it looks at when it is done with all else. Should it have been the last one, it adds up
// all then.
template <int THREADS, int SUMS, typename Sum>
DEVICE u32 leave_part(const Sum (&sums)[SUMS], const Shared& tile) {
  write_part<THREADS>(sums, tile);
  meet_consumers<THREADS>();
  return threadIdx.x == 0 ? add_up_and_go_on(tile.counter, COME_FIRST<SUMS> ? 1 << 16 | 1 : 1) : 0;
}
template <int THREADS, int AT_ONCE, int SUMS, typename Sum>
DEVICE bool left_for_last(Sum (&sums)[SUMS], const Shared& tile, u32 came_before) {
  const u32 others = tile.last - tile.first;
  meet_consumers<THREADS>();  // all have read what was there of another tile
  if (threadIdx.x == 0) {
    *tile.last_to_come = (came_before & 0xFFFF) == others;
    if (*tile.last_to_come) wait_for_count(tile.counter, COME_FIRST<SUMS> ? (others + 1) << 16 | (others + 1) : others + 1);
  }
  meet_consumers<THREADS>();
  if (*tile.last_to_come == 0) return false;
  if (threadIdx.x == 0) *tile.counter = 0;
  add_parts<THREADS, AT_ONCE>(sums, tile, false);
  return true;
}

// ---------------------------------------------------------------------------------------------- tiles of a cluster

// PARTS of a cluster, OF_BLOCK in each of its blocks, have a tile's sums, each of other columns: every one gets its share
// of x's rows from all, and adds these up in the order of the columns. A part is THREADS threads of a block, the parts of
// a block one after the other. `memory` has room for all of a block's sums.
template <int PARTS, int OF_BLOCK, int THREADS, int SUMS, typename Sum>
DEVICE void add_in_cluster(Sum (&share)[SUMS / PARTS], const Sum (&sums)[SUMS], u8* memory, u32 rank) {
  constexpr int FOURS = SUMS / PARTS / 4;
  const u32 group = threadIdx.x / THREADS, thread = threadIdx.x % THREADS;
  auto place = [&](u32 group, u32 part, int c) {
    return memory + (((group * PARTS + part) * FOURS + c) * THREADS + thread) * 16;
  };
  arrive_in_cluster();
  wait_for_cluster();  // nobody reads any more what lay there
#pragma unroll
  for (int to = 0; to < PARTS; to++) {
    const u32 there = address_in_cluster(place(to % OF_BLOCK, rank * OF_BLOCK + group, 0), to / OF_BLOCK);
#pragma unroll
    for (int c = 0; c < FOURS; c++) {
      const Sum* four = sums + (to * FOURS + c) * 4;
      store_in_cluster(there + c * THREADS * 16,
                       make_uint4(bits_of(four[0]), bits_of(four[1]), bits_of(four[2]), bits_of(four[3])));
    }
  }
  arrive_in_cluster();
  wait_for_cluster();
#pragma unroll
  for (int c = 0; c < FOURS; c++)
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) {
      const uint4 four = *(const uint4*)place(group, part, c);
      if (part == 0) share[4 * c] = share[4 * c + 1] = share[4 * c + 2] = share[4 * c + 3] = 0;
      add_bits(share[4 * c], four.x), add_bits(share[4 * c + 1], four.y);
      add_bits(share[4 * c + 2], four.z), add_bits(share[4 * c + 3], four.w);
    }
}

// ---------------------------------------------------------------------------------------------- the output

DEVICE float as_float(float value) { return value; }
DEVICE float as_float(int bits) { return __uint_as_float((u32)bits); }
DEVICE void set_float(float& to, float value) { to = value; }
DEVICE void set_float(int& to, float value) { to = (int)__float_as_uint(value); }

// A warp's sums, 16 rows of the weight from `row` on by m rows of x, to out[m, n]. `whole`, the same for all threads of
// the block: there are as many rows of both as it has sums for.
template <int SUMS, typename Sum>
DEVICE void write_sums(const Sum (&sums)[SUMS], u16* out, int m, int n, int row, const void* bias, int bias_bytes, int g, int t,
                       bool whole = false) {
  const float bias0 = bias_at(bias, bias_bytes, min(row + g, n - 1));
  const float bias1 = bias_at(bias, bias_bytes, min(row + g + 8, n - 1));
  auto upper_of = [&](int c) { return pair_of_two(as_float(sums[4 * c]) + bias0, as_float(sums[4 * c + 1]) + bias0); };
  auto lower_of = [&](int c) { return pair_of_two(as_float(sums[4 * c + 2]) + bias1, as_float(sums[4 * c + 3]) + bias1); };
  if ((n & 3) != 0) {
#pragma unroll
    for (int c = 0; c < SUMS / 4; c++) {
      if (c * 8 >= m) break;
      const u32 upper = upper_of(c), lower = lower_of(c);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int to = row + g + (i & 2) * 4, at = c * 8 + t * 2 + (i & 1);
        const u32 pair = i & 2 ? lower : upper;
        if (at < m && to < n) out[(long long)at * n + to] = (u16)(i & 1 ? pair >> 16 : pair);
      }
    }
    return;
  }
  // a lane gets four neighbours of a row of the output, so that four lanes write 32 bytes
  auto four_of = [&](int c) {
    const u32 upper = transposed(upper_of(c)), lower = transposed(lower_of(c));
    const u32 other = __shfl_xor_sync(0xFFFFFFFF, t & 1 ? upper : lower, 1);
    return t & 1 ? make_uint2(other, lower) : make_uint2(upper, other);
  };
  const int to = row + (t & 1) * 8 + (t & 2) * 2;
  u16* place = out + (long long)g * n + to;
  if (whole) {  // no branches: what takes a while is under way for several
#pragma unroll
    for (int c = 0; c < SUMS / 4; c++, place += 8ll * n) *(uint2*)place = four_of(c);
  } else {
#pragma unroll
    for (int c = 0; c < SUMS / 4; c++, place += 8ll * n) {
      if (c * 8 >= m) break;
      const uint2 four = four_of(c);
      if (c * 8 + g < m && to < n) *(uint2*)place = four;
    }
  }
}

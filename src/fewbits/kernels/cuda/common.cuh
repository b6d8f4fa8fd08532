// What all kernels share. There are no includes: NVRTC then needs no toolkit's headers.
//
// Assembly stands in small functions alone, behind `#ifndef EMULATED`: tests on a CPU bring their own ones
// (tests/emulator/cuda.h), and run all the rest as it is.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

// ---------------------------------------------------------------------------------------------- 16-bit numbers
// BF16 says what x, the bias and the output are: bf16, or fp16.

#ifndef EMULATED

#if BF16
#define MMA_TYPES "f32.bf16.bf16.f32"
#define PAIR_TYPE "bf16x2"
#define NARROW "bf16"
#else
#define MMA_TYPES "f32.f16.f16.f32"
#define PAIR_TYPE "f16x2"
#define NARROW "f16"
#endif

DEVICE u16 narrowed(float value) {
  u16 out;
  asm("cvt.rn." NARROW ".f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}

DEVICE float widened(u16 value) {
  float out;
#if BF16
  out = __uint_as_float(u32(value) << 16);
#else
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value));
#endif
  return out;
}

// The host gets an error, now or at its next call.
DEVICE void stop_with_error() { asm volatile("trap;"); }

// two neighbours, the first in the low half
DEVICE u32 pair_of_two(float low, float high) {
  u32 out;
  asm("cvt.rn." PAIR_TYPE ".f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

DEVICE u32 difference_of_pairs(u32 left, u32 right) {
  u32 out;
  asm("sub.rn." PAIR_TYPE " %0, %1, %2;" : "=r"(out) : "r"(left), "r"(right));
  return out;
}

#endif

// A bias is of x's dtype or fp32: 2 or 4 bytes an element; 0 says that there is none.
DEVICE float bias_at(const void* bias, int bias_bytes, int n) {
  if (bias_bytes == 0) return 0.0f;
  return bias_bytes == 2 ? widened(((const u16*)bias)[n]) : ((const float*)bias)[n];
}

// ---------------------------------------------------------------------------------------------- matrix units

#ifndef EMULATED

// sums[16 x 8] += a[16 x 16] * b[16 x 8], in the layout of mma.m16n8k16: with g = lane / 4 and t = lane % 4 a thread
// holds of a the rows g and g + 8 at columns 2t, 2t + 1 (a[0], a[1]) and 2t + 8, 2t + 9 (a[2], a[3]); of b the same rows
// of column g (b0, b1); of the sums rows g (0, 1) and g + 8 (2, 3) at columns 2t, 2t + 1.
DEVICE void multiply_add(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------------------------------------- memory

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// 16 bytes from global to shared memory; of them only the first `bytes` are read, the rest are zeros
DEVICE void copy_async(u32 to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// No .nc: such a load has no order with anything, and ptxas puts it off until just before its use.
DEVICE uint4 load_16_bytes(const void* pointer) {
  uint4 out;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "l"(pointer)
               : "memory");
  return out;
}

// to the second-level cache
DEVICE void fetch(const void* pointer) { asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer)); }

// With programmatic dependent launch a kernel begins while the one before it ends. What that one may have written is
// read only after this wait, and the next kernel may begin only after it: what its neighbours two launches away wrote
// is there then. Without such a launch it does nothing.
DEVICE void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// A barrier in shared memory: a phase ends when so many arrivals have come. Whoever waits names the phase by its parity;
// the phase before the first has ended.
struct Barrier {
  u64 state;

  DEVICE void init(int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
  }
  DEVICE void arrive() {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // an arrival, and the phase does not end before so many bytes of boxes (copy_box) have come as well
  DEVICE void arrive_and_expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  DEVICE void wait(int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(this)), "r"(parity) : "memory");
  }
};

// Blocks of a cluster run at the same time, and write to each other's shared memory. All their threads arrive, and then
// wait: what was written before is there, and all blocks have begun.
#if SPLIT > 1  // what a kernel is compiled for
#define OF_CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define OF_CLUSTER
#endif
DEVICE void arrive_in_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
DEVICE void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// where block `rank` has what this one has at a place in shared memory
DEVICE u32 address_in_cluster(const void* pointer, u32 rank) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(pointer)), "r"(rank));
  return there;
}
DEVICE void store_in_cluster(u32 to, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}
DEVICE void store_in_cluster(u32 to, uint4 value) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// How many came before, of `others` + 1 in all; the last one leaves a zero. What a block wrote before it came (and
// before a barrier) is there for blocks that come later (and after a barrier).
DEVICE u32 count_up(u32* counter, u32 others) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(others)
               : "memory");
  return before;
}

// Adds, and returns what was there; a wait until so much is there. What a block wrote before it added (and before a
// barrier) is there for blocks that add or wait later (and after a barrier).
DEVICE u32 add_up(u32* counter, u32 value) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}
// Without an answer until that is used; and for what others wrote before they added, a wait is needed then.
DEVICE u32 add_up_and_go_on(u32* counter, u32 value) {
  u32 before;
  asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}
DEVICE void wait_for_count(const u32* counter, u32 count) {
  u32 now;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  while (now != count);
}

#endif

// ---------------------------------------------------------------------------------------------- codes

// A byte holds two 4-bit codes, the first in its high half. This table has, for each of the 256 bytes, the two values
// as a pair of 16-bit numbers, once for each of the 32 lanes, so that no two lanes meet in a bank. An entry begins every
// 256 bytes and takes half of them: then one byte permutation makes an address of a byte and a lane.
constexpr int PAIR_TABLE_BYTES = 65536;
constexpr int PAIR_TABLE_GAP = 128;  // where the free half of an entry begins: room for one more such table

// A thread fills halves of entries; what these are it reads first, so that other reads can go on beside.
template <int THREADS>
struct OwnPairs {
  static constexpr int COUNT = (512 + THREADS - 1) / THREADS;
  u32 pair[COUNT];
};

template <int THREADS>
DEVICE OwnPairs<THREADS> read_pairs(const u32* pairs) {
  OwnPairs<THREADS> own;
#pragma unroll
  for (int j = 0; j < own.COUNT; j++) own.pair[j] = pairs[min((int)threadIdx.x + j * THREADS, 511) >> 1];
  return own;
}

template <int THREADS>
DEVICE void fill_pair_table(u8* table, const OwnPairs<THREADS>& own) {
#pragma unroll
  for (int k = 0; k < own.COUNT; k++) {
    const int i = threadIdx.x + k * THREADS, entry = i >> 1, half = i & 1;
    if (i >= 512) break;
    const u32 pair = own.pair[k];
    const uint4 copies = make_uint4(pair, pair, pair, pair);
#pragma unroll
    for (int j = 0; j < 4; j++)  // neighbours begin at different banks
      *(uint4*)(table + entry * 256 + ((2 * j + half + 2 * entry) & 7) * 16) = copies;
  }
}

// the pair of byte BYTE of a word; lane4 is 4 * lane
template <int BYTE>
DEVICE u32 pair_of(const u8* table, u32 word, u32 lane4) {
  return *(const u32*)(table + __byte_perm(word, lane4, 0x5504 | BYTE << 4));
}

// two of a word's four signed bytes, the first two or the last two: exact in either dtype
template <int HALF>
DEVICE u32 pair_of_bytes(u32 word) {
#if BF16
  // 0x43 and a byte are 128 + its low 7 bits, or 128 and 256 where only the sign bit is left
  const u32 biased = __byte_perm(word, 0x43434343, HALF ? 0x4342 : 0x4140);
  return difference_of_pairs(biased & 0xFF7FFF7F, biased & 0xFF80FF80);
#else
  // 0x64 and a byte without sign are 1024 + the byte
  const u32 biased = __byte_perm(word ^ 0x80808080, 0x64646464, HALF ? 0x4342 : 0x4140);
  return difference_of_pairs(biased, 0x64806480);
#endif
}

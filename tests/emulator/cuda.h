// CUDA on a CPU, as far as our kernels use it: their sources are compiled as C++ with EMULATED defined, and what they
// have in assembly comes from here.
//
// Each thread of a block is a fiber. Fibers change places wherever threads may wait for each other, and here and there
// besides, in an order that a seed decides: lanes of a warp are not in step, warps run ahead or are left behind. What
// the hardware does on its own happens as late as it is allowed to, or at once, as the seed decides: asynchronous
// copies, until they are waited for; products of a warpgroup, likewise. Until then what they write is NaN, and so is
// the dynamic shared memory that a block finds. Blocks run one after the other, in any order.
//
// So a wait or a barrier that is missing gives wrong results with most seeds. What cannot be right under any is
// reported: reads and writes that are not aligned, or outside an array (as -fsanitize finds them), x read before the
// previous kernel has ended, dynamic shared memory written past its end, threads that wait forever.
//
// Not seen: what goes wrong only while two blocks run at once; two threads that write or read the same place between
// the same barriers, where the order does not change the result; reads of global memory past a tensor's end.

#include <pthread.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// ---------------------------------------------------------------------------------------------- words of the language

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local  // a block has a thread of its own: all its fibers see the same, zeros at first

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }

inline float __uint_as_float(u32 bits) { float out; std::memcpy(&out, &bits, 4); return out; }
inline u32 __float_as_uint(float value) { u32 out; std::memcpy(&out, &value, 4); return out; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float4 __ldcg(const float4* from) { return *from; }
inline void __stcg(float4* to, float4 value) { *to = value; }

inline u32 __byte_perm(u32 low, u32 high, u32 selector) {
  const u64 bytes = low | (u64)high << 32;
  u32 out = 0;
  for (int i = 0; i < 4; i++) out |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
inline u32 __funnelshift_r(u32 low, u32 high, u32 shift) { return (u32)(((u64)high << 32 | low) >> (shift & 31)); }

static struct { unsigned x, y, z; } threadIdx, blockIdx, gridDim;
constexpr int ALL_SHARED = 227 << 10;
alignas(1024) thread_local u8 shared[ALL_SHARED];

// ---------------------------------------------------------------------------------------------- fibers

namespace emulated {

constexpr int MOST_THREADS = 1024, STACK = 128 << 10;

struct Copy { u32 to; const void* from; int bytes; bool done; };
struct Product { float* sums; int count; const u32* a; u64 x; bool accumulate; };

struct Fiber {
  ucontext_t context;
  bool ended, previous_ended;              // the thread; for all it knows, the kernel before
  std::vector<Copy> copies, unseen;        // not committed; come, but not shown to the matrix units
  std::vector<std::vector<Copy>> committed;  // not waited for
  std::vector<Product> products;
  std::vector<std::vector<Product>> groups;  // of products
};

struct Chance {  // xorshift: any number that is not 0 is a seed
  typedef u32 result_type;
  u32 state;
  static constexpr u32 min() { return 0; }
  static constexpr u32 max() { return ~0u; }
  u32 operator()() {
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state * 0x9E3779B1u >> 8 | state << 24;
  }
};

struct Meeting { int come = 0, number = 0; };  // threads that have come, and how often all had

static Fiber fibers[MOST_THREADS];
static char* stacks[MOST_THREADS];
static ucontext_t scheduler;
static int threads, current, shared_bytes;
static long long steps;                          // that threads made: none means that they wait forever
static const char* failure;
static Chance chance;
static Meeting block_meeting, warp_meetings[MOST_THREADS / 32];
static u32 exchanged[MOST_THREADS][6];           // what lanes show each other
static size_t groups_done[MOST_THREADS / 128];   // of a warpgroup's products
static u8 seen_by_matrix_units[ALL_SHARED];      // shared memory as they see it
static const char *late_begin, *late_end;        // what the previous kernel may still write to

static bool one_in(unsigned count) { return chance() % count == 0; }
static Fiber& own() { return fibers[current]; }
static void yield() { swapcontext(&own().context, &scheduler); }
static void perhaps_yield() { if (one_in(8)) yield(); }

[[noreturn]] static void fail(const char* why) {
  failure = why;
  while (true) yield();
}

template <typename Condition>
void wait_until(Condition condition) {
  while (!condition()) yield();
  steps++;
}

static void meet(Meeting& meeting, int count) {
  const int number = meeting.number;
  if (++meeting.come == count) {
    meeting.come = 0;
    meeting.number++;
  }
  wait_until([&] { return meeting.number != number; });
}

static void meet_warp() { meet(warp_meetings[current / 32], 32); }

// Each lane of a warp gives some words; then a lane computes from all of them.
template <typename Compute>
auto exchange(std::initializer_list<u32> words, Compute compute) {
  std::copy(words.begin(), words.end(), exchanged[current]);
  meet_warp();
  const auto out = compute(exchanged + current / 32 * 32);
  meet_warp();
  return out;
}

}  // namespace emulated

// what -fsanitize=alignment,bounds calls
extern "C" void __ubsan_handle_type_mismatch_v1_abort(void*, void*) {
  emulated::fail("a read or write that is not aligned");
}
extern "C" void __ubsan_handle_out_of_bounds_abort(void*, void*) { emulated::fail("an index outside an array"); }

inline void __syncthreads() { emulated::meet(emulated::block_meeting, emulated::threads); }
inline void __syncwarp() { emulated::meet_warp(); emulated::perhaps_yield(); }
inline u32 __shfl_xor_sync(u32, u32 value, int mask) {
  return emulated::exchange({value}, [&](auto words) { return words[emulated::current % 32 ^ mask][0]; });
}
inline u32 __reduce_max_sync(u32, u32 value) {
  return emulated::exchange({value}, [&](auto words) {
    u32 largest = 0;
    for (int lane = 0; lane < 32; lane++) largest = max(largest, words[lane][0]);
    return largest;
  });
}

// ---------------------------------------------------------------------------------------------- 16-bit numbers

#if BF16
inline u16 narrowed(float value) {
  const u32 bits = __float_as_uint(value);
  return value != value ? 0x7FFF : (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float widened(u16 value) { return __uint_as_float((u32)value << 16); }
#else
inline u16 narrowed(float value) {
  if (value != value) return 0x7FFF;
  const float size = std::fabs(value);
  const u16 sign = std::signbit(value) ? 0x8000 : 0;
  if (size >= 65520.0f) return sign | 0x7C00;
  const int exponent = max(size > 0 ? std::ilogb(size) : -14, -14);
  return sign | (u16)(((exponent + 14) << 10) + (int)std::nearbyint(std::ldexp(size, 10 - exponent)));
}
inline float widened(u16 value) {
  const int exponent = value >> 10 & 31, fraction = value & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? fraction * 0x1p-24f
                                     : __uint_as_float((u32)(exponent + 112) << 23 | fraction << 13);
  return value & 0x8000 ? -size : size;
}
#endif

inline float low_of(u32 pair) { return widened((u16)pair); }
inline float high_of(u32 pair) { return widened((u16)(pair >> 16)); }
inline u32 pair_of_two(float low, float high) { return narrowed(low) | (u32)narrowed(high) << 16; }
inline u32 product_of_pairs(u32 left, u32 right) {
  return pair_of_two(low_of(left) * low_of(right), high_of(left) * high_of(right));
}
inline u32 difference_of_pairs(u32 left, u32 right) {
  return pair_of_two(low_of(left) - low_of(right), high_of(left) - high_of(right));
}

// ---------------------------------------------------------------------------------------------- memory

inline u32 shared_address(const void* pointer) { return (u32)((const u8*)pointer - shared); }

namespace emulated {

// NaN, for both who read shared memory, until a copy has come
static void forget(u32 at) {
  std::memset(shared + at, 0xFF, 16);
  std::memset(seen_by_matrix_units + at, 0xFF, 16);
}

static void complete(Copy& copy) {
  if (copy.done) return;
  copy.done = true;
  std::memset(shared + copy.to, 0, 16);
  std::memcpy(shared + copy.to, copy.from, copy.bytes);
}

static void check_read(const void* from) {
  const char* at = (const char*)from;
  if ((u64)at % 16) fail("a read that is not aligned");
  if (at < late_end && at + 16 > late_begin && !own().previous_ended) fail("x is read before the kernel before ended");
}

}  // namespace emulated

inline void copy_async(u32 to, const void* from, int bytes) {
  using namespace emulated;
  if (to % 16 || to + 16 > ALL_SHARED) fail("a copy to an address that is not aligned, or not in shared memory");
  if (bytes) check_read(from);
  Copy copy{to, from, bytes, false};
  forget(to);
  if (one_in(2)) complete(copy);
  own().copies.push_back(copy);
}
inline void copy_codes_async(u32 to, const void* from, int bytes) { copy_async(to, from, bytes); }

inline void commit_copies() {
  emulated::own().committed.push_back(std::move(emulated::own().copies));
  emulated::own().copies.clear();
  emulated::perhaps_yield();
}

template <int PENDING>
void wait_for_copies() {
  emulated::Fiber& own = emulated::own();
  emulated::perhaps_yield();
  for (; own.committed.size() > PENDING; own.committed.erase(own.committed.begin()))
    for (emulated::Copy& copy : own.committed.front()) {
      emulated::complete(copy);
      own.unseen.push_back(copy);
    }
}

inline uint4 load_16_bytes(const void* pointer) {
  emulated::check_read(pointer);
  return *(const uint4*)pointer;
}

inline void wait_for_previous_kernel() { emulated::own().previous_ended = true; }

inline u32 count_up(u32* counter, u32 others) {
  const u32 before = *counter;
  *counter = before >= others ? 0 : before + 1;
  return before;
}

struct Barrier {
  u16 arrivals, missing;
  u32 phase;

  void init(int count) {
    arrivals = missing = (u16)count;
    phase = 0;
  }
  void arrive() {
    if (arrivals == 0 || arrivals > emulated::threads) emulated::fail("a barrier that is not initialized");
    if (--missing == 0) {
      missing = arrivals;
      phase++;
    }
    emulated::perhaps_yield();
  }
  void wait(int parity) {
    emulated::wait_until([&] { return (phase & 1) != (u32)parity; });
    emulated::perhaps_yield();
  }
};

// ---------------------------------------------------------------------------------------------- matrix units

inline void multiply_add(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulated::exchange({a[0], a[1], a[2], a[3], b0, b1}, [&](auto words) {
    const int g = emulated::current % 32 / 4, t = emulated::current % 4;
    for (int i = 0; i < 4; i++)
      for (int k = 0; k < 8; k++) {  // pairs of columns: lane k % 4 of a row's four has them
        const u32 left = words[g * 4 + k % 4][(i >> 1) + k / 4 * 2];
        const u32 right = words[(2 * t + i % 2) * 4 + k % 4][4 + k / 4];
        sums[i] += low_of(left) * low_of(right);
        sums[i] += high_of(left) * high_of(right);
      }
    return 0;
  });
}

inline u32 transposed(u32 pair) {
  return emulated::exchange({pair}, [&](auto words) {
    const int g = emulated::current % 32 / 4, t = emulated::current % 4;
    auto at = [&](int row, int column) { return words[row * 4 + column / 2][0] >> 16 * (column % 2) & 0xFFFF; };
    return at(2 * t, g) | at(2 * t + 1, g) << 16;
  });
}

namespace emulated {

static bool all_committed(int warpgroup, size_t group) {
  return std::all_of(fibers + warpgroup * 128, fibers + warpgroup * 128 + 128,
                     [&](const Fiber& fiber) { return fiber.groups.size() > group; });
}

// product `step` of the next group: sums of 64 rows, 16 a warp, with rows of x that the descriptor finds
static void multiply_warpgroup(Fiber* of, size_t group, size_t step) {
  const Product first = of[0].groups[group][step];
  if (first.x >> 62 != 1 || (first.x >> 32 & 0x3FFF) != 1024 / 16) return void(failure = "another layout of x");
  const int rows_of_x = first.count * 2;
  float x[256][16];
  for (int row = 0; row < rows_of_x; row++)
    for (int k = 0; k < 16; k++) {
      u32 at = (u32)(first.x & 0x3FFF) * 16 + row / 8 * 1024 + row % 8 * 128 + k * 2;
      at ^= (at >> 7 & 7) << 4;  // the eight pieces of 128 bytes are permuted
      u16 value;
      std::memcpy(&value, seen_by_matrix_units + at, 2);
      x[row][k] = widened(value);
    }
  for (int warp = 0; warp < 4; warp++) {
    float a[16][16];
    for (int lane = 0; lane < 32; lane++) {
      const Product& product = of[warp * 32 + lane].groups[group][step];
      if (product.x != first.x) return void(failure = "threads give different descriptors");
      for (int i = 0; i < 4; i++) {
        float* to = a[lane / 4 + i % 2 * 8] + lane % 4 * 2 + i / 2 * 8;
        to[0] = low_of(product.a[i]), to[1] = high_of(product.a[i]);
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      const Product& product = of[warp * 32 + lane].groups[group][step];
      for (int i = 0; i < product.count; i++) {
        const float *left = a[lane / 4 + (i >> 1 & 1) * 8], *right = x[i / 4 * 8 + lane % 4 * 2 + i % 2];
        float sum = product.accumulate ? product.sums[i] : 0.0f;
        for (int k = 0; k < 16; k++) sum += left[k] * right[k];
        product.sums[i] = sum;
      }
    }
  }
}

static void complete_groups(int warpgroup, size_t count) {
  for (size_t& done = groups_done[warpgroup]; done < count && all_committed(warpgroup, done); done++)
    for (size_t step = 0; step < fibers[warpgroup * 128].groups[done].size(); step++)
      multiply_warpgroup(fibers + warpgroup * 128, done, step);
}

}  // namespace emulated

template <int SUMS>
void multiply_16(float (&sums)[SUMS], const u32 (&a)[4], u64 x, int accumulate) {
  if (!accumulate) std::fill(sums, sums + SUMS, NAN);
  emulated::own().products.push_back({sums, SUMS, a, x, accumulate != 0});
}

inline void begin_products() {}

inline void commit_products() {
  using namespace emulated;
  own().groups.push_back(std::move(own().products));
  own().products.clear();
  if (one_in(2)) complete_groups(current / 128, own().groups.size());
  perhaps_yield();
}

template <int PENDING>
void wait_for_products() {
  using namespace emulated;
  const size_t wanted = max(own().groups.size(), (size_t)PENDING) - PENDING;
  wait_until([&] {
    complete_groups(current / 128, wanted);
    return groups_done[current / 128] >= wanted;
  });
}

template <int SUMS>
void sums_are_there(float (&)[SUMS]) {}

inline void show_matrix_units() {
  using namespace emulated;
  for (const Copy& copy : own().unseen) std::memcpy(seen_by_matrix_units + copy.to, shared + copy.to, 16);
  own().unseen.clear();
}

// ---------------------------------------------------------------------------------------------- launching

namespace emulated {

static void (*thread_of_kernel)();

static void begin_fiber() {
  thread_of_kernel();
  own().ended = true;
  steps++;
  while (true) yield();
}

static void run_block() {
  std::memset(shared, 0xFF, sizeof shared);
  std::memset(seen_by_matrix_units, 0xFF, sizeof seen_by_matrix_units);
  block_meeting = {};
  for (Meeting& meeting : warp_meetings) meeting = {};
  std::fill(std::begin(groups_done), std::end(groups_done), 0);
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    fiber = Fiber{};
    if (!stacks[i]) stacks[i] = new char[STACK];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i];
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, begin_fiber, 0);
  }
  const int warps = threads / 32;
  int left_behind = -1, idle = 0;
  while (!std::all_of(fibers, fibers + threads, [](const Fiber& fiber) { return fiber.ended; })) {
    const long long before = steps;
    if (one_in(8)) left_behind = one_in(2) ? (int)(chance() % warps) : -1;
    for (int turn = 0; turn < warps; turn++) {
      const int warp = chance() % warps, first = chance() % 32, stride = chance() % 16 * 2 + 1;
      if (warp == left_behind && !one_in(16)) continue;
      for (int i = 0; i < 32 && !one_in(64); i++) {
        current = warp * 32 + (first + i * stride) % 32;
        if (own().ended) continue;
        threadIdx.x = current;
        swapcontext(&scheduler, &own().context);
        if (failure) return;
      }
    }
    idle = steps == before ? idle + 1 : 0;
    if (idle > 2000) return void(failure = "threads wait forever");
  }
  for (int i = shared_bytes; i < ALL_SHARED; i++)
    if (shared[i] != 0xFF) return void(failure = "shared memory is written past its end");
}

// x may be written by the kernel before
template <typename Arguments>
auto note_late(const Arguments& a, int) -> decltype(a.x, a.x_stride, void()) {
  late_begin = (const char*)a.x;
  late_end = (const char*)(a.x + (a.m - 1) * a.x_stride + a.k);
}
template <typename Arguments>
void note_late(const Arguments&, long) { late_begin = late_end = nullptr; }

// null, or what went wrong
template <auto KERNEL, typename Arguments>
const char* launch(const void* arguments, size_t bytes, int grid_x, int grid_y, int block, int room, u32 seed) {
  static Arguments a;
  if (bytes > sizeof a || bytes + 8 <= sizeof a) return "the arguments are of another size";
  std::memcpy(&a, arguments, bytes);
  note_late(a, 0);
  thread_of_kernel = [] { KERNEL(a); };
  threads = block, shared_bytes = room;
  failure = nullptr;
  chance.state = seed * 2 + 1;
  gridDim = {(unsigned)grid_x, (unsigned)grid_y, 1};
  std::vector<int> blocks(grid_x * grid_y);
  for (size_t i = 0; i < blocks.size(); i++) blocks[i] = (int)i;
  std::shuffle(blocks.begin(), blocks.end(), chance);
  for (const int index : blocks) {
    blockIdx = {(unsigned)(index % grid_x), (unsigned)(index / grid_x), 0};
    pthread_t thread;
    auto run = [](void*) -> void* { return run_block(), nullptr; };
    if (pthread_create(&thread, nullptr, run, nullptr)) return "no thread";
    pthread_join(thread, nullptr);
    if (failure) return failure;
  }
  return nullptr;
}

}  // namespace emulated

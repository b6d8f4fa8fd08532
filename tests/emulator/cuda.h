// CUDA on a CPU, as far as our kernels use it: their sources are compiled as C++ with EMULATED defined, and what they
// have in assembly comes from here.
//
// Each thread of a block is a fiber. Fibers change places wherever threads may wait for each other, and here and there
// besides, in an order that a seed decides: lanes of a warp are not in step, warps run ahead or are left behind. What
// the hardware does on its own happens as late as it is allowed to, or at once, as the seed decides: asynchronous
// copies and products of a warpgroup, until they are waited for; boxes, until threads can but wait for them, in any
// order; writes to another block's memory, until that may be told of them. Until then what they write is NaN, and so is
// the dynamic shared memory that a block finds: as integers -1, and for sums of integers a number that is unlikely.
// Blocks run one after the other, in any order; those of a cluster take turns, each in a thread of its own.
//
// So a wait or a barrier that is missing gives wrong results with most seeds. What cannot be right under any is
// reported: reads and writes that are not aligned, or outside an array (as -fsanitize finds them), x read before the
// previous kernel has ended, dynamic shared memory written past its end, or of a block that has not begun or has ended,
// threads that wait forever.
//
// Not seen: what goes wrong only while two blocks run at once; two threads that write or read the same place between
// the same barriers, where the order does not change the result; reads of global memory past a tensor's end.

#include <pthread.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
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
struct alignas(16) int4 { int x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

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
inline float __int2float_rn(int a) { return (float)a; }
inline int __float2int_rn(float a) {  // half to even; the nearest there is, and 0 of NaN
  return a != a ? 0 : (int)std::nearbyint(min(max((double)a, -0x1p31), 0x1p31 - 1));
}
inline u32 __vmaxu2(u32 a, u32 b) { return max(a & 0xFFFF, b & 0xFFFF) | max(a >> 16, b >> 16) << 16; }
inline int __popc(u32 bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

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

struct Barrier;

namespace emulated {

constexpr int MOST_THREADS = 1024, STACK = 128 << 10;

struct Copy { u32 to; const void* from; int bytes; bool done; };
struct Matrix {  // what tests have in a tensor map
  u64 pointer, item_bytes, rows, columns, stride, box_rows, box_columns, unused[9];
};
struct Box { Matrix of; u32 to; int column, row; Barrier* at; };
struct Product {
  u32* sums;  // of fp32 or, without a, integers
  int count;
  const u32* a;   // the first operand where it is in registers
  u64 weight, x;  // descriptors; of weight where the first operand is in shared memory
  bool accumulate;
};
struct Sums { int products; std::vector<u32> values; };  // that so many products are still to change

struct Store { u8* to; int bytes; u8 value[16]; };  // to another block's shared memory

struct Fiber {
  ucontext_t context;
  bool ended, previous_ended;                // the thread; for all it knows, the kernel before
  bool arrived;                              // in the cluster, and has not waited
  int meeting;                               // of the cluster's, in which it arrived
  std::vector<Store> stores;                 // that nobody may know of yet
  bool (*may_go_on)(void* condition);        // null where it does not wait
  void* condition;
  std::vector<Copy> copies;                  // not committed
  std::vector<std::vector<Copy>> committed;  // not waited for
  std::vector<u32> unseen;                   // where 16 bytes have come that are not shown to the matrix units
  std::vector<Product> products;             // not committed
  std::vector<std::vector<Product>> groups;  // of products
  std::map<u32*, Sums> sums;                 // of products that are not complete
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

struct Block {
  unsigned index_x, index_y;
  Fiber fibers[MOST_THREADS];
  ucontext_t scheduler;
  Meeting block_meeting, consumers_meeting, warp_meetings[MOST_THREADS / 32];
  u32 exchanged[MOST_THREADS][6];         // what lanes show each other
  size_t groups_done[MOST_THREADS / 128];  // of a warpgroup's products
  u8 seen_by_matrix_units[ALL_SHARED];    // shared memory as they see it
  std::vector<Box> boxes;                 // that have not come
  u8* memory;                             // its shared memory: null before it begins, and once it has ended
  bool ended;
};

// Blocks that run at the same time: of their threads one at a time does.
struct Cluster {
  std::vector<Block*> blocks;
  size_t turn;       // whose it is
  int idle, live;    // rounds in which nothing happened; threads that have not ended
  Meeting meeting;
};

static Block* block;  // whose turn it is
static Cluster cluster;
static pthread_mutex_t taking_turns = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t next_turn = PTHREAD_COND_INITIALIZER;
static std::vector<char*> stacks;  // that nobody uses
static int threads, current, shared_bytes;
static const char* failure;
static Chance chance;
static const char *late_begin, *late_end;  // what the previous kernel may still write to

static bool one_in(unsigned count) { return chance() % count == 0; }
static Fiber& own() { return block->fibers[current]; }
static void yield() { swapcontext(&own().context, &block->scheduler); }
static void perhaps_yield() { if (one_in(8)) yield(); }

[[noreturn]] static void fail(const char* why) {
  failure = why;
  while (true) yield();
}

// The scheduler looks whether a thread may go on: to change to one that may not would take longer.
template <typename Condition>
void wait_until(Condition condition) {
  if (condition()) return;
  own().may_go_on = [](void* condition) { return (*(Condition*)condition)(); };
  own().condition = &condition;
  yield();
  own().may_go_on = nullptr;
}

static void meet(Meeting& meeting, int count) {
  const int number = meeting.number;
  if (++meeting.come == count) {
    meeting.come = 0;
    meeting.number++;
  }
  wait_until([&] { return meeting.number != number; });
}

static void meet_warp() { meet(block->warp_meetings[current / 32], 32); }

// Each lane of a warp gives some words; then a lane computes from all of them.
template <typename Compute>
auto exchange(std::initializer_list<u32> words, Compute compute) {
  std::copy(words.begin(), words.end(), block->exchanged[current]);
  meet_warp();
  const auto out = compute(block->exchanged + current / 32 * 32);
  meet_warp();
  return out;
}

// the value of the lane that lane_of gives for one's own
template <typename Value, typename LaneOf>
Value from_lane(Value value, LaneOf lane_of) {
  static_assert(sizeof(Value) == 4);
  u32 bits;
  std::memcpy(&bits, &value, 4);
  bits = exchange({bits}, [&](auto words) { return words[lane_of(current % 32)][0]; });
  std::memcpy(&value, &bits, 4);
  return value;
}

template <typename Value, typename Combine>
Value combined(Value value, Combine combine) {
  return exchange({(u32)value}, [&](auto words) {
    Value out = (Value)words[0][0];
    for (int lane = 1; lane < 32; lane++) out = combine(out, (Value)words[lane][0]);
    return out;
  });
}

}  // namespace emulated

// what -fsanitize=alignment,bounds calls
extern "C" void __ubsan_handle_type_mismatch_v1_abort(void*, void*) {
  emulated::fail("a read or write that is not aligned");
}
extern "C" void __ubsan_handle_out_of_bounds_abort(void*, void*) { emulated::fail("an index outside an array"); }

inline void __syncthreads() { emulated::meet(emulated::block->block_meeting, emulated::threads); }
inline void __syncwarp() { emulated::meet_warp(); emulated::perhaps_yield(); }

// the first THREADS threads wait for each other
template <int THREADS>
void meet_consumers() {
  using namespace emulated;
  if (current >= THREADS) fail("a thread is at a barrier of others");
  meet(block->consumers_meeting, THREADS);
}

template <typename Value>
Value __shfl_sync(u32, Value value, int lane) {
  return emulated::from_lane(value, [&](int) { return lane & 31; });
}
template <typename Value>
Value __shfl_xor_sync(u32, Value value, int mask) {
  return emulated::from_lane(value, [&](int own) { return own ^ mask; });
}
template <typename Value>
Value __shfl_down_sync(u32, Value value, u32 lanes) {
  return emulated::from_lane(value, [&](int own) { return own + lanes < 32 ? own + lanes : own; });
}
inline u32 __ballot_sync(u32, int predicate) {
  return emulated::combined(predicate ? 1u << emulated::current % 32 : 0, [](u32 a, u32 b) { return a | b; });
}
inline u32 __reduce_or_sync(u32, u32 value) {
  return emulated::combined(value, [](u32 a, u32 b) { return a | b; });
}
inline u32 __reduce_max_sync(u32, u32 value) {
  return emulated::combined(value, [](u32 a, u32 b) { return max(a, b); });
}
inline int __reduce_max_sync(u32, int value) {
  return emulated::combined(value, [](int a, int b) { return max(a, b); });
}
inline u32 __reduce_add_sync(u32, u32 value) {
  return emulated::combined(value, [](u32 a, u32 b) { return a + b; });
}
inline int __reduce_add_sync(u32, int value) { return (int)__reduce_add_sync(0, (u32)value); }

// what a warpgroup has of registers makes no difference
template <int COUNT>
void take_registers() {}
template <int COUNT>
void give_registers() {}

// ---------------------------------------------------------------------------------------------- 16-bit numbers

inline u16 half_narrowed(float value) {
  if (value != value) return 0x7FFF;
  const float size = std::fabs(value);
  const u16 sign = std::signbit(value) ? 0x8000 : 0;
  if (size >= 65520.0f) return sign | 0x7C00;
  const int exponent = max(size > 0 ? std::ilogb(size) : -14, -14);
  return sign | (u16)(((exponent + 14) << 10) + (int)std::nearbyint(std::ldexp(size, 10 - exponent)));
}
inline float half_widened(u16 value) {
  const int exponent = value >> 10 & 31, fraction = value & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? fraction * 0x1p-24f
                                     : __uint_as_float((u32)(exponent + 112) << 23 | fraction << 13);
  return value & 0x8000 ? -size : size;
}

#if BF16
inline u16 narrowed(float value) {
  const u32 bits = __float_as_uint(value);
  return value != value ? 0x7FFF : (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float widened(u16 value) { return __uint_as_float((u32)value << 16); }
#else
inline u16 narrowed(float value) { return half_narrowed(value); }
inline float widened(u16 value) { return half_widened(value); }
#endif

inline void stop_with_error() { emulated::fail("stopped with an error"); }
inline float low_of(u32 pair) { return widened((u16)pair); }
inline float high_of(u32 pair) { return widened((u16)(pair >> 16)); }
inline u32 pair_of_two(float low, float high) { return narrowed(low) | (u32)narrowed(high) << 16; }
inline u32 difference_of_pairs(u32 left, u32 right) {
  return pair_of_two(low_of(left) - low_of(right), high_of(left) - high_of(right));
}

// ---------------------------------------------------------------------------------------------- memory

inline u32 shared_address(const void* pointer) { return (u32)((const u8*)pointer - shared); }

struct Barrier {
  u16 arrivals, missing;
  u32 phase : 1, bytes : 31;  // of boxes, that are expected in this phase and have not come

  void init(int count) {
    arrivals = missing = (u16)count;
    phase = bytes = 0;
  }
  void count(int come, int more_bytes) {
    if (arrivals == 0 || arrivals > emulated::threads) emulated::failure = "a barrier that is not initialized";
    if (come > missing) emulated::failure = "more arrivals than a barrier has";
    if ((int)bytes + more_bytes < 0) emulated::failure = "a barrier does not expect a box";
    missing -= come, bytes += more_bytes;
    if (missing == 0 && bytes == 0) {
      missing = arrivals;
      phase ^= 1;
    }
  }
  void arrive() { arrive_and_expect(0); }
  void arrive_and_expect(int bytes) {
    count(1, bytes);
    emulated::perhaps_yield();
  }
  void wait(int parity) {
    emulated::wait_until([&] { return phase != (u32)parity; });
    emulated::perhaps_yield();
  }
};

namespace emulated {

// NaN, for both who read shared memory, until a copy has come
static void forget(u32 at) {
  std::memset(shared + at, 0xFF, 16);
  std::memset(block->seen_by_matrix_units + at, 0xFF, 16);
}

static void complete(Copy& copy) {
  if (copy.done) return;
  copy.done = true;
  std::memset(shared + copy.to, 0, 16);
  std::memcpy(shared + copy.to, copy.from, copy.bytes);
}

// one of the boxes, in any order
static void box_comes(size_t index) {
  const Box box = block->boxes[index];
  block->boxes.erase(block->boxes.begin() + index);
  const Matrix& of = box.of;
  const int item = (int)of.item_bytes, row_bytes = (int)of.box_columns * item;
  const int begin = max(box.column, 0), end = min(box.column + (int)of.box_columns, (int)of.columns);
  for (int row = 0; row < (int)of.box_rows; row++) {
    u8 bytes[512] = {};
    const int from = box.row + row;
    if (from >= 0 && from < (int)of.rows && begin < end)
      std::memcpy(bytes + (begin - box.column) * item, (const u8*)of.pointer + from * of.stride + begin * item,
                  (end - begin) * item);
    for (int i = 0; i < row_bytes; i += 16) {
      u32 at = box.to + row * row_bytes + i;
      if (row_bytes >= 64) at ^= (at >> 7 & (row_bytes == 64 ? 3 : 7)) << 4;
      std::memcpy(shared + at, bytes + i, 16);
      std::memcpy(block->seen_by_matrix_units + at, bytes + i, 16);
    }
  }
  box.at->count(0, -(int)of.box_rows * row_bytes);
}

static void check_late(const void* from, size_t bytes) {
  const char* at = (const char*)from;
  if (at < late_end && at + bytes > late_begin && !own().previous_ended)
    fail("x is read before the kernel before ended");
}

static void check_read(const void* from) {
  if ((u64)from % 16) fail("a read that is not aligned");
  check_late(from, 16);
}

static void check_shared(u32 to) {
  if (to % 16 || to + 16 > ALL_SHARED) fail("a write to an address that is not aligned, or not in shared memory");
}

}  // namespace emulated

inline void copy_async(u32 to, const void* from, int bytes) {
  using namespace emulated;
  check_shared(to);
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
      own.unseen.push_back(copy.to);
    }
}

template <typename Map>
void copy_box(u32 to, const Map& map, int column, int row, Barrier& barrier) {
  using namespace emulated;
  Box box{{}, to, column, row, &barrier};
  static_assert(sizeof map == sizeof box.of);
  std::memcpy(&box.of, &map, sizeof map);
  const Matrix& of = box.of;
  const u32 row_bytes = (u32)(of.box_columns * of.item_bytes), bytes = (u32)of.box_rows * row_bytes;
  if (to % (row_bytes >= 64 ? row_bytes * 8 : 128) || to + bytes > ALL_SHARED)
    fail("a box to an address that is not aligned, or not in shared memory");
  const int first = max(row, 0), last = min(row + (int)of.box_rows, (int)of.rows) - 1;
  if (first <= last) check_late((const u8*)of.pointer + first * of.stride, (last - first) * of.stride + 1);
  for (u32 i = 0; i < bytes; i += 16) forget(to + i);
  block->boxes.push_back(box);
  if (one_in(2)) box_comes(block->boxes.size() - 1);
  perhaps_yield();
}

// that it is in the cache makes no difference; x is not there yet
template <typename Map>
void fetch_box(const Map& map, int, int) {
  emulated::Matrix of;
  std::memcpy(&of, &map, sizeof of);
  emulated::check_late((const u8*)of.pointer, of.rows * of.stride);
}

inline void fetch(const void*) {}

inline uint4 load_16_bytes(const void* pointer) {
  emulated::check_read(pointer);
  return *(const uint4*)pointer;
}

template <typename Value>
Value __ldcg(const Value* from) {
  emulated::check_late(from, sizeof(Value));
  return *from;
}
template <typename Value>
void __stcg(Value* to, std::common_type_t<Value> value) { *to = value; }

// the matrix units see it only when this thread has called show_matrix_units
inline void store_for_matrix_units(u32 to, uint4 value) {
  emulated::check_shared(to);
  emulated::forget(to);
  std::memcpy(shared + to, &value, 16);
  emulated::own().unseen.push_back(to);
}

inline void wait_for_previous_kernel() { emulated::own().previous_ended = true; }

namespace emulated {

// others may know of what a thread wrote to their memory
static void show_stores() {
  for (const Store& store : own().stores) std::memcpy(store.to, store.value, store.bytes);
  own().stores.clear();
}

static void end_meeting_of_cluster() {
  if (cluster.live > 0 && cluster.meeting.come == cluster.live) cluster.meeting.come = 0, cluster.meeting.number++;
}

}  // namespace emulated

#define OF_CLUSTER

inline void arrive_in_cluster() {
  using namespace emulated;
  if (own().arrived) fail("a thread arrives again without waiting");
  show_stores();
  own().arrived = true;
  own().meeting = cluster.meeting.number;
  cluster.meeting.come++;
  end_meeting_of_cluster();
  perhaps_yield();
}
inline void wait_for_cluster() {
  using namespace emulated;
  if (!own().arrived) fail("a thread waits for others without having arrived");
  wait_until([] { return cluster.meeting.number != own().meeting; });
  own().arrived = false;
}

constexpr int RANK_BITS = 20;  // above an address in a block's memory
inline u32 address_in_cluster(const void* pointer, u32 rank) { return shared_address(pointer) | (rank + 1) << RANK_BITS; }

template <typename Value>
void store_in_cluster(u32 to, Value value) {
  using namespace emulated;
  const u32 at = to & ((1 << RANK_BITS) - 1), rank = (to >> RANK_BITS) - 1;
  if (rank >= cluster.blocks.size()) fail("a write to a block that is none of the cluster");
  u8* memory = cluster.blocks[rank]->memory;
  if (!memory) fail("a write to the memory of a block that has not begun, or has ended");
  if (at % sizeof value || at + sizeof value > (u32)shared_bytes)
    fail("a write to an address that is not aligned, or not in shared memory");
  Store store = {memory + at, sizeof value};
  std::memcpy(store.value, &value, sizeof value);
  own().stores.push_back(store);
  if (one_in(2)) show_stores();
}

inline u32 count_up(u32* counter, u32 others) {
  const u32 before = *counter;
  *counter = before >= others ? 0 : before + 1;
  return before;
}

inline u32 add_up(u32* counter, u32 value) {
  const u32 before = *counter;
  *counter += value;
  return before;
}
inline u32 add_up_and_go_on(u32* counter, u32 value) { return add_up(counter, value); }
inline void wait_for_count(const u32* counter, u32 count) {
  if (*counter != count) emulated::fail("a wait for blocks that may not have begun");  // they run one after the other
}

inline u32 atomicOr(u32* to, u32 bits) {
  const u32 before = *to;
  *to |= bits;
  return before;
}

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
  const Fiber* of = block->fibers + warpgroup * 128;
  return std::all_of(of, of + 128, [&](const Fiber& fiber) { return fiber.groups.size() > group; });
}

// rows of 32 bytes that the descriptor finds
static void read_operand(u64 descriptor, int rows, u8 (*out)[32]) {
  const u32 begin = (u32)(descriptor & 0x3FFF) * 16;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0 || (descriptor >> 32 & 0x3FFF) != 1024 / 16 ||
      begin % 1024 + 32 > 128 || begin / 1024 * 1024 + rows * 128 > ALL_SHARED)
    return void(failure = "another layout of an operand");
  for (int row = 0; row < rows; row++)
    for (int piece = 0; piece < 2; piece++) {
      u32 at = begin + row / 8 * 1024 + row % 8 * 128 + piece * 16;
      at ^= (at >> 7 & 7) << 4;  // the eight pieces of 128 bytes are permuted
      std::memcpy(out[row] + piece * 16, block->seen_by_matrix_units + at, 16);
    }
}

static void numbers_of(const u8* bytes, float (&out)[16]) {
  for (int k = 0; k < 16; k++) out[k] = widened((u16)(bytes[2 * k] | bytes[2 * k + 1] << 8));
}
static void numbers_of(const u8* bytes, u32 (&out)[32]) {  // signed ones: modulo 2^32 that makes no difference
  for (int k = 0; k < 32; k++) out[k] = (u32)(int)(signed char)bytes[k];
}

// sums of 64 rows, 16 a warp, with rows of x
template <typename Number, int COLUMNS>
void multiply_rows(Fiber* of, size_t group, size_t step) {
  const Product& first = of[0].groups[group][step];
  const int rows_of_x = first.count * 2;
  u8 bytes[256][32];
  Number left[64][COLUMNS], right[256][COLUMNS];
  if (first.a) {
    for (int thread = 0; thread < 128; thread++)
      for (int i = 0; i < 4; i++)
        std::memcpy(bytes[thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8] + thread % 4 * 4 + i / 2 * 16,
                    of[thread].groups[group][step].a + i, 4);
  } else {
    read_operand(first.weight, 64, bytes);
  }
  for (int row = 0; row < 64; row++) numbers_of(bytes[row], left[row]);
  read_operand(first.x, rows_of_x, bytes);
  for (int row = 0; row < rows_of_x; row++) numbers_of(bytes[row], right[row]);
  for (int thread = 0; thread < 128; thread++) {
    const Product& product = of[thread].groups[group][step];
    Sums& sums = of[thread].sums[product.sums];
    for (int i = 0; i < product.count; i++) {
      const Number* a = left[thread / 32 * 16 + thread % 32 / 4 + (i >> 1 & 1) * 8];
      const Number* b = right[i / 4 * 8 + thread % 4 * 2 + i % 2];
      Number sum = 0;
      if (product.accumulate) std::memcpy(&sum, &sums.values[i], 4);
      for (int k = 0; k < COLUMNS; k++) sum += a[k] * b[k];
      std::memcpy(&sums.values[i], &sum, 4);
    }
    if (--sums.products == 0) {
      std::copy(sums.values.begin(), sums.values.end(), product.sums);
      of[thread].sums.erase(product.sums);
    }
  }
}

static void complete_groups(int warpgroup, size_t count) {
  Fiber* of = block->fibers + warpgroup * 128;
  for (size_t& done = block->groups_done[warpgroup]; done < count && all_committed(warpgroup, done); done++) {
    const std::vector<Product>& products = of[0].groups[done];
    for (int thread = 1; thread < 128; thread++)
      if (!std::equal(products.begin(), products.end(), of[thread].groups[done].begin(), of[thread].groups[done].end(),
                      [](const Product& a, const Product& b) {
                        return a.count == b.count && !a.a == !b.a && a.weight == b.weight && a.x == b.x &&
                               a.accumulate == b.accumulate;
                      }))
        return void(failure = "threads of a warpgroup give different products");
    for (size_t step = 0; step < products.size(); step++)
      products[step].a ? multiply_rows<float, 16>(of, done, step) : multiply_rows<u32, 32>(of, done, step);
    for (int thread = 0; thread < 128; thread++) of[thread].groups[done] = {};
  }
}

// Until all their products are complete, sums are NaN, or as an integer what no sum is likely to be.
static void begin_product(u32* sums, int count, const u32* a, u64 weight, u64 x, bool accumulate) {
  Sums& kept = own().sums[sums];
  if (kept.products++ == 0) kept.values.assign(sums, sums + count);
  std::fill(sums, sums + count, 0x7FABCDEF);
  own().products.push_back({sums, count, a, weight, x, accumulate});
}

}  // namespace emulated

// sums in fp32, or their bits in integers
template <typename Sum, int SUMS>
void multiply_16(Sum (&sums)[SUMS], const u32 (&a)[4], u64 x, int accumulate) {
  static_assert(SUMS <= 128);
  emulated::begin_product((u32*)sums, SUMS, a, 0, x, accumulate != 0);
}

template <int SUMS>
void multiply_32(int (&sums)[SUMS], u64 weight, u64 x, int accumulate) {
  static_assert(SUMS <= 128);
  emulated::begin_product((u32*)sums, SUMS, nullptr, weight, x, accumulate != 0);
}

inline void begin_products() {}

inline void commit_products() {
  using namespace emulated;
  own().groups.push_back(std::move(own().products));
  own().products.clear();
  const size_t count = own().groups.size();  // the last thread decides, or these would hardly ever be late
  if (all_committed(current / 128, count - 1) && one_in(2)) complete_groups(current / 128, count);
  perhaps_yield();
}

template <int PENDING>
void wait_for_products() {
  using namespace emulated;
  const size_t wanted = max(own().groups.size(), (size_t)PENDING) - PENDING;
  wait_until([&] {
    complete_groups(current / 128, wanted);
    return block->groups_done[current / 128] >= wanted;
  });
}

template <int SUMS>
void sums_are_there(float (&)[SUMS]) {}
template <int SUMS>
void sums_are_there(int (&)[SUMS]) {}

inline void show_matrix_units() {
  using namespace emulated;
  for (const u32 at : own().unseen) std::memcpy(block->seen_by_matrix_units + at, shared + at, 16);
  own().unseen.clear();
}

// ---------------------------------------------------------------------------------------------- launching

namespace emulated {

static void (*thread_of_kernel)();

static void begin_fiber() {
  thread_of_kernel();
  own().ended = true;
  cluster.live--;
  if (own().arrived) cluster.meeting.come--;
  end_meeting_of_cluster();
  while (true) yield();
}

// Another block goes on, and this one when it is its turn again.
static void give_turn() {
  Block* const own = block;
  const size_t count = cluster.blocks.size(), first = chance() % count;
  size_t rank = 0;
  while (cluster.blocks[rank] != own) rank++;
  for (size_t i = 0; i < count; i++)
    if (const size_t other = (first + i) % count; other != rank && !cluster.blocks[other]->ended) {
      cluster.turn = other;
      pthread_cond_broadcast(&next_turn);
      if (own->ended) return;
      while (cluster.turn != rank) pthread_cond_wait(&next_turn, &taking_turns);
      block = own;
      blockIdx = {own->index_x, own->index_y, 0};
      return;
    }
}

static void run_threads() {
  const int warps = threads / 32;
  int left_behind = -1;
  while (!std::all_of(block->fibers, block->fibers + threads, [](const Fiber& fiber) { return fiber.ended; })) {
    bool idle_round = true;  // no thread may go on, and nothing comes
    if (one_in(8)) left_behind = one_in(2) ? (int)(chance() % warps) : -1;
    for (int turn = 0; turn < warps; turn++) {
      const int warp = chance() % warps, first = chance() % 32, stride = chance() % 16 * 2 + 1;
      if (warp == left_behind && !one_in(16)) continue;
      for (int i = 0; i < 32 && !one_in(64); i++) {
        current = warp * 32 + (first + i * stride) % 32;
        if (own().ended) continue;
        if (!own().may_go_on || own().may_go_on(own().condition)) {
          threadIdx.x = current;
          swapcontext(&block->scheduler, &own().context);
          idle_round = false;
        }
        if (failure) return;
      }
    }
    if (!block->boxes.empty() && (idle_round || one_in(8))) {
      box_comes(chance() % block->boxes.size());
      idle_round = false;
    }
    if (failure) return;
    cluster.idle = idle_round ? cluster.idle + 1 : 0;
    if (cluster.idle > 2000) return void(failure = "threads wait forever");
    if (idle_round || one_in(8)) give_turn();
    if (failure) return;
  }
}

static void run_block() {
  std::memset(shared, 0xFF, sizeof shared);
  std::memset(block->seen_by_matrix_units, 0xFF, sizeof block->seen_by_matrix_units);
  block->memory = shared;
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = block->fibers[i];
    getcontext(&fiber.context);
    if (stacks.empty()) stacks.push_back(new char[STACK]);
    fiber.context.uc_stack.ss_sp = stacks.back();
    fiber.context.uc_stack.ss_size = STACK;
    stacks.pop_back();
    makecontext(&fiber.context, begin_fiber, 0);
  }
  run_threads();
  for (int i = 0; i < threads; i++) stacks.push_back((char*)block->fibers[i].context.uc_stack.ss_sp);
  block->memory = nullptr;
  if (failure) return;
  if (!block->boxes.empty()) return void(failure = "a block ends before its boxes have come");
  for (int i = shared_bytes; i < ALL_SHARED; i++)
    if (shared[i] != 0xFF) return void(failure = "shared memory is written past its end");
}

static void* run_in_turns(void* of) {
  Block* const own = (Block*)of;
  pthread_mutex_lock(&taking_turns);
  while (cluster.blocks[cluster.turn] != own) pthread_cond_wait(&next_turn, &taking_turns);
  block = own;
  blockIdx = {own->index_x, own->index_y, 0};
  run_block();
  own->ended = true;
  give_turn();
  pthread_mutex_unlock(&taking_turns);
  return nullptr;
}

// x may be written by the kernel before
template <typename Arguments>
auto note_late(const Arguments& a, int) -> decltype(a.x + a.x_stride + a.m + a.k, void()) {
  late_begin = (const char*)a.x;
  late_end = (const char*)(a.x + (a.m - 1) * a.x_stride + a.k);
}
template <typename Arguments>
void note_late(const Arguments&, long) { late_begin = late_end = nullptr; }

// null, or what went wrong
template <auto KERNEL, typename Arguments>
const char* launch(const void* arguments, size_t bytes, int grid_x, int grid_y, int block, int room, u32 seed) {
  static Arguments a;
  if (bytes > sizeof a || bytes + alignof(Arguments) <= sizeof a) return "the arguments are of another size";
  std::memcpy(&a, arguments, bytes);
  note_late(a, 0);
  thread_of_kernel = [] { KERNEL(a); };
  threads = block, shared_bytes = room;
  failure = nullptr;
  chance.state = seed * 2 + 1;
  gridDim = {(unsigned)grid_x, (unsigned)grid_y, 1};
#ifdef SPLIT
  const int of_cluster = SPLIT;
#else
  const int of_cluster = 1;
#endif
  if (grid_x % of_cluster) return "the grid is no multiple of a cluster's blocks";
  std::vector<int> clusters(grid_x / of_cluster * grid_y);
  for (size_t i = 0; i < clusters.size(); i++) clusters[i] = (int)i;
  std::shuffle(clusters.begin(), clusters.end(), chance);
  for (const int index : clusters) {
    cluster = {};
    cluster.turn = chance() % of_cluster;
    cluster.live = threads * of_cluster;
    for (int i = 0; i < of_cluster; i++) {
      cluster.blocks.push_back(new Block());
      cluster.blocks[i]->index_x = index % (grid_x / of_cluster) * of_cluster + i;
      cluster.blocks[i]->index_y = index / (grid_x / of_cluster);
    }
    std::vector<pthread_t> running(of_cluster);
    for (int i = 0; i < of_cluster; i++)
      if (pthread_create(&running[i], nullptr, run_in_turns, cluster.blocks[i])) return "no thread";
    for (const pthread_t thread : running) pthread_join(thread, nullptr);
    for (Block* ended : cluster.blocks) delete ended;
    if (failure) return failure;
  }
  return nullptr;
}

}  // namespace emulated

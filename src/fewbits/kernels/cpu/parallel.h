// Work on torch's own threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fewbits {

// body(context, index) for every index below count, on at most so many threads. Which thread takes which index is not
// determined: a result must not depend on it. With one thread, in a child of fork(), in a parallel region and without
// an OpenMP runtime it runs in the caller.
void run_parallel(int64_t threads, int64_t count, void (*body)(void* context, int64_t index), void* context);

// Memory of this thread, 64-byte aligned, that stays until a call with the same slot wants more. Of several that are in
// use at once, each has its own slot: 0 to 3 within a parallel body, 4 to 7 outside of it.
void* scratch(int slot, size_t bytes);

// Keep the larger of what is there and a value, of several threads.
void keep_larger(int64_t* there, int64_t value);

#ifdef FEWBITS_LEVEL
namespace FEWBITS_LEVEL {

template <class Body>
static inline void parallel_for(int64_t threads, int64_t count, const Body& body) {
    run_parallel(
        threads, count, [](void* context, int64_t index) { (*static_cast<const Body*>(context))(index); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace FEWBITS_LEVEL
#endif

}  // namespace fewbits

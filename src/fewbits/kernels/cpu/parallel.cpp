#include "parallel.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fewbits {
namespace {

// Of the OpenMP runtime that torch has loaded. A second one, or threads of our own that wait by spinning, would take
// the cores from torch's threads, which spin as well; a region of theirs costs under a microsecond.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpInParallel = int (*)();
GompParallel gomp_parallel = nullptr;
OmpInParallel omp_in_parallel = nullptr;
std::atomic<bool> forked{false};  // the threads of the runtime do not live on in a child, and it would wait for them

struct Job {
    void (*body)(void*, int64_t);
    void* context;
    int64_t count;
    std::atomic<int64_t> next{0};
};

void work(void* pointer) {
    Job& job = *static_cast<Job*>(pointer);
    for (int64_t index; (index = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;)
        job.body(job.context, index);
}

struct Scratch {
    void* memory[8] = {};
    size_t bytes[8] = {};
    ~Scratch() {
        for (void* piece : memory) free(piece);
    }
};

}  // namespace

void run_parallel(int64_t threads, int64_t count, void (*body)(void*, int64_t), void* context) {
    if (threads > count) threads = count;
    const bool alone = threads <= 1 || gomp_parallel == nullptr || forked.load(std::memory_order_relaxed) ||
                       (omp_in_parallel != nullptr && omp_in_parallel());
    if (alone) {
        for (int64_t index = 0; index < count; index++) body(context, index);
        return;
    }
    Job job{body, context, count};
    gomp_parallel(work, &job, static_cast<unsigned>(threads), 0);
}

void* scratch(int slot, size_t bytes) {
    static thread_local Scratch mine;
    if (mine.bytes[slot] < bytes) {
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        free(mine.memory[slot]);
        void* memory = nullptr;
        if (posix_memalign(&memory, 4096, rounded) != 0) {  // no exception may leave a thread of the runtime
            fprintf(stderr, "fewbits: no memory for %zu bytes of scratch\n", rounded);
            abort();
        }
        mine.memory[slot] = memory;
        mine.bytes[slot] = rounded;
    }
    return mine.memory[slot];
}

void keep_larger(int64_t* there, int64_t value) {
    int64_t known = __atomic_load_n(there, __ATOMIC_RELAXED);
    while (value > known &&
           !__atomic_compare_exchange_n(there, &known, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

}  // namespace fewbits

// Addresses of the OpenMP runtime's GOMP_parallel and omp_in_parallel.
extern "C" __attribute__((visibility("default"))) void fewbits_set_threads(void* parallel, void* in_parallel) {
    fewbits::gomp_parallel = reinterpret_cast<fewbits::GompParallel>(parallel);
    fewbits::omp_in_parallel = reinterpret_cast<fewbits::OmpInParallel>(in_parallel);
#if defined(__unix__) || defined(__APPLE__)
    static const int once = pthread_atfork(nullptr, nullptr, [] { fewbits::forked.store(true); });
    (void)once;
#endif
}

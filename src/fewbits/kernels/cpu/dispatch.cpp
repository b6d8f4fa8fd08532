// Which level runs: what the CPU and the operating system have, and the exported functions that go through it.
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fewbits {

#define LEVEL(name) \
    namespace name { extern const Kernels kernels; }
FEWBITS_LEVELS
#undef LEVEL

namespace {

#if defined(__x86_64__)
// Linux saves the 8 KiB of a thread's tiles for processes that have asked for it, which all its threads may then use.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
    return false;
#endif
}

struct Cpu {
    bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false, intel = false;

    Cpu() {
        unsigned a, b, c, d;
        intel = __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
        if (!__get_cpuid(1, &a, &b, &c, &d)) return;
        const bool fma = c >> 12 & 1, f16c = c >> 29 & 1, xsave = c >> 27 & 1;
        if (!xsave) return;
        unsigned state, high;  // registers that the operating system saves
        __asm__("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
        const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6, tmm = (state & 0x60000) == 0x60000;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        const unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
        const bool vbmi = c >> 1 & 1, vnni = c >> 11 & 1;
        const bool tiles = d >> 22 & 1 && d >> 24 & 1 && d >> 25 & 1;  // with products of bf16 and of 8 bits
        avx2 = ymm && (b >> 5 & 1) && fma && f16c;
#ifdef FEWBITS_EMULATE
        (void)zmm, (void)tmm, (void)wanted, (void)vbmi, (void)vnni, (void)tiles, (void)may_use_tiles;
        avx512 = avx512_bf16 = amx = avx2;
#else
        avx512 = avx2 && zmm && (b & wanted) == wanted && vnni;
        const unsigned subleaves = a;
        avx512_bf16 = avx512 && vbmi && subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
        amx = avx512_bf16 && tmm && tiles && may_use_tiles();
#endif
    }
};

const Cpu& cpu() {
    static const Cpu found;
    return found;
}

bool runs_amx() { return cpu().amx; }
bool runs_avx512_bf16() { return cpu().avx512_bf16; }
bool runs_avx512() { return cpu().avx512; }
bool runs_avx2() { return cpu().avx2; }
#endif
inline bool runs_neon() { return true; }  // every aarch64 has it
inline bool runs_portable() { return true; }

struct Level {
    const char* name;
    const Kernels* kernels;
    bool (*runs)();
};

// the best first
const Level LEVELS[] = {
#define LEVEL(name) {#name, &name::kernels, runs_##name},
    FEWBITS_LEVELS
#undef LEVEL
};

const Level* active = nullptr;

}  // namespace
}  // namespace fewbits

// The name of a level that was compiled and runs here, those with more instructions first; null past the last.
EXPORT const char* fewbits_level(int64_t index) {
    for (const auto& level : fewbits::LEVELS)
        if (level.runs() && index-- == 0) return level.name;
    return nullptr;
}

// The name of the level that is taken unless one is forced. Intel's vdpbf16ps is no match for two fused products in
// fp32 (measured on Sapphire Rapids: 1.5 times the time); AMD's is.
EXPORT const char* fewbits_best_level() {
    int64_t index = 0;
#if defined(__x86_64__)
    if (fewbits::cpu().intel && strcmp(fewbits_level(0), "avx512_bf16") == 0) index = 1;
#endif
    return fewbits_level(index);
}

// Run every kernel on this level from now on: 0, or -1 if there is no such level here.
EXPORT int fewbits_use_level(const char* name) {
    for (const auto& level : fewbits::LEVELS)
        if (level.runs() && strcmp(level.name, name) == 0) {
            fewbits::active = &level;
            return 0;
        }
    return -1;
}

// fewbits_<kernel>: 0, or -1 if the level has not got it.
#define KERNEL(name, Arguments)                                            \
    EXPORT int fewbits_##name(const fewbits::Arguments* arguments) {       \
        if (fewbits::active->kernels->name == nullptr) return -1;          \
        fewbits::active->kernels->name(*arguments);                        \
        return 0;                                                          \
    }
FEWBITS_KERNELS(KERNEL)

// Runs kernels for another process, which cannot: with a level, and then for each call on stdin
//     the kernel's name, its struct, and for every pointer of it that is not null: field, bytes, whether it is written
// after each of which what was written goes to stdout. Numbers have 8 bytes; every piece of memory ends where a page does
// that may not be touched.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"

extern "C" int fewbits_use_level(const char* name);
#define KERNEL(name, Arguments) extern "C" int fewbits_##name(const fewbits::Arguments* arguments);
FEWBITS_KERNELS(KERNEL)
#undef KERNEL

static bool read_all(void* to, size_t bytes) { return fread(to, 1, bytes, stdin) == bytes; }

static int64_t number() {
    int64_t value;
    if (!read_all(&value, 8)) exit(0);
    return value;
}

static std::string text() {
    std::string found(static_cast<size_t>(number()), ' ');
    if (!read_all(&found[0], found.size())) exit(2);
    return found;
}

struct Piece {
    char *memory, *mapping;
    size_t bytes, mapped;
    bool written;
};

static Piece piece(size_t bytes, bool written) {
    const size_t page = 65536, mapped = (bytes + page - 1) / page * page + page;
    char* mapping = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mapping == MAP_FAILED || mprotect(mapping + mapped - page, page, PROT_NONE) != 0) exit(3);
    return {mapping + mapped - page - bytes, mapping, bytes, mapped, written};
}

int main(int, char** arguments) {
    if (fewbits_use_level(arguments[1]) != 0) return 4;
    for (;;) {
        const std::string name = text();
        std::string fields = text();
        std::vector<Piece> pieces;
        for (int64_t count = number(); count > 0; count--) {
            const int64_t field = number(), bytes = number(), written = number();
            const Piece found = piece(static_cast<size_t>(bytes), written != 0);
            if (!read_all(found.memory, found.bytes)) return 2;
            const char* pointer = found.memory;
            memcpy(&fields[static_cast<size_t>(8 * field)], &pointer, 8);
            pieces.push_back(found);
        }
        int64_t result = -2;
#define KERNEL(kernel, Arguments) \
    if (name == #kernel) result = fewbits_##kernel(reinterpret_cast<const fewbits::Arguments*>(fields.data()));
        FEWBITS_KERNELS(KERNEL)
#undef KERNEL
        fwrite(&result, 8, 1, stdout);
        for (const Piece& found : pieces) {
            if (found.written) fwrite(found.memory, 1, found.bytes, stdout);
            munmap(found.mapping, found.mapped);
        }
        fflush(stdout);
    }
}

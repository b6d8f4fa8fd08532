#include "reading.h"

#include <cerrno>
#include <cstddef>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace fewbits {

int64_t read_at(int64_t file, int64_t offset, void* to, int64_t bytes) {
#if defined(__unix__) || defined(__APPLE__)
    for (int64_t done = 0; done < bytes;) {
        const ssize_t got = pread(
            static_cast<int>(file), static_cast<char*>(to) + done, static_cast<size_t>(bytes - done), offset + done);
        if (got == 0) return -1;
        if (got < 0 && errno != EINTR) return errno;
        done += got > 0 ? got : 0;
    }
    return 0;
#else
    (void)file, (void)offset, (void)to, (void)bytes;
    return ENOSYS;
#endif
}

}  // namespace fewbits

// Reading a file from several threads.
#pragma once

#include <cstdint>

namespace fewbits {

// Bytes of an open file from offset on. 0, or errno, or -1 if the file ends before.
int64_t read_at(int64_t file, int64_t offset, void* to, int64_t bytes);

}  // namespace fewbits

// The table of one level's kernels.
#include "kernels.h"

namespace fewbits {
namespace FEWBITS_LEVEL {

extern const Kernels kernels;
const Kernels kernels = {
#define KERNEL(name, Arguments) name,
    FEWBITS_KERNELS(KERNEL)
#undef KERNEL
};

}  // namespace FEWBITS_LEVEL
}  // namespace fewbits

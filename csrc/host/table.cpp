// One table of kernels per instruction set, filled by every file of csrc/kernels (CMake lists them in PL_KERNEL_FILES).
#include "paceline/isa.h"

namespace paceline {
namespace PL_ISA {

#define X(stem) void fill_##stem(Kernels&);
PL_KERNEL_FILES
#undef X

void fill(Kernels& k) {
  k = {};
#define X(stem) fill_##stem(k);
  PL_KERNEL_FILES
#undef X
}

}  // namespace PL_ISA
}  // namespace paceline

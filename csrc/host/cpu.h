// What this machine can run, and how much of it we may use.
#pragma once
#include <string>
#include <vector>

#include "paceline/kernels.h"

namespace paceline {

struct Isa {
  const char* name;
  void (*fill)(Kernels&);
  std::string why_not;  // empty: usable here
};

// Every instruction set in the build, best last. Asks the kernel for AMX tile permission (Linux, once per process, harmless to repeat).
std::vector<Isa> instruction_sets();

// Threads the process may keep busy: CPU affinity, bounded by the cgroup quota; at least 1.
int usable_threads();

}  // namespace paceline

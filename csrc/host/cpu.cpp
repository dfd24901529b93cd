#include "cpu.h"

#include <math.h>
#include <stdio.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <thread>

#ifdef __linux__
#include <sched.h>
#include <sys/syscall.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace paceline {

#define X(isa) namespace isa { void fill(Kernels&); }
PL_ISAS
#undef X

namespace {

#if defined(__x86_64__)
struct Leaf { unsigned a = 0, b = 0, c = 0, d = 0; };

Leaf cpuid(unsigned leaf, unsigned sub) {
  Leaf l;
  __get_cpuid_count(leaf, sub, &l.a, &l.b, &l.c, &l.d);
  return l;
}

bool bit(unsigned word, int i) { return word >> i & 1; }

uint64_t xgetbv() {
  if (!bit(cpuid(1, 0).c, 27)) return 0;  // OSXSAVE
  unsigned lo, hi;
  asm volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return static_cast<uint64_t>(hi) << 32 | lo;
}

bool amx_permitted() {
#ifdef __linux__
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::string why_not(const std::string& name) {
  if (name == "generic") return "";
#if defined(__x86_64__)
  const Leaf one = cpuid(1, 0), seven = cpuid(7, 0), seven1 = cpuid(7, 1);
  const uint64_t os = xgetbv();
  if (!(bit(seven.b, 5) && bit(one.c, 12) && bit(one.c, 29))) return "the CPU has no AVX2 with FMA and F16C";
  if ((os & 0x6) != 0x6) return "the operating system does not save AVX registers";
  if (name == "avx2") return "";
  if (!(bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31))) return "the CPU has no AVX-512 (F, DQ, BW, VL)";
  if ((os & 0xe0) != 0xe0) return "the operating system does not save AVX-512 registers";
  if (name == "avx512") return "";
  if (!bit(seven.c, 11)) return "the CPU has no AVX-512 VNNI";
  if (name == "avx512_vnni") return "";
  if (!bit(seven1.a, 5)) return "the CPU has no AVX-512 BF16";
  if (name == "avx512_bf16" || name == "amx_emulated") return "";
  if (!(bit(seven.d, 22) && bit(seven.d, 24) && bit(seven.d, 25))) return "the CPU has no AMX (tile, int8, bf16)";
  if ((os & 0x60000) != 0x60000) return "the operating system does not save AMX tiles";
  if (!amx_permitted()) return "the operating system did not grant AMX tile data to this process";
  return "";
#else
  return "not built for this processor";
#endif
}

std::string first_line(const std::string& path) {
  std::ifstream f(path);
  std::string line;
  std::getline(f, line);
  return line;
}

double quota_of(const std::string& dir_v2, const std::string& dir_v1) {
  long long quota = 0, period = 0;
  std::istringstream v2(first_line(dir_v2 + "/cpu.max"));
  if (v2 >> quota >> period && quota > 0 && period > 0) return static_cast<double>(quota) / static_cast<double>(period);
  std::istringstream q(first_line(dir_v1 + "/cpu.cfs_quota_us")), p(first_line(dir_v1 + "/cpu.cfs_period_us"));
  if (q >> quota && p >> period && quota > 0 && period > 0) return static_cast<double>(quota) / static_cast<double>(period);
  return INFINITY;
}

// The tightest CPU bandwidth limit among the process's control groups and their parents.
double cgroup_quota() {
  const std::string root = "/sys/fs/cgroup", root_v1 = "/sys/fs/cgroup/cpu";
  double quota = quota_of(root, root_v1);
  std::ifstream f("/proc/self/cgroup");
  for (std::string line; std::getline(f, line);) {
    const size_t a = line.find(':'), b = line.find(':', a + 1);
    if (a == std::string::npos || b == std::string::npos) continue;
    const std::string controllers = line.substr(a + 1, b - a - 1);
    if (!controllers.empty() && controllers.find("cpu") == std::string::npos) continue;
    for (std::string path = line.substr(b + 1); path.size() > 1; path.resize(path.rfind('/')))
      quota = fmin(quota, quota_of(root + path, root_v1 + path));
  }
  return quota;
}

}  // namespace

std::vector<Isa> instruction_sets() {
  std::vector<Isa> out;
#define X(isa) out.push_back({#isa, &isa::fill, why_not(#isa)});
  PL_ISAS
#undef X
  return out;
}

int usable_threads() {
  int n = static_cast<int>(std::thread::hardware_concurrency());
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
  const double quota = cgroup_quota();
  if (quota < n) n = static_cast<int>(quota + 0.5);
#endif
  return n < 1 ? 1 : n;
}

}  // namespace paceline

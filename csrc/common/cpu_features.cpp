#include "common/cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastseq {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows "f16c". It needs the same operating-system support as
// AVX.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29)) && __builtin_cpu_supports("avx");
}
#endif

Isa initial_isa() {
  const char* wanted = std::getenv("FASTSEQ_ISA");
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (wanted != nullptr && isa <= best_isa() && std::strcmp(wanted, name(isa)) == 0) return isa;
  return best_isa();
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

const char* name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa best_isa() {
#if defined(__x86_64__)
  [[maybe_unused]] const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  [[maybe_unused]] const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512cd");
#if defined(FASTSEQ_HAS_AVX512)
  if (avx512) return Isa::avx512;
#endif
#if defined(FASTSEQ_HAS_AVX2)
  if (avx2) return Isa::avx2;
#endif
#endif
  return Isa::baseline;
}

Isa chosen_isa() { return current().load(std::memory_order_relaxed); }

bool set_isa(const std::string& wanted) {
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa <= best_isa() && wanted == name(isa)) {
      current().store(isa, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

std::string cpu_model() {
#if defined(__x86_64__)
  unsigned words[12] = {};
  for (unsigned leaf = 0; leaf < 3; ++leaf) {
    unsigned* w = words + 4 * leaf;
    if (!__get_cpuid(0x80000002u + leaf, w, w + 1, w + 2, w + 3)) return "";
  }
  char text[sizeof(words) + 1] = {};
  std::memcpy(text, words, sizeof(words));
  const std::string model(text);
  const size_t first = model.find_first_not_of(' ');
  return first == std::string::npos ? "" : model.substr(first, model.find_last_not_of(' ') - first + 1);
#else
  return "";
#endif
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
// A macro, because the builtin takes a literal.
#define FASTSEQ_ADD(feature) \
  if (__builtin_cpu_supports(feature)) found.push_back(feature)
  FASTSEQ_ADD("sse4.2");
  FASTSEQ_ADD("avx");
  FASTSEQ_ADD("avx2");
  FASTSEQ_ADD("fma");
  if (has_f16c()) found.push_back("f16c");
  FASTSEQ_ADD("avx512f");
  FASTSEQ_ADD("avx512bw");
  FASTSEQ_ADD("avx512vl");
  FASTSEQ_ADD("avx512dq");
  FASTSEQ_ADD("avx512cd");
  FASTSEQ_ADD("avx512vnni");
  FASTSEQ_ADD("avx512bf16");
#undef FASTSEQ_ADD
#endif
  return found;
}

}  // namespace fastseq

// Plain C, so that fastseq/library.py can ask the op library itself through ctypes.
extern "C" {
__attribute__((visibility("default"))) const char* fastseq_isa() {
  return fastseq::name(fastseq::chosen_isa());
}
__attribute__((visibility("default"))) const char* fastseq_best_isa() {
  return fastseq::name(fastseq::best_isa());
}
__attribute__((visibility("default"))) int fastseq_set_isa(const char* wanted) {
  return fastseq::set_isa(wanted);
}
}

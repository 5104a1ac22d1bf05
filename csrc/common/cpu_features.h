// Which instruction sets this CPU has, and which variant of the kernels is in use. Shared by the op library,
// the host module and the C++ tests; each of them has its own copy of the choice.
#pragma once
#include <string>
#include <vector>

namespace fastseq {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

const char* name(Isa isa);

// The best variant that this CPU can run and that was built.
Isa best_isa();

// The variant in use: the best one, or a lower one that FASTSEQ_ISA (read once) or set_isa asks for.
Isa chosen_isa();

// False, and no change, where the name is unknown or this CPU cannot run it.
bool set_isa(const std::string& name);

// The CPU's own name, and those of its features that matter here, in a fixed order.
std::string cpu_model();
std::vector<std::string> cpu_features();

}  // namespace fastseq

// The function of this name in the namespace of the chosen variant: FASTSEQ_SELECT(crf::viterbi)(args...). It
// must be declared in each of the namespaces fastseq::baseline, fastseq::avx2 and fastseq::avx512 that were
// built.
#if defined(FASTSEQ_HAS_AVX512) && defined(FASTSEQ_HAS_AVX2)
#define FASTSEQ_SELECT(function)                                                    \
  (::fastseq::chosen_isa() == ::fastseq::Isa::avx512 ? &::fastseq::avx512::function \
   : ::fastseq::chosen_isa() == ::fastseq::Isa::avx2 ? &::fastseq::avx2::function   \
                                                     : &::fastseq::baseline::function)
#else
#define FASTSEQ_SELECT(function) (&::fastseq::baseline::function)
#endif

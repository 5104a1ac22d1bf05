// The choice of the instruction set: never above what the CPU has, and set only to what there is.
#include "common/cpu_features.h"

#include <algorithm>
#include <string>

#include "testing/check.h"

using namespace fastseq;

int main() {
  CHECK(chosen_isa() <= best_isa());
  CHECK(set_isa("baseline") && chosen_isa() == Isa::baseline);
  CHECK(!set_isa("avx1024") && chosen_isa() == Isa::baseline);
  CHECK(set_isa(name(best_isa())) && chosen_isa() == best_isa());
  const std::vector<std::string> features = cpu_features();
  const auto has = [&](const char* feature) {
    return std::find(features.begin(), features.end(), feature) != features.end();
  };
  CHECK(best_isa() < Isa::avx2 || (has("avx2") && has("fma") && has("f16c")));
  CHECK(best_isa() < Isa::avx512 || (has("avx512f") && has("avx512bw") && has("avx512vl")));
  return testing::summary("cpu_features");
}

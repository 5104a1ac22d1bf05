// What the launches of the CUDA kernels ask for, a line each, for cuda_resources.py:
//
//     the regime (or the kernel, where it has one shape)  ;  threads a block  ;  dynamic shared memory, at
//     most
#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <string>
#include <typeinfo>

#include "crf/cuda/nll.cuh"
#include "crf/cuda/viterbi.cuh"
#include "pointer/cuda/decoder_launch.cuh"
#include "pointer/cuda/distribution.cuh"

namespace {

using namespace fastseq::crf::cuda;

constexpr int kLongest = 1 << 20;  // positions: more than any window has

struct Launch {
  int threads = 0, shared = 0;
};
std::map<std::string, Launch> launches;

template <class Regime>
void add(int bytes_of_team) {
  int status = 0;
  char* name = abi::__cxa_demangle(typeid(Regime).name(), nullptr, nullptr, &status);
  Launch& launch = launches[name];
  launch.threads = Regime::Team::kBlock;
  launch.shared = std::max(launch.shared, Regime::Team::kPerBlock * bytes_of_team);
  std::free(name);
}

template <class S, class R>
void add_viterbi(int K) {
  decoding::with_regime<S, R>(K, [&](auto type) {
    using Regime = typename decltype(type)::type;
    add<Regime>(decoding::Memory<Regime>::bytes(kLongest, K));
  });
}

// Positions fill what the vectors of a sequence leave of the shared memory that a block may have.
void add_decoder() {
  using namespace fastseq::pointer::cuda;
  using namespace fastseq::pointer::cuda::decoding;
  launches["decoder_kernel"] = {kThreads, int(kShared)};
  launches["decoder_recompute_kernel"] = {kThreads, int(Recompute<double>::bytes(kLargest))};
  launches["decoder_sweep_kernel"] = {kThreads, int(kShared)};
  launches["decoder_positions_kernel<double>"] = {kTileThreads, Tile<double>::kBytes};
  launches["decoder_positions_kernel<float>"] = {kTileThreads, Tile<float>::kBytes};
  launches["decoder_reduce_kernel"] = {kOutputs * kSlices, kOutputs * kSlices * int(sizeof(double))};
}

void add_distribution() {
  using namespace fastseq::pointer::cuda::mixing;
  launches["distribution_order_kernel"] = {kThreads, kTile * int(sizeof(int64_t))};
  launches["distribution_kernel"] =
      launches["distribution_grad_kernel"] = {kThreads, kScratch * int(sizeof(double))};
}

}  // namespace

int main() {
  launches["exact_kernel"] = {exact::Block::kBlock, 0};
  launches["reduce_kernel"] = {reduce::Block::kBlock, 0};
  for (int K = 1; K <= kMaxTags; ++K) {
    with_regime(K, [&](auto regime) {
      using Regime = decltype(regime);
      add<Regime>(Segment<Regime>::bytes(K));
    });
    add_viterbi<double, double>(K);
    add_viterbi<float, float>(K);
    add_viterbi<fastseq::cuda::bf16, float>(K);
    add_viterbi<fastseq::cuda::f16, float>(K);
  }
  add_decoder();
  add_distribution();
  for (const auto& [name, launch] : launches)
    std::printf("%s;%d;%d\n", name.c_str(), launch.threads, launch.shared);
}

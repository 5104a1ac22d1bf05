// What the CUDA emulator says is an error: toy kernels that go wrong in each way must end with a text that
// says where, under several schedules, and harm no later launch.
#include <algorithm>
#include <string>
#include <vector>

#include "testing/cuda_emulator_check.h"

namespace {

using namespace fastseq;
using namespace fastseq::testing;

__global__ void write_ones(int* out) { store_int(out + blockIdx.x * blockDim.x + threadIdx.x, 1); }

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "";
}

// The error must say all of `texts`, and harm no later launch.
void check_error(const std::vector<std::string>& texts, const std::function<void()>& f) {
  for_schedules(seeds(), [&] {
    const std::string error = error_of(f);
    for (const std::string& text : texts) {
      testing::context() = "error \"" + error + "\", wanted \"" + text + "\"";
      CHECK(error.find(text) != std::string::npos);
    }
    testing::context() = "";
    std::vector<int> out(64);
    FASTSEQ_LAUNCH(write_ones, 2, 32, 0, nullptr, out.data());
    CHECK(std::count(out.begin(), out.end(), 1) == 64);
  });
}

enum class Wrong {
  divergent_barrier,
  other_barrier,
  exited_at_barrier,
  warp_and_barrier,
  not_in_mask,
  reads_outside_mask,
  reads_exited,
  masks_differ,
  other_operation,
  barrier_number,
  partial_warp,
  count_differs,
};

template <Wrong kWrong>
__global__ void go_wrong(int* alive) {
  struct Counted {  // what a kernel has on its stack is destroyed, however it ends
    int* count;
    explicit Counted(int* of) : count(of) { atomicAdd(count, 1); }
    ~Counted() { --*count; }
  };
  const Counted counted(alive + threadIdx.x);
  const int i = threadIdx.x, lane = i % 32;
  switch (kWrong) {
    case Wrong::divergent_barrier:
      for (int round = 0; round < 1 + (i < 32); ++round) __syncthreads();
      break;
    case Wrong::other_barrier:
      if (i < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case Wrong::exited_at_barrier:
      if (i == 7) return;
      __syncthreads();
      break;
    case Wrong::warp_and_barrier:
      if (i < 16)
        __syncwarp();
      else
        __syncthreads();
      break;
    case Wrong::not_in_mask:
      __syncwarp(0xFF);
      break;
    case Wrong::reads_outside_mask:
      if (lane < 16) __shfl_xor_sync(0xFFFF, i, 16);
      break;
    case Wrong::reads_exited:
      if (lane > 0) __shfl_sync(kFullMask, i, 0);
      break;
    case Wrong::masks_differ:
      __ballot_sync(lane < 16 ? kFullMask : kFullMask >> 1 << 1, 1);
      break;
    case Wrong::other_operation:
      if (lane < 16)
        __any_sync(kFullMask, 1);
      else
        __all_sync(kFullMask, 1);
      break;
    case Wrong::barrier_number:
      bar_sync(0, 96);
      break;
    case Wrong::partial_warp:
      if (lane < 16) bar_sync(1, 32);
      break;
    case Wrong::count_differs:
      bar_sync(1, i < 32 ? 64 : 96);
      break;
  }
}

template <Wrong kWrong>
void check_wrong(const std::vector<std::string>& texts) {
  std::vector<int> alive(96);
  check_error(texts, [&] { FASTSEQ_LAUNCH((go_wrong<kWrong>), 1, 96, 0, nullptr, alive.data()); });
  CHECK(std::count(alive.begin(), alive.end(), 0) == 96);
}

void test_errors() {
  const std::string here = "cuda_emulator_errors_test.cpp:", barrier = "__syncthreads (",
                    kernel = "go_wrong<kWrong>";
  check_wrong<Wrong::divergent_barrier>({kernel, barrier, here, "exited"});
  check_wrong<Wrong::other_barrier>({barrier, here, "others wait at another"});
  check_wrong<Wrong::exited_at_barrier>({barrier, here, "exited"});
  check_wrong<Wrong::warp_and_barrier>(
      {"deadlock", "__syncwarp (", here, "): threads 0-15\n", barrier, "): threads 16-95\n"});
  check_wrong<Wrong::not_in_mask>({"__syncwarp (", here, "calling lane is not in its own mask"});
  check_wrong<Wrong::reads_outside_mask>({"__shfl_xor_sync (", here, " reads lane 16"});
  check_wrong<Wrong::reads_exited>({"__shfl_sync (", here, "reads lane 0"});
  check_wrong<Wrong::masks_differ>({"__ballot_sync (", here, "mask"});
  check_wrong<Wrong::other_operation>({"__any_sync (", "__all_sync (", here, "other lanes of its mask"});
  check_wrong<Wrong::barrier_number>({"bar_sync(0, 96)", here});
  check_wrong<Wrong::partial_warp>(
      {"deadlock", "bar_sync (", here, "): threads 0-15 32-47 64-79\n", "exited: 48"});
  check_wrong<Wrong::count_differs>({"bar_sync(1)", here, "while others wait for"});
}

__global__ void nothing() {}
__global__ void nested_launch() { FASTSEQ_LAUNCH(nothing, 1, 1, 0, nullptr); }

void test_limits() {
  check_error({"nothing", "grid or a block of nothing"}, [] { FASTSEQ_LAUNCH(nothing, 0, 32, 0, nullptr); });
  check_error({"grid or a block of nothing"}, [] { FASTSEQ_LAUNCH(nothing, 1, dim3(32, 0), 0, nullptr); });
  check_error({"the grid is too large"}, [] { FASTSEQ_LAUNCH(nothing, dim3(1, 65536), 1, 0, nullptr); });
  check_error({"a block of 1056 threads"}, [] { FASTSEQ_LAUNCH(nothing, 1, dim3(33, 32), 0, nullptr); });
  check_error({"65552 bytes of shared memory"}, [] { FASTSEQ_LAUNCH(nothing, 1, 1, 65552, nullptr); });
  check_error({"launched by a kernel"}, [] { FASTSEQ_LAUNCH(nested_launch, 1, 1, 0, nullptr); });
  emulator::settings().shared_limit = 99 << 10;
  FASTSEQ_LAUNCH(nothing, 1, 1, 65552, nullptr);
  emulator::settings() = {};
  CHECK(cudaGetLastError() == cudaSuccess);
}

void test_shared_bounds() {
  const auto write = [](int at) { FASTSEQ_LAUNCH(write_shared, 2, 32, 7 * sizeof(int), nullptr, at); };
  write(6);
  check_error({"outside its dynamic shared memory of 28 bytes"}, [&] { write(7); });
  check_error({"outside its dynamic shared memory of 28 bytes"}, [&] { write(-1); });
}

}  // namespace

int main() {
  test_errors();
  test_limits();
  if (!kAddressSanitizer) test_shared_bounds();
  return testing::summary("cuda_emulator_errors");
}

// The CUDA emulator itself: every primitive's result, and toy kernels without a barrier, whose numbers must
// be wrong under several schedules. What only a sanitizer sees is planted in a process of its own, `--bug
// NAME`, that this one starts and wants to see fail. What the emulator says is an error:
// cuda_emulator_errors_test.cpp.
#include <sys/wait.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "testing/cuda_emulator_check.h"

namespace {

using namespace fastseq;
using namespace fastseq::testing;

// ---- kernels that hand numbers round: right, or with a barrier missing -----------------------------------

enum class Missing { nothing, after_write, after_read };

// Every round, each thread takes its neighbour's number.
template <Missing kMissing>
__global__ void rotate_block(const int* __restrict__ x, int* __restrict__ out, int rounds) {
  FASTSEQ_DYNAMIC_SHARED(int, shared);
  const int n = blockDim.x, i = threadIdx.x;
  int v = load_int(x + blockIdx.x * n + i);
  for (int round = 0; round < rounds; ++round) {
    shared[i] = v;
    if (kMissing != Missing::after_write) __syncthreads();
    v = shared[(i + 1) % n];
    if (kMissing != Missing::after_read) __syncthreads();
  }
  store_int(out + blockIdx.x * n + i, v);
}

// The same within groups of 16 lanes, each with a number of rounds of its own.
template <Missing kMissing>
__global__ void rotate_lanes(const int* __restrict__ x, int* __restrict__ out, int rounds) {
  FASTSEQ_DYNAMIC_SHARED(int, shared);
  const int i = threadIdx.x, lane = i % 16, first = i - lane;
  const unsigned mask = 0xFFFFu << (first % 32);
  int v = load_int(x + blockIdx.x * blockDim.x + i);
  for (int round = 0; round < rounds + first / 16; ++round) {
    shared[i] = v;
    if (kMissing != Missing::after_write) __syncwarp(mask);
    v = shared[first + (lane + 1) % 16];
    if (kMissing != Missing::after_read) __syncwarp(mask);
  }
  store_int(out + blockIdx.x * blockDim.x + i, v);
}

// Pairs of warps, each pair with a barrier and a number of rounds of its own. `count` should be 64.
__global__ void rotate_pairs(const int* __restrict__ x, int* __restrict__ out, int rounds, int count) {
  FASTSEQ_DYNAMIC_SHARED(int, shared);
  const int i = threadIdx.x, pair = i / 64;
  int v = load_int(x + blockIdx.x * blockDim.x + i);
  for (int round = 0; round < rounds + 3 * pair; ++round) {
    shared[i] = v;
    bar_sync(1 + pair, count);
    v = shared[pair * 64 + (i + 1) % 64];
    bar_sync(1 + pair, count);
  }
  store_int(out + blockIdx.x * blockDim.x + i, v);
}

using Rotate = std::function<void(const int* x, int* out, int rounds)>;
constexpr int kBlocks = 3, kRounds = 6;
int threads = 128;  // of a block

template <Missing kMissing>
void launch_rotate_block(const int* x, int* out, int rounds) {
  FASTSEQ_LAUNCH((rotate_block<kMissing>), kBlocks, threads, threads * sizeof(int), nullptr, x, out, rounds);
}
template <Missing kMissing>
void launch_rotate_lanes(const int* x, int* out, int rounds) {
  FASTSEQ_LAUNCH((rotate_lanes<kMissing>), kBlocks, threads, threads * sizeof(int), nullptr, x, out, rounds);
}
void launch_rotate_pairs(const int* x, int* out, int rounds) {
  FASTSEQ_LAUNCH(rotate_pairs, kBlocks, threads, threads * sizeof(int), nullptr, x, out, rounds, 64);
}

// Whether the numbers are right: groups of `size` threads rotate, group g of a block `more` * g rounds
// more.
bool rotates(const Rotate& launch, int size, int more) {
  std::vector<int> x(kBlocks * threads), out(x.size(), -1);
  std::iota(x.begin(), x.end(), 0);
  launch(x.data(), out.data(), kRounds);
  bool right = true;
  for (int i = 0; i < static_cast<int>(x.size()); ++i) {
    const int rounds = kRounds + more * (i % threads / size);
    right &= out[i] == i / size * size + (i + rounds) % size;
  }
  return right;
}

void test_barriers() {
  for_schedules(seeds(), [] {
    CHECK(rotates(launch_rotate_block<Missing::nothing>, threads, 0));
    CHECK(rotates(launch_rotate_lanes<Missing::nothing>, 16, 1));
    CHECK(rotates(launch_rotate_pairs, 64, 3));
  });
}

// Without a sanitizer, what is missing shows as wrong numbers, under most seeds.
void test_missing_barriers() {
  const auto found = [](const char* what, const Rotate& launch, int size, int more) {
    int wrong = 0;
    for (int seed = 0; seed < 20; ++seed) {
      emulator::settings().seed = seed;
      wrong += !rotates(launch, size, more);
    }
    testing::context() = std::string(what) + ": wrong under " + std::to_string(wrong) + " of 20 seeds";
    CHECK(wrong >= 15);
    emulator::settings() = {};
  };
  found("no __syncthreads after writing", launch_rotate_block<Missing::after_write>, threads, 0);
  found("no __syncthreads after reading", launch_rotate_block<Missing::after_read>, threads, 0);
  found("no __syncwarp after writing", launch_rotate_lanes<Missing::after_write>, 16, 1);
  found("no __syncwarp after reading", launch_rotate_lanes<Missing::after_read>, 16, 1);
  testing::context() = "";
}

// ---- what primitives return ------------------------------------------------------------------------------

__global__ void count_threads(int* out) {
  const int i = threadIdx.x, n = blockDim.x;
  bool right = __syncthreads_count(i % 3 == 0) == (n + 2) / 3;
  right &= __syncthreads_or(i == n - 1) == 1 && __syncthreads_or(0) == 0;
  right &= __syncthreads_and(i < n) == 1 && __syncthreads_and(i > 0) == 0;
  right &= __syncthreads_count(right) == n;
  out[i] = right;
}

// The sum over each W neighbouring lanes, in every one of them the same bits: `mask` are the lanes that
// call. The order of the additions is fixed, a tree.
template <int W, class V>
__device__ V group_sum(V v, unsigned mask) {
  static_assert(W >= 1 && W <= 32 && (W & (W - 1)) == 0);
#pragma unroll
  for (int offset = W / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(mask, v, offset);
  return v;
}

template <int W, class V>
__device__ V group_max(V v, unsigned mask) {
  static_assert(W >= 1 && W <= 32 && (W & (W - 1)) == 0);
#pragma unroll
  for (int offset = W / 2; offset > 0; offset /= 2) {
    const V other = __shfl_xor_sync(mask, v, offset);
    v = other > v ? other : v;
  }
  return v;
}

template <class T>
__global__ void shuffle_lanes(int* out) {
  const int i = threadIdx.x, lane = i % 32, lanes = min(32, static_cast<int>(blockDim.x) - i + lane);
  const auto value = [](int of) { return static_cast<T>(of) * 3 + 1; };
  const T v = value(lane);
  bool right = __shfl_sync(kFullMask, v, lanes - 1) == value(lanes - 1);
  right &= __shfl_sync(kFullMask, v, 11, 8) == value(lane / 8 * 8 + 3);
  right &= __shfl_up_sync(kFullMask, v, 3) == value(lane < 3 ? lane : lane - 3);
  right &= __shfl_up_sync(kFullMask, v, 3, 16) == value(lane % 16 < 3 ? lane : lane - 3);
  right &= __shfl_down_sync(kFullMask, v, 5, 8) == value(lane % 8 + 5 < 8 ? lane + 5 : lane);
  right &= __shfl_xor_sync(kFullMask, v, 9, 16) == value(lane ^ 9);
  right &= __shfl_xor_sync(kFullMask, v, 16, 8) == value(lane < 16 || lanes < 32 ? lane : lane - 16);
  right &= group_sum<8>(v, kFullMask) == value(lane / 8 * 8) * 8 + 3 * 28;
  right &= group_max<16>(v, kFullMask) == value(lane | 15);
  out[i] = right;
}

__global__ void vote(int* out) {
  const int i = threadIdx.x, lane = i % 32;
  const unsigned mask = lane < 10 ? 0x3FFu : ~0x3FFu;  // two groups that do not wait for each other
  bool right = __ballot_sync(mask, lane % 2) == (0xAAAAAAAAu & mask);
  for (int round = 0; round < (lane < 10 ? 5 : 2); ++round)
    right &= __any_sync(mask, lane == round) == (lane < 10) && __all_sync(mask, lane < 10) == (lane < 10);
  right &= __match_any_sync(mask, lane % 4) == (0x11111111u << lane % 4 & mask);
  right &= __match_any_sync(kFullMask, static_cast<int64_t>(lane / 30) << 40) ==
           (lane < 30 ? 0x3FFFFFFFu : 3u << 30);
  out[i] = right;
}

// Some lanes wait with the full mask, while others still work in a mask of their own; some leave early.
__global__ void nested_masks(int* out) {
  const int lane = threadIdx.x;
  out[lane] = 1;
  if (lane >= 24) return;
  int sum = 1;
  if (lane < 8) sum = group_sum<8>(1, 0xFFu);
  __syncwarp();
  out[lane] = __shfl_sync(kFullMask, sum, 0) == 8 && __ballot_sync(kFullMask, 1) == 0xFFFFFFu;
}

__global__ void where_am_i(int* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}

__global__ void static_shared(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = blockIdx.x;
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = values[63 - threadIdx.x] == static_cast<int>(blockIdx.x);
}

__global__ void shared_is_nan(int* out) {
  FASTSEQ_DYNAMIC_SHARED(double, doubles);
  FASTSEQ_DYNAMIC_SHARED(float, floats);
  out[threadIdx.x] = isnan(doubles[threadIdx.x]) && isnan(floats[threadIdx.x]) &&
                     reinterpret_cast<uintptr_t>(doubles) % 16 == 0;
  __syncthreads();
  floats[threadIdx.x] = 0;
}

// All ones from a kernel of one pointer.
template <class Kernel>
void check_ones(const char* what, Kernel kernel, dim3 grid, dim3 block, size_t bytes = 0) {
  testing::context() = what;
  for_schedules(seeds(), [&] {
    std::vector<int> out(grid.count() * block.count(), 0);
    FASTSEQ_LAUNCH(kernel, grid, block, bytes, nullptr, out.data());
    CHECK(std::count(out.begin(), out.end(), 1) == static_cast<int64_t>(out.size()));
  });
  testing::context() = "";
}

void test_results() {
  check_ones("__syncthreads_count", count_threads, 1, 100);
  check_ones("shuffles", shuffle_lanes<int>, 1, 48);  // the last warp is a half
  check_ones("shuffles", shuffle_lanes<unsigned>, 1, 64);
  check_ones("shuffles", shuffle_lanes<float>, 1, 64);
  check_ones("shuffles", shuffle_lanes<double>, 1, 64);
  check_ones("shuffles", shuffle_lanes<int64_t>, 1, 48);
  check_ones("votes", vote, 1, 64);
  check_ones("nested masks", nested_masks, 1, 32);
  check_ones("indices", where_am_i, dim3(3, 2, 2), dim3(5, 3, 4));
  check_ones("static shared memory", static_shared, 5, 64);
  check_ones("fresh shared memory", shared_is_nan, 1, 64, 64 * sizeof(double));
  check_ones("a full block", count_threads, 1,
             kThreadSanitizer ? 128 : 1024);  // it takes 2 ms to make a fiber
}

struct Tally {
  int sum = 0, most = -9, least = 9, swapped = 0;
  unsigned bits = 0;
  unsigned long long wide = 0;
  float real = 0;
};

__global__ void tally(Tally* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&out->sum, i);
  atomicMax(&out->most, i);
  atomicMin(&out->least, i);
  atomicOr(&out->bits, 1u << i % 32);
  atomicAdd(&out->wide, 1ull << 40);
  atomicAdd(&out->real, 0.5f);
  for (int old = 0, seen; (seen = atomicCAS(&out->swapped, old, old + 2)) != old;) old = seen;
}

// The block that is done last adds up what all have written.
__global__ void last_block_sums(float* partial, unsigned* done, float* out) {
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = blockIdx.x + 1.0f;
    __threadfence();
  }
  const bool last = __syncthreads_or(threadIdx.x == 0 && atomicAdd(done, 1) == gridDim.x - 1);
  if (!last || threadIdx.x != 0) return;
  __threadfence();
  for (unsigned b = 0; b < gridDim.x; ++b) *out += partial[b];
}

void test_atomics() {
  for_schedules(seeds(), [] {
    Tally got;
    FASTSEQ_LAUNCH(tally, 4, 64, 0, nullptr, &got);
    CHECK(got.sum == 255 * 128 && got.most == 255 && got.least == 0 && got.swapped == 512);
    CHECK(got.bits == ~0u && got.wide == 256ull << 40 && got.real == 128);
    std::vector<float> partial(6);
    unsigned done = 0;
    float sum = 0;
    FASTSEQ_LAUNCH(last_block_sums, 6, 32, 0, nullptr, partial.data(), &done, &sum);
    CHECK(sum == 21);
  });
}

void test_bits() {
  CHECK(__ffs(0) == 0 && __ffs(24) == 4 && __ffsll(1ll << 40) == 41);
  CHECK(__popc(0xF0F0u) == 8 && __popcll(~0ull) == 64);
  CHECK(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0 && __clzll(1) == 63);
  CHECK(__brev(1u) == 1u << 31 && __brev(0xF0000001u) == 0x8000000Fu);
  CHECK(__float_as_int(-1.0f) == static_cast<int>(0xBF800000) && __int_as_float(0x40000000) == 2);
  CHECK(__float_as_uint(-1.0f) == 0xBF800000 && __uint_as_float(0x40000000) == 2);
  CHECK(__double_as_longlong(1.0) == 0x3FFll << 52 && __longlong_as_double(1ll << 62) == 2);
  CHECK(rsqrtf(4) == 0.5f && __fdividef(3, 4) == 0.75f && __expf(0) == 1 && __logf(1) == 0 &&
        __log2f(8) == 3);
  const int five = 5;
  CHECK(__ldg(&five) == 5);
}

// ---- elements and counters -------------------------------------------------------------------------------

template <class S, class R>
__global__ void copy_elements(const S* __restrict__ from, S* __restrict__ to, R* __restrict__ values) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  values[i] = load<R>(from + i);
  store(to + i, values[i]);
}

template <class S, class R, class Value>
void check_halves(Value value) {
  std::vector<S> from(65536), to(65536);
  std::vector<R> values(65536);
  for (int i = 0; i < 65536; ++i) from[i].bits = static_cast<uint16_t>(i);
  FASTSEQ_LAUNCH((copy_elements<S, R>), 512, 128, 0, nullptr, from.data(), to.data(), values.data());
  int wrong = 0;
  for (int i = 0; i < 65536; ++i) {
    const float want = value(from[i].bits);
    const bool nan = std::isnan(want);
    wrong +=
        nan ? !std::isnan(values[i]) || !std::isnan(value(to[i].bits)) : values[i] != want || to[i].bits != i;
  }
  CHECK(wrong == 0);
}

template <class S>
__global__ void round_elements(const float* __restrict__ from, S* __restrict__ to) {
  store(to + threadIdx.x, from[threadIdx.x]);
}

void test_elements() {
  check_halves<f16, float>(half_to_float);
  check_halves<f16, double>(half_to_float);
  check_halves<bf16, float>(bf16_to_float);
  check_halves<bf16, double>(bf16_to_float);
  std::vector<float> from = {1 + 0x1p-8f, 1 + 0x3p-8f, 1 + 0x1p-11f, 1 + 0x3p-11f,
                             1e30f,       INFINITY,    -0.0f,        1e-7f};
  from.push_back(__uint_as_float(0x7FFFFFFF));
  std::vector<bf16> brain(from.size());
  std::vector<f16> half(from.size());
  FASTSEQ_LAUNCH((round_elements<bf16>), 1, from.size(), 0, nullptr, from.data(), brain.data());
  FASTSEQ_LAUNCH((round_elements<f16>), 1, from.size(), 0, nullptr, from.data(), half.data());
  for (size_t i = 0; i < from.size(); ++i)
    CHECK(brain[i].bits == float_to_bf16(from[i]) && half[i].bits == float_to_half(from[i]));
  const double third = 1.0 / 3;
  double copy = 0, value = 0;
  FASTSEQ_LAUNCH((copy_elements<double, double>), 1, 1, 0, nullptr, &third, &copy, &value);
  CHECK(copy == third && value == third);
}

__global__ void move_integers(const int64_t* tags, const bool* mask, uint8_t* out) {
  if (load_int(mask + threadIdx.x)) store_int(out + threadIdx.x, load_int(tags + threadIdx.x));
}

void test_counters() {
  const std::vector<int64_t> tags(10, 7);
  const bool mask[10] = {true, false, true};
  std::vector<uint8_t> out(10);
  std::vector<bf16> elements(32);
  std::vector<float> values(32);
  emulator::reset_counters();
  FASTSEQ_LAUNCH(move_integers, 1, 10, 0, nullptr, tags.data(), mask, out.data());
  CHECK(out[0] == 7 && out[1] == 0 && out[2] == 7);
  emulator::Counters counters = emulator::counters();
  CHECK(counters.launches == 1 && counters.bytes_read == 10 + 2 * 8 && counters.bytes_written == 2);
  FASTSEQ_LAUNCH((copy_elements<bf16, float>), 2, 16, 0, nullptr, elements.data(), elements.data(),
                 values.data());
  counters = emulator::counters();
  CHECK(counters.launches == 2 && counters.bytes_read == 26 + 64 && counters.bytes_written == 2 + 64);
  emulator::reset_counters();
  CHECK(emulator::counters().launches == 0 && emulator::counters().bytes_read == 0);
}

// ---- schedules are drawn from the seed -------------------------------------------------------------------

__global__ void line_up(int* line, int* length) {
  line[atomicAdd(length, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

std::vector<int> order_of(Schedule schedule, uint64_t seed) {
  emulator::settings().schedule = schedule;
  emulator::settings().seed = seed;
  std::vector<int> line(256);
  int length = 0;
  FASTSEQ_LAUNCH(line_up, 4, 64, 0, nullptr, line.data(), &length);
  emulator::settings() = {};
  return line;
}

void test_schedules() {
  std::vector<int> sorted(256);
  std::iota(sorted.begin(), sorted.end(), 0);
  CHECK(order_of(Schedule::in_order, 3) == sorted);
  for (Schedule schedule : {Schedule::random, Schedule::warp_first, Schedule::mixed}) {
    std::vector<int> order = order_of(schedule, 3);
    CHECK(order == order_of(schedule, 3) && order != order_of(schedule, 4) && order != sorted);
    std::sort(order.begin(), order.end());
    CHECK(order == sorted);
  }
}

// Each OS thread has an emulator of its own.
void test_threads() {
  const int before = std::exchange(threads, 32);
  std::vector<char> right(3, false);
  std::vector<std::thread> hosts;
  for (char& r : right)
    hosts.emplace_back([&r] { r = rotates(launch_rotate_block<Missing::nothing>, threads, 0); });
  for (std::thread& host : hosts) host.join();
  threads = before;
  CHECK(std::count(right.begin(), right.end(), true) == 3);
}

// ---- what only a sanitizer sees --------------------------------------------------------------------------

template <bool kAtomic>
__global__ void add_up(float* sum) {
  if (kAtomic)
    atomicAdd(sum, 1);
  else
    *sum += 1;
}

// Shuffles, unlike __syncwarp, order no memory.
template <bool kOrdered>
__global__ void write_shuffle_read(int* out) {
  FASTSEQ_DYNAMIC_SHARED(int, shared);
  shared[threadIdx.x] = 1;
  __shfl_sync(kFullMask, 0, 0);
  if (kOrdered) __syncwarp();
  out[threadIdx.x] = shared[31 - threadIdx.x];
}

// The second half of a warp reads what the first wrote, each after a __syncwarp of its own.
__global__ void halves_read_each_other(int* out) {
  FASTSEQ_DYNAMIC_SHARED(int, shared);
  shared[threadIdx.x] = 1;
  __syncwarp(threadIdx.x < 16 ? 0xFFFFu : 0xFFFF0000u);
  out[threadIdx.x] = shared[31 - threadIdx.x];
}

__global__ void write_partial(float* partial, unsigned* done) {
  partial[blockIdx.x] = 1;  // and no __threadfence
  if (atomicAdd(done, 1) == gridDim.x - 1)
    for (unsigned b = 1; b < gridDim.x; ++b) partial[0] += partial[b];
}

__global__ void read_shared(int at, int* out) {
  FASTSEQ_DYNAMIC_SHARED(int, shared);
  *out = shared[at];
}

struct Bug {
  const char* name;
  const char* report;  // what the sanitizer says
  bool seen;           // by a sanitizer of this build
  std::function<void()> run;
};

std::vector<Bug> bugs() {
  static float sum = 0, partial[4];
  static unsigned done = 0;
  static int out[32];
  const char *race = "data race", *overflow = "heap-buffer-overflow";
  const auto rotate = [](const Rotate& launch, int size, int more) {
    return [=] { rotates(launch, size, more); };
  };
  return {
      {"shared_unwritten", race, kThreadSanitizer,
       rotate(launch_rotate_block<Missing::after_write>, threads, 0)},
      {"shared_unread", race, kThreadSanitizer, rotate(launch_rotate_block<Missing::after_read>, threads, 0)},
      {"warp_unwritten", race, kThreadSanitizer, rotate(launch_rotate_lanes<Missing::after_write>, 16, 1)},
      {"warp_unread", race, kThreadSanitizer, rotate(launch_rotate_lanes<Missing::after_read>, 16, 1)},
      {"lost_in_block", race, kThreadSanitizer,
       [] { FASTSEQ_LAUNCH((add_up<false>), 1, 32, 0, nullptr, &sum); }},
      {"lost_in_grid", race, kThreadSanitizer,
       [] { FASTSEQ_LAUNCH((add_up<false>), 8, 1, 0, nullptr, &sum); }},
      {"shuffle_no_order", race, kThreadSanitizer,
       [] { FASTSEQ_LAUNCH((write_shuffle_read<false>), 1, 32, 128, nullptr, out); }},
      {"halves", race, kThreadSanitizer,
       [] { FASTSEQ_LAUNCH(halves_read_each_other, 1, 32, 128, nullptr, out); }},
      {"no_fence", race, kThreadSanitizer,
       [] { FASTSEQ_LAUNCH(write_partial, 4, 1, 0, nullptr, partial, &done); }},
      {"shared_end", overflow, kAddressSanitizer,
       [] { FASTSEQ_LAUNCH(write_shared, 1, 32, 28, nullptr, 7); }},
      {"shared_begin", overflow, kAddressSanitizer,
       [] { FASTSEQ_LAUNCH(write_shared, 1, 32, 28, nullptr, -1); }},
      {"shared_read", overflow, kAddressSanitizer,
       [] { FASTSEQ_LAUNCH(read_shared, 1, 1, 28, nullptr, 7, out); }},
  };
}

// This program must fail with each bug, by the sanitizer's report, at any seed.
void test_bugs(const std::string& program) {
  for (const Bug& bug : bugs()) {
    if (!bug.seen) continue;
    for (const char* seed : {"0", "1"}) {
      testing::context() = bug.name;
      const std::string command =
          "FASTSEQ_EMULATOR_SEED=" + std::string(seed) + " '" + program + "' --bug " + bug.name;
      FILE* output = popen((command + " 2>&1").c_str(), "r");
      std::string text;
      for (int c; (c = std::fgetc(output)) != EOF;) text += static_cast<char>(c);
      const int status = pclose(output);
      CHECK(WIFEXITED(status) && WEXITSTATUS(status) != 0 && WEXITSTATUS(status) != 77);
      CHECK(text.find(bug.report) != std::string::npos);
    }
  }
  testing::context() = "";
}

// The same kernels without their bugs.
void test_no_bugs() {
  float sum = 0;
  std::vector<int> out(32);
  for_schedules(seeds(), [&] {
    FASTSEQ_LAUNCH((add_up<true>), 8, 32, 0, nullptr, &sum);
    FASTSEQ_LAUNCH((write_shuffle_read<true>), 1, 32, 128, nullptr, out.data());
  });
  CHECK(sum == 256.0f * (1 + 3 * seeds()) && std::count(out.begin(), out.end(), 1) == 32);
}

// 77, "skipped", if this build has no sanitizer that sees the bug.
int run_bug(const std::string& name) {
  threads = 64;  // the fewer the faster: a fiber costs the thread sanitizer 2 ms
  for (const Bug& bug : bugs()) {
    if (bug.name != name) continue;
    if (!bug.seen) return 77;
    bug.run();
    return 0;
  }
  std::printf("no bug of the name %s\n", name.c_str());
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "--bug") return run_bug(argv[2]);
  test_barriers();
  test_results();
  test_atomics();
  test_bits();
  test_elements();
  test_counters();
  test_schedules();
  test_threads();
  test_no_bugs();
  if (!kThreadSanitizer) test_missing_barriers();
  test_bugs(argv[0]);
  return testing::summary("cuda_emulator");
}

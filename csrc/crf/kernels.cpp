// The drivers of the scaled kernels: which layout, which rows go together, and the sums over them.
//
// Rows are sorted by length and cut into blocks; blocks are dealt to slots, each of which owns one set of
// parameter sums and is worked off by whichever thread is free. Neither blocks nor slots depend on the number
// of threads, and slots are added up in order: the result is the same, bit for bit, for any number of
// threads.
#include "kernels.h"

#include <numeric>
#include <thread>

#include "by_sequence.h"
#include "by_tag.h"
#include "usable.h"
#include "viterbi.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// What this machine could run at once. A property of the machine, unlike torch's thread count: blocks may
// depend on it.
int64_t processors() {
  static const int64_t n = std::max(1u, std::thread::hardware_concurrency());
  return n;
}

// Non-empty rows, longest first, cut into blocks of at most `height` rows.
struct Blocks {
  std::vector<int64_t> rows;
  std::vector<int64_t> begin;  // block i is rows[begin[i] .. begin[i+1])

  int64_t count() const { return int64_t(begin.size()) - 1; }

  // `dealt`: block i takes rows i, i + n, i + 2n ... of the sorted order, so that few blocks cost the same;
  // else runs of consecutive rows, which have like lengths and waste no lanes.
  Blocks(const Rows& all, int64_t B, int64_t height, bool dealt) {
    std::vector<int64_t> sorted;
    sorted.reserve(B);
    for (int64_t b = 0; b < B; ++b)
      if (all.length(b)) sorted.push_back(b);
    std::stable_sort(sorted.begin(), sorted.end(),
                     [&](int64_t a, int64_t b) { return all.length(a) > all.length(b); });
    const int64_t n = int64_t(sorted.size()), blocks = (n + height - 1) / height;
    begin.push_back(0);
    for (int64_t i = 0; i < blocks; ++i) {
      if (dealt)
        for (int64_t r = i; r < n; r += blocks) rows.push_back(sorted[r]);
      else
        rows.insert(rows.end(), sorted.begin() + i * height, sorted.begin() + std::min(n, (i + 1) * height));
      begin.push_back(int64_t(rows.size()));
    }
  }
};

enum class Layout { by_sequence, by_tag };

Layout layout_for(int64_t K) { return K > kMaxTagsBySequence ? Layout::by_tag : Layout::by_sequence; }

Blocks blocks_for(const Rows& rows, int64_t B, Layout layout) {
  if (layout == Layout::by_sequence) return Blocks(rows, B, Narrow::W, false);
  // As many blocks as processors can share evenly, where there are few; 6 rows keep what a block touches in
  // the cache.
  int64_t blocks = (B + 5) / 6;
  const bool few = blocks < 4 * processors();
  if (few) blocks = round_up(blocks, processors());
  return Blocks(rows, B, std::max<int64_t>(1, (B + blocks - 1) / std::max<int64_t>(blocks, 1)), few);
}

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

Scratch& call_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// Positions that are off have gradient 0.
void zero_off_positions(const Job& job, int64_t b) {
  const Emissions& x = job.model.x;
  const int64_t L = job.model.rows.length(b);
  if (L == x.T) return;
  const int32_t* at = job.model.rows.of(b);
  const int64_t size = x.type == Type::f32 ? 4 : 2;
  char* g = static_cast<char*>(job.gradient->emissions);
  for (int64_t t = 0, next = 0; t < x.T; ++t) {
    if (next < L && at[next] == t)
      ++next;
    else
      std::memset(g + (b * job.gradient->stride_b + t * job.gradient->stride_t) * size, 0, x.K * size);
  }
}

void run_block(const Job& job, Layout layout, const int64_t* rows, int count, float* sums) {
  const int64_t L = job.model.rows.length(rows[0]), K = job.tables.K;
  const bool gradient = job.gradient != nullptr;
  Scratch& scratch = thread_scratch();
  if (layout == Layout::by_sequence)
    BySequence<Narrow>(job, rows, count, scratch.floats(BySequence<Narrow>::scratch_floats(L, K, gradient)),
                       sums)
        .run();
  else
    ByTag(job, rows, count, scratch.floats(ByTag::scratch_floats(L, count, job.tables.ld, gradient)), sums)
        .run();
  if (gradient)
    for (int i = 0; i < count; ++i) zero_off_positions(job, rows[i]);
}

// Subtract the gold paths from the parameter sums: in double, since they nearly cancel what is there.
void subtract_gold(const Job& job, double* sums) {
  const int64_t K = job.tables.K;
  for (int64_t b = 0; b < job.model.x.B; ++b) {
    const int64_t L = job.model.rows.length(b);
    if (L == 0 || job.marks[b]) continue;
    const double w = job.row_weight(b);
    const int32_t* at = job.model.rows.of(b);
    const int64_t* tags = job.tags.data + b * job.tags.stride_b;
    int64_t previous = tags[at[0] * job.tags.stride_t];
    sums[K * K + previous] -= w;
    for (int64_t i = 1; i < L; ++i) {
      const int64_t y = tags[at[i] * job.tags.stride_t];
      sums[previous * K + y] -= w;
      previous = y;
    }
    sums[(K + 1) * K + previous] -= w;
  }
}

}  // namespace

void scaled_nll(const Model<float>& model, Tags tags, const float* weights, double scale, float* nll,
                const Gradients<float>* gradient, uint8_t* marks, double* sums, const ParallelFor& parallel) {
  const int64_t B = model.x.B, K = model.x.K;
  const Layout layout = layout_for(K);
  const int64_t ld = layout == Layout::by_tag ? round_up(K, Wide::W) : K;
  const Blocks blocks = blocks_for(model.rows, B, layout);
  const int64_t slot_floats = gradient ? (K + 2) * ld : 0;
  const int64_t most_slots =
      std::clamp<int64_t>((int64_t(8) << 20) / std::max<int64_t>(slot_floats, 1), 2, 64);
  const int64_t slots = std::min(blocks.count(), most_slots);
  float* memory = call_scratch().floats(Tables::floats(K, ld) + slots * slot_floats);
  const Tables tables(model, ld, memory);
  float* slot_sums = memory + Tables::floats(K, ld);
  const Job job{model, tables, tags, weights, scale, nll, gradient, marks};

  run_tasks(parallel, slots, [&](int64_t slot) {
    float* mine = slot_sums + slot * slot_floats;
    std::fill(mine, mine + slot_floats, 0.f);
    for (int64_t i = slot; i < blocks.count(); i += slots) {
      const int64_t* rows = blocks.rows.data() + blocks.begin[i];
      const int count = int(blocks.begin[i + 1] - blocks.begin[i]);
      run_block(job, layout, rows, count, mine);
    }
    thread_scratch().trim();
  });

  if (gradient) {
    for (int64_t slot = 0; slot < slots; ++slot)
      for (int64_t i = 0; i < K + 2; ++i) {
        const float* from = slot_sums + slot * slot_floats + i * ld;
        const float* edge = tables.edges + i * ld;  // the slots' sums of transitions lack this factor
        for (int64_t k = 0; k < K; ++k) sums[i * K + k] += i < K ? from[k] * edge[k] : from[k];
      }
    if (tags.data) subtract_gold(job, sums);
  }
  call_scratch().trim();
}

void viterbi(const Model<float>& model, int64_t* paths, float* scores, const ParallelFor& parallel) {
  const int64_t B = model.x.B, T = model.x.T, K = model.x.K;
  const Layout layout = layout_for(K);
  const int64_t ld = layout == Layout::by_tag ? round_up(K, Wide::W) : K;
  const Blocks blocks = blocks_for(model.rows, B, layout);
  float* edges = call_scratch().floats(2 * K * ld + ld);
  float* edges_t = edges + K * ld;
  std::fill(edges, edges + 2 * K * ld + ld, -INFINITY);
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j < K; ++j) edges_t[j * ld + i] = edges[i * ld + j] = model.transitions[i * K + j];
  float* reach = edges_t + K * ld;
  if (layout == Layout::by_tag) find_reach(edges, ld, K, reach);
  std::vector<uint8_t> invalid(B);
  const int64_t longest = longest_usable(model);
  for (int64_t b = 0; b < B; ++b) invalid[b] = model.rows.length(b) > longest;
  const ViterbiJob job{model, edges, edges_t, ld, reach, paths, scores, invalid.data()};
  for (int64_t b = 0; b < B; ++b) scores[b] = model.rows.length(b) ? NAN : 0;

  run_tasks(parallel, blocks.count(), [&](int64_t i) {
    const int64_t* rows = blocks.rows.data() + blocks.begin[i];
    const int count = int(blocks.begin[i + 1] - blocks.begin[i]);
    const int64_t L = model.rows.length(rows[0]);
    for (int r = 0; r < count; ++r)
      if (model.rows.length(rows[r]) < T) std::fill_n(paths + rows[r] * T, T, -100);
    float* scratch = thread_scratch().floats(
        layout == Layout::by_tag ? L * count * ld + round_up(K, 16)
                                 : (L + 1) * K * Narrow::W + (Narrow::W + 1) * round_up(K, 16));
    if (layout == Layout::by_sequence)
      viterbi_by_sequence<Narrow>(job, rows, count, scratch);
    else
      viterbi_by_tag(job, rows, count, scratch);
    thread_scratch().trim();
  });
  for (int64_t b = 0; b < B; ++b)
    if (!model.rows.length(b)) std::fill_n(paths + b * T, T, -100);
  call_scratch().trim();
}

}  // namespace fastseq::FASTSEQ_ISA

// The n best paths of each row, in the arithmetic of Viterbi: score of a step fl(fl(s + A_ij) + e_j), of the
// end fl(s + end_j), in R.
//
// A task owns a row. For each tag it keeps the n best partial paths, best first. For a next tag j the K
// lists, each plus its A_ij and e_j, are still in order, as rounding is monotone: a heap of their heads
// merges them. They are compared as rounded, with e_j added: ties go to the smaller tag, then to the smaller
// rank, which for n = 1 is Viterbi's (and pytorch-crf's) first maximum. A path with score -inf does not
// exist. Cost of a step: K heaps, each 2*K additions and O(K + n log K) comparisons. Memory of a row: 2*K*n
// scores and L*K*n links of 2 bytes (4 if K*n > 65536), of which only what is used is touched: after t steps
// a tag has at most K^(t-1) paths.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "../common/half.h"
#include "usable.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

template <class R>
constexpr R kNone = -std::numeric_limits<R>::infinity();

// The head of tag i's list: its score with the step to the next tag taken, and its rank in the list.
template <class R>
struct Head {
  R score;
  int32_t tag;
  int32_t rank;
  bool before(const Head& other) const {
    return score > other.score || (score == other.score && tag < other.tag);
  }
};

template <class R>
void sift_down(Head<R>* heap, int64_t size, int64_t at) {
  const Head<R> moving = heap[at];
  for (int64_t child; (child = 2 * at + 1) < size; at = child) {
    if (child + 1 < size && heap[child + 1].before(heap[child])) ++child;
    if (!heap[child].before(moving)) break;
    heap[at] = heap[child];
  }
  heap[at] = moving;
}

// The partial paths after a step: scores[rank*K + tag], best first, kNone after the last; ranks below `width`
// are filled.
template <class R>
struct Frontier {
  std::unique_ptr<R[]> scores;
  int64_t width = 1;
  explicit Frontier(int64_t size) : scores(new R[size]) {}
};

// The existing heads of the lists, list i raised by edge[i] and then by x, as a heap; returns their number.
// For small n only the n best heads, kept sorted on the way: most are turned down by one comparison, which a
// heap of all could not do.
template <class R>
int64_t collect_heads(const R* scores, const R* edge, R x, int64_t K, int64_t n, Head<R>* heap) {
  const bool sorted = n <= 16;
  const int64_t limit = sorted ? std::min(n, K) : K;
  int64_t size = 0;
  for (int64_t i = 0; i < K; ++i) {
    const R score = (scores[i] + edge[i]) + x;
    if (!(score > (size == limit ? heap[size - 1].score : kNone<R>))) continue;
    int64_t at = size < limit ? size++ : size - 1;
    for (; sorted && at > 0 && score > heap[at - 1].score; --at) heap[at] = heap[at - 1];
    heap[at] = {score, static_cast<int32_t>(i), 0};
  }
  for (int64_t i = sorted ? -1 : size / 2 - 1; i >= 0; --i) sift_down(heap, size, i);
  return size;
}

// The `n` best of all lists, list i raised by edge[i] and then by x, best first: emit(rank, score, link),
// link = rank*K + tag of the path that goes on; for a rank that does not exist, kNone and link 0.
template <class R, class Emit>
void merge(const Frontier<R>& from, const R* edge, R x, int64_t K, int64_t n, Head<R>* heap,
           const Emit& emit) {
  const R* scores = from.scores.get();
  int64_t size = collect_heads(scores, edge, x, K, n, heap);
  int64_t rank = 0;
  for (; rank < n && size > 0; ++rank) {
    Head<R>& top = heap[0];
    emit(rank, top.score, top.rank * K + top.tag);
    const R next = ++top.rank < from.width ? (scores[top.rank * K + top.tag] + edge[top.tag]) + x : kNone<R>;
    if (next > kNone<R>) {
      top.score = next;
    } else {
      top = heap[--size];
    }
    sift_down(heap, size, 0);
  }
  for (; rank < n; ++rank) emit(rank, kNone<R>, int64_t{0});
}

// The search through one row. Link holds rank*K + tag.
template <class R, class Link>
struct Search {
  const Model<R>& model;
  const R* transposed;
  int64_t b, n, K, L;
  const int32_t* position;
  Frontier<R> now, next;
  std::unique_ptr<Link[]> links;  // (L,n,K)
  std::vector<R> x;
  std::vector<Head<R>> heap;

  Search(const Model<R>& model, const R* transposed, int64_t b, int64_t n)
      : model(model),
        transposed(transposed),
        b(b),
        n(n),
        K(model.x.K),
        L(model.rows.length(b)),
        position(model.rows.of(b)),
        now(n * K),
        next(n * K),
        links(new Link[L * n * K]),
        x(K),
        heap(K) {}

  // Fills `now` with the partial paths of the whole row. False if an emission is NaN or +inf.
  bool advance() {
    for (int64_t l = 0; l < L; ++l) {
      load_row(model.x, b, position[l], x.data());
      if (!all_usable(x.data(), K)) return false;
      if (l == 0) {
        for (int64_t j = 0; j < K; ++j) now.scores[j] = model.start[j] + x[j];
      } else {
        step(links.get() + l * n * K);
      }
    }
    return true;
  }

  void step(Link* link) {
    next.width = std::min(n, now.width * K);
    for (int64_t j = 0; j < K; ++j) {
      merge(now, transposed + j * K, x[j], K, next.width, heap.data(),
            [&](int64_t rank, R score, int64_t from) {
              next.scores[rank * K + j] = score;
              link[rank * K + j] = static_cast<Link>(from);
            });
    }
    std::swap(now, next);
  }

  // Writes the best scores, and the paths (n,T) that have them; `paths` must hold -100.
  void finish(int64_t* paths, R* scores) {
    merge(now, model.end, R{0}, K, n, heap.data(), [&](int64_t rank, R score, int64_t from) {
      scores[rank] = score;
      if (score > kNone<R>) trace(from, paths + rank * model.x.T);
    });
  }

  void trace(int64_t from, int64_t* path) const {
    for (int64_t l = L - 1; l >= 0; --l) {
      path[position[l]] = from % K;
      if (l > 0) from = links[l * n * K + from];
    }
  }
};

template <class R, class Link>
void search_all(const Model<R>& model, int64_t n, int64_t* paths, R* scores,
                const ParallelFor& parallel_for) {
  const int64_t K = model.x.K, T = model.x.T, longest = longest_usable(model);
  std::vector<R> transposed(K * K);
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t j = 0; j < K; ++j) transposed[j * K + i] = model.transitions[i * K + j];
  }
  run_tasks(parallel_for, model.x.B, [&](int64_t b) {
    const int64_t L = model.rows.length(b);
    R* row_scores = scores + b * n;
    std::fill_n(paths + b * n * T, n * T, -100);
    std::fill_n(row_scores, n, L == 0 ? kNone<R> : std::numeric_limits<R>::quiet_NaN());
    if (L == 0) row_scores[0] = 0;  // the empty path
    if (L == 0 || L > longest) return;
    Search<R, Link> search(model, transposed.data(), b, n);
    if (search.advance()) search.finish(paths + b * n * T, row_scores);
  });
}

}  // namespace

template <class R>
void nbest(const Model<R>& model, int64_t n, int64_t* paths, R* scores, const ParallelFor& parallel_for) {
  if (n <= 0) return;
  if (n * model.x.K <= 65536) return search_all<R, uint16_t>(model, n, paths, scores, parallel_for);
  search_all<R, uint32_t>(model, n, paths, scores, parallel_for);
}

template void nbest(const Model<float>&, int64_t, int64_t*, float*, const ParallelFor&);
template void nbest(const Model<double>&, int64_t, int64_t*, double*, const ParallelFor&);

}  // namespace fastseq::FASTSEQ_ISA

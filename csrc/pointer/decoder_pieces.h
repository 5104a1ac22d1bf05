// How the source positions are cut for the attention of a step: pieces of at most kPiece positions of one
// row. They depend on the mask alone, and sums over pieces are taken in their order: results do not depend on
// the number of threads.
#pragma once
#include "decoder.h"
#include "decoder_products.h"

namespace fastseq::FASTSEQ_ISA::decoder {

constexpr int64_t kPiece = 64;

struct Piece {
  int64_t row, begin, end;  // of the positions that are on
};

struct Pieces {
  std::vector<Piece> all;      // in the order of their rows
  std::vector<int64_t> first;  // row b has pieces first[b] .. first[b+1]
  int64_t count() const { return int64_t(all.size()); }

  template <class R>
  explicit Pieces(const pointer::Decoder<R>& in) : first(1, 0) {
    for (int64_t b = 0; b < in.B; ++b) {
      const int64_t n = in.on.count(in.memory_of(b)), pieces = (n + kPiece - 1) / kPiece;
      const int64_t size = pieces ? round_up((n + pieces - 1) / pieces, 8) : 0;
      for (int64_t i = 0; i < n; i += size) all.push_back({b, i, std::min(n, i + size)});
      first.push_back(count());
    }
  }
};

// tanh y = 1 - 2 / (1 + 2^(c y)): an absolute error of 1e-7, which is all that a sum of tanh can keep, for
// three quarters of the cost of a tanh that is relatively right near 0.
constexpr double kTanhExponent = 2 * 1.44269504088896340736;

}  // namespace fastseq::FASTSEQ_ISA::decoder

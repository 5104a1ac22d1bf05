// Batches of sequences of like length, for loaders. The description is in fastseq/host.py, the Python twin in
// fastseq/_host_python.py.
#pragma once
#include <cstdint>
#include <vector>

namespace fastseq {

// Batch i is order[offsets[i] .. offsets[i+1]).
struct Plan {
  std::vector<int64_t> order, offsets;
};

// One of batch_size and max_tokens may be 0: no such limit. window: how many sequences are sorted together.
Plan bucket_plan(const int64_t* lengths, int64_t n, int64_t batch_size, int64_t max_tokens, uint64_t seed,
                 bool drop_last, int64_t window);

}  // namespace fastseq

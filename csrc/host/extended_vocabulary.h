// Words to ids, where words outside the vocabulary get ids of their own in each sequence: what a model that
// copies reads. The description is in fastseq/host.py, the Python twin in fastseq/_host_python.py.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fastseq {

// Words numbered in the order in which they were added. An open-addressed hash table: a look-up of a word
// that is not there, the usual case in a sequence's own table, mostly ends at its first slot.
class WordTable {
 public:
  static constexpr int64_t kAbsent = -1;

  WordTable();
  int64_t size() const { return int64_t(words_.size()); }
  // The word's number, or kAbsent.
  int64_t find(std::string_view word, uint64_t hash) const;
  // A word that is not there yet; what it views must outlive the table.
  void add(std::string_view word, uint64_t hash);
  void clear();

  static uint64_t hash(std::string_view word);

 private:
  struct Slot {
    uint64_t hash = 0;
    int64_t number = kAbsent;
  };
  void place(uint64_t hash, int64_t number);
  void grow();

  std::vector<std::string_view> words_;
  std::vector<Slot> slots_;  // a power of two, at most half of them taken
};

// Sequence i is tokens[offsets[i] .. offsets[i+1]).
struct Sequences {
  std::vector<std::string_view> tokens;
  std::vector<int64_t> offsets{0};

  int64_t count() const { return int64_t(offsets.size()) - 1; }
  int64_t longest() const;
};

// Never changes once it is made: any number of threads may use it at once.
class ExtendedVocabulary {
 public:
  // `unknown` is the id that stands for all the words that are not in `words`.
  ExtendedVocabulary(std::vector<std::string> words, int64_t unknown);
  ExtendedVocabulary(const ExtendedVocabulary&) = delete;  // the table views the words
  ExtendedVocabulary& operator=(const ExtendedVocabulary&) = delete;

  // Fills the first columns of the rows of ids and extended, both (count, longest), and leaves the others as
  // they are. Returns, of each sequence, where in `tokens` its out-of-vocabulary words come first: word j has
  // the extended id V + j.
  std::vector<std::vector<int64_t>> encode_sources(const Sequences& sources, int64_t* ids,
                                                   int64_t* extended) const;

  // The same for targets, of which row i takes the out-of-vocabulary words from sequence i of `oov`.
  void encode_targets(const Sequences& targets, const Sequences& oov, int64_t* ids, int64_t* extended) const;

 private:
  const std::vector<std::string> words_;
  const int64_t unknown_;
  WordTable table_;
};

}  // namespace fastseq

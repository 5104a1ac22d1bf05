#include "host/extended_vocabulary.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace fastseq {
namespace {

constexpr size_t kFewestSlots = 64;

// Where a look-up of a hash begins: its upper half is the better mixed one.
size_t first_slot(uint64_t hash, size_t slots) { return (hash >> 32) & (slots - 1); }

}  // namespace

WordTable::WordTable() : slots_(kFewestSlots) {}

// Eight bytes a step, each multiplied and folded. Words are short, and an adversary gains a slow table at
// most.
uint64_t WordTable::hash(std::string_view word) {
  uint64_t state = 0x9e3779b97f4a7c15 ^ word.size();
  const auto mix = [&state](uint64_t bytes) {
    state = (state ^ bytes) * 0xbf58476d1ce4e5b9;
    state ^= state >> 29;
  };
  const char* at = word.data();
  size_t left = word.size();
  for (; left >= 8; at += 8, left -= 8) {
    uint64_t bytes;
    std::memcpy(&bytes, at, 8);
    mix(bytes);
  }
  uint64_t rest = 0;
  if (left > 0) std::memcpy(&rest, at, left);
  mix(rest);
  return state * 0x94d049bb133111eb;
}

int64_t WordTable::find(std::string_view word, uint64_t hash) const {
  for (size_t i = first_slot(hash, slots_.size());; i = (i + 1) & (slots_.size() - 1)) {
    const Slot& slot = slots_[i];
    if (slot.number == kAbsent) return kAbsent;
    if (slot.hash == hash && words_[slot.number] == word) return slot.number;
  }
}

void WordTable::add(std::string_view word, uint64_t hash) {
  if (2 * (words_.size() + 1) > slots_.size()) grow();
  place(hash, size());
  words_.push_back(word);
}

void WordTable::clear() {
  if (words_.empty()) return;
  words_.clear();
  std::fill(slots_.begin(), slots_.end(), Slot{});
}

void WordTable::place(uint64_t hash, int64_t number) {
  size_t i = first_slot(hash, slots_.size());
  while (slots_[i].number != kAbsent) i = (i + 1) & (slots_.size() - 1);
  slots_[i] = {hash, number};
}

void WordTable::grow() {
  std::vector<Slot> old(2 * slots_.size());
  old.swap(slots_);
  for (const Slot& slot : old)
    if (slot.number != kAbsent) place(slot.hash, slot.number);
}

int64_t Sequences::longest() const {
  int64_t most = 0;
  for (int64_t i = 0; i < count(); ++i) most = std::max(most, offsets[i + 1] - offsets[i]);
  return most;
}

ExtendedVocabulary::ExtendedVocabulary(std::vector<std::string> words, int64_t unknown)
    : words_(std::move(words)), unknown_(unknown) {
  for (const std::string& word : words_) table_.add(word, WordTable::hash(word));
}

std::vector<std::vector<int64_t>> ExtendedVocabulary::encode_sources(const Sequences& sources, int64_t* ids,
                                                                     int64_t* extended) const {
  const int64_t width = sources.longest();
  std::vector<std::vector<int64_t>> oov(sources.count());
  WordTable own;
  for (int64_t row = 0; row < sources.count(); ++row, ids += width, extended += width) {
    own.clear();
    const int64_t begin = sources.offsets[row];
    for (int64_t i = begin; i < sources.offsets[row + 1]; ++i) {
      const std::string_view word = sources.tokens[i];
      const uint64_t hash = WordTable::hash(word);
      int64_t id = table_.find(word, hash);
      ids[i - begin] = id == WordTable::kAbsent ? unknown_ : id;
      if (id == WordTable::kAbsent) {
        int64_t number = own.find(word, hash);
        if (number == WordTable::kAbsent) {
          number = own.size();
          own.add(word, hash);
          oov[row].push_back(i);
        }
        id = table_.size() + number;
      }
      extended[i - begin] = id;
    }
  }
  return oov;
}

void ExtendedVocabulary::encode_targets(const Sequences& targets, const Sequences& oov, int64_t* ids,
                                        int64_t* extended) const {
  const int64_t width = targets.longest();
  WordTable own;
  for (int64_t row = 0; row < targets.count(); ++row, ids += width, extended += width) {
    own.clear();
    for (int64_t i = oov.offsets[row]; i < oov.offsets[row + 1]; ++i)
      own.add(oov.tokens[i], WordTable::hash(oov.tokens[i]));  // of equal words, the first is found
    const int64_t begin = targets.offsets[row];
    for (int64_t i = begin; i < targets.offsets[row + 1]; ++i) {
      const std::string_view word = targets.tokens[i];
      const uint64_t hash = WordTable::hash(word);
      const int64_t id = table_.find(word, hash);
      const int64_t number = id == WordTable::kAbsent ? own.find(word, hash) : WordTable::kAbsent;
      ids[i - begin] = id == WordTable::kAbsent ? unknown_ : id;
      extended[i - begin] = number == WordTable::kAbsent ? ids[i - begin] : table_.size() + number;
    }
  }
}

}  // namespace fastseq

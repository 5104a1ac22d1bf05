// Ids against a std::map, on words that share beginnings and lengths and hold any byte; and from several
// threads at once.
#include "host/extended_vocabulary.h"

#include <algorithm>
#include <map>
#include <random>

#include "testing/check.h"
#include "testing/threads.h"

using fastseq::ExtendedVocabulary;
using fastseq::Sequences;
using fastseq::WordTable;

namespace {

constexpr int64_t kUnknown = 1, kUntouched = -7;

// The empty word, a zero byte, words of 7, 8, 9 and 16 bytes that differ in the last one, and numbers.
std::vector<std::string> words(int64_t count) {
  std::vector<std::string> out{"", std::string(1, '\0'), "\xf0\x9f\x98\x80"};
  for (int64_t size : {7, 8, 9, 16})
    for (char last : {'a', 'b'}) out.push_back(std::string(size - 1, 'x') + last);
  for (int64_t i = int64_t(out.size()); i < count; ++i) out.push_back(std::to_string(i * i));
  return out;
}

Sequences sequences(const std::vector<std::string>& from, int64_t rows, int64_t most, std::mt19937& random) {
  Sequences out;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = random() % (most + 1); i > 0; --i) out.tokens.push_back(from[random() % from.size()]);
    out.offsets.push_back(int64_t(out.tokens.size()));
  }
  return out;
}

using Ids = std::map<std::string_view, int64_t>;

int64_t find(const Ids& ids, std::string_view word, int64_t otherwise) {
  const auto found = ids.find(word);
  return found == ids.end() ? otherwise : found->second;
}

// What both encoders gave for a row, the padding included.
void check_row(const Sequences& of, int64_t row, const Ids& known, const Ids& all, const int64_t* ids,
               const int64_t* extended) {
  const int64_t begin = of.offsets[row], length = of.offsets[row + 1] - begin;
  for (int64_t i = 0; i < of.longest(); ++i) {
    const std::string_view word = i < length ? of.tokens[begin + i] : std::string_view();
    CHECK(ids[i] == (i < length ? find(known, word, kUnknown) : kUntouched));
    CHECK(extended[i] == (i < length ? find(all, word, kUnknown) : kUntouched));
  }
}

void check_encoding(int64_t vocabulary_size, int64_t rows, int64_t longest, std::mt19937& random) {
  const std::vector<std::string> every = words(2 * vocabulary_size);
  const std::vector<std::string> kept(every.begin(), every.begin() + vocabulary_size);
  const ExtendedVocabulary vocabulary(kept, kUnknown);
  Ids known;
  for (int64_t i = 0; i < vocabulary_size; ++i) known[kept[i]] = i;

  const Sequences sources = sequences(every, rows, longest, random),
                  targets = sequences(every, rows, 9, random);
  std::vector<int64_t> ids(rows * sources.longest(), kUntouched), extended = ids;
  const auto places = vocabulary.encode_sources(sources, ids.data(), extended.data());
  std::vector<int64_t> target_ids(rows * targets.longest(), kUntouched), target_extended = target_ids;
  Sequences oov;
  for (const auto& row : places) {
    for (int64_t place : row) oov.tokens.push_back(sources.tokens[place]);
    oov.offsets.push_back(int64_t(oov.tokens.size()));
  }
  vocabulary.encode_targets(targets, oov, target_ids.data(), target_extended.data());

  for (int64_t row = 0; row < rows; ++row) {
    Ids all = known;
    for (int64_t i = sources.offsets[row]; i < sources.offsets[row + 1]; ++i)
      all.insert({sources.tokens[i], int64_t(all.size())});  // the first time only
    CHECK(int64_t(all.size()) == vocabulary_size + int64_t(places[row].size()));
    CHECK(std::is_sorted(places[row].begin(), places[row].end()));
    check_row(sources, row, known, all, &ids[row * sources.longest()], &extended[row * sources.longest()]);
    check_row(targets, row, known, all, &target_ids[row * targets.longest()],
              &target_extended[row * targets.longest()]);
  }
}

void check_threads() {
  std::mt19937 random(2);
  const std::vector<std::string> every = words(400);
  const ExtendedVocabulary vocabulary({every.begin(), every.begin() + 100}, kUnknown);
  const Sequences sources = sequences(every, 50, 60, random);
  const int64_t size = 50 * sources.longest();
  std::vector<std::vector<int64_t>> ids(8, std::vector<int64_t>(size)), extended = ids;
  fastseq::testing::threads(8)(8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      vocabulary.encode_sources(sources, ids[i].data(), extended[i].data());
  });
  for (int i = 1; i < 8; ++i) CHECK(ids[i] == ids[0] && extended[i] == extended[0]);
}

void check_no_words() {
  const ExtendedVocabulary vocabulary({"a", "b"}, kUnknown);
  int64_t nothing = kUntouched;
  CHECK(vocabulary.encode_sources(Sequences{}, &nothing, &nothing).empty());
  CHECK(vocabulary.encode_sources(Sequences{{}, {0, 0}}, &nothing, &nothing) ==
        std::vector<std::vector<int64_t>>(1));
  CHECK(nothing == kUntouched);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int64_t size : {2, 11, 33, 500})
    for (int64_t longest : {1, 20, 700}) check_encoding(size, 12, longest, random);
  check_threads();
  check_no_words();
  return fastseq::testing::summary("extended vocabulary");
}

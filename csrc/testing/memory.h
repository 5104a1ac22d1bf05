// Arrays for tests that end where memory ends.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

namespace fastseq::testing {

constexpr char kUntouched = 0x55;

// n elements, of bytes kUntouched, which end where a page ends that is followed by one that cannot be
// touched.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t n) : n_(n) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    size_ = (n * int64_t(sizeof(T)) + page - 1) / page * page + page;
    base_ =
        static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + size_ - page, page, PROT_NONE)) std::abort();
    std::memset(base_, kUntouched, size_ - page);
    data_ = reinterpret_cast<T*>(base_ + size_ - page) - n;
  }
  template <class From>
  explicit Memory(const std::vector<From>& from) : Memory(int64_t(from.size())) {
    for (int64_t i = 0; i < n_; ++i) data_[i] = static_cast<T>(from[i]);
  }
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept { return swap(other), *this; }
  ~Memory() {
    if (base_) munmap(base_, size_);
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return n_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  void swap(Memory& other) {
    std::swap(n_, other.n_), std::swap(size_, other.size_), std::swap(base_, other.base_);
    std::swap(data_, other.data_);
  }
  int64_t n_ = 0, size_ = 0;
  char* base_ = nullptr;
  T* data_ = nullptr;
};

template <class T>
bool same_bits(const Memory<T>& a, const Memory<T>& b) {
  return a.size() == b.size() &&
         (a.size() == 0 || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace fastseq::testing

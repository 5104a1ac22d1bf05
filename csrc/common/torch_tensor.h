// What the registrations of all ops share, for every device, on the LibTorch stable ABI: the error that names
// an argument, which starts with "fastseq: " and which Python turns into ValueError, and new tensors.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

namespace fastseq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(bool ok, const std::string& message) {
  if (!ok) throw std::runtime_error("fastseq: " + message);
}

// An uninitialised tensor on the device of `like`. (torch::stable::new_empty looks its op up by name each
// time: five outputs cost 8 us.)
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[8], step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= sizes.begin()[i]) strides[i] = step;
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides,
                                                         int32_t(type), device_type, device_index, &handle));
  return Tensor(handle);
}

template <class R>
R* data(Tensor& t) {
  return static_cast<R*>(t.mutable_data_ptr());
}

}  // namespace fastseq

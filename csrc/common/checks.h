// What memory safety needs of the arguments, and new tensors; wordings for users are in fastrpe/checks.py.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "dtype.h"

namespace fastrpe {

using torch::stable::Tensor;

inline void check_like(const char* op, const char* argument, const Tensor& x, ScalarType dtype, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, op, ": ", argument, " has the wrong dtype");
  STD_TORCH_CHECK(x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(), op, ": ", argument,
                  " must be on the device of q");
}

// An uninitialised contiguous tensor on the device of `like`, without a trip through the dispatcher.
inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 0 ? sizes[i] : 1;
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                               like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor new_empty_like(const Tensor& x) {
  const auto sizes = x.sizes();
  return new_empty(x, std::vector<int64_t>(sizes.begin(), sizes.end()), x.scalar_type());
}

}  // namespace fastrpe

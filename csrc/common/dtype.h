// Storage types, the types kernels compute in, and dispatch over them.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#ifdef __CUDACC__
#define FASTRPE_HD __host__ __device__ __forceinline__
#else
#define FASTRPE_HD inline __attribute__((always_inline))
#endif

namespace fastrpe {

using c10::BFloat16;
using c10::Half;
using torch::headeronly::ScalarType;

// Arithmetic is float32, and float64 for float64.
template <typename T>
struct Acc {
  using type = float;
};
template <>
struct Acc<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Acc<T>::type;

inline ScalarType acc_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f with a value of the storage type.
template <typename F>
void dispatch_float(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, op, ": q must have dtype float16, bfloat16, float32 or float64");
  }
}

}  // namespace fastrpe

// Maps for copies of tiles by Hopper's copy engine.
#pragma once

#include <cuda.h>

#include "shared.cuh"

namespace fastrpe {
namespace linear {

// The driver's function for it, looked up once, since nothing is linked against the driver.
inline auto tensor_map_encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)
               : nullptr;
  }();
  return found;
}

// Whether a map of (B, H, L, 64) for copies of tiles of `rows` rows could be made; none of an empty tensor.
template <typename T>
bool map_tiles(CUtensorMap& map, const Rows<T>& x, int64_t B, int64_t H, int64_t L, uint32_t rows) {
  const auto encode = tensor_map_encoder();
  const cuuint64_t sizes[] = {width, static_cast<cuuint64_t>(L), static_cast<cuuint64_t>(H),
                              static_cast<cuuint64_t>(B)};
  const cuuint64_t strides[] = {sizeof(T) * x.l, sizeof(T) * x.h, sizeof(T) * x.b};
  const cuuint32_t box[] = {width, rows, 1, 1}, steps[] = {1, 1, 1, 1};
  constexpr auto type =
      std::is_same_v<T, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode != nullptr &&
         encode(&map, type, 4, const_cast<T*>(x.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace linear
}  // namespace fastrpe

#pragma once

#include <vector>

#include "../common/checks.h"

namespace fastrpe {
namespace reflection {

// P = F_1 ... F_K, (H, D, D), in float64 and rounded once, for D up to 128 and K D up to 2048.
Tensor reflection_basis_cuda(const Tensor& v,  // (H, K, D), float32 or float64
                             int64_t block, std::vector<int64_t> shuffles);

// The gradient of v, (H, K, D).
Tensor reflection_basis_bwd_cuda(const Tensor& dy,  // (H, D, D): of P
                                 const Tensor& v,   // (H, K, D)
                                 int64_t block, std::vector<int64_t> shuffles);

}  // namespace reflection
}  // namespace fastrpe

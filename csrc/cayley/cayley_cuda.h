#pragma once

#include <tuple>

#include "../common/checks.h"

namespace fastrpe {
namespace cayley {

// P = 2 (I + S)^{-1} - I, and in float64 (I + S)^{-1}, both (H, d, d), for d up to 128.
std::tuple<Tensor, Tensor> cayley_basis_cuda(
    const Tensor& params);  // (H, d (d - 1) / 2): S above its diagonal, by rows

// The gradient of params, (H, d (d - 1) / 2).
Tensor cayley_basis_bwd_cuda(const Tensor& dy,        // (H, d, d): of P
                             const Tensor& inverse);  // (H, d, d), float64

}  // namespace cayley
}  // namespace fastrpe

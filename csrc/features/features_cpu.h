#pragma once

#include <optional>
#include <tuple>

#include "../common/checks.h"

namespace fastrpe {
namespace features {

Tensor random_features_cpu(const Tensor& x,                     // (B, H, L, D)
                           const std::optional<Tensor>& omega,  // (M, D) or (H, M, D)
                           int64_t kind, double scale, double eps,
                           const std::optional<Tensor>& a,  // ()
                           int64_t stabilizer);

// dx, and the sums over rows of dp (scale x)^T, shaped as omega, and of dp, (M,) or (H, M); empty if not needed.
std::tuple<Tensor, Tensor, Tensor> random_features_bwd_cpu(const Tensor& dy,                    // (B, H, L, F)
                                                           const Tensor& y,                     // (B, H, L, F)
                                                           const Tensor& x,                     // (B, H, L, D)
                                                           const std::optional<Tensor>& omega,  // (M, D) or (H, M, D)
                                                           int64_t kind, double scale, double eps,
                                                           const std::optional<Tensor>& a,  // ()
                                                           bool need_sums);

Tensor fwht_cpu(const Tensor& x,  // (rows, D)
                double scale);

}  // namespace features
}  // namespace fastrpe

// Every native schema, and the CPU kernels behind them.
#include <torch/csrc/stable/library.h>

#include "features/features_cpu.h"
#include "linear/linear_attention_cpu.h"
#include "rotary/rotary_cpu.h"

STABLE_TORCH_LIBRARY(fastrpe_native, m) {
  m.def("cayley_basis(Tensor params) -> (Tensor, Tensor)");
  m.def("cayley_basis_bwd(Tensor dy, Tensor inverse) -> Tensor");
  m.def("fwht(Tensor x, float scale) -> Tensor");
  m.def(
      "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? omega, int kind, bool causal, float scale, Tensor? bias, "
      "float eps, bool normalize, Tensor? mask, Tensor? cu_seqlens, Tensor? kv, Tensor? z, Tensor? log_scale, "
      "bool need_state) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_attention_bwd(Tensor dout, Tensor? dkv, Tensor? dz, Tensor q, Tensor k, Tensor v, Tensor? omega, "
      "int kind, bool causal, float scale, Tensor? bias, float eps, bool normalize, Tensor? mask, Tensor? cu_seqlens, "
      "Tensor? kv, Tensor? z, Tensor? log_scale, Tensor last_kv, Tensor last_z, Tensor last_log_scale, "
      "bool need_omega) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "random_features(Tensor x, Tensor? omega, int kind, float scale, float eps, Tensor? a, int stabilizer) "
      "-> Tensor");
  m.def(
      "random_features_bwd(Tensor dy, Tensor y, Tensor x, Tensor? omega, int kind, float scale, float eps, Tensor? a, "
      "bool need_sums) -> (Tensor, Tensor, Tensor)");
  m.def("reflection_basis(Tensor v, int block, int[] shuffles) -> Tensor");
  m.def("reflection_basis_bwd(Tensor dy, Tensor v, int block, int[] shuffles) -> Tensor");
  m.def(
      "rotate(Tensor q, Tensor k, Tensor positions, Tensor freqs, bool interleaved, bool inverse, float factor, "
      "int prefix) -> (Tensor, Tensor)");
  m.def(
      "rotate_basis(Tensor q, Tensor k, Tensor positions, Tensor freqs, Tensor basis, bool interleaved, bool inverse, "
      "float factor, int prefix) -> (Tensor, Tensor)");
  m.def(
      "rotate_basis_bwd(Tensor dyq, Tensor dyk, Tensor q, Tensor k, Tensor positions, Tensor freqs, Tensor basis, "
      "bool interleaved, float factor, int prefix, bool need_freqs, bool need_basis) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "rotate_bwd(Tensor dyq, Tensor dyk, Tensor q, Tensor k, Tensor positions, Tensor freqs, bool interleaved, "
      "bool inverse, float factor, int prefix, bool need_positions, bool need_freqs) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rotate_cos_sin(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse, int prefix) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastrpe_native, CPU, m) {
  m.impl("fwht", TORCH_BOX(&fastrpe::features::fwht_cpu));
  m.impl("linear_attention", TORCH_BOX(&fastrpe::linear::linear_attention_cpu));
  m.impl("linear_attention_bwd", TORCH_BOX(&fastrpe::linear::linear_attention_bwd_cpu));
  m.impl("random_features", TORCH_BOX(&fastrpe::features::random_features_cpu));
  m.impl("random_features_bwd", TORCH_BOX(&fastrpe::features::random_features_bwd_cpu));
  m.impl("rotate", TORCH_BOX(&fastrpe::rotary::rotate_cpu));
  m.impl("rotate_bwd", TORCH_BOX(&fastrpe::rotary::rotate_bwd_cpu));
  m.impl("rotate_cos_sin", TORCH_BOX(&fastrpe::rotary::rotate_cos_sin_cpu));
}

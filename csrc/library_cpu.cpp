// Every native schema, and the CPU kernels behind them.
#include <torch/csrc/stable/library.h>

#include "rotary/rotary_cpu.h"

STABLE_TORCH_LIBRARY(fastrpe_native, m) {
  m.def("cayley_basis(Tensor params) -> (Tensor, Tensor)");
  m.def("cayley_basis_bwd(Tensor dy, Tensor inverse) -> Tensor");
  m.def(
      "rotate(Tensor q, Tensor k, Tensor positions, Tensor freqs, bool interleaved, bool inverse, float factor, "
      "int prefix) -> (Tensor, Tensor)");
  m.def(
      "rotate_basis(Tensor q, Tensor k, Tensor positions, Tensor freqs, Tensor basis, bool interleaved, bool inverse, "
      "float factor, int prefix) -> (Tensor, Tensor)");
  m.def(
      "rotate_basis_bwd(Tensor dyq, Tensor dyk, Tensor q, Tensor k, Tensor positions, Tensor freqs, Tensor basis, "
      "bool interleaved, float factor, int prefix, bool need_freqs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rotate_bwd(Tensor dyq, Tensor dyk, Tensor q, Tensor k, Tensor positions, Tensor freqs, bool interleaved, "
      "bool inverse, float factor, int prefix, bool need_positions, bool need_freqs) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rotate_cos_sin(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse, int prefix) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastrpe_native, CPU, m) {
  m.impl("rotate", TORCH_BOX(&fastrpe::rotary::rotate_cpu));
  m.impl("rotate_bwd", TORCH_BOX(&fastrpe::rotary::rotate_bwd_cpu));
  m.impl("rotate_cos_sin", TORCH_BOX(&fastrpe::rotary::rotate_cos_sin_cpu));
}

// The neural tangent kernel of a feed-forward block, tile by tile; fusion_kernels/ntk/reference.py has the derivation.
//
// A block turns rows x (N, d) into hidden values (N, h) and slopes: (N, h), or (N, 2h) with the gate's behind the
// others' in a gated block. Multiplied by the weights of outputs and neurons, they make the kernel of two sets of rows
//
//   K = constant + hidden1 hidden2ᵀ + sum over terms t of (weights_t x1 x2ᵀ + bias_t) ∘ slopes1_t slopes2_tᵀ
//
// where a term is a range of columns of the slopes, and weights_t and bias_t are 0 or 1.
#pragma once

#include <cstdint>
#include <vector>

#include "../activation.h"
#include "../gate.h"

namespace mlp_fusion {

// A block's input side: z = x w_inᵀ + b_in and, in a gated block, g = x w_gateᵀ + b_gate, both times `shrink`. The three
// factors are multiplied, neuron by neuron, to
//
//   plain   hidden = of_hidden phi(z)     slopes = of_in phi'(z)
//   gated   hidden = of_hidden phi(g) z   slopes = of_in phi(g) | of_gate phi'(g) z
//
// with the limits and the offset of the gate, and replaced by their signs where `signs` says so. Null: no bias, no
// shrinking, a plain block (of_gate).
template <class T>
struct Neurons {
  const T *w_in, *w_gate, *b_in, *b_gate, *shrink, *of_hidden, *of_in, *of_gate;
  int64_t d, h;
  Activation activation;
  Gate<T> gate;
  bool signs;
};

// Hidden values and slopes of n rows. Rows are taken in blocks of one size, each by one thread.
template <class T>
void block_factors(const Neurons<T>& neurons, const T* x, int64_t n, T* hidden, T* slopes);

struct Term {
  int64_t begin, columns;
  bool weights, bias;
};

// One set of rows: x (n, d), hidden (n, h) and slopes (n, width). Null hidden: K has no such product.
template <class T>
struct Rows {
  const T *x, *hidden, *slopes;
};

template <class T>
struct TangentKernel {
  Rows<T> left, right;
  int64_t d, h, width;
  std::vector<Term> terms;
  T constant;
};

// out (n1, n2), with the given distance between rows, = K. `symmetric`: left and right are the same rows; half of the
// tiles are computed and mirrored, so that out is symmetric to the bit.
template <class T>
void kernel_matrix(const TangentKernel<T>& kernel, int64_t n1, int64_t n2, bool symmetric, int64_t tile, T* out,
                   int64_t stride);

// sums = <A, A>, <A, B>, <B, B> and |A - B|² of the kernels a and b of the same rows x, without storing either. The sums
// of their rows (2, n1) and columns (2, n2) are of the same rounded values: what is left of `sums` when means are taken
// off would be the rounding of others.
template <class T>
void kernel_sums(const TangentKernel<T>& a, const TangentKernel<T>& b, int64_t n1, int64_t n2, bool symmetric,
                 int64_t tile, double* sums, double* rows, double* columns);

}  // namespace mlp_fusion

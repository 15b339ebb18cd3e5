// The compiled k-means operators of fusion_kernels, registered with PyTorch through the LibTorch stable ABI: one build
// serves every later PyTorch. They are steps of the public operators, called by fusion_kernels/kmeans/cpu_backend.py,
// which checks values and documents the whole; here only what would read out of bounds is checked.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/kmeans.h"
#include "cpu/parallel.h"
#include "cpu/points.h"
#include "cpu/products.h"
#include "cpu/simd.h"
#include "cpu/tensors.h"

namespace mlp_fusion {
namespace {

// Distance between rows of a Gram matrix: padded, and not a multiple of the page size, at which the rows of a column
// would compete for the same few lines of the cache.
int64_t gram_stride(int64_t n, int64_t element_size) {
  const int64_t stride = padded(n);
  return stride * element_size % 4096 == 0 ? stride + kPad : stride;
}

std::tuple<Tensor, Tensor, Tensor> prepare(const Tensor x, const Tensor w) {
  STD_TORCH_CHECK(x.dim() == 3, "prepare: x must be (B, n, D)");
  const int64_t batch = x.size(0), n = x.size(1), D = x.size(2), stride = padded(D);
  check(x, "x", x.scalar_type(), {batch, n, D});
  check(w, "w", ScalarType::Double, {batch, n});
  Tensor points = new_tensor({batch, n, stride}, x.scalar_type());
  Tensor offset = new_tensor({batch, D}, ScalarType::Double), scale = new_tensor({batch}, ScalarType::Double);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    prepare_points(data<T>(x), data<double>(w), batch, n, D, stride, mutable_data<T>(points),
                   mutable_data<double>(offset), mutable_data<double>(scale));
  });
  return {points, offset, scale};
}

Tensor gram(const Tensor points) {
  STD_TORCH_CHECK(points.dim() == 3, "gram: points must be (B, n, D)");
  const int64_t batch = points.size(0), n = points.size(1), D = points.size(2);
  check(points, "points", points.scalar_type(), {batch, n, D});
  return with_dtype(points, [&](auto zero) {
    using T = decltype(zero);
    const int64_t stride = gram_stride(n, sizeof(T));
    Tensor g = new_tensor({batch, n, stride}, points.scalar_type());
    gram_matrices(data<T>(points), batch, n, D, mutable_data<T>(g), stride);
    return g;
  });
}

// Call work(In*) with points that are float32 or bfloat16.
template <class Work>
void with_points(const Tensor& points, const Work& work) {
  check(points, "points", points.scalar_type(), {points.size(0), points.size(1), points.size(2)});
  if (points.scalar_type() == ScalarType::BFloat16) return work(data<uint16_t>(points));
  STD_TORCH_CHECK(points.scalar_type() == ScalarType::Float, "points: float32 or bfloat16 expected");
  work(data<float>(points));
}

std::tuple<Tensor, Tensor> moments(const Tensor points) {
  STD_TORCH_CHECK(points.dim() == 3, "moments: points must be (B, n, D)");
  const int64_t batch = points.size(0), n = points.size(1), D = points.size(2);
  Tensor found = new_tensor({batch, 2}, ScalarType::Double), squares = new_tensor({batch, n}, ScalarType::Double);
  with_points(points, [&](const auto* x) {
    block_moments(x, batch, n, D, mutable_data<double>(found), mutable_data<double>(squares));
  });
  return {found, squares};
}

void add_products_to(Tensor g, const Tensor points, const Tensor factors) {
  STD_TORCH_CHECK(points.dim() == 3 && g.dim() == 3, "add_products: points (B, n, D), g (B, n, stride)");
  const int64_t batch = points.size(0), n = points.size(1), D = points.size(2), stride = g.size(2);
  STD_TORCH_CHECK(stride >= padded(n), "add_products: g has too few columns");
  check(g, "g", ScalarType::Float, {batch, n, stride});
  check(factors, "factors", ScalarType::Double, {batch});
  with_points(points, [&](const auto* x) {
    add_products(x, data<double>(factors), batch, n, D, mutable_data<float>(g), stride);
  });
}

Tensor means(const Tensor x, const Tensor w, const Tensor labels, int64_t n_clusters) {
  STD_TORCH_CHECK(x.dim() == 3, "means: x must be (B, n, D)");
  const int64_t batch = x.size(0), n = x.size(1), D = x.size(2);
  check(x, "x", x.scalar_type(), {batch, n, D});
  check(w, "w", ScalarType::Double, {batch, n});
  check(labels, "labels", ScalarType::Long, {batch, n});
  const int64_t* label = data<int64_t>(labels);
  STD_TORCH_CHECK(std::all_of(label, label + batch * n, [&](int64_t c) { return c >= 0 && c < n_clusters; }),
                  "means: labels: outside");
  if (x.scalar_type() == ScalarType::BFloat16) {
    Tensor found = new_tensor({batch, n_clusters, D}, ScalarType::Float);
    cluster_means(data<uint16_t>(x), data<double>(w), label, batch, n, D, n_clusters, mutable_data<float>(found));
    return found;
  }
  Tensor found = new_tensor({batch, n_clusters, D}, x.scalar_type());
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    cluster_means(data<T>(x), data<double>(w), label, batch, n, D, n_clusters, mutable_data<T>(found));
  });
  return found;
}

Tensor centre(const Tensor g, const Tensor w) {
  STD_TORCH_CHECK(g.dim() == 3 && g.size(2) >= padded(g.size(1)), "centre: g must be (B, n, stride)");
  const int64_t batch = g.size(0), n = g.size(1), stride = g.size(2);
  check(g, "g", ScalarType::Float, {batch, n, stride});
  check(w, "w", ScalarType::Double, {batch, n});
  Tensor moments = new_tensor({batch, 2}, ScalarType::Double);
  centre_gram(mutable_data<float>(g), data<double>(w), batch, n, stride, mutable_data<double>(moments));
  return moments;
}

Tensor inertia(const Tensor g, const Tensor w, const Tensor labels, int64_t n_clusters) {
  STD_TORCH_CHECK(g.dim() == 3 && g.size(2) >= g.size(1), "inertia: g must be (B, n, stride)");
  const int64_t batch = g.size(0), n = g.size(1), stride = g.size(2);
  check(g, "g", ScalarType::Float, {batch, n, stride});
  check(w, "w", ScalarType::Double, {batch, n});
  check(labels, "labels", ScalarType::Long, {batch, n});
  const int64_t* label = data<int64_t>(labels);
  STD_TORCH_CHECK(std::all_of(label, label + batch * n, [&](int64_t c) { return c >= 0 && c < n_clusters; }),
                  "inertia: labels: outside");
  Tensor found = new_tensor({batch}, ScalarType::Double);
  gram_inertia(data<float>(g), data<double>(w), label, batch, n, stride, n_clusters, mutable_data<double>(found));
  return found;
}

Tensor cross(const Tensor centroids, const Tensor points) {
  STD_TORCH_CHECK(points.dim() == 3 && centroids.dim() == 3, "cross: centroids (B, K, D) and points (B, n, D)");
  const int64_t batch = points.size(0), n = points.size(1), D = points.size(2), K = centroids.size(1);
  check(points, "points", points.scalar_type(), {batch, n, D});
  check(centroids, "centroids", points.scalar_type(), {batch, K, D});
  return with_dtype(points, [&](auto zero) {
    using T = decltype(zero);
    const int64_t stride = gram_stride(n, sizeof(T));
    Tensor products = new_tensor({batch, K, stride}, points.scalar_type());
    cross_products(data<T>(centroids), data<T>(points), batch, K, n, D, mutable_data<T>(products), stride);
    return products;
  });
}

// The arguments of `cluster`, checked, and the best of n_init runs on each of its problems.
template <class T>
class Batch {
 public:
  Batch(const Tensor& g, const Tensor& w, const double* offset, const Options& options, double column_count)
      : batch_(g.size(0)), n_(g.size(1)), stride_(g.size(2)), options_(options) {
    const int64_t width = padded(n_);
    w_.assign(batch_ * width, 0.0);
    sq_.assign(batch_ * width, T{0});
    for (int64_t b = 0; b < batch_; ++b) {
      const T* matrix = data<T>(g) + b * n_ * stride_;
      std::copy_n(data<double>(w) + b * n_, n_, w_.begin() + b * width);
      for (int64_t j = 0; j < n_; ++j) sq_[b * width + j] = matrix[j * stride_ + j];
      problems_.push_back({n_, width, stride_, matrix, w_.data() + b * width, sq_.data() + b * width,
                           offset == nullptr ? 0.0 : offset[b], column_count});
    }
  }

  // All runs are independent: as many at a time as there are threads, or one whose own steps share the threads.
  std::vector<Outcome> solve(const double* levels, const int64_t* seeds, const int64_t* labels, const T* products,
                             const double* norms) const {
    const int64_t K = options_.clusters, runs = batch_ * options_.n_init;
    const int64_t draws = 1 + trials_per_step(K) * (K - 1);
    std::vector<Outcome> outcomes(runs);
    const auto run = [&](int64_t item) {
      const int64_t b = item / options_.n_init, attempt = item % options_.n_init;
      Start<T> start;
      if (levels != nullptr) start.levels = levels + attempt * draws;
      if (seeds != nullptr) start.seeds = seeds + item * K;
      if (labels != nullptr) start.labels = labels + b * n_;
      if (products != nullptr) start.products = products + b * K * stride_;
      if (norms != nullptr) start.norms = norms + b * K;
      std::unique_ptr<T[]> v(new T[K * stride_]);
      outcomes[item] = Run<T>(problems_[b], options_, v.get()).solve(start);
    };
    for_each_if(runs >= torch::stable::get_num_threads(), runs, run);
    std::vector<Outcome> best;
    for (int64_t b = 0; b < batch_; ++b) {
      const auto first = outcomes.begin() + b * options_.n_init;
      best.push_back(std::move(*std::min_element(first, first + options_.n_init, [](const auto& one, const auto& other) {
        return one.inertia < other.inertia;
      })));
    }
    return best;
  }

 private:
  int64_t batch_, n_, stride_;
  Options options_;
  std::vector<double> w_;
  std::vector<T> sq_;
  std::vector<Problem<T>> problems_;
};

using Clusters = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Clusters pack(const std::vector<Outcome>& outcomes, int64_t n, int64_t K) {
  const int64_t batch = outcomes.size();
  int64_t listed = 0, doubted = 0;
  for (const Outcome& outcome : outcomes) {
    for (const auto& list : outcome.centre) listed += list.size();
    doubted += outcome.doubts.size();
  }
  Tensor labels = new_tensor({batch, n}, ScalarType::Long), offsets = new_tensor({batch, K + 1}, ScalarType::Long);
  Tensor members = new_tensor({listed}, ScalarType::Long), n_iter = new_tensor({batch}, ScalarType::Long);
  Tensor converged = new_tensor({batch}, ScalarType::Bool), resolved = new_tensor({batch}, ScalarType::Bool);
  Tensor doubts = new_tensor({doubted, 3}, ScalarType::Long);
  int64_t* doubt = mutable_data<int64_t>(doubts);
  int64_t *offset = mutable_data<int64_t>(offsets), *member = mutable_data<int64_t>(members), end = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const Outcome& outcome = outcomes[b];
    std::copy(outcome.labels.begin(), outcome.labels.end(), mutable_data<int64_t>(labels) + b * n);
    *offset++ = end;
    for (const auto& list : outcome.centre) {
      member = std::copy(list.begin(), list.end(), member);
      *offset++ = end += list.size();
    }
    mutable_data<int64_t>(n_iter)[b] = outcome.n_iter;
    mutable_data<bool>(converged)[b] = outcome.converged;
    mutable_data<bool>(resolved)[b] = outcome.resolved;
    for (const auto& [point, cluster] : outcome.doubts) {
      for (int64_t index : {b, int64_t{point}, int64_t{cluster}}) *doubt++ = index;
    }
  }
  return {labels, offsets, members, n_iter, converged, doubts, resolved};
}

Clusters cluster(const Tensor g, const Tensor w, const std::optional<Tensor> levels, const std::optional<Tensor> seeds,
                 const std::optional<Tensor> labels, const std::optional<Tensor> products,
                 const std::optional<Tensor> norms, int64_t n_clusters, int64_t n_init, const std::string algorithm,
                 int64_t max_iter, double tol, int64_t column_count, const std::optional<Tensor> offset, double rounding) {
  STD_TORCH_CHECK(g.dim() == 3, "cluster: g must be (B, n, stride)");
  const int64_t batch = g.size(0), n = g.size(1), stride = g.size(2), K = n_clusters;
  STD_TORCH_CHECK(algorithm == "hartigan" || algorithm == "lloyd", "cluster: unknown algorithm ", algorithm);
  STD_TORCH_CHECK(stride >= padded(n) && n > K && K >= 1 && n_init >= 1, "cluster: wrong sizes");
  check(g, "g", g.scalar_type(), {batch, n, stride});
  check(w, "w", ScalarType::Double, {batch, n});
  if (levels) check(*levels, "levels", ScalarType::Double, {n_init, 1 + trials_per_step(K) * (K - 1)});
  if (seeds) check(*seeds, "seeds", ScalarType::Long, {batch, n_init, K});
  if (labels) check(*labels, "labels", ScalarType::Long, {batch, n});
  if (products) check(*products, "products", g.scalar_type(), {batch, K, stride});
  if (norms) check(*norms, "norms", ScalarType::Double, {batch, K});
  if (offset) check(*offset, "offset", ScalarType::Double, {batch});
  STD_TORCH_CHECK(levels.has_value() + seeds.has_value() + labels.has_value() + products.has_value() == 1 &&
                      products.has_value() == norms.has_value(),
                  "cluster: pass one start");
  const Options options{K, n_init, algorithm == "hartigan", max_iter, tol, rounding};
  return with_dtype(g, [&](auto zero) {
    using T = decltype(zero);
    const Batch<T> problems(g, w, data<double>(offset), options, static_cast<double>(column_count));
    return pack(problems.solve(data<double>(levels), data<int64_t>(seeds), data<int64_t>(labels), data<T>(products),
                               data<double>(norms)),
                n, K);
  });
}

std::tuple<Tensor, Tensor> finish(const Tensor x, const Tensor w, const Tensor labels, const Tensor offsets,
                                  const Tensor members, const std::optional<Tensor> fallback) {
  STD_TORCH_CHECK(x.dim() == 3 && offsets.dim() == 2 && members.dim() == 1, "finish: wrong dimensions");
  const int64_t batch = x.size(0), n = x.size(1), D = x.size(2), K = offsets.size(1) - 1;
  check(x, "x", x.scalar_type(), {batch, n, D});
  check(w, "w", ScalarType::Double, {batch, n});
  check(labels, "labels", ScalarType::Long, {batch, n});
  check(offsets, "offsets", ScalarType::Long, {batch, K + 1});
  check(members, "members", ScalarType::Long, {members.size(0)});
  if (fallback) check(*fallback, "fallback", x.scalar_type(), {batch, K, D});
  Tensor centroids = new_tensor({batch, K, D}, x.scalar_type()), inertia = new_tensor({batch}, ScalarType::Double);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    finish_clusters(data<T>(x), data<double>(w), data<int64_t>(labels), data<int64_t>(offsets), data<int64_t>(members),
                    data<T>(fallback), batch, n, D, K, mutable_data<T>(centroids), mutable_data<double>(inertia));
  });
  return {centroids, inertia};
}

Tensor nearest(const Tensor x, const Tensor centroids) {
  STD_TORCH_CHECK(x.dim() == 3 && centroids.dim() == 3, "nearest: x (B, n, D) and centroids (B, K, D)");
  const int64_t batch = x.size(0), n = x.size(1), D = x.size(2), K = centroids.size(1);
  check(x, "x", x.scalar_type(), {batch, n, D});
  check(centroids, "centroids", x.scalar_type(), {batch, K, D});
  Tensor labels = new_tensor({batch, n}, ScalarType::Long);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    nearest_centroids(data<T>(x), data<T>(centroids), batch, n, K, D, mutable_data<int64_t>(labels));
  });
  return labels;
}

Tensor decide(const Tensor x, const Tensor centroids, const Tensor labels, const Tensor doubts) {
  STD_TORCH_CHECK(x.dim() == 3 && centroids.dim() == 3 && doubts.dim() == 2, "decide: wrong dimensions");
  const int64_t batch = x.size(0), n = x.size(1), D = x.size(2), K = centroids.size(1), count = doubts.size(0);
  check(x, "x", x.scalar_type(), {batch, n, D});
  check(centroids, "centroids", x.scalar_type(), {batch, K, D});
  check(labels, "labels", ScalarType::Long, {batch, n});
  check(doubts, "doubts", ScalarType::Long, {count, 3});
  const int64_t* doubt = data<int64_t>(doubts);
  for (int64_t i = 0; i < 3 * count; ++i) {
    STD_TORCH_CHECK(doubt[i] >= 0 && doubt[i] < (i % 3 == 0 ? batch : i % 3 == 1 ? n : K), "decide: doubts: outside");
  }
  Tensor decided = new_tensor({batch, n}, ScalarType::Long);
  std::copy_n(data<int64_t>(labels), batch * n, mutable_data<int64_t>(decided));
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    decide_doubts(data<T>(x), data<T>(centroids), n, K, D, doubt, count, mutable_data<int64_t>(decided));
  });
  return decided;
}

}  // namespace
}  // namespace mlp_fusion

STABLE_TORCH_LIBRARY(fusion_kernels_native, m) {
  m.def("prepare(Tensor x, Tensor w) -> (Tensor, Tensor, Tensor)");
  m.def("gram(Tensor points) -> Tensor");
  m.def("moments(Tensor points) -> (Tensor, Tensor)");
  m.def("add_products(Tensor(a!) g, Tensor points, Tensor factors) -> ()");
  m.def("centre(Tensor(a!) g, Tensor w) -> Tensor");
  m.def("inertia(Tensor g, Tensor w, Tensor labels, int n_clusters) -> Tensor");
  m.def("means(Tensor x, Tensor w, Tensor labels, int n_clusters) -> Tensor");
  m.def("cross(Tensor centroids, Tensor points) -> Tensor");
  m.def(
      "cluster(Tensor g, Tensor w, Tensor? levels, Tensor? seeds, Tensor? labels, Tensor? products, Tensor? norms, "
      "int n_clusters, int n_init, str algorithm, int max_iter, float tol, int column_count, Tensor? offset=None, "
      "float rounding=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "finish(Tensor x, Tensor w, Tensor labels, Tensor offsets, Tensor members, Tensor? fallback) "
      "-> (Tensor, Tensor)");
  m.def("nearest(Tensor x, Tensor centroids) -> Tensor");
  m.def("decide(Tensor x, Tensor centroids, Tensor labels, Tensor doubts) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusion_kernels_native, CPU, m) {
  m.impl("prepare", TORCH_BOX(&mlp_fusion::prepare));
  m.impl("gram", TORCH_BOX(&mlp_fusion::gram));
  m.impl("moments", TORCH_BOX(&mlp_fusion::moments));
  m.impl("add_products", TORCH_BOX(&mlp_fusion::add_products_to));
  m.impl("centre", TORCH_BOX(&mlp_fusion::centre));
  m.impl("inertia", TORCH_BOX(&mlp_fusion::inertia));
  m.impl("means", TORCH_BOX(&mlp_fusion::means));
  m.impl("cross", TORCH_BOX(&mlp_fusion::cross));
  m.impl("cluster", TORCH_BOX(&mlp_fusion::cluster));
  m.impl("finish", TORCH_BOX(&mlp_fusion::finish));
  m.impl("nearest", TORCH_BOX(&mlp_fusion::nearest));
  m.impl("decide", TORCH_BOX(&mlp_fusion::decide));
}

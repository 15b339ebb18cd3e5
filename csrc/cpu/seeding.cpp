// Greedy k-means++ from rows of the Gram matrix: |x_j - x_s|^2 = G_ss + G_jj - 2 G_sj.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "kmeans.h"

namespace mlp_fusion {
namespace {

// Masses of the points with partial sums over blocks of kBlock of them.
class Masses {
 public:
  explicit Masses(int64_t width) : block((width + kBlock - 1) / kBlock), width_(width) {}

  double total() const {
    double sum = 0;
    for (double mass : block) sum += mass;
    return sum;
  }

  // The first point whose cumulative mass exceeds `level`: one without mass is never drawn. mass(j) is that of point j.
  template <class Mass>
  Index find(double level, const Mass& mass) const {
    double below = 0;
    size_t b = 0;
    while (b + 1 < block.size() && below + block[b] <= level) below += block[b++];
    const int64_t end = std::min(width_, static_cast<int64_t>(b + 1) * kBlock);
    for (int64_t j = b * kBlock; j < end; ++j) {
      below += mass(j);
      if (below > level) return static_cast<Index>(j);
    }
    // Rounding put the level beyond the block's own sum: its last point of positive mass, or of an earlier block.
    int64_t last = end - 1;
    while (last > 0 && !(mass(last) > 0)) --last;
    return static_cast<Index>(last);
  }

  std::vector<double> block;

 private:
  int64_t width_;
};

}  // namespace

int64_t trials_per_step(int64_t clusters) {
  return 2 + static_cast<int64_t>(std::log(static_cast<double>(clusters)));
}

template <class T>
std::vector<Index> seed_plus_plus(const Problem<T>& problem, int64_t clusters, const double* levels) {
  const int64_t trials = trials_per_step(clusters);
  std::vector<double> closest(problem.width, std::numeric_limits<double>::max());
  const Seeding<T> state{closest.data(), problem.w, problem.sq, kSlack<T>, problem.width};
  Masses masses(problem.width);
  const auto weight = [&](int64_t j) { return problem.w[j]; };
  const auto mass = [&](int64_t j) { return problem.w[j] * closest[j]; };

  for (int64_t j = 0; j < problem.n; ++j) masses.block[j / kBlock] += problem.w[j];
  std::vector<Index> seeds{masses.find(*levels++ * masses.total(), weight)};
  take_seed(state, problem.row(seeds[0]), problem.sq[seeds[0]], masses.block.data());

  std::vector<Index> candidates(trials);
  while (static_cast<int64_t>(seeds.size()) < clusters) {
    const double total = masses.total();
    if (!(total > 0)) {
      seeds.resize(clusters, seeds[0]);
      break;
    }
    for (Index& candidate : candidates) candidate = masses.find(*levels++ * total, mass);
    Index best = candidates[0];
    double least = std::numeric_limits<double>::infinity();
    for (int64_t first = 0; first < trials; first += kTrials) {
      const int64_t count = std::min(kTrials, trials - first);
      const T* rows[kTrials];
      double norms[kTrials], potential[kTrials];
      for (int64_t t = 0; t < count; ++t) {
        rows[t] = problem.row(candidates[first + t]);
        norms[t] = problem.sq[candidates[first + t]];
      }
      potentials(state, rows, norms, count, potential);
      for (int64_t t = 0; t < count; ++t) {
        if (potential[t] < least) {
          least = potential[t];
          best = candidates[first + t];
        }
      }
    }
    seeds.push_back(best);
    take_seed(state, problem.row(best), problem.sq[best], masses.block.data());
  }
  return seeds;
}

template std::vector<Index> seed_plus_plus(const Problem<float>&, int64_t, const double*);
template std::vector<Index> seed_plus_plus(const Problem<double>&, int64_t, const double*);

}  // namespace mlp_fusion

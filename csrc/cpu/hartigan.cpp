// Hartigan's method on the matrix V: rounds of single-point moves between disjoint pairs of clusters.
#include <algorithm>
#include <limits>

#include "kernels.h"
#include "kmeans.h"
#include "parallel.h"

namespace mlp_fusion {
namespace {

constexpr Index kNoTarget = std::numeric_limits<Index>::max();
// Points of a tile whose cheapest cluster has changed, above which one pass over the tile finds all the new ones.
constexpr int64_t kScanned = 16;

}  // namespace

template <class T>
void Run<T>::hartigan() {
  uniform_ = std::all_of(p_.w, p_.w + p_.n, [&](double w) { return w == p_.w[0]; });
  cost_.resize(p_.width);
  target_.resize(p_.width);
  second_.resize(p_.width);
  gain_.resize(p_.width);
  weights_.assign(K_, 0.0);
  factor_.resize(K_);
  every_.resize(K_);
  gather_members();
  std::vector<char> empty(K_, 1);
  for (int64_t j = 0; j < p_.n; ++j) empty[labels_[j]] = 0;
  for (int64_t c = 0; c < K_; ++c) {
    every_[c] = static_cast<Index>(c);
    if (!empty[c]) weigh(c);
  }

  means_ = true;
  converged_ = false;
  for (int64_t round = 0; round < options_.max_iter && !converged_; ++round) {
    ++n_iter_;
    std::sort(changed_.begin(), changed_.end());
    update_norms();
    const int64_t rows = round == 0 ? K_ : static_cast<int64_t>(changed_.size());
    for_each_if(rows * p_.width >= kWorthThreads, (p_.width + kTile - 1) / kTile, [&](int64_t tile) {
      const int64_t begin = tile * kTile, width = std::min(kTile, p_.width - begin);
      update_rows(begin, width);
      find_entries(begin, width, round == 0);
      for (int64_t j = begin; j < std::min(begin + width, p_.n); ++j) gain_[j] = gain(j);
    });
    clear_marks();
    const std::vector<Index> moves = disjoint_moves();
    for (Index j : moves) move(j);
    converged_ = moves.empty();
  }
  update_norms();
}

// The cheapest other cluster of every point of a tile: of all clusters, or, once that is known, of the changed ones and
// what was cheapest before. Points whose cheapest cluster has changed and may have become another start afresh.
template <class T>
void Run<T>::find_entries(int64_t begin, int64_t width, bool all) {
  Index lost[kTile];
  int64_t count = 0;
  if (!all) {
    for (int64_t j = begin; j < std::min(begin + width, p_.n); ++j) {
      if (!keeps_target(j)) lost[count++] = static_cast<Index>(j);
    }
    all = count > kScanned;
  }
  if (all) {
    std::fill_n(cost_.begin() + begin, width, std::numeric_limits<T>::infinity());
    std::fill_n(second_.begin() + begin, width, std::numeric_limits<T>::infinity());
    std::fill_n(target_.begin() + begin, width, kNoTarget);
  }
  const std::vector<Index>& clusters = all ? every_ : changed_;
  cheapest_entry(Entry<T>{v_ + begin, p_.stride, clusters.data(), static_cast<int64_t>(clusters.size()), width,
                          p_.sq + begin, labels_.data() + begin, uniform_ ? factor_.data() : nullptr, weights_.data(),
                          p_.w + begin, cost_.data() + begin, target_.data() + begin, second_.data() + begin});
  if (!all) {
    for (int64_t i = 0; i < count; ++i) find_entry(lost[i]);
  }
}

template <class T>
T Run<T>::entry_cost(int64_t c, int64_t j) const {
  const T d = v_[c * p_.stride + j] + p_.sq[j];
  return uniform_ ? d * factor_[c] : static_cast<T>(d * (weights_[c] / (weights_[c] + p_.w[j])));
}

// Whether the cheapest of the clusters that have not changed, and the point's target, is known: then it is the target,
// with its cost brought up to date.
template <class T>
bool Run<T>::keeps_target(int64_t j) {
  const Index c = target_[j];
  if (c == kNoTarget || c == labels_[j]) return false;
  if (!is_changed_[c]) return true;
  cost_[j] = entry_cost(c, j);
  return cost_[j] < second_[j];
}

// As find_entries, for one point among all clusters.
template <class T>
void Run<T>::find_entry(int64_t j) {
  T least = std::numeric_limits<T>::infinity(), second = least;
  Index target = kNoTarget;
  for (int64_t c = 0; c < K_; ++c) {
    if (c == labels_[j]) continue;
    const T cost = entry_cost(c, j);
    if (cost < least) {
      second = least;
      least = cost;
      target = static_cast<Index>(c);
    } else if (cost < second) {
      second = cost;
    }
  }
  cost_[j] = least;
  second_[j] = second;
  target_[j] = target;
}

// How much the move of point j to its cheapest other cluster lowers the inertia: (2), or 0 if not beyond rounding.
template <class T>
double Run<T>::gain(int64_t j) const {
  const Index from = labels_[j], to = target_[j];
  const double w = p_.w[j], rest = weights_[from] - w;
  // Nothing is left beside a single point, nor, in floating point, beside one that outweighs the others completely.
  if (to == kNoTarget || !(rest > 0)) return 0;
  const double leave = weights_[from] / rest;
  const double enter = weights_[to] / (weights_[to] + w) * distance(to, j);
  const double decrease = w * (leave * distance(from, j) - enter);
  return decrease > w * (leave + 1) * kSlack<T> * p_.sq[j] ? decrease : 0;
}

// The moves of a round: by falling gain, then rising index, those whose two clusters no earlier one touches.
template <class T>
std::vector<Index> Run<T>::disjoint_moves() const {
  std::vector<Index> movable, moves;
  for (int64_t j = 0; j < p_.n; ++j) {
    if (gain_[j] > 0) movable.push_back(static_cast<Index>(j));
  }
  std::stable_sort(movable.begin(), movable.end(), [&](Index a, Index b) { return gain_[a] > gain_[b]; });
  std::vector<char> taken(K_, 0);
  for (Index j : movable) {
    char &from = taken[labels_[j]], &to = taken[target_[j]];
    if (from || to) continue;
    from = to = 1;
    moves.push_back(j);
  }
  return moves;
}

template <class T>
void Run<T>::move(Index j) {
  const Index from = labels_[j], to = target_[j];
  std::vector<Index>&left = centre_[from], &entered = centre_[to];
  if (weights_[to] == 0) entered.clear();  // an empty cluster lists the members that it had last
  left.erase(std::lower_bound(left.begin(), left.end(), j));
  entered.insert(std::lower_bound(entered.begin(), entered.end(), j), j);
  labels_[j] = to;
  for (Index c : {from, to}) {
    weigh(c);
    mark(c);
  }
}

template <class T>
void Run<T>::weigh(int64_t c) {
  double weight = 0;
  for (Index l : centre_[c]) weight += p_.w[l];
  weights_[c] = weight;
  factor_[c] = static_cast<T>(weight / (weight + p_.w[0]));
}

template class Run<float>;
template class Run<double>;

}  // namespace mlp_fusion

// One run of k-means: the matrix V, the members of the clusters, and Lloyd's iteration.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <type_traits>

#include "kernels.h"
#include "kmeans.h"
#include "parallel.h"

namespace mlp_fusion {
namespace {

// Points of a tile that leave their clusters, above which one pass over the tile finds all their new clusters.
constexpr int64_t kScanned = 32;

}  // namespace

// The row of S of a large cluster, and the points that it sums.
template <class T>
struct Run<T>::Sum {
  std::vector<Index> members;
  std::vector<double> row;
};

template <class T>
Run<T>::Run(const Problem<T>& problem, const Options& options, T* v)
    : p_(problem),
      options_(options),
      K_(options.clusters),
      v_(v),
      norms_(K_, 0.0),
      centre_(K_),
      sums_(K_),
      is_changed_(K_, 0) {}

template <class T>
Run<T>::~Run() = default;

template <class T>
Outcome Run<T>::solve(const Start<T>& start) {
  start_from(start);
  lloyd();
  if (options_.hartigan) hartigan();
  Outcome outcome;
  outcome.inertia = inertia();
  find_doubts(outcome);
  labels_.resize(p_.n);
  outcome.labels = std::move(labels_);
  outcome.centre = std::move(centre_);
  outcome.n_iter = n_iter_;
  outcome.converged = converged_;
  return outcome;
}

template <class T>
void Run<T>::start_from(const Start<T>& start) {
  if (start.products != nullptr) {
    constexpr double far = std::numeric_limits<T>::max() / 4;
    for (int64_t c = 0; c < K_; ++c) {
      norms_[c] = start.norms[c];
      const T* products = start.products + c * p_.stride;
      T* row = v_ + c * p_.stride;
      for (int64_t j = 0; j < p_.width; ++j) {
        row[j] = static_cast<T>(std::min(norms_[c] - 2.0 * static_cast<double>(products[j]), far));
      }
    }
    return;
  }
  if (start.labels != nullptr) {
    // A cluster without members is at the origin, the mean of all points: its norm and row of V are 0.
    labels_.assign(p_.width, kNone);
    std::copy(start.labels, start.labels + p_.n, labels_.begin());
    std::fill(v_, v_ + K_ * p_.stride, T{0});
    gather_members();
    update_norms();
    for_each_tile([&](int64_t begin, int64_t width) { update_rows(begin, width); });
    clear_marks();
    relocate(labels_);
    gather_members();
    return;
  }
  std::vector<Index> seeds;
  if (start.seeds != nullptr) {
    seeds.assign(start.seeds, start.seeds + K_);
  } else {
    seeds = seed_plus_plus(p_, K_, start.levels);
  }
  for (int64_t c = 0; c < K_; ++c) {
    centre_[c].assign(1, seeds[c]);
    mark(c);
  }
}

// Bring the lists of members, and the marks of those that change, up to date with the labels. A cluster that has lost
// all its members keeps its list: its centroid stays where it was.
template <class T>
void Run<T>::gather_members() {
  std::vector<Index> begin(K_ + 1, 0), order(p_.n);
  for (int64_t j = 0; j < p_.n; ++j) ++begin[labels_[j] + 1];
  for (int64_t c = 0; c < K_; ++c) begin[c + 1] += begin[c];
  std::vector<Index> next(begin.begin(), begin.end() - 1);
  for (int64_t j = 0; j < p_.n; ++j) order[next[labels_[j]]++] = static_cast<Index>(j);
  for (int64_t c = 0; c < K_; ++c) {
    const auto first = order.begin() + begin[c], last = order.begin() + begin[c + 1];
    if (first == last || std::equal(first, last, centre_[c].begin(), centre_[c].end())) continue;
    centre_[c].assign(first, last);
    mark(c);
  }
}

template <class T>
double Run<T>::norm_of(const std::vector<Index>& members) const {
  if (members.size() == 1) return p_.sq[members[0]];
  double total = 0, weight = 0;
  for (size_t i = 0; i < members.size(); ++i) {
    const T* row = p_.row(members[i]);
    double products = 0;
    for (size_t l = 0; l < i; ++l) products += p_.w[members[l]] * row[members[l]];
    const double w = p_.w[members[i]];
    total += w * (w * row[members[i]] + 2 * products);
    weight += w;
  }
  return total / (weight * weight);
}

// What brings the row of S of a cluster up to date: rows of G to add, with negative weights for those to subtract.
template <class T>
struct Run<T>::Edits {
  int64_t cluster = 0;
  bool afresh = false;
  std::vector<const T*> rows;
  std::vector<double> w;
};

template <class T>
typename Run<T>::Edits Run<T>::edits_of(int64_t c) {
  const std::vector<Index>& members = centre_[c];
  std::vector<Index> joined, left;
  if (sums_[c] != nullptr) {
    const std::vector<Index>& old = sums_[c]->members;
    std::set_difference(members.begin(), members.end(), old.begin(), old.end(), std::back_inserter(joined));
    std::set_difference(old.begin(), old.end(), members.begin(), members.end(), std::back_inserter(left));
  }
  Edits edits;
  edits.cluster = c;
  edits.afresh = sums_[c] == nullptr || 2 * (joined.size() + left.size()) > members.size();
  const auto add = [&](Index l, double sign) {
    edits.rows.push_back(p_.row(l));
    edits.w.push_back(sign * p_.w[l]);
  };
  if (edits.afresh) {
    for (Index l : members) add(l, 1);
  } else {
    for (Index l : joined) add(l, 1);
    for (Index l : left) add(l, -1);
  }
  if (sums_[c] == nullptr) sums_[c].reset(new Sum{{}, std::vector<double>(p_.width)});
  sums_[c]->members = members;
  return edits;
}

// The norms of the changed clusters, and the rows of S of the large ones among them.
template <class T>
void Run<T>::update_norms() {
  std::vector<Edits> large;
  int64_t work = 0, entries = 0;
  for (Index c : changed_) {
    const int64_t count = centre_[c].size();
    if (count >= kLarge) {
      large.push_back(edits_of(c));
      entries += large.back().rows.size() * p_.width;
    } else {
      sums_[c].reset();
      work += count * count;
    }
  }
  const int64_t tiles = (p_.width + kTile - 1) / kTile;
  for_each_if(entries >= kWorthThreads, entries == 0 ? 0 : tiles, [&](int64_t tile) {
    const int64_t begin = tile * kTile, width = std::min(kTile, p_.width - begin);
    for (const Edits& edits : large) {
      std::vector<const T*> rows(edits.rows);
      for (const T*& row : rows) row += begin;
      add_rows(rows.data(), edits.w.data(), rows.size(), width, edits.afresh, sums_[edits.cluster]->row.data() + begin);
    }
  });
  for_each_if(work >= kWorthThreads, changed_.size(), [&](int64_t i) {
    const Index c = changed_[i];
    if (sums_[c] == nullptr) {
      norms_[c] = norm_of(centre_[c]);
      return;
    }
    double total = 0, weight = 0;
    for (Index l : centre_[c]) {
      total += p_.w[l] * sums_[c]->row[l];
      weight += p_.w[l];
    }
    norms_[c] = total / (weight * weight);
  });
}

// The rows of V of the changed clusters, for one tile of columns.
template <class T>
void Run<T>::update_rows(int64_t begin, int64_t width) {
  double scratch[kTile];
  std::vector<const T*> rows;
  std::vector<double> w;
  for (Index c : changed_) {
    rows.clear();
    w.clear();
    double weight = 0;
    for (Index l : centre_[c]) {
      rows.push_back(p_.row(l) + begin);
      w.push_back(p_.w[l]);
      weight += p_.w[l];
    }
    const double* sum = scratch;
    if (sums_[c] != nullptr) {
      sum = sums_[c]->row.data() + begin;
    } else {
      add_rows(rows.data(), w.data(), rows.size(), width, true, scratch);
    }
    scale_row(sum, width, -2 / weight, norms_[c], v_ + c * p_.stride + begin);
  }
}

template <class T>
template <class Work>
void Run<T>::for_each_tile(const Work& work) const {
  for_each_if(p_.width * K_ >= kWorthThreads, (p_.width + kTile - 1) / kTile, [&](int64_t tile) {
    work(tile * kTile, std::min(kTile, p_.width - tile * kTile));
  });
}

// Labels of the nearest centroids; ties keep the current label, else take the lowest id.
template <class T>
std::vector<Index> Run<T>::assign() {
  std::vector<Index> assigned(p_.width, 0);
  update_norms();
  for_each_tile([&](int64_t begin, int64_t width) {
    update_rows(begin, width);
    assign_tile(begin, width, labels_.empty() ? nullptr : labels_.data() + begin, assigned.data() + begin);
  });
  clear_marks();
  std::fill(assigned.begin() + p_.n, assigned.end(), kNone);
  return assigned;
}

template <class T>
void Run<T>::assign_tile(int64_t begin, int64_t width, const Index* current, Index* assigned) const {
  T bound[kTile];
  Index leaving[kTile];
  const T* v = v_ + begin;
  const T* sq = p_.sq + begin;
  column_minimum(v, p_.stride, K_, width, bound);
  for (int64_t j = 0; j < width; ++j) bound[j] += static_cast<T>(kSlack<T>) * sq[j];
  if (current == nullptr) return first_within(v, p_.stride, K_, width, bound, assigned);

  int64_t count = 0;
  for (int64_t j = 0; j < std::min(width, p_.n - begin); ++j) {
    assigned[j] = current[j];
    const T distance = v[current[j] * p_.stride + j];
    if (!(distance <= bound[j] + static_cast<T>(kSlack<T>) * sq[j])) leaving[count++] = static_cast<Index>(j);
  }
  if (count > kScanned) {
    Index nearest[kTile] = {};
    first_within(v, p_.stride, K_, width, bound, nearest);
    for (int64_t i = 0; i < count; ++i) assigned[leaving[i]] = nearest[leaving[i]];
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const Index j = leaving[i];
    Index c = 0;
    while (c + 1 < K_ && !(v[c * p_.stride + j] <= bound[j])) ++c;
    assigned[j] = c;
  }
}

// Give every empty cluster, in order, the point that costs most where it is, from a cluster with other members; nothing
// moves once all points lie on their centroids.
template <class T>
void Run<T>::relocate(std::vector<Index>& labels) const {
  std::vector<Index> members(K_, 0);
  for (int64_t j = 0; j < p_.n; ++j) ++members[labels[j]];
  if (std::find(members.begin(), members.end(), 0) == members.end()) return;
  std::vector<double> cost(p_.n);
  for (int64_t j = 0; j < p_.n; ++j) {
    const double d = distance(labels[j], j);
    cost[j] = d > kSlack<T> * p_.sq[j] ? p_.w[j] * d : 0.0;
  }
  for (int64_t c = 0; c < K_; ++c) {
    if (members[c] != 0) continue;
    int64_t point = -1;
    for (int64_t j = 0; j < p_.n; ++j) {
      if (members[labels[j]] > 1 && cost[j] > (point < 0 ? 0.0 : cost[point])) point = j;
    }
    if (point < 0) return;
    --members[labels[point]];
    ++members[c];
    labels[point] = static_cast<Index>(c);
    cost[point] = 0;
  }
}

// Squared distance that the changed centroids have moved, while V still has their old rows: the mean of an old row over
// the new members is the old centroid's norm less twice its product with the new centroid.
template <class T>
double Run<T>::squared_shift() const {
  double shift = 0;
  for (Index c : changed_) {
    double total = 0, weight = 0;
    for (Index l : centre_[c]) {
      total += p_.w[l] * v_[c * p_.stride + l];
      weight += p_.w[l];
    }
    shift += norms_[c] + total / weight;
  }
  return shift;
}

template <class T>
void Run<T>::lloyd() {
  double moment = 0, weight = 0;
  for (int64_t j = 0; j < p_.n; ++j) {
    moment += p_.w[j] * p_.sq[j];
    weight += p_.w[j];
  }
  const double smallest_shift = options_.tol * moment / (weight * p_.column_count);
  while (n_iter_ < options_.max_iter && !converged_) {
    ++n_iter_;
    std::vector<Index> assigned = assign();
    relocate(assigned);
    if (assigned == labels_) {
      converged_ = true;
      return;
    }
    labels_ = std::move(assigned);
    gather_members();
    if (options_.tol > 0) {
      update_norms();
      converged_ = squared_shift() <= smallest_shift;
    }
  }
  // The labels are those of the previous centroids; the caller gets the ones of these.
  std::vector<Index> final = assign();
  converged_ = converged_ || final == labels_;
  labels_ = std::move(final);
}

template <class T>
double Run<T>::inertia() const {
  double total = 0;
  if (means_) {
    for (int64_t j = 0; j < p_.n; ++j) total += p_.w[j] * p_.sq[j];
    for (int64_t c = 0; c < K_; ++c) total -= weights_[c] * norms_[c];
  } else {
    for (int64_t j = 0; j < p_.n; ++j) total += p_.w[j] * distance(labels_[j], j);
  }
  return total;
}

// How far V may be off for the points of every cluster: the error of its centroid.
template <class T>
std::vector<T> Run<T>::blurs() const {
  std::vector<T> blur(K_);
  for (int64_t c = 0; c < K_; ++c) {
    double moment = 0, weight = 0;
    for (Index l : centre_[c]) {
      moment += p_.w[l] * p_.sq[l];
      weight += p_.w[l];
    }
    blur[c] = static_cast<T>(kBlur<T> * std::max(norms_[c], weight > 0 ? moment / weight : 0.0));
  }
  return blur;
}

// Which points may have another nearest centroid than their own once centroids are rounded, in one tile of columns;
// returns how many.
template <class T>
int64_t Run<T>::doubt_tile(int64_t begin, int64_t width, const std::vector<T>& blur, double moved, Doubts& doubts) {
  update_rows(begin, width);  // what the last moves of Hartigan's method have changed
  const int64_t end = std::min(begin + width, p_.n);
  const T* v = v_ + begin;
  T bound[kTile];
  Index count[kTile] = {};
  std::fill_n(bound, width, -std::numeric_limits<T>::infinity());
  for (int64_t j = begin; j < end; ++j) {
    const Index own = labels_[j];
    const double error = blur[own] + kBlur<T> * p_.sq[j], d = std::max(0.0, distance(own, j)) + error;
    const double window = error + kBlur<T> * p_.sq[j] + moved * (4 * std::sqrt(d) + 2 * moved);
    bound[j - begin] = static_cast<T>(v_[own * p_.stride + j] + window);
  }
  count_within(v, p_.stride, K_, width, blur.data(), bound, count);
  int64_t points = 0;
  for (int64_t j = begin; j < end; ++j) {
    if (count[j - begin] < 2) continue;
    ++points;
    for (int64_t c = 0; c < K_; ++c) {
      if (v[c * p_.stride + j - begin] - blur[c] > bound[j - begin]) continue;
      doubts.emplace_back(static_cast<Index>(j), static_cast<Index>(c));
    }
  }
  return points;
}

template <class T>
void Run<T>::find_doubts(Outcome& outcome) {
  double moment = 0, longest = 0;
  for (int64_t j = 0; j < p_.n; ++j) {
    moment += p_.w[j] * p_.sq[j];
    longest = std::max(longest, std::sqrt(static_cast<double>(p_.sq[j])));
  }
  const std::vector<T> blur = blurs();
  const double moved = options_.rounding * (p_.offset + longest);  // no mean is longer than the longest point
  const int64_t tiles = (p_.width + kTile - 1) / kTile;
  std::vector<Doubts> doubts(tiles);
  std::vector<int64_t> points(tiles, 0);
  for_each_tile([&](int64_t begin, int64_t width) {
    points[begin / kTile] = doubt_tile(begin, width, blur, moved, doubts[begin / kTile]);
  });
  clear_marks();
  int64_t doubtful = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    doubtful += points[tile];
    outcome.doubts.insert(outcome.doubts.end(), doubts[tile].begin(), doubts[tile].end());
  }
  if (std::is_same_v<T, double>) return;
  std::vector<char> empty(K_, 1);
  for (int64_t j = 0; j < p_.n; ++j) empty[labels_[j]] = 0;
  const bool refilled = options_.max_iter == 0 || std::find(empty.begin(), empty.end(), 1) == empty.end();
  outcome.resolved = refilled && outcome.inertia > kResolved * moment && doubtful <= kDoubtful * p_.n;
  if (!outcome.resolved) outcome.doubts.clear();
}

template <class T>
void Run<T>::mark(int64_t c) {
  if (is_changed_[c]) return;
  is_changed_[c] = 1;
  changed_.push_back(static_cast<Index>(c));
}

template <class T>
void Run<T>::clear_marks() {
  for (Index c : changed_) is_changed_[c] = 0;
  changed_.clear();
}

template class Run<float>;
template class Run<double>;

}  // namespace mlp_fusion

// Weighted k-means on the Gram matrix of the points, after which no step depends on the number of their columns.
//
// With G_ij = x_i . x_j, weights w, W_c = sum of w over the members of cluster c, and S_cj = sum_{l in c} w_l G_lj, the
// mean m_c has |m_c|^2 = q_c and
//
//   |x_j - m_c|^2 = G_jj + V_cj,   V_cj = q_c - 2 S_cj / W_c,   q_c = sum_{l in c} w_l S_cl / W_c^2.        (1)
//
// V (K, n) is the one large matrix besides G. A row of it is computed from the members' rows of G, and only when the
// members change; the nearest centroid of point j is the smallest entry of its column. A seed is a cluster with one
// member. Moving j from a to b lowers the inertia by (Hartigan 1975)
//
//   w_j (W_a / (W_a - w_j) |x_j - m_a|^2 - W_b / (W_b + w_j) |x_j - m_b|^2).                                (2)
//
// What is computed is specified by fusion_kernels/kmeans/reference.py; distances closer than `slack` G_jj are ties,
// which covers the rounding of G and V. Sums are taken in double and in an order that the data alone decides, tiles of
// columns are independent, and so the bits do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace mlp_fusion {

using Index = int32_t;

// How far two squared distances of a point may differ and still be a tie, relative to its squared norm.
template <class T>
constexpr double kSlack = 0;
template <>
inline constexpr double kSlack<float> = 8 * 0x1p-23;
template <>
inline constexpr double kSlack<double> = 16 * 0x1p-52;

// By how much a computed squared distance of a point and a centroid can miss, at most, relative to the squared norms of
// the point and of what the centroid is the mean of: what products and sums of tens of thousands of terms leave, twice.
template <class T>
constexpr double kBlur = 0;
template <>
inline constexpr double kBlur<float> = 24 * 0x1p-23;
template <>
inline constexpr double kBlur<double> = 24 * 0x1p-52;

// Of what the points have about their mean, the share that a partition in float32 must leave: with less, or with as many
// near-ties as this share of the points, rounding has decided it, and it is to be found in double.
constexpr double kResolved = 0x1p-13;
constexpr double kDoubtful = 0.25;

// Squared distances that agree to this are equal, and so are those below that many squared norms of their point: what
// sums in double, and means that are rounded to double, leave.
constexpr double kTie = 0x1p-48;
constexpr double kNothing = 0x1p-98;

// Entries of G or V below which a step is done by one thread: waking others takes longer.
constexpr int64_t kWorthThreads = 1 << 16;

struct Options {
  int64_t clusters;
  int64_t n_init;
  bool hartigan;
  int64_t max_iter;
  double tol;
  double rounding;  // of the centroids, relative to their norms, once they are returned
};

// One problem: n points of positive weight, n > clusters.
template <class T>
struct Problem {
  int64_t n;
  int64_t width;        // n padded to kPad: the columns that loops run over
  int64_t stride;       // between rows of g
  const T* g;           // (n, stride), zeros beyond column n
  const double* w;      // (width), zeros beyond n
  const T* sq;          // (width), the diagonal of g, zeros beyond n
  double offset;        // norm of what was subtracted from the points, in their units
  double column_count;  // D, for the mean variance of a column that `tol` refers to

  const T* row(int64_t i) const { return g + i * stride; }
};

// Where a run starts: exactly one of the pointers is set.
template <class T>
struct Start {
  const double* levels = nullptr;   // k-means++: uniform draws, 1 + trials (K - 1) of them
  const int64_t* seeds = nullptr;   // (K) points
  const int64_t* labels = nullptr;  // (n) in [0, K)
  const T* products = nullptr;      // (K, stride): products of given centroids with the points
  const double* norms = nullptr;    // (K): squared norms of the given centroids, with `products`
};

// (point, cluster), point by point.
using Doubts = std::vector<std::pair<Index, Index>>;

// What a run finds. `centre[c]` lists, in rising order, the points whose weighted mean is centroid c: its members, for
// an empty cluster those that it had last, for a run without iterations its seed; none for a given centroid.
// `doubts` lists, point by point, (point, cluster) for all clusters that may be the nearest to it once centroids are
// rounded, where there are several; `resolved` is false if they, or the clusters, are rounding's work.
struct Outcome {
  std::vector<Index> labels;
  std::vector<std::vector<Index>> centre;
  double inertia = 0;
  int64_t n_iter = 0;
  bool converged = false;
  Doubts doubts;
  bool resolved = true;
};

// Draws by which a k-means++ step chooses, as in the reference: 2 + floor(ln K).
int64_t trials_per_step(int64_t clusters);

// Greedy k-means++ (Arthur & Vassilvitskii 2007): every step draws `trials_per_step` points with probability
// proportional to weight times squared distance to the closest seed, and keeps the one that leaves the least mass. When
// every point coincides with a seed, the first seed fills the remaining places.
template <class T>
std::vector<Index> seed_plus_plus(const Problem<T>& problem, int64_t clusters, const double* levels);

// One run on one problem: V, the lists of members and the steps that keep them up to date.
template <class T>
class Run {
 public:
  // `v` holds clusters * problem.stride elements; it need not be initialised.
  Run(const Problem<T>& problem, const Options& options, T* v);
  ~Run();

  Outcome solve(const Start<T>& start);

 private:
  static constexpr Index kNone = -1;
  // Members from which on a cluster keeps its row of S, in double: while few of them come and go, the row is corrected
  // by those. All such rows together are a 24th of n x n doubles.
  static constexpr int64_t kLarge = 24;

  void start_from(const Start<T>& start);
  void gather_members();
  double norm_of(const std::vector<Index>& members) const;
  struct Sum;
  struct Edits;
  Edits edits_of(int64_t c);
  void update_norms();
  void update_rows(int64_t begin, int64_t width);
  template <class Work>
  void for_each_tile(const Work& work) const;

  double distance(int64_t c, int64_t j) const { return double{v_[c * p_.stride + j]} + double{p_.sq[j]}; }
  std::vector<Index> assign();
  void assign_tile(int64_t begin, int64_t width, const Index* current, Index* assigned) const;
  void relocate(std::vector<Index>& labels) const;
  double squared_shift() const;
  void lloyd();

  void hartigan();
  void find_entries(int64_t begin, int64_t width, bool all);
  T entry_cost(int64_t c, int64_t j) const;
  bool keeps_target(int64_t j);
  void find_entry(int64_t j);
  double gain(int64_t j) const;
  std::vector<Index> disjoint_moves() const;
  void move(Index j);
  void weigh(int64_t c);

  void mark(int64_t c);
  void clear_marks();
  double inertia() const;
  int64_t doubt_tile(int64_t begin, int64_t width, const std::vector<T>& blur, double moved, Doubts& doubts);
  void find_doubts(Outcome& outcome);
  std::vector<T> blurs() const;

  const Problem<T>& p_;
  const Options& options_;
  const int64_t K_;
  T* v_;                                    // (K, stride): V of (1)
  std::vector<double> norms_;               // (K): q of (1)
  std::vector<std::vector<Index>> centre_;  // (K): as in Outcome
  std::vector<std::unique_ptr<Sum>> sums_;  // (K): of large clusters
  std::vector<Index> labels_;               // (width), kNone beyond n; empty before the first assignment
  std::vector<Index> changed_;              // clusters whose norm and row are not up to date
  std::vector<char> is_changed_;            // (K)
  bool means_ = false;                      // every centroid is the mean of its members
  int64_t n_iter_ = 0;
  bool converged_ = false;

  // Hartigan's method: the cheapest other cluster for every point, and what a move there gains.
  bool uniform_ = false;         // all weights are equal
  std::vector<T> cost_;          // (width)
  std::vector<Index> target_;    // (width)
  std::vector<T> second_;        // (width): no other cluster costs less than this
  std::vector<double> gain_;     // (width), 0 unless a move lowers the inertia
  std::vector<double> weights_;  // (K): W of the members
  std::vector<T> factor_;        // (K): W / (W + w) for uniform weights
  std::vector<Index> every_;     // 0 .. K - 1
};

}  // namespace mlp_fusion

// What k-means does with the points themselves: before there is a Gram matrix, and after the clusters are known.
#pragma once

#include <cstdint>

namespace mlp_fusion {

// For each of `batch` problems x (n, D) with weights w (n): offset (D), their weighted mean; scale, a power of two that
// brings all |x| below 1, so that no product over- or underflows; and out (n, stride) = (x - offset) scale with zeros
// beyond column D. Where the sum of the squares of x is not finite, scale is NaN and the rest is not set.
template <class T>
void prepare_points(const T* x, const double* w, int64_t batch, int64_t n, int64_t D, int64_t stride, T* out,
                    double* offset, double* scale);

// Centroids of lists of points, and the inertia of labels: for each problem, list c is members[offsets[c]] up to
// members[offsets[c + 1]] and gives centroids[c], the weighted mean; an empty list gives fallback[c] (zeros if null).
// inertia[b] = sum_j w_j |x_j - centroid of its label|^2, from centroids that are not rounded to T.
template <class T>
void finish_clusters(const T* x, const double* w, const int64_t* labels, const int64_t* offsets, const int64_t* members,
                     const T* fallback, int64_t batch, int64_t n, int64_t D, int64_t K, T* centroids, double* inertia);

// means (batch, K, D): of each problem x (n, D) the weighted mean of each label's points, summed in double; zeros where
// there are none of positive weight. Rows may be bfloat16, by their bits.
template <class In, class Out>
void cluster_means(const In* x, const double* w, const int64_t* labels, int64_t batch, int64_t n, int64_t D, int64_t K,
                   Out* means);

// labels[j] = the nearest of K centroids to x_j, by differences in double where products leave a doubt, ties to the
// lowest id, for each of `batch` problems; 0 where x_j or the centroids are not finite.
template <class T>
void nearest_centroids(const T* x, const T* centroids, int64_t batch, int64_t n, int64_t K, int64_t D,
                       int64_t* labels);

// Decide `count` doubts, each (problem, point, cluster), those of a point one after the other by rising id of the
// cluster: labels[point] becomes the nearest of these, ties to the label that it has, else to the lowest id.
template <class T>
void decide_doubts(const T* x, const T* centroids, int64_t n, int64_t K, int64_t D, const int64_t* doubts, int64_t count,
                   int64_t* labels);

}  // namespace mlp_fusion

// Work shared among PyTorch's threads, with results that do not depend on how many there are: every item is computed
// by one thread, items do not share sums, and which thread takes an item changes nothing but the time.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mlp_fusion {

// Call work(i) for every i in [0, items), each as soon as one of at least `least` threads is free. Inside another
// parallel region, and with one thread, the items are done in order by the caller.
template <class Work>
void for_each(int64_t items, const Work& work, int64_t least = 1) {
  std::atomic<int64_t> next{0};
  const auto drain = [&](int64_t, int64_t) {
    for (int64_t i = next++; i < items; i = next++) work(i);
  };
  const int64_t threads = std::min<int64_t>(items, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, std::max(threads, least), 1, drain);
}

// As for_each, but inside a parallel region even for a single item, so that what `work` calls runs on one thread: a
// BLAS may split a product differently among several, and then round differently.
template <class Work>
void for_each_alone(int64_t items, const Work& work) {
  for_each(items, work, 2);
}

// As for_each where that is worth waking threads.
template <class Work>
void for_each_if(bool worth, int64_t items, const Work& work) {
  if (worth) return for_each(items, work);
  for (int64_t i = 0; i < items; ++i) work(i);
}

}  // namespace mlp_fusion

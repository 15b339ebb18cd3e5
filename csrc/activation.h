// The activations by name and by number, in the order of fusion_kernels/activations.py, whose table the tests hold every
// function here against.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <string_view>

namespace mlp_fusion {

enum class Activation { gelu, gelu_tanh, quick_gelu, relu, relu2, silu };

inline constexpr std::array<std::string_view, 6> kActivations{"gelu",  "gelu_tanh", "quick_gelu",
                                                              "relu", "relu2",     "silu"};
// What quick_gelu's sigmoid takes its argument times.
inline constexpr double kQuickGelu = 1.702;

inline constexpr std::string_view name_of(Activation activation) { return kActivations[static_cast<size_t>(activation)]; }
static_assert(name_of(Activation::gelu) == "gelu" && name_of(Activation::gelu_tanh) == "gelu_tanh" &&
              name_of(Activation::quick_gelu) == "quick_gelu" && name_of(Activation::relu) == "relu" &&
              name_of(Activation::relu2) == "relu2" && name_of(Activation::silu) == "silu" &&
              static_cast<size_t>(Activation::silu) + 1 == kActivations.size());

inline std::optional<Activation> activation_named(std::string_view name) {
  for (size_t number = 0; number < kActivations.size(); ++number) {
    if (name == kActivations[number]) return static_cast<Activation>(number);
  }
  return std::nullopt;
}

}  // namespace mlp_fusion

// Activations by name, as fusion_kernels/activations.py has them.
#pragma once

#include <array>
#include <optional>
#include <string_view>
#include <utility>

namespace mlp_fusion {

enum class Activation { gelu, gelu_tanh, relu, relu2, silu };

inline std::optional<Activation> activation_named(std::string_view name) {
  constexpr std::array<std::pair<std::string_view, Activation>, 5> names{{{"gelu", Activation::gelu},
                                                                           {"gelu_tanh", Activation::gelu_tanh},
                                                                           {"relu", Activation::relu},
                                                                           {"relu2", Activation::relu2},
                                                                           {"silu", Activation::silu}}};
  for (const auto& [known, activation] : names) {
    if (name == known) return activation;
  }
  return std::nullopt;
}

}  // namespace mlp_fusion

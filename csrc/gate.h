// What a gated block does beside the activation: fusion_kernels/gates.py, whose form every function here takes.
#pragma once

#include <limits>
#include <optional>
#include <string_view>

namespace mlp_fusion {

// Limits of phi's argument, of phi and, on both sides, of the up projection; infinite where there is none. Then what is
// added to that.
template <class T>
struct Gate {
  T low = -std::numeric_limits<T>::infinity(), high = std::numeric_limits<T>::infinity();
  T highest = std::numeric_limits<T>::infinity(), limit = std::numeric_limits<T>::infinity();
  T offset = T(0);
  bool limited = false;  // which a limit beyond the numbers of a type is as well

  bool plain() const { return !limited && offset == T(0); }
};

// From what operators take; nothing for a clamp that is not known. Limits are rounded to Stored, the type of what they
// are compared with, as torch does.
template <class T, class Stored>
std::optional<Gate<T>> gate_of(std::optional<double> limit, std::string_view clamp, double up_offset) {
  const auto rounded = [](double value) { return static_cast<T>(static_cast<Stored>(static_cast<T>(value))); };
  Gate<T> gate;
  gate.offset = static_cast<T>(up_offset);
  if (limit) gate.limit = rounded(*limit);
  gate.limited = limit.has_value();
  if (clamp == "above" || clamp == "both") {
    gate.high = gate.limit;
    if (clamp == "both") gate.low = -gate.limit;
  } else if (clamp == "after") {
    gate.highest = gate.limit;
  } else if (clamp != "none") {
    return std::nullopt;
  }
  return gate;
}

}  // namespace mlp_fusion

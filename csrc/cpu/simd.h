// Vector types of the hot loops, and how those loops are compiled for several instruction sets.
//
// Vectors are GCC/Clang vector extensions of 64 bytes of double and the same number of elements of other types; the
// compiler splits them into whatever registers the target has. A function marked MLP_CLONES is compiled for AVX-512,
// for AVX2 with FMA and for the baseline of the platform, and the loader picks one for the machine that it runs on, so
// that a library built on one machine runs on every other. Loops are written once, as templates over the element type
// that are inlined into such functions.
//
// The loader asks the processor, which no environment overrides: to run the code for a lesser one, build the library with
// MLP_PINNED_BYTES defined as the bytes of its registers, 64 (AVX-512), 32 (AVX2 with FMA) or 16 (the baseline).
#pragma once

#include <cstdint>
#include <cstring>

// The loader's choice needs glibc, and the fallback is the baseline alone. x86-64-v3 is AVX2 and FMA, for which compilers
// before GCC 12 have no one name: theirs is FMA with the integers of AVX, in halves.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define MLP_AVX2 "arch=x86-64-v3"
#else
#define MLP_AVX2 "fma"
#endif
#if !defined(MLP_PINNED_BYTES)
#define MLP_CLONES __attribute__((target_clones("avx512f", MLP_AVX2, "default")))
// Function(Target, Bytes, ...) for the same three, with the bytes of their registers: for code whose vectors depend on
// them, which has to be written out once for every target.
#define MLP_EACH_TARGET(Function, ...)                                                                                 \
  Function(__attribute__((target("avx512f"))), 64, __VA_ARGS__)                                                        \
  Function(__attribute__((target(MLP_AVX2))), 32, __VA_ARGS__)                                                         \
  Function(__attribute__((target("default"))), 16, __VA_ARGS__)
#elif MLP_PINNED_BYTES == 64
#define MLP_CLONES __attribute__((target("avx512f")))
#elif MLP_PINNED_BYTES == 32
#define MLP_CLONES __attribute__((target(MLP_AVX2)))
#elif MLP_PINNED_BYTES == 16
#define MLP_CLONES
#else
#error "MLP_PINNED_BYTES must be 64, 32 or 16"
#endif
#if defined(MLP_PINNED_BYTES)
#define MLP_EACH_TARGET(Function, ...) Function(MLP_CLONES, MLP_PINNED_BYTES, __VA_ARGS__)
#endif
#else
#define MLP_CLONES
#define MLP_EACH_TARGET(Function, ...) Function(, 16, __VA_ARGS__)
#endif
#define MLP_INLINE inline __attribute__((always_inline))

namespace mlp_fusion {

// Lanes of a vector of double; rows are padded to a multiple of kPad elements, so that loops have no remainder.
constexpr int64_t kLanes = 8;
constexpr int64_t kPad = 16;

constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

typedef double Double8 __attribute__((vector_size(64)));
typedef double Double4 __attribute__((vector_size(32)));
typedef float Float4 __attribute__((vector_size(16)));
typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef uint16_t Short4 __attribute__((vector_size(8)));
typedef uint16_t Short8 __attribute__((vector_size(16)));
typedef uint32_t UInt4 __attribute__((vector_size(16)));
typedef uint32_t UInt8 __attribute__((vector_size(32)));
typedef int64_t Long8 __attribute__((vector_size(64)));

// The types of `kLanes` elements of T, and of their comparison's result.
template <class T>
struct Vector;
template <>
struct Vector<float> {
  using Type = Float8;
  using Mask = Int8;
};
template <>
struct Vector<double> {
  using Type = Double8;
  using Mask = Long8;
};

template <class V, class T>
MLP_INLINE V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class T>
MLP_INLINE void store(T* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

template <class To, class From>
MLP_INLINE To bit_cast(From v) {
  return load<To>(&v);
}

// bfloat16 numbers, of which these are the bits, or others, as float.
MLP_INLINE void widen(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof(bits));
  }
}
template <class T>
MLP_INLINE void widen(const T* from, int64_t count, T* to) {
  std::memcpy(to, from, count * sizeof(T));
}

// Element by element: GCC 12 makes one instruction of this, and five of __builtin_convertvector.
MLP_INLINE Double8 load_double(const float* from) {
  double v[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) v[i] = from[i];
  return load<Double8>(v);
}
MLP_INLINE Double8 load_double(const double* from) { return load<Double8>(from); }
// Of bfloat16, whose bits are the upper ones of a float.
MLP_INLINE Double8 load_double(const uint16_t* from) {
  const Float8 narrow = bit_cast<Float8>(__builtin_convertvector(load<Short8>(from), UInt8) << 16);
  double v[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) v[i] = narrow[i];
  return load<Double8>(v);
}
MLP_INLINE double as_double(uint16_t bits) {
  float value;
  widen(&bits, 1, &value);
  return value;
}
template <class T>
MLP_INLINE double as_double(T value) {
  return value;
}
MLP_INLINE void store_double(float* to, Double8 v) { store(to, __builtin_convertvector(v, Float8)); }
MLP_INLINE void store_double(double* to, Double8 v) { store(to, v); }

// Half of it, in a register of AVX2, for which GCC 12 takes wider vectors apart through memory.
MLP_INLINE Double4 load_double4(const float* from) { return __builtin_convertvector(load<Float4>(from), Double4); }
MLP_INLINE Double4 load_double4(const double* from) { return load<Double4>(from); }
MLP_INLINE Double4 load_double4(const uint16_t* from) {
  return __builtin_convertvector(bit_cast<Float4>(__builtin_convertvector(load<Short4>(from), UInt4) << 16), Double4);
}

MLP_INLINE double sum(Double8 v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

}  // namespace mlp_fusion

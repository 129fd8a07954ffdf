// Random numbers that are the same on every platform, unlike those of <random>'s distributions.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <iterator>

namespace heddle::testing {

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x632be59bd9b4e019u) {}

  // SplitMix64 (Steele, Lea and Flood, 2014).
  std::uint64_t bits() {
    state_ += 0x9e3779b97f4a7c15u;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }  // [0, 1)
  bool chance(double p) { return uniform() < p; }
  // [low, high], both included
  std::int64_t integer(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(high - low + 1));
  }
  // As many small as large ones.
  std::int64_t log_integer(std::int64_t low, std::int64_t high) {
    const double x = std::log(static_cast<double>(low)) +
                     uniform() * std::log((static_cast<double>(high) + 1.0) / static_cast<double>(low));
    const auto n = static_cast<std::int64_t>(std::exp(x));
    return n < low ? low : n > high ? high : n;
  }
  template <class T>
  T pick(std::initializer_list<T> from) {
    return *std::next(from.begin(), integer(0, static_cast<std::int64_t>(from.size()) - 1));
  }
  // About N(0, 1): the sum of four uniform 16-bit numbers.
  float normal() {
    const std::uint64_t b = bits();
    const auto sum = static_cast<double>((b & 0xffff) + (b >> 16 & 0xffff) + (b >> 32 & 0xffff) + (b >> 48));
    return static_cast<float>((sum - 131070.0) * (1.7320508075688772 / 65536.0));
  }

 private:
  std::uint64_t state_;
};

}  // namespace heddle::testing

// Powers of positive numbers, the same bits on every machine.
//
// The C library's functions are not vectorized and differ from one processor to the
// next. This one is exact to about 1e-11 before it is rounded to float32.

#ifndef SPARSE_ADAM_POWER_H_
#define SPARSE_ADAM_POWER_H_

#include <cstdint>
#include <cstring>
#include <limits>

#include "rule.h"

namespace sparse_adam {

// x to a fixed exponent. A negative x gives NaN; 0 and infinity their limits.
class Power {
 public:
  explicit Power(double exponent)
      : exponent_(exponent),
        at_zero_(exponent > 0 ? 0 : exponent < 0 ? kInfinity : 1),
        at_infinity_(exponent > 0 ? kInfinity : exponent < 0 ? 0 : 1) {}

  LANE float operator()(float x) const {
    const float power = static_cast<float>(PowerOfTwo(exponent_ * Log2(x)));
    const float positive = x < kInfinity ? power : at_infinity_;
    const float limit = x == 0 ? at_zero_ : kNaN;
    return x > 0 ? positive : limit;
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  static constexpr uint64_t kOne = 0x3ff0000000000000;
  static constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd;  // the root of 1/2
  static constexpr uint64_t kMantissa = 0x000fffffffffffff;

  LANE static uint64_t BitsOf(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
  }

  LANE static double DoubleOf(uint64_t bits) {
    double x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }

  // x is 2**e times m with m from the root of 1/2 to that of 2, and the logarithm of m
  // is a series in (m - 1) / (m + 1), which is at most 0.1716.
  LANE static double Log2(double x) {
    constexpr double kTwoByLn2 = 2.8853900817779268;
    const uint64_t bits = BitsOf(x) + (kOne - kRootHalf);
    const double e = static_cast<double>(static_cast<int32_t>(bits >> 52) - 1023);
    const double m = DoubleOf((bits & kMantissa) + kRootHalf);
    const double s = (m - 1) / (m + 1), t = s * s;
    double series = kTwoByLn2 / 15;
    series = series * t + kTwoByLn2 / 13;
    series = series * t + kTwoByLn2 / 11;
    series = series * t + kTwoByLn2 / 9;
    series = series * t + kTwoByLn2 / 7;
    series = series * t + kTwoByLn2 / 5;
    series = series * t + kTwoByLn2 / 3;
    series = series * t + kTwoByLn2;
    return e + s * series;
  }

  // y is an integer n and a rest of at most 1/2, whose power is a series.
  LANE static double PowerOfTwo(double y) {
    constexpr double kLn2 = 0.69314718055994531;
    constexpr double kLowest = -1022, kHighest = 1023;  // far outside of float32
    const double raised = y < kLowest ? kLowest : y;
    const double bounded = raised > kHighest ? kHighest : raised;
    // The last bits of a number of this size count in ones.
    constexpr double kRounder = 6755399441055744;  // 1.5 * 2**52
    const double shifted = bounded + kRounder;
    const double n = shifted - kRounder;
    const double x = (bounded - n) * kLn2;
    double series = 1.0 / 3628800;
    series = series * x + 1.0 / 362880;
    series = series * x + 1.0 / 40320;
    series = series * x + 1.0 / 5040;
    series = series * x + 1.0 / 720;
    series = series * x + 1.0 / 120;
    series = series * x + 1.0 / 24;
    series = series * x + 1.0 / 6;
    series = series * x + 1.0 / 2;
    series = series * x + 1.0;
    series = series * x + 1.0;
    return series * DoubleOf((BitsOf(shifted) + 1023) << 52);
  }

  double exponent_;
  float at_zero_, at_infinity_;
};

}  // namespace sparse_adam

#endif  // SPARSE_ADAM_POWER_H_

// How often which time was measured: buckets a sixteenth of a power of two wide, so that a percentile is right
// to 6 %. The longest time is kept exactly.
//
// Thread safety: one writer; merged when it is done. Zeroed memory is an empty histogram. Units: the caller's.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace bench {

class Histogram {
  public:
    void add(uint64_t value) {
        counts_[bucket(value)]++;
        longest_ = std::max(longest_, value);
    }

    void merge(const Histogram& other) {
        for (int i = 0; i < kBuckets; i++) counts_[i] += other.counts_[i];
        longest_ = std::max(longest_, other.longest_);
    }

    uint64_t longest() const { return longest_; }
    uint64_t count() const {
        uint64_t sum = 0;
        for (const uint32_t n : counts_) sum += n;
        return sum;
    }

    /// The least value that `share` of all do not exceed; 0 when there are none.
    uint64_t percentile(double share) const {
        const double wanted = share * static_cast<double>(count());
        uint64_t sum = 0;
        for (int i = 0; i < kBuckets; i++) {
            sum += counts_[i];
            if (sum != 0 && static_cast<double>(sum) >= wanted) return std::min(middle(i), longest_);
        }
        return longest_;
    }

  private:
    static constexpr int kBits = 4, kPerPower = 1 << kBits;
    static constexpr int kBuckets = (64 - kBits + 1) * kPerPower;

    static int bucket(uint64_t value) {
        if (value < kPerPower) return static_cast<int>(value);
        const int power = std::bit_width(value) - 1 - kBits;
        return power * kPerPower + static_cast<int>(value >> power);
    }
    static uint64_t middle(int bucket) {
        if (bucket < kPerPower) return static_cast<uint64_t>(bucket);
        const int power = bucket / kPerPower - 1;
        const uint64_t from = static_cast<uint64_t>(bucket - power * kPerPower) << power;
        return from + ((uint64_t{1} << power) >> 1);
    }

    uint32_t counts_[kBuckets];
    uint64_t longest_;
};

}  // namespace bench

// The histogram of bench/micro, against the sorted values themselves.
#include "../../bench/locks/histogram.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

namespace {

using bench::Histogram;

uint64_t true_percentile(std::vector<uint64_t> values, double share) {
    std::sort(values.begin(), values.end());
    const auto rank = static_cast<size_t>(std::ceil(share * static_cast<double>(values.size())));
    return values[rank == 0 ? 0 : rank - 1];
}

TEST(Histogram, PercentilesAreRightToSixPercent) {
    std::mt19937_64 random(1);
    std::uniform_real_distribution<double> power(0, 62);
    std::vector<uint64_t> values;
    Histogram histogram = {};
    for (int i = 0; i < 20'000; i++) {
        values.push_back(static_cast<uint64_t>(std::exp2(power(random))));
        histogram.add(values.back());
    }
    EXPECT_EQ(histogram.count(), values.size());
    EXPECT_EQ(histogram.longest(), *std::max_element(values.begin(), values.end()));
    for (const double share : {0.001, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0}) {
        const auto wanted = static_cast<double>(true_percentile(values, share));
        EXPECT_NEAR(static_cast<double>(histogram.percentile(share)), wanted, 0.0625 * wanted + 1) << share;
    }
}

TEST(Histogram, KnowsEveryValue) {
    for (int bit = 0; bit < 64; bit++)
        for (const uint64_t value :
             {(uint64_t{1} << bit) - 1, uint64_t{1} << bit, (uint64_t{1} << bit) + 1, ~uint64_t{0}}) {
            Histogram histogram = {};
            histogram.add(value);
            // What is alone is the longest, and no percentile exceeds that.
            EXPECT_LE(histogram.percentile(0.5), value);
            EXPECT_GE(static_cast<double>(histogram.percentile(0.5)), 0.93 * static_cast<double>(value));
        }
}

TEST(Histogram, MergesAndIsEmptyWhenZeroed) {
    Histogram all = {}, few = {}, many = {};
    EXPECT_EQ(all.percentile(0.5), 0u);
    few.add(1'000'000);
    for (int i = 0; i < 99; i++) many.add(10);
    all.merge(few);
    all.merge(many);
    EXPECT_EQ(all.count(), 100u);
    EXPECT_EQ(all.percentile(0.5), 10u);
    EXPECT_EQ(all.percentile(0.99), 10u);
    EXPECT_EQ(all.longest(), 1'000'000u);
    EXPECT_NEAR(static_cast<double>(all.percentile(1)), 1e6, 62'500);
}

}  // namespace

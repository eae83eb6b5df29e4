#pragma once
/*
 * An atomic each of whose operations is a step of the Explorer: what code under test is given in the place of
 * std::atomic_ref, to be run in every interleaving (interleavings.h).
 */

#include <atomic>
#include <utility>

#include "interleavings.h"

namespace adaptive::test {

inline Explorer* explorer;

template <class T>
class Stepped {
  public:
    explicit Stepped(T& word) : word_(word) {}
    T load(std::memory_order = {}) const {
        explorer->step("load");
        return word_;
    }
    void store(T value, std::memory_order = {}) {
        explorer->step("store");
        word_ = value;
    }
    T exchange(T value, std::memory_order = {}) {
        explorer->step("exchange");
        return std::exchange(word_, value);
    }
    T fetch_or(T bits) {
        explorer->step("fetch_or");
        return std::exchange(word_, word_ | bits);
    }
    T fetch_and(T bits) {
        explorer->step("fetch_and");
        return std::exchange(word_, word_ & bits);
    }
    T fetch_add(T n, std::memory_order = {}) {
        explorer->step("fetch_add");
        return std::exchange(word_, word_ + n);
    }
    T fetch_sub(T n) {
        explorer->step("fetch_sub");
        return std::exchange(word_, word_ - n);
    }
    bool compare_exchange_weak(T& expected, T desired, std::memory_order = {}, std::memory_order = {}) {
        explorer->step("compare_exchange");
        if (word_ == expected) {
            word_ = desired;
            return true;
        }
        expected = word_;
        return false;
    }
    bool compare_exchange_strong(T& expected, T desired, std::memory_order = {}, std::memory_order = {}) {
        return compare_exchange_weak(expected, desired);
    }

  private:
    T& word_;
};

}  // namespace adaptive::test

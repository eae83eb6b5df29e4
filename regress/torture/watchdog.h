#pragma once
/*
 * The watchdog looks for lost wake-ups: a scene that should not last, for more than a second in which nobody
 * was stopped and nothing changed in it, and everybody who could still owe the wake-up has had a CPU or is
 * asleep as well. And for a burst that does not end.
 */

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "../unit/processes.h"
#include "server/torture.h"

namespace torture {

// ---- /proc; a thread is a process there ----

inline std::string read_file(const std::string& path) {
    std::ifstream file(path);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

inline char scheduling_state(pid_t pid) {
    const std::string stat = read_file("/proc/" + std::to_string(pid) + "/stat");
    const size_t name_ends = stat.rfind(')');
    return name_ends == std::string::npos || name_ends + 2 >= stat.size() ? '?' : stat[name_ends + 2];
}

/// Nanoseconds on a CPU.
inline uint64_t run_time(pid_t pid) {
    return strtoull(read_file("/proc/" + std::to_string(pid) + "/schedstat").c_str(), nullptr, 10);
}

// ---- the watchdog ----

/// What is to be seen of one lock. Two that are equal: nothing has happened in between.
struct Scene {
    struct Sleeper {
        int task;
        uint32_t episode;
        bool operator==(const Sleeper&) const = default;
    };

    std::string wrong;  ///< what should not last; empty: all is well
    uint64_t state = 0;
    uint64_t holds = 0;
    std::vector<Sleeper> asleep;

    bool operator==(const Scene&) const = default;
};

class Watchdog {
  public:
    using Arena = lock_generator::torture::Arena;
    using Task = lock_generator::torture::Task;

    /// Looks at scene_of(0 .. scenes - 1).
    Watchdog(const Arena& arena, int scenes, std::function<Scene(int)> scene_of)
        : arena_(arena),
          scene_of_(std::move(scene_of)),
          suspicions_(size_t(scenes)),
          stopped_(arena.stopped_until(adaptive::CycleClock::now())) {}

    /// What is wrong, or an empty string.
    std::string look() {
        const double now = test::seconds();
        has_looked_ = now - last_ >= 0.1;
        if (!has_looked_) return "";
        // Only what passed while nobody was stopped.
        const uint64_t ticks = adaptive::CycleClock::now(), stopped = arena_.stopped_until(ticks);
        const double stopped_for =
            double(stopped - stopped_) / double(adaptive::CycleClock::ticks_per_microsecond()) / 1e6;
        const double passed = std::max(0.0, now - last_ - stopped_for);
        last_ = now;
        stopped_ = stopped;

        for (size_t i = 0; i < suspicions_.size(); i++) {
            Suspicion& s = suspicions_[i];
            Scene scene = scene_of_(int(i));
            if (scene.wrong.empty()) {
                s = {};
            } else if (!(scene == s.scene)) {
                s = {std::move(scene), 0, run_times()};
            } else if ((s.seconds += passed) > 1 && (s.seconds > 30 || nobody_may_owe(s))) {
                char text[40];
                snprintf(text, sizeof(text), " for %.1f s", s.seconds);
                return s.scene.wrong + text;
            }
        }

        const uint64_t epoch = arena_.epoch;
        stuck_for_ = epoch == epoch_ ? stuck_for_ + passed : 0;
        epoch_ = epoch;
        return stuck_for_ > 30 ? "a burst does not end" : "";
    }
    /// Whether it was time to look.
    bool has_looked() const { return has_looked_; }

  private:
    struct Suspicion {
        Scene scene;
        double seconds = 0;
        std::vector<uint64_t> run_times;
    };

    std::vector<uint64_t> run_times() const {
        std::vector<uint64_t> times;
        for (const Task& t : arena_.tasks) times.push_back(t.pid.load() != 0 ? run_time(t.pid) : 0);
        return times;
    }
    bool nobody_may_owe(const Suspicion& s) const {
        const std::vector<uint64_t> times = run_times();
        for (size_t i = 0; i < times.size(); i++) {
            const pid_t pid = arena_.tasks[i].pid;
            if (pid != 0 && scheduling_state(pid) != 'S' && times[i] - s.run_times[i] < 10'000'000)
                return false;
        }
        return true;
    }

    const Arena& arena_;
    const std::function<Scene(int)> scene_of_;
    std::vector<Suspicion> suspicions_;
    double last_ = test::seconds(), stuck_for_ = 0;
    uint64_t stopped_ = 0, epoch_ = 0;
    bool has_looked_ = false;
};

}  // namespace torture

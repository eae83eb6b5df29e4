// What moving a written cache line between two CPUs costs: the floor under every hand-over of a lock.
#pragma once

namespace lock_generator {

// Two threads, each on a CPU of its own, take turns at incrementing one word. Returns half a round trip in
// nanoseconds (the shortest of several trials), or 0 when this process may use only one CPU or no thread can
// be made. The helper thread has all signals blocked and calls nothing of the server. Takes some
// milliseconds; the caller's CPU affinity is restored.
double line_cost_ns();

}  // namespace lock_generator

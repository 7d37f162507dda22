// How long a call may take.

#include <chrono>
#include <cstdint>

namespace {

class Clock {
  public:
    Clock(double seconds, int64_t steps_per_look)
        : end_(std::chrono::steady_clock::now() +
               std::chrono::microseconds(static_cast<int64_t>(1e6 * seconds))),
          every_(steps_per_look) {}

    // To be asked after each step.
    bool over() {
        if (++steps_ % every_) return false;
        return left() <= 0.0;
    }

    // Seconds.
    double left() const {
        return std::chrono::duration<double>(end_ - std::chrono::steady_clock::now()).count();
    }

  private:
    const std::chrono::steady_clock::time_point end_;
    const int64_t every_;
    int64_t steps_ = 0;
};

}  // namespace

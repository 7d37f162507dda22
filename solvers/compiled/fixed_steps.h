// Steps whose lengths do not depend on the state: FixedGrid and PrescribedGrid of solvers/clock.py.

#include <cstdint>
#include <vector>

namespace {

class FixedSteps {
  public:
    struct Place {
        double start, length, end;
        bool last;  // of its interval
    };

    FixedSteps(const int64_t* counts, int64_t number) : counts_(counts, counts + number) {}

    // The ends of all steps, from the first one's start on.
    void prescribe(const double* points, int64_t number) { points_.assign(points, points + number); }

    void begin() { first_ = 0; }

    // Go on behind an interval.
    void next(size_t interval) { first_ += counts_[interval]; }

    // The step at `position` of an interval from `begin` to `end`.
    Place at(size_t interval, int64_t position, double begin, double end) const {
        const int64_t number = counts_[interval];
        const bool last = position + 1 == number;
        if (!points_.empty()) {
            const double start = points_[first_ + position], stop = points_[first_ + position + 1];
            return {start, stop - start, stop, last};
        }
        const double length = (end - begin) / static_cast<double>(number);
        const auto place = [&](int64_t k) { return k ? begin + static_cast<double>(k) * length : begin; };
        return {place(position), length, last ? end : place(position + 1), last};
    }

  private:
    const std::vector<int64_t> counts_;  // of each interval
    std::vector<double> points_;         // empty: the steps of an interval are equal
    int64_t first_ = 0;                  // point of the interval
};

}  // namespace

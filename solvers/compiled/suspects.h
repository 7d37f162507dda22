// Steps in which pnode/sweeping/event_search.py may find something. Above this stands kernel.h.
//
// It looks at samples of each step's interpolant: at whether an entry has left its side of zero, and
// for lowest points between neighbours. Samples here are the same but for round-off. How much that
// is, the same computation tells from states that are a little off.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

struct Sieve {  // of event_programs.py
    void (*values)(void* const* read, double t, const double* y, double* found);
    void* const* read;
    int64_t entries, samples;
    // Where a step is looked at, from its start to its end, and the interpolant's weights there: of
    // both states, and of both slopes in units of the step.
    const double *thetas, *weights;
    const double* sides;  // of the entries, 0 where they are not known
};

// What is seen along one step, from states that are multiplied by `off`, and times by `late`.
class Samples {
  public:
    Samples(const Sieve& sieve, std::vector<double> off, double late)
        : sieve_(sieve), off_(std::move(off)), late_(late), between_(off_.size()),
          values_(sieve.samples * sieve.entries) {
        for (auto* each : {&begin_, &end_, &first_, &last_}) each->resize(off_.size());
    }

    // Stand at the end of a step, where another one begins; false if there are no slopes.
    bool stand(Kernel& field, double t, const double* y) {
        std::swap(begin_, end_), std::swap(first_, last_);
        for (size_t k = 0; k < off_.size(); k++) end_[k] = y[k] * off_[k];
        return field.slope(t * late_, end_.data(), last_.data());
    }

    // Look at the step that ends there.
    void look(double direction, double start, double length) {
        const double h = direction * length, *w = sieve_.weights;
        for (int64_t i = 0; i < sieve_.samples; i++, w += 4) {
            for (size_t k = 0; k < off_.size(); k++)
                between_[k] = w[0] * begin_[k] + w[1] * end_[k] + h * (w[2] * first_[k] + w[3] * last_[k]);
            const double t = direction * (start + sieve_.thetas[i] * length);
            sieve_.values(sieve_.read, t * late_, between_.data(), &values_[i * sieve_.entries]);
        }
    }

    double operator()(int64_t sample, int64_t entry) const {
        return values_[sample * sieve_.entries + entry];
    }

  private:
    const Sieve& sieve_;
    const std::vector<double> off_;
    const double late_;
    std::vector<double> begin_, end_, first_, last_, between_, values_;
};

class Suspects {
  public:
    Suspects(const Sieve& sieve, int64_t size)
        : sieve_(sieve), exact_(sieve_, std::vector<double>(size, 1.0), 1.0),
          moved_(sieve_, away(size), 1.0 + OFF / 16.0), heights_(sieve.samples),
          rough_(sieve.samples) {}

    // Begin the next step somewhere else than where the last one has ended.
    void forget() { follows_ = false; }

    // Whether a step may hold an event; `field` has slopes. Times run forwards.
    bool in(Kernel& field, double direction, double start, double end, const double* before,
            const double* after) {
        const double* stop = sieve_.sides + sieve_.entries;
        if (std::find(sieve_.sides, stop, 0.0) != stop) return follows_ = false, true;
        for (Samples* each : {&exact_, &moved_}) {
            if (!follows_) each->stand(field, direction * start, before);
            const int64_t calls = field.counts.rhs;
            if (!each->stand(field, direction * end, after)) return follows_ = false, true;
            evaluations = field.counts.rhs - calls;
            each->look(direction, start, end - start);
        }
        follows_ = true;
        for (int64_t entry = 0; entry < sieve_.entries; entry++)
            if (holds(entry)) return true;
        return false;
    }

    int64_t evaluations = 0;  // of f, for one slope
    bool passed = false;      // whether the last step was none

  private:
    static constexpr double OFF = 1.0 / (int64_t(1) << 44);

    // By different factors, so that what they change does not cancel.
    static std::vector<double> away(int64_t size) {
        std::vector<double> off(size);
        for (int64_t k = 0; k < size; k++)
            off[k] = 1.0 + (k % 2 ? -OFF : OFF) * (1.0 + std::fmod(0.618 * (k + 1.0), 1.0));
        return off;
    }

    bool holds(int64_t entry) {
        bool constant = true;
        for (int64_t i = 0; i < sieve_.samples; i++) {
            const double value = exact_(i, entry), other = moved_(i, entry);
            heights_[i] = sieve_.sides[entry] * value;
            rough_[i] = 4.0 * std::fabs(value - other) + OFF * std::fabs(value);
            const bool beyond = i > 0 && !(heights_[i] > rough_[i]);  // or not finite
            if (beyond || !std::isfinite(rough_[i])) return true;
            constant = constant && value == exact_(0, entry) && other == moved_(0, entry);
        }
        if (constant) return false;
        for (int64_t i = 0; i + 2 < sieve_.samples; i++)
            if (dips(i)) return true;
        return false;
    }

    // Whether the parabola through three samples may be lowest between them: _vertex.
    bool dips(int64_t i) const {
        const double *theta = sieve_.thetas + i, *height = &heights_[i], *rough = &rough_[i];
        const double left = theta[1] - theta[0], right = theta[2] - theta[1];
        const double down = (height[1] - height[0]) / left, up = (height[2] - height[1]) / right;
        const double bend = (up - down) / (left + right);
        const double unclear =
            8.0 * std::max({rough[0], rough[1], rough[2]}) / std::min(left, right);
        return down - bend * left < unclear && up + bend * right > -unclear;
    }

    const Sieve sieve_;
    Samples exact_, moved_;
    std::vector<double> heights_, rough_;
    bool follows_ = false;
};

}  // namespace

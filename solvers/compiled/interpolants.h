// Outputs inside of steps, y = u + h sum_i b_i(theta) k_i, and their cotangents. The last slope of a
// step is the first of the next one. Above this stands kernel.h.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace {

struct Given {  // of interpolants.py
    int64_t stages, degree;
    const double* weights;  // coefficients of theta, ..., theta^degree, a row for each slope
    int64_t number;
    const double* times;  // of the outputs between the first and the last, forwards
    double* rates;  // dy/dt there, in the user's time; null where they are not wanted
};

class Inside {
  public:
    Inside(const Given& given, int64_t size)
        : given_(given), b_(given.stages), state_(size) {}

    int64_t number() const { return given_.number; }

    void begin() { places_.clear(); }

    // Write those in an attempt; false if they are not finite. One at its end is the state there,
    // unless the sweep `ends` there.
    bool write(const Kernel& kernel, void* outputs, int64_t step, double start, double end, double h,
               bool ends) {
        const double *u = kernel.state(), *k = kernel.step_slopes();
        const int64_t n = state_.size();
        for (int64_t i; (i = places_.size()) < given_.number && given_.times[i] < end;) {
            const double theta = (given_.times[i] - start) / std::fabs(h);
            places_.push_back({step, theta});
            std::copy_n(u, n, state_.begin());
            add(theta, h, k, false, state_.data());
            kernel.write(state_.data(), outputs, 1 + i);
            for (double x : state_)
                if (!std::isfinite(x)) return false;
            if (!given_.rates) continue;
            double* rate = given_.rates + i * n;
            std::fill_n(rate, n, 0.0);
            add(theta, 1.0, k, true, rate);
        }
        const int64_t i = places_.size();
        if (i < given_.number && given_.times[i] == end && !ends) {
            places_.push_back({step, std::numeric_limits<double>::quiet_NaN()});
            kernel.write(kernel.tried(), outputs, 1 + i);
        }
        return true;
    }

    // In which steps they are, and where; NaN: at the end.
    int64_t places(int64_t* steps, double* thetas) const {
        for (const auto& [step, theta] : places_)
            if (steps) *steps++ = step, *thetas++ = theta;
        return places_.size();
    }

    // Cotangents of them all; those at ends of steps are not looked at.
    void take(const double* cotangents) { cotangents_ = cotangents; }

    // Give a step's slopes what they get from its own outputs and, the first, from those of the step
    // before; whether that is anything.
    bool pull_back(Kernel& kernel, int64_t step, double h, double h_before) {
        const int64_t n = state_.size(), last = given_.stages - 1;
        bool any = false;
        own_ = false;
        for (auto place = first(step - 1); place != places_.end() && place->first <= step; ++place) {
            const double* w = cotangents_ + (place - places_.begin()) * n;
            const bool own = place->first == step;
            if (std::isnan(place->second)) continue;
            if (std::all_of(w, w + n, [](double x) { return x == 0.0; })) continue;
            weights(place->second, false);
            double* k = kernel.slope_cotangents();
            any = true;
            if (!own) {
                for (int64_t j = 0; j < n; j++) k[j] += h_before * b_[last] * w[j];
                continue;
            }
            for (int64_t i = 0; i < last; i++)
                for (int64_t j = 0; j < n; j++) k[i * n + j] += h * b_[i] * w[j];
            if (!own_) std::fill(state_.begin(), state_.end(), 0.0);
            own_ = true;
            for (int64_t j = 0; j < n; j++) state_[j] += w[j];
        }
        return any;
    }

    // Give the start of that step what it gets besides.
    void add_start(Kernel& kernel) const {
        if (own_) kernel.add(state_.data());
    }

  private:
    typedef std::pair<int64_t, double> Place;

    std::vector<Place>::const_iterator first(int64_t step) const {
        return std::lower_bound(places_.begin(), places_.end(), step,
                                [](const Place& a, int64_t b) { return a.first < b; });
    }

    void weights(double theta, bool rate) {
        const double* row = given_.weights;
        for (double& b : b_) {
            b = 0.0;
            for (int64_t j = given_.degree; j-- > 0;)
                b = rate ? b * theta + double(j + 1) * row[j] : (b + row[j]) * theta;
            row += given_.degree;
        }
    }

    void add(double theta, double h, const double* k, bool rate, double* sum) {
        const int64_t n = state_.size();
        weights(theta, rate);
        for (int64_t i = 0; i < given_.stages; i++, k += n)
            for (int64_t j = 0; b_[i] != 0.0 && j < n; j++) sum[j] += h * b_[i] * k[j];
    }

    const Given given_;
    std::vector<double> b_, state_;
    std::vector<Place> places_;
    const double* cotangents_ = nullptr;
    bool own_ = false;
};

}  // namespace

// Explicit steps on states with ghost cells, a kernel for sweeps.cpp: what the explicit integrator and
// ExplicitAdjoint do, each stage with an exchange before f, a compiled graph, is evaluated. Above this
// stand kernel.h, graphs.h and exchange.h.

#include <algorithm>
#include <cmath>
#include <deque>
#include <vector>

namespace {

// What is kept of a step: all that its adjoint needs, or its stages without ghost cells.
enum Keeps : int64_t { NOTHING, EVERYTHING, STAGES };

struct StagedSettings {  // of staged_steps.py
    int64_t size, stages, fsal, adaptive, alone, saved, keeps, parameters, bytes;
    Exchange exchange;
    Graph value, product;
};

struct StagedPlan : StagedSettings {
    std::vector<double> A, b, c, defect;
    std::vector<bool> live;
    std::vector<Form> states, read;  // what f gets and returns; what it reads besides
    int64_t seen;  // entries of what f gets

    const double* row(int64_t i) const { return A.data() + i * stages; }
};

class StagedSteps : public Kernel {
  public:
    StagedSteps(const StagedPlan& plan, const double* start, const double* rtol,
                const double* atol)
        : Kernel(plan.size), plan_(plan), start_(start, start + plan.size),
          rtol_(rtol, rtol + plan.size * plan.adaptive),
          atol_(atol, atol + plan.size * plan.adaptive) {
        collective = true;
    }

    void lend(void* const* captured) override {
        read_ = captured ? views(plan_.read, captured) : Tensors();
    }

    void begin() override {
        stand(nullptr);
        slopes_.assign(plan_.stages, std::vector<double>(size));
        points_.clear();
        points_.resize(plan_.stages);
        checkpoints_.clear();
        cells_.assign(plan_.seen, 0.0);
        failed_ = false;
    }

    void fail() override { failed_ = true; }
    bool failed() const override { return failed_; }

    Attempt attempt(double t, double h) override {
        for (int64_t i = 0; i < plan_.stages; ++i) {
            if (i == 0 && knows_slope_) continue;
            combine(u_.data(), h, plan_.row(i), i, stage_);
            const double time = t + plan_.c[i] * h;
            evaluate(time, stage_.data(), points_[i], slopes_[i], plan_.keeps == EVERYTHING);
            if (plan_.keeps == STAGES) points_[i].owned = stage_;
            if (i == 0) knows_slope_ = plan_.fsal;
        }
        if (plan_.fsal)
            end_.swap(stage_);
        else
            combine(u_.data(), h, plan_.b.data(), plan_.stages, end_);
        bool usable = square(end_) < MODERATE;
        if (!plan_.adaptive) {
            if (!usable) usable = std::all_of(end_.begin(), end_.end(), [](double x) {
                return std::isfinite(x);
            });
            if (plan_.alone) return {failed_ ? FAILED : usable ? DONE : NOT_FINITE, 0.0};
            failed_ |= !usable;  // and goes on: others wait for its cells
            return {DONE, 0.0};
        }
        for (const auto& slope : slopes_) usable = usable && square(slope) < MODERATE;
        return {failed_ ? FAILED : usable ? DONE : NOT_FINITE, error(h)};
    }

    void accept(bool keep) override {
        const int64_t own = plan_.stages - plan_.fsal;
        Point next;
        if (plan_.fsal) {
            next = std::move(points_.back());
            slopes_.front().swap(slopes_.back());
        }
        points_.resize(own);
        if (keep && !failed_) {
            checkpoints_.push_back(std::move(points_));
            counts.bytes += plan_.bytes;
        } else if (plan_.keeps == STAGES) {
            last_ = std::move(points_);
        }
        points_.clear();
        points_.resize(plan_.stages);
        points_.front() = std::move(next);
        knows_slope_ = plan_.fsal;
        u_.swap(end_);
    }

    void restart_step() override { knows_slope_ = false; }

    void output(void* outputs, int64_t index) const override {
        std::copy(u_.begin(), u_.end(), static_cast<double*>(outputs) + index * size);
    }

    const double* state() const override { return u_.data(); }
    const double* tried() const override { return end_.data(); }
    int64_t kept() const override { return checkpoints_.size(); }

    void live(Numbers& found) override {
        found.clear();
        for (const Point& point : last_)
            found.insert(found.end(), point.owned.begin(), point.owned.end());
        last_.clear();
    }

    void load(const double* from) override { loaded_ = from; }

    void stand(const double* from) override {
        u_.assign(from ? from : start_.data(), (from ? from : start_.data()) + size);
        knows_slope_ = false;
        last_.clear();
    }

    void begin_adjoint(double* const* sums) override {
        lambda_.assign(size, 0.0);
        below_.assign(plan_.stages, std::vector<double>(size));
        sums_ = sums;
        failed_ = false;
    }

    void add(const double* cotangent) override {
        for (int64_t k = 0; k < size; ++k) lambda_[k] += cotangent[k];
    }

    Status adjoint(int64_t, double t, double h) override {
        const int64_t number = plan_.stages - plan_.fsal;
        std::vector<double> w(size), slope(size);
        for (int64_t i = number; i-- > 0;) {
            if (!plan_.live[i]) continue;
            for (int64_t k = 0; k < size; ++k) w[k] = plan_.b[i] * lambda_[k];
            for (int64_t j = i + 1; j < number; ++j) {
                const double a = plan_.live[j] ? plan_.row(j)[i] : 0.0;
                if (a != 0.0) add_to(w, a, below_[j]);
            }
            for (double& x : w) x *= h;
            const double time = t + plan_.c[i] * h;
            Point again;
            if (plan_.keeps == STAGES) {
                const double* y = loaded_ ? loaded_ + i * size : checkpoints_.back()[i].owned.data();
                evaluate(time, y, again, slope, true);
            }
            pull_back(time, plan_.keeps == STAGES ? again : checkpoints_.back()[i], w, below_[i]);
        }
        for (int64_t i = 0; i < number; ++i)
            if (plan_.live[i]) add_to(lambda_, 1.0, below_[i]);
        return plan_.alone && failed_ ? FAILED : DONE;
    }

    void forget() override {
        if (!loaded_) checkpoints_.pop_back();
    }

    void end_adjoint(double* state, double* const*) override {
        if (failed_) throw FAILED;
        std::copy(lambda_.begin(), lambda_.end(), state);
    }

  private:
    // What f got at a stage, and what its product needs of that; or the stage itself.
    struct Point {
        Tensor seen;
        Tensors saved;
        std::vector<double> owned;
    };

    static double square(const std::vector<double>& x) {
        const double* values = x.data();
        const int64_t number = x.size();
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < number; ++k) sum += values[k] * values[k];
        return sum;
    }

    static void add_to(std::vector<double>& sum, double factor, const std::vector<double>& x) {
        double* target = sum.data();
        const double* source = x.data();
        const int64_t number = sum.size();
#pragma omp simd
        for (int64_t k = 0; k < number; ++k) target[k] += factor * source[k];
    }

    // y = from + h sum_j weights_j slope_j.
    void combine(const double* from, double h, const double* weights, int64_t count,
                 std::vector<double>& y) const {
        y.assign(size, 0.0);
        for (int64_t j = 0; j < count; ++j)
            if (weights[j] != 0.0) add_to(y, weights[j], slopes_[j]);
        double* end = y.data();
#pragma omp simd
        for (int64_t k = 0; k < size; ++k) end[k] = from[k] + h * end[k];
    }

    // VecErrorWeightedNorms: the embedded solution is end + defect.
    double error(double h) {
        combine(std::vector<double>(size).data(), h, plan_.defect.data(), plan_.stages, stage_);
        const double *end = end_.data(), *defect = stage_.data();
        double sum = 0.0, counted = 0.0;  // those that have a tolerance
#pragma omp simd reduction(+ : sum, counted)
        for (int64_t k = 0; k < size; ++k) {
            const double a = std::fabs(end[k]), b = std::fabs(end[k] + defect[k]);
            const double allowed = atol_[k] + rtol_[k] * (a < b ? b : a), part = defect[k] / allowed;
            sum += allowed == 0.0 ? 0.0 : part * part;
            counted += allowed != 0.0;
        }
        return counted > 0.0 ? std::sqrt(sum / counted) : 0.0;
    }

    // Collective, whatever fails. `keeps`: what a product needs.
    void evaluate(double t, const double* y, Point& point, std::vector<double>& slope, bool keeps) {
        Tensor seen;
        double* cells = cells_.data();  // of a rank that has failed
        tried([&] {
            seen = plan_.states[0].empty();
            cells = seen.data<double>();
        });
        std::fill_n(cells, plan_.seen, 0.0);
        failed_ |= !plan_.exchange.gather(y, cells);
        counts.rhs++;
        attempted(slope, [&] {
            Tensors found = called(t, seen);
            copy_out(found[0], slope.data());
            point.saved.clear();
            if (!keeps) return;
            for (int64_t k = 1; k <= plan_.saved; ++k) point.saved.push_back(std::move(found[k]));
        });
        if (keeps) point.seen = std::move(seen);
    }

    // l = G^T f_y^T w, with G the exchange, and mu += f_p^T w. Collective, whatever fails.
    void pull_back(double t, Point& point, std::vector<double>& w, std::vector<double>& l) {
        cells_.assign(plan_.seen, 0.0);
        counts.vjp++;
        attempted(cells_, [&] {
            Tensors saved = std::move(point.saved);
            std::vector<Handle> inputs{plan_.states[1].view(w.data()).take(), number(t).take(),
                                       point.seen.share()};
            for (const Tensor& tensor : read_) inputs.push_back(tensor.share());
            for (Tensor& tensor : saved) inputs.push_back(tensor.take());
            Tensors found = plan_.product(inputs, 1 + plan_.parameters);
            copy_out(found[0], cells_.data());
            for (int64_t k = 0; k < plan_.parameters; ++k) {
                sum_.resize(entries(found[1 + k]));
                copy_out(found[1 + k], sum_.data());
                for (size_t i = 0; i < sum_.size(); ++i) sums_[k][i] += sum_[i];
            }
        });
        std::fill(l.begin(), l.end(), 0.0);
        failed_ |= !plan_.exchange.scatter(cells_.data(), l.data());
    }

    template <typename Function>
    bool tried(Function function) {
        if (failed_) return false;
        try {
            function();
        } catch (...) {
            failed_ = true;
        }
        return !failed_;
    }

    // What has failed goes on with NaN.
    template <typename Function>
    void attempted(std::vector<double>& result, Function function) {
        if (!tried(function)) std::fill(result.begin(), result.end(), std::nan(""));
    }

    Tensors called(double t, const Tensor& seen) const {
        std::vector<Handle> inputs{number(t).take(), seen.share()};
        for (const Tensor& tensor : read_) inputs.push_back(tensor.share());
        return plan_.value(inputs, 1 + plan_.saved);
    }

    const StagedPlan& plan_;
    const std::vector<double> start_, rtol_, atol_;
    Tensors read_;
    std::vector<double> u_, end_, stage_;
    std::vector<std::vector<double>> slopes_;
    std::vector<Point> points_;
    bool knows_slope_ = false, failed_ = false;
    std::deque<std::vector<Point>> checkpoints_;
    std::vector<Point> last_;  // what checkpoints.h takes of the last step
    const double* loaded_ = nullptr;  // and has lent
    std::vector<double> cells_;  // what f gets, of a rank that has failed; its cotangent
    // Of the adjoint: of stages below the one it is at, of a parameter.
    std::vector<double> lambda_, sum_;
    std::vector<std::vector<double>> below_;
    double* const* sums_ = nullptr;
};

}  // namespace

extern "C" {

// `scheme`: A, b, c and the embedded weights less b. `text`: the forms of what f gets and returns, and
// of what it reads.
void* pnode_staged_plan(const StagedSettings* settings, const double* scheme, const int64_t* live,
                        const int64_t* text) {
    auto* plan = new StagedPlan{*settings, {}, {}, {}, {}, {}, {}, {}, 1};
    const int64_t s = settings->stages;
    plan->A.assign(scheme, scheme + s * s);
    scheme += s * s;
    for (auto* row : {&plan->b, &plan->c, &plan->defect}) {
        row->assign(scheme, scheme + s);
        scheme += s;
    }
    plan->live.assign(live, live + s);
    plan->states = forms(text);
    plan->read = forms(text);
    for (int64_t entries : plan->states[0].sizes) plan->seen *= entries;
    return plan;
}

void pnode_free_staged_plan(void* plan) { delete static_cast<StagedPlan*>(plan); }

// Tolerances are those of each entry.
void* pnode_staged_steps(void* plan, const double* start, const double* rtol, const double* atol) {
    return static_cast<Kernel*>(
        new StagedSteps(*static_cast<StagedPlan*>(plan), start, rtol, atol));
}
}

// Explicit steps as compiled graphs, a kernel for sweeps.cpp: what integrator.py and
// adjoint/compiled.py do, with the same numbers. Above this stand kernel.h and graphs.h.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

namespace {

struct Settings {  // of graph_steps.py
    int64_t size, dtype, fsal, adaptive, results, begin, end, last;
    int64_t evaluations, products, again, bytes, saved;
    int64_t slopes;  // whether steps return theirs, and adjoints take their cotangents
    Graph step, adjoint, slope;  // the last where steps begin with one, or events are looked for
};

struct Tangents {
    int64_t number;  // at once
    Graph graph;
};

struct Plan : Settings {
    std::vector<Form> tolerances, carried, captured, sums;
    Tangents tangents[4];  // one and several; of the state alone, and of parameters too
};

class GraphSteps : public Kernel {
  public:
    GraphSteps(const Plan& plan, void* const* tolerances, double* start, double* slope,
               void* const* carried)
        : Kernel(plan.size), plan_(plan),
          tolerances_at_(tolerances, tolerances + plan.tolerances.size()), start_(start),
          slope_start_(slope),
          carried_start_(carried, carried + plan.carried.size()) {}

    void lend(void* const* captured) override {
        tolerances_.clear();
        captured_.clear();
        if (!captured) return;
        tolerances_ = views(plan_.tolerances, tolerances_at_.data());
        captured_ = views(plan_.captured, captured);
    }

    void begin() override {
        stand(nullptr);
        checkpoints_.clear();
        state_ = Tensor();
        sums_.clear();
    }

    // Of methods whose last stage is u': a step of length 0 evaluates f at u.
    double first_step(const Control& control, double s, double stop) override {
        if (control.first_step > 0.0) return control.first_step;
        const double t = control.direction * s;
        if (!slope_) begin_step(t);
        const double *u = u_.data<double>(), *f0 = slope_.data<double>();
        const double *rtol = tolerances_[0].data<double>(), *atol = tolerances_[1].data<double>();
        const bool relative = entries(tolerances_[0]) > 1, absolute = entries(tolerances_[1]) > 1;
        const auto slope = [&](double t, const double* y, double* f) {
            if (y == u) {
                std::copy_n(f0, size, f);
                return;
            }
            const Tensor point = Form{DOUBLE, {size}, {1}}.view(const_cast<double*>(y));
            copy_out(step(t, 0.0, point)[2], f);
            counts.rhs++;
        };
        const auto scaled = [&](const double* x) {
            double sum = 0.0;
            for (int64_t k = 0; k < size; ++k) {
                const double scale = atol[absolute * k] + rtol[relative * k] * std::fabs(u[k]);
                const double units = x[k] == 0.0 ? 0.0 : x[k] / scale;
                sum += units * units;
            }
            return std::sqrt(sum / static_cast<double>(size));
        };
        return automatic_step(control, control.order, s, stop, u, size, slope, scaled);
    }

    Attempt attempt(double t, double h) override {
        last_.clear();
        if (plan_.fsal && !slope_) begin_step(t);
        results_ = step(t, h, u_);
        counts.rhs += plan_.evaluations;
        const double* looks = results_[0].data<double>();
        if (plan_.adaptive)
            return {looks[0] < MODERATE && looks[2] < MODERATE ? DONE : NOT_FINITE, looks[1]};
        if (!(looks[0] < MODERATE)) {
            const double* end = results_[1].data<double>();
            for (int64_t k = 0; k < size; ++k)
                if (!std::isfinite(end[k])) return {NOT_FINITE, 0.0};
        }
        return {DONE, 0.0};
    }

    void accept(bool keep) override {
        if (plan_.adjoint.run) {
            Tensors kept;
            kept.push_back(in_users_precision());
            for (int64_t k = plan_.begin; k < plan_.end; ++k)
                kept.push_back(std::move(results_[k]));
            for (Tensor& tensor : carried_) kept.push_back(std::move(tensor));
            for (int64_t k = plan_.end; k < plan_.last; ++k)
                kept.push_back(std::move(results_[k]));
            if (keep) {
                checkpoints_.push_back(std::move(kept));
                counts.bytes += plan_.bytes;
            } else {
                last_ = std::move(kept);
            }
        }
        u_ = std::move(results_[1]);
        if (plan_.fsal) slope_ = std::move(results_[2]);
        carried_.clear();
        for (int64_t k = plan_.last; k < plan_.results; ++k)
            carried_.push_back(std::move(results_[k]));
        results_.clear();
    }

    void output(void* outputs, int64_t index) const override {
        write(u_.data<double>(), outputs, index);
    }

    void write(const double* u, void* outputs, int64_t index) const override {
        if (plan_.dtype == FLOAT) {
            std::copy_n(u, size, static_cast<float*>(outputs) + index * size);
        } else {
            std::copy_n(u, size, static_cast<double*>(outputs) + index * size);
        }
    }

    const double* tried() const override { return results_[1].data<double>(); }

    const double* step_slopes() const override { return results_[3].data<double>(); }

    double* slope_cotangents() override {
        if (cotangents_.empty()) cotangents_.assign(plan_.evaluations * size, 0.0);
        given_ = true;
        return cotangents_.data();
    }

    void follow(const Kernel& other) override {
        const auto& from = static_cast<const GraphSteps&>(other);
        restart_step();
        u_ = Tensor(from.u_.share());
        if (from.slope_) slope_ = Tensor(from.slope_.share());
    }

    void adopt(const Kernel& other) override {
        results_.clear();
        for (const Tensor& tensor : static_cast<const GraphSteps&>(other).results_)
            results_.emplace_back(tensor.share());
    }

    bool slope(double t, const double* y, double* f) override {
        point_.assign(y, y + size);
        copy_out(slope_at(t, Form{DOUBLE, {size}, {1}}.view(point_.data()))[0], f);
        return true;
    }

    int64_t kept() const override { return checkpoints_.size(); }

    const double* state() const override { return u_.data<double>(); }

    void restart_step() override {
        slope_ = Tensor();
        carried_.clear();
    }

    void stand(const double* from) override {
        restart_step();
        last_.clear();
        const Form form{DOUBLE, {size}, {1}};
        if (from) {
            u_ = form.empty();
            std::copy_n(from, size, u_.data<double>());
            return;
        }
        u_ = form.view(start_);
        if (!plan_.fsal || !slope_start_) return;  // there is none, or it is to be evaluated
        slope_ = form.view(slope_start_);
        carried_ = views(plan_.carried, carried_start_.data());
    }

    void live(Numbers& found) override {
        const size_t bytes = state_bytes();
        found.resize((last_.size() * bytes + sizeof(double) - 1) / sizeof(double));
        char* place = reinterpret_cast<char*>(found.data());
        for (const Tensor& stage : last_) {
            std::memcpy(place, stage.data<char>(), bytes);
            place += bytes;
        }
        last_.clear();
    }

    void load(const double* from) override {
        loaded_.clear();
        if (!from) return;
        const size_t bytes = state_bytes();
        char* place = reinterpret_cast<char*>(const_cast<double*>(from));
        for (int64_t k = 0; k <= plan_.end - plan_.begin; ++k, place += bytes) {
            const bool fits = bytes % 64 == 0;  // each begins as torch's own does; see Numbers
            loaded_.push_back(fits ? Form{int32_t(plan_.dtype), {size}, {1}}.view(place)
                                   : vector(size, plan_.dtype));
            if (!fits) std::memcpy(loaded_.back().data<char>(), place, bytes);
        }
    }

    void begin_adjoint(double* const* sums) override {
        state_ = vector(size, DOUBLE);
        std::fill_n(state_.data<double>(), size, 0.0);
        sums_ = views(plan_.sums, reinterpret_cast<void* const*>(sums));
    }

    void add(const double* cotangent) override {
        Tensor sum = vector(size, DOUBLE);
        const double* state = state_.data<double>();
        double* target = sum.data<double>();
        for (int64_t k = 0; k < size; ++k) target[k] = state[k] + cotangent[k];
        state_ = std::move(sum);
    }

    Status adjoint(int64_t, double t, double h) override {
        std::vector<Handle> inputs{number(t).take(), number(h).take(), state_.take()};
        if (plan_.slopes) {
            if (cotangents_.empty()) slope_cotangents();
            const Form form{DOUBLE, {plan_.evaluations, size}, {size, 1}};
            inputs.push_back(form.view(cotangents_.data()).take());
        }
        for (Tensor& tensor : loaded_.empty() ? checkpoints_.back() : loaded_)
            inputs.push_back(tensor.take());
        for (Tensor& tensor : sums_) inputs.push_back(tensor.take());
        for (const Tensor& tensor : captured_) inputs.push_back(tensor.share());
        Tensors results = plan_.adjoint(inputs, 1 + sums_.size());
        state_ = std::move(results[0]);
        for (size_t k = 0; k < sums_.size(); ++k) sums_[k] = std::move(results[1 + k]);
        if (std::exchange(given_, false)) std::fill(cotangents_.begin(), cotangents_.end(), 0.0);
        counts.vjp += plan_.products;
        counts.rhs += plan_.again;
        return DONE;
    }

    void forget() override {
        if (loaded_.empty()) checkpoints_.pop_back();
    }

    void end_adjoint(double* state, double* const* sums) override {
        copy_out(state_, state);
        for (size_t k = 0; k < sums_.size(); ++k) copy_out(sums_[k], sums[k]);
        state_ = Tensor();
        sums_.clear();
    }

    void begin_tangents(int64_t number, const double* first, const double* along) override {
        number_ = number;
        const Tangents& code = tangents_ = plan_.tangents[2 * (number > 1) + (along != nullptr)];
        int64_t entries = 0;
        for (const Form& form : plan_.sums)
            entries += std::accumulate(form.sizes.begin(), form.sizes.end(), int64_t(1),
                                       std::multiplies<int64_t>());
        const int64_t groups = (number + code.number - 1) / code.number;
        du_.clear(), along_.clear();
        first_.assign(groups * code.number * size, 0.0);
        std::copy_n(first, number * size, first_.begin());
        directions_.assign(along ? groups * code.number * entries : 0, 0.0);
        if (along) std::copy_n(along, number * entries, directions_.begin());
        for (int64_t k = 0; k < groups; ++k) {
            const Form rows{DOUBLE, {code.number * size}, {1}};
            du_.push_back(rows.view(first_.data() + k * code.number * size));
            const Form all{DOUBLE, {code.number, entries}, {entries, 1}};
            if (along) along_.push_back(all.view(directions_.data() + k * code.number * entries));
        }
    }

    Status tangent(int64_t index, double t, double h) override {
        for (size_t k = 0; k < du_.size(); ++k) {
            std::vector<Handle> inputs{number(t).take(), number(h).take(), du_[k].take()};
            if (!along_.empty()) inputs.push_back(along_[k].share());
            for (const Tensor& tensor : loaded_.empty() ? checkpoints_[index] : loaded_)
                inputs.push_back(tensor.share());
            for (const Tensor& tensor : captured_) inputs.push_back(tensor.share());
            du_[k] = std::move(tangents_.graph(inputs, 1)[0]);
            counts.rhs += plan_.again;
        }
        counts.jvp += number_ * plan_.products;
        return DONE;
    }

    void tangents(double* rows) const override {
        int64_t left = number_ * size;
        for (const Tensor& group : du_) {
            const int64_t count = std::min(left, tangents_.number * size);
            rows = std::copy_n(group.data<double>(), count, rows);
            left -= count;
        }
    }

  private:
    size_t state_bytes() const {
        return size * (plan_.dtype == FLOAT ? sizeof(float) : sizeof(double));
    }

    Tensors step(double t, double h, const Tensor& u) const {
        std::vector<Handle> inputs{number(t).take(), number(h).take(), u.share()};
        for (const Tensor& tensor : tolerances_) inputs.push_back(tensor.share());
        if (slope_) inputs.push_back(slope_.share());
        for (const Tensor& tensor : captured_) inputs.push_back(tensor.share());
        return plan_.step(inputs, plan_.results);
    }

    // What the last step would have left: by a graph for that, or by a step of length 0.
    void begin_step(double t) {
        if (plan_.slope.run) {
            carried_ = slope_at(t, Tensor(u_.share()));
            slope_ = std::move(carried_.front());
            carried_.erase(carried_.begin());
            return;
        }
        counts.rhs++;
        slope_ = vector(size, DOUBLE);
        std::fill_n(slope_.data<double>(), size, 0.0);
        Tensors results = step(t, 0.0, u_);
        slope_ = std::move(results[2]);
        for (int64_t k = plan_.last; k < plan_.results; ++k)
            carried_.push_back(std::move(results[k]));
    }

    // That of f, and what is saved of it.
    Tensors slope_at(double t, Tensor u) {
        std::vector<Handle> inputs{number(t).take(), u.take()};
        for (const Tensor& tensor : captured_) inputs.push_back(tensor.share());
        counts.rhs++;
        return plan_.slope(inputs, 1 + plan_.saved);
    }

    Tensor in_users_precision() const {
        if (plan_.dtype == DOUBLE) return Tensor(u_.share());
        Tensor rounded = vector(size, FLOAT);
        std::copy_n(u_.data<double>(), size, rounded.data<float>());
        return rounded;
    }

    const Plan& plan_;
    const std::vector<void*> tolerances_at_;
    double *const start_, *const slope_start_;
    const std::vector<void*> carried_start_;
    Tensor u_, slope_, state_;
    Tensors carried_, tolerances_, captured_, results_, sums_;
    std::deque<Tensors> checkpoints_;
    Numbers cotangents_, point_;  // of slopes, for the next adjoint; where one is evaluated
    bool given_ = false;  // whether there are any
    Tensors last_, loaded_;  // what checkpoints.h takes of the last step, and has lent
    // Of tangents: how many there are, the code, and in groups those of the state and parameters.
    int64_t number_ = 0;
    Tangents tangents_{};
    Tensors du_, along_;
    std::vector<double> first_, directions_;
};

}  // namespace

extern "C" {

// `text`: the forms of the tolerances, of what a step passes on to the next, of what f reads, and
// of the sums of mu.
void* pnode_plan(const Settings* settings, const int64_t* text) {
    Plan* plan = new Plan{*settings, {}, {}, {}, {}, {}};
    for (auto* part : {&plan->tolerances, &plan->carried, &plan->captured, &plan->sums})
        *part = forms(text);
    return plan;
}

// A graph of tangents, and how many it takes at once.
void pnode_plan_tangents(void* plan, int64_t place, const Graph* graph, int64_t number) {
    static_cast<Plan*>(plan)->tangents[place] = {number, *graph};
}

void pnode_free_plan(void* plan) { delete static_cast<Plan*>(plan); }

void* pnode_graph_steps(void* plan, void* const* tolerances, double* start, double* slope,
                        void* const* carried) {
    return static_cast<Kernel*>(
        new GraphSteps(*static_cast<Plan*>(plan), tolerances, start, slope, carried));
}

// How many tensors there are, for tests.
int64_t pnode_owned() { return owned; }
}

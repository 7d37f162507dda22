// Whole sweeps of compiled explicit steps, forwards and backwards: what solvers/compiled.py,
// solvers/stepping.py and adjoint/compiled.py do step by step, with the same numbers.
//
// Steps and adjoints are graphs in libraries of their own, called through torch's C interface for
// compiled graphs; explicit_driver.py passes the functions.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <utility>
#include <vector>

namespace {

typedef void* Handle;  // of a tensor

struct Torch {  // 0 is success
    int32_t (*from_blob)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t,
                         int32_t, Handle*);
    int32_t (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
    int32_t (*share)(Handle, Handle*);
    int32_t (*release)(Handle);
    int32_t (*data)(Handle, void**);
    int32_t (*dimensions)(Handle, int64_t*);
    int32_t (*sizes)(Handle, int64_t**);
    int32_t (*strides)(Handle, int64_t**);
};

Torch torch;  // the same in all libraries
constexpr int32_t CPU = 0, DOUBLE = 7, FLOAT = 6;

// What an adaptive step may square and divide by a tolerance.
constexpr double MODERATE = 1e200;
// TSADAPTBASIC's defaults.
constexpr double SAFETY = 0.9, LEAST_FACTOR = 0.1, LARGEST_FACTOR = 10.0;
constexpr double FAILURE_FACTOR = 0.25;
const double INFINITE = std::numeric_limits<double>::infinity();

// Each but the first two: the solve is repeated step by step, which tells the error.
enum Status : int64_t { DONE, PAUSED, NOT_FINITE, STEP_LIMIT, TOO_SMALL, GRAPH_FAILED };

struct GraphFailed {};

void check(int32_t error) {
    if (error) throw GraphFailed();
}

std::atomic<int64_t> owned{0};

// Owns a tensor.
class Tensor {
  public:
    Tensor() = default;
    explicit Tensor(Handle handle) : handle_(handle) { ++owned; }
    Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Tensor() {
        if (handle_) torch.release(take());
    }
    Handle share() const {
        Handle other;
        check(torch.share(handle_, &other));
        return other;
    }
    Handle take() {
        if (handle_) --owned;
        return std::exchange(handle_, nullptr);
    }
    Handle get() const { return handle_; }
    explicit operator bool() const { return handle_ != nullptr; }
    template <typename T>
    T* data() const {
        void* data;
        check(torch.data(handle_, &data));
        return static_cast<T*>(data);
    }

  private:
    Handle handle_ = nullptr;
};

typedef std::vector<Tensor> Tensors;

struct Form {
    int32_t dtype;
    std::vector<int64_t> sizes, strides;

    Tensor view(void* data) const {
        Handle handle;
        check(torch.from_blob(data, sizes.size(), sizes.data(), strides.data(), 0, dtype, CPU, 0,
                              &handle));
        return Tensor(handle);
    }
};

Tensors views(const std::vector<Form>& forms, void* const* data) {
    Tensors tensors;
    for (const Form& form : forms) tensors.push_back(form.view(*data++));
    return tensors;
}

Tensor number(double& value) { return Form{DOUBLE, {}, {}}.view(&value); }

Tensor vector(int64_t size, int32_t dtype) {
    const int64_t one = 1;
    Handle handle;
    check(torch.empty(1, &size, &one, dtype, CPU, 0, &handle));
    return Tensor(handle);
}

void copy_out(const Tensor& tensor, double* target) {
    int64_t dimensions, *sizes, *strides;
    check(torch.dimensions(tensor.get(), &dimensions));
    check(torch.sizes(tensor.get(), &sizes));
    check(torch.strides(tensor.get(), &strides));
    const double* source = tensor.data<double>();
    int64_t count = 1;
    bool contiguous = true;
    for (int64_t d = dimensions; d-- > 0;) {
        contiguous = contiguous && (sizes[d] == 1 || strides[d] == count);
        count *= sizes[d];
    }
    if (contiguous) {
        std::memmove(target, source, count * sizeof(double));
        return;
    }
    for (int64_t k = 0; k < count; ++k) {
        int64_t rest = k, place = 0;
        for (int64_t d = dimensions; d-- > 0;) {
            place += rest % sizes[d] * strides[d];
            rest /= sizes[d];
        }
        target[k] = source[place];
    }
}

struct Graph {
    int32_t (*run)(void*, Handle*, size_t, Handle*, size_t, void*, void*);
    void* container;

    Tensors operator()(std::vector<Handle>& inputs, size_t results) const {
        std::vector<Handle> outputs(results);
        check(run(container, inputs.data(), inputs.size(), outputs.data(), results, nullptr,
                  nullptr));
        Tensors tensors;
        for (Handle output : outputs) tensors.emplace_back(output);
        return tensors;
    }
};

struct Settings {  // of explicit_driver.py
    int64_t size, dtype, fsal, adaptive, results, begin, end, last;
    double order;
    Graph step, adjoint;
};

struct Plan {
    Settings settings;
    std::vector<Form> tolerances, carried, captured, sums;
};

struct Control {  // of explicit_driver.py
    int64_t keep, max_steps;
    double direction, first_step, min_step, max_step, longest;
};

struct Counts {
    int64_t steps, rejected;
};

struct Step {
    double t, h;  // the user's: negative where time runs backwards
    Tensors checkpoint;
};

class Sweep {
  public:
    Sweep(const Plan& plan, const Control& control, const double* times, const int64_t* counts,
          int64_t number, double* start, double* slope, void* const* carried)
        : plan_(plan), control_(control), times_(times, times + number),
          counts_(counts, counts + number), start_(start),
          slope_start_(slope), carried_start_(carried, carried + plan.carried.size()) {
        begin();
    }

    // Take steps until they are done, or the time is over.
    Status forward(void* const* tolerances, void* const* captured, void* outputs, double seconds) {
        tolerances_ = views(plan_.tolerances, tolerances);
        captured_ = views(plan_.captured, captured);
        outputs_ = outputs;
        const Clock clock(seconds);
        Status status = PAUSED;
        if (!interval_) output();
        do {
            if (interval_ == times_.size()) {
                status = DONE;
                break;
            }
            status = !again_ && plan_.settings.adaptive ? adapt() : known();
        } while (status == PAUSED && !clock.over());
        tolerances_.clear();
        captured_.clear();
        return status;
    }

    // Begin once more with the steps that were taken.
    void repeat(bool keep) {
        again_ = !record_.empty();
        control_.keep = keep;
        begin();
    }

    // Take adjoints until they are done, or the time is over.
    Status reverse(void* const* captured, double* const* zeros, const double* cotangents,
                   const char* nonzero, double seconds) {
        captured_ = views(plan_.captured, captured);
        const Clock clock(seconds);
        if (!state_) {
            state_ = vector(plan_.settings.size, DOUBLE);
            std::fill_n(state_.data<double>(), plan_.settings.size, 0.0);
            sums_ = views(plan_.sums, reinterpret_cast<void* const*>(zeros));
            waiting_ = outputs_at_.size();
            active_ = false;
        }
        do {
            while (waiting_ > 1 && outputs_at_[waiting_ - 1] == static_cast<int64_t>(steps_.size()))
                add(cotangents, nonzero, --waiting_);
            if (active_) adjoint(steps_.back());
            steps_.pop_back();
        } while (!steps_.empty() && !clock.over());
        captured_.clear();
        return steps_.empty() ? DONE : PAUSED;
    }

    int64_t finish(double* state, double* const* sums) {
        copy_out(state_, state);
        for (size_t k = 0; k < sums_.size(); ++k) copy_out(sums_[k], sums[k]);
        state_ = Tensor();
        sums_.clear();
        return std::exchange(adjoints_, 0);
    }

    Counts counts() const { return {static_cast<int64_t>(record_.size()), rejected_}; }
    int64_t kept() const { return steps_.size(); }

  private:
    class Clock {
      public:
        explicit Clock(double seconds)
            : end_(std::chrono::steady_clock::now() +
                   std::chrono::microseconds(static_cast<int64_t>(1e6 * seconds))) {}
        bool over() const { return std::chrono::steady_clock::now() >= end_; }

      private:
        std::chrono::steady_clock::time_point end_;
    };

    void begin() {
        const Settings& settings = plan_.settings;
        const Form form{DOUBLE, {settings.size}, {1}};
        u_ = form.view(start_);
        if (settings.fsal) slope_ = form.view(slope_start_);
        carried_ = views(plan_.carried, carried_start_.data());
        steps_.clear();
        outputs_at_.clear();
        if (!again_) record_.clear();
        index_ = interval_ = position_ = 0;
        s_ = times_[0];
        natural_ = control_.first_step;
        rejected_ = 0;
        failed_ = false;
        state_ = Tensor();
        sums_.clear();
    }

    // The next output, from the state as it stands.
    void output() {
        const int64_t size = plan_.settings.size;
        const double* u = u_.data<double>();
        if (plan_.settings.dtype == FLOAT) {
            std::copy_n(u, size, static_cast<float*>(outputs_) + interval_ * size);
        } else {
            std::copy_n(u, size, static_cast<double*>(outputs_) + interval_ * size);
        }
        outputs_at_.push_back(index_);
        ++interval_;
        position_ = 0;
    }

    // A step whose length is known: fixed, or one that was taken before.
    Status known() {
        double start, length;
        bool reached;
        if (again_) {
            start = control_.direction * record_[index_].first;
            length = control_.direction * record_[index_].second;
            reached = index_ + 1 == reached_[interval_];
        } else {
            const double begin = times_[interval_ - 1], span = times_[interval_] - begin;
            const int64_t number = counts_[interval_ - 1];
            length = span / static_cast<double>(number);
            start = position_ ? begin + static_cast<double>(position_) * length : begin;
            reached = ++position_ == number;
        }
        Tensors results = attempt(start, length);
        const double square = results[0].data<double>()[0];
        if (!(square < MODERATE)) {
            const double* end = results[1].data<double>();
            for (int64_t k = 0; k < plan_.settings.size; ++k)
                if (!std::isfinite(end[k])) return NOT_FINITE;
        }
        accept(std::move(results), reached);
        return PAUSED;
    }

    // One attempt of an adaptive step: _Sweep.adapt of stepping.py.
    Status adapt() {
        if (control_.max_steps >= 0 && index_ >= control_.max_steps) return STEP_LIMIT;
        const double end = times_[interval_], left = end - s_;
        const double size = std::fabs(s_), spacing = std::nextafter(size, INFINITE) - size;
        const double least = std::max(4.0 * spacing, 1e-30 * left);
        const double natural =
            std::min(std::max({natural_, control_.min_step, least}), control_.max_step);
        if (natural < std::min(least, left)) return TOO_SMALL;
        double wanted = natural;
        if (natural >= left * (1.0 - 1e-10)) {
            wanted = left;
        } else if (natural > left / 2.0) {
            wanted = left / 2.0;
        }
        // The clock moves by as much as the state: move of clock.py.
        const bool reached = wanted == left;
        double after = reached ? end : s_ + wanted;
        if (!reached && after - s_ > wanted) after = std::nextafter(after, s_);
        const double length = after - s_;
        Tensors results = attempt(s_, length);
        const double* looks = results[0].data<double>();
        const double error = looks[1];
        const bool finite = looks[0] < MODERATE && looks[2] < MODERATE;
        bool accepted = false;
        double proposed = length;
        if (std::isfinite(error)) {
            double factor = error != 0.0
                ? SAFETY * std::pow(error, -1.0 / plan_.settings.order) : INFINITE;
            factor = std::min(std::max(factor, LEAST_FACTOR), LARGEST_FACTOR);
            accepted = error <= 1.0;
            proposed = std::min(length * factor, control_.longest);
        }
        if (accepted && finite) {
            const bool shortened = wanted < natural && proposed >= length;
            natural_ = shortened ? std::max(proposed, natural) : proposed;
            s_ = after;
            failed_ = false;
            accept(std::move(results), reached);
            return PAUSED;
        }
        ++rejected_;
        failed_ = failed_ || !finite;
        if (wanted <= std::max(control_.min_step, least)) return failed_ ? NOT_FINITE : TOO_SMALL;
        if (!finite) proposed = FAILURE_FACTOR * length;
        natural_ = 0.0 < proposed && proposed < length ? proposed : FAILURE_FACTOR * length;
        return PAUSED;
    }

    Tensors attempt(double start, double length) {
        current_.t = control_.direction * start;
        current_.h = control_.direction * length;
        std::vector<Handle> inputs{number(current_.t).take(), number(current_.h).take(),
                                   u_.share()};
        for (const Tensor& tensor : tolerances_) inputs.push_back(tensor.share());
        if (slope_) inputs.push_back(slope_.share());
        for (const Tensor& tensor : captured_) inputs.push_back(tensor.share());
        return plan_.settings.step(inputs, plan_.settings.results);
    }

    void accept(Tensors results, bool reached) {
        const Settings& settings = plan_.settings;
        const int64_t count = results.size();
        if (control_.keep) {
            Tensors kept;
            kept.push_back(in_users_precision());
            for (int64_t k = settings.begin; k < settings.end; ++k)
                kept.push_back(std::move(results[k]));
            for (Tensor& tensor : carried_) kept.push_back(std::move(tensor));
            for (int64_t k = settings.end; k < settings.last; ++k)
                kept.push_back(std::move(results[k]));
            steps_.push_back({current_.t, current_.h, std::move(kept)});
        }
        u_ = std::move(results[1]);
        if (settings.fsal) slope_ = std::move(results[2]);
        carried_.clear();
        for (int64_t k = settings.last; k < count; ++k) carried_.push_back(std::move(results[k]));
        if (!again_) record_.emplace_back(current_.t, current_.h);
        ++index_;
        if (reached) {
            if (!again_) {
                reached_.resize(times_.size());
                reached_[interval_] = index_;
            }
            output();
        }
    }

    Tensor in_users_precision() {
        const int64_t size = plan_.settings.size;
        if (plan_.settings.dtype == DOUBLE) return Tensor(u_.share());
        Tensor rounded = vector(size, FLOAT);
        std::copy_n(u_.data<double>(), size, rounded.data<float>());
        return rounded;
    }

    void add(const double* cotangents, const char* nonzero, size_t output) {
        if (!nonzero[output]) return;
        const int64_t size = plan_.settings.size;
        Tensor sum = vector(size, DOUBLE);
        const double *state = state_.data<double>(), *more = cotangents + output * size;
        double* target = sum.data<double>();
        for (int64_t k = 0; k < size; ++k) target[k] = state[k] + more[k];
        state_ = std::move(sum);
        active_ = true;
    }

    void adjoint(Step& step) {
        std::vector<Handle> inputs{number(step.t).take(), number(step.h).take(), state_.take()};
        for (Tensor& tensor : step.checkpoint) inputs.push_back(tensor.take());
        for (Tensor& tensor : sums_) inputs.push_back(tensor.take());
        for (const Tensor& tensor : captured_) inputs.push_back(tensor.share());
        Tensors results = plan_.settings.adjoint(inputs, 1 + sums_.size());
        state_ = std::move(results[0]);
        for (size_t k = 0; k < sums_.size(); ++k) sums_[k] = std::move(results[1 + k]);
        ++adjoints_;
    }

    const Plan& plan_;
    Control control_;
    const std::vector<double> times_;
    const std::vector<int64_t> counts_;  // of fixed steps between them
    double *const start_, *const slope_start_;
    const std::vector<void*> carried_start_;
    void* outputs_ = nullptr;
    // Where the sweep stands.
    Tensor u_, slope_;
    Tensors carried_, tolerances_, captured_;
    Step current_;
    size_t interval_;
    int64_t index_, position_, rejected_;
    double s_, natural_;
    bool failed_, again_ = false;
    // What it has done.
    std::deque<Step> steps_;
    std::vector<std::pair<double, double>> record_;
    std::vector<int64_t> outputs_at_, reached_;
    // Its adjoint.
    Tensor state_;
    Tensors sums_;
    size_t waiting_ = 0;
    bool active_ = false;
    int64_t adjoints_ = 0;
};

std::vector<Form> forms(const int64_t*& text) {
    std::vector<Form> found(*text++);
    for (Form& form : found) {
        form.dtype = static_cast<int32_t>(*text++);
        const int64_t dimensions = *text++;
        form.sizes.assign(text, text + dimensions);
        form.strides.assign(text + dimensions, text + 2 * dimensions);
        text += 2 * dimensions;
    }
    return found;
}

template <typename Function>
int64_t guarded(Function function) {
    try {
        return function();
    } catch (...) {
        return GRAPH_FAILED;
    }
}

}  // namespace

extern "C" {

void pnode_torch(const Torch* functions) { torch = *functions; }

// `text`: the forms of the tolerances, of what a step passes on to the next, of what f reads, and
// of the sums of mu.
void* pnode_plan(const Settings* settings, const int64_t* text) {
    Plan* plan = new Plan{*settings, {}, {}, {}, {}};
    plan->tolerances = forms(text);
    plan->carried = forms(text);
    plan->captured = forms(text);
    plan->sums = forms(text);
    return plan;
}

void pnode_free_plan(void* plan) { delete static_cast<Plan*>(plan); }

void* pnode_sweep(void* plan, const Control* control, const double* times, const int64_t* counts,
                  int64_t number, double* start, double* slope, void* const* carried) {
    try {
        return new Sweep(*static_cast<Plan*>(plan), *control, times, counts, number, start, slope,
                         carried);
    } catch (...) {
        return nullptr;
    }
}

void pnode_free_sweep(void* sweep) { delete static_cast<Sweep*>(sweep); }

int64_t pnode_forward(void* sweep, void* const* tolerances, void* const* captured, void* outputs,
                      double seconds, Counts* counts) {
    return guarded([&] {
        Sweep& own = *static_cast<Sweep*>(sweep);
        const Status status = own.forward(tolerances, captured, outputs, seconds);
        *counts = own.counts();
        return status;
    });
}

int64_t pnode_repeat(void* sweep, int64_t keep) {
    return guarded([&] {
        static_cast<Sweep*>(sweep)->repeat(keep);
        return DONE;
    });
}

int64_t pnode_reverse(void* sweep, void* const* captured, double* const* zeros,
                      const double* cotangents, const char* nonzero, double seconds) {
    return guarded([&] {
        return static_cast<Sweep*>(sweep)->reverse(captured, zeros, cotangents, nonzero, seconds);
    });
}

int64_t pnode_finish(void* sweep, double* state, double* const* sums, int64_t* adjoints) {
    return guarded([&] {
        *adjoints = static_cast<Sweep*>(sweep)->finish(state, sums);
        return DONE;
    });
}

// How many tensors there are, for tests.
int64_t pnode_owned() { return owned; }

int64_t pnode_kept(void* sweep) { return static_cast<Sweep*>(sweep)->kept(); }
}

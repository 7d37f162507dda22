// Explicit steps as compiled graphs, a kernel for sweeps.cpp: what integrator.py and
// adjoint/compiled.py do, with the same numbers. Above this stands kernel.h.
//
// Steps and adjoints are graphs in libraries of their own, called through torch's C interface for
// compiled graphs; graph_steps.py passes the functions.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <deque>
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

struct Settings {  // of graph_steps.py
    int64_t size, dtype, fsal, adaptive, results, begin, end, last;
    int64_t evaluations, products, again, bytes;
    Graph step, adjoint;
};

struct Plan : Settings {
    std::vector<Form> tolerances, carried, captured, sums;
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
        const Form form{DOUBLE, {size}, {1}};
        u_ = form.view(start_);
        if (plan_.fsal) slope_ = form.view(slope_start_);
        carried_ = views(plan_.carried, carried_start_.data());
        checkpoints_.clear();
        state_ = Tensor();
        sums_.clear();
    }

    Attempt attempt(double t, double h) override {
        std::vector<Handle> inputs{number(t).take(), number(h).take(), u_.share()};
        for (const Tensor& tensor : tolerances_) inputs.push_back(tensor.share());
        if (slope_) inputs.push_back(slope_.share());
        for (const Tensor& tensor : captured_) inputs.push_back(tensor.share());
        results_ = plan_.step(inputs, plan_.results);
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
        if (keep) {
            Tensors kept;
            kept.push_back(in_users_precision());
            for (int64_t k = plan_.begin; k < plan_.end; ++k)
                kept.push_back(std::move(results_[k]));
            for (Tensor& tensor : carried_) kept.push_back(std::move(tensor));
            for (int64_t k = plan_.end; k < plan_.last; ++k)
                kept.push_back(std::move(results_[k]));
            checkpoints_.push_back(std::move(kept));
            counts.bytes += plan_.bytes;
        }
        u_ = std::move(results_[1]);
        if (plan_.fsal) slope_ = std::move(results_[2]);
        carried_.clear();
        for (int64_t k = plan_.last; k < plan_.results; ++k)
            carried_.push_back(std::move(results_[k]));
        results_.clear();
    }

    void output(void* outputs, int64_t index) const override {
        const double* u = u_.data<double>();
        if (plan_.dtype == FLOAT) {
            std::copy_n(u, size, static_cast<float*>(outputs) + index * size);
        } else {
            std::copy_n(u, size, static_cast<double*>(outputs) + index * size);
        }
    }

    int64_t kept() const override { return checkpoints_.size(); }

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
        for (Tensor& tensor : checkpoints_.back()) inputs.push_back(tensor.take());
        for (Tensor& tensor : sums_) inputs.push_back(tensor.take());
        for (const Tensor& tensor : captured_) inputs.push_back(tensor.share());
        Tensors results = plan_.adjoint(inputs, 1 + sums_.size());
        state_ = std::move(results[0]);
        for (size_t k = 0; k < sums_.size(); ++k) sums_[k] = std::move(results[1 + k]);
        counts.vjp += plan_.products;
        counts.rhs += plan_.again;
        return DONE;
    }

    void forget() override { checkpoints_.pop_back(); }

    void end_adjoint(double* state, double* const* sums) override {
        copy_out(state_, state);
        for (size_t k = 0; k < sums_.size(); ++k) copy_out(sums_[k], sums[k]);
        state_ = Tensor();
        sums_.clear();
    }

  private:
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

}  // namespace

extern "C" {

void pnode_torch(const Torch* functions) { torch = *functions; }

// `text`: the forms of the tolerances, of what a step passes on to the next, of what f reads, and
// of the sums of mu.
void* pnode_plan(const Settings* settings, const int64_t* text) {
    Plan* plan = new Plan{*settings, {}, {}, {}, {}};
    for (auto* part : {&plan->tolerances, &plan->carried, &plan->captured, &plan->sums})
        *part = forms(text);
    return plan;
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

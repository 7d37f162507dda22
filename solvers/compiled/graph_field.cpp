// A field y' = f(t, y, p) as compiled graphs: the functions that implicit_steps.cpp lists, but those of
// Rosenbrock methods. Above this stand kernel.h, graphs.h, N and AUTONOMOUS.

namespace {

struct FieldGraphs {  // of graph_programs.py
    int64_t saved, parameters;
    Graph value, rows, product;
};

struct Plan : FieldGraphs {
    std::vector<Form> read;  // unit vectors, y, and what f reads besides
} plan;                      // the same in all sweeps: a library is for one field

// f, and what its derivatives need of an evaluation, where it was evaluated last.
class Field {
  public:
    static constexpr bool CHEAP = false;

    Field* lend(void* const* captured) {
        saved_.clear();
        known_ = false;
        read_ = captured ? views(plan.read, captured) : Tensors();
        return this;
    }

    void value(double t, const double* y, double* f) {
        evaluate(t, y);
        std::memcpy(f, value_, sizeof(value_));
    }

    void jacobian(double t, const double* y, double* f, double* J) {
        value(t, y, f);
        copy_out(derivative(plan.rows, read_[0].share(), 1)[0], J);
    }

    void parameters(double t, const double* y, const double* w, double* mu) {
        evaluate(t, y);
        double cotangent[N];
        std::memcpy(cotangent, w, sizeof(cotangent));
        const Handle given = plan.read[1].view(cotangent).take();
        const Tensors found = derivative(plan.product, given, 1 + plan.parameters);
        for (int64_t k = 1; k <= plan.parameters; k++) {
            const int64_t count = entries(found[k]);
            sum_.resize(std::max(sum_.size(), size_t(count)));
            copy_out(found[k], sum_.data());
            for (int64_t i = 0; i < count; i++) mu[i] += sum_[i];
            mu += count;
        }
    }

  private:
    void evaluate(double t, const double* y) {
        const bool there = known_ && std::memcmp(y, point_, sizeof(point_)) == 0;
        if (there && (AUTONOMOUS || t == time_)) return;
        known_ = false;
        saved_.clear();
        time_ = t;
        std::memcpy(point_, y, sizeof(point_));
        std::vector<Handle> inputs;
        stand(inputs);
        saved_ = plan.value(inputs, 1 + plan.saved);
        copy_out(saved_[0], value_);
        known_ = true;
    }

    Tensors derivative(const Graph& graph, Handle first, size_t results) {
        std::vector<Handle> inputs{first};
        stand(inputs);
        for (size_t k = 1; k < saved_.size(); k++) inputs.push_back(saved_[k].share());
        return graph(inputs, results);
    }

    void stand(std::vector<Handle>& inputs) {
        inputs.push_back(number(time_).take());
        inputs.push_back(plan.read[1].view(point_).take());
        for (size_t k = 2; k < read_.size(); k++) inputs.push_back(read_[k].share());
    }

    bool known_ = false;
    double time_ = 0.0, point_[N], value_[N];
    Tensors read_, saved_;
    std::vector<double> sum_;
};

typedef Field* Captured;

void value(double t, const double* y, Captured c, double* f) { c->value(t, y, f); }

void jacobian(double t, const double* y, Captured c, double* f, double* J) {
    c->jacobian(t, y, f, J);
}

void parameters(double t, const double* y, const double* w, Captured c, double* mu) {
    c->parameters(t, y, w, mu);
}

}  // namespace

extern "C" void pnode_field(const FieldGraphs* graphs, const int64_t* text) {
    plan = Plan{*graphs, forms(text)};
}

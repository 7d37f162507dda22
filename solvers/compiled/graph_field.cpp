// A field y' = f(t, y, p) as compiled graphs: the functions that implicit_steps.cpp lists. Above this
// stand kernel.h, graphs.h, N, WIDTH, AUTONOMOUS, and POINTS, at how many points its value is kept; ENTRIES of a
// Jacobian, and COLORS, the products that tell them if it is sparse, else 0.

namespace {

constexpr double SQRT_EPS = 1.0 / (1 << 26);

struct FieldGraphs {  // of graph_programs.py
    int64_t saved, parameters;
    Graph value, rows, product;
    Graph rate, second;  // of second_graphs.py, for Rosenbrock methods
};

struct Plan : FieldGraphs {
    std::vector<Form> read;  // unit vectors, one of them, y, and what f reads besides
    std::vector<Form> more;  // what rate and second read
    std::vector<int64_t> rows_of, columns_of, colors;  // of the entries; of each row; see colored.py
} plan;                      // the same in all sweeps: a library is for one field

// f, and what its derivatives need of an evaluation, where it was evaluated last.
class Field {
  public:
    static constexpr bool CHEAP = false, TOGETHER = false;

    Field* lend(void* const* captured, Together* = nullptr) {
        found_.clear();
        for (Point& point : points_) point.known = false, point.saved.clear();
        read_ = captured ? views(plan.read, captured) : Tensors();
        more_ = captured ? views(plan.more, captured + plan.read.size()) : Tensors();
        return this;
    }

    void value(double t, const double* y, double* f) {
        std::memcpy(f, evaluated(t, y).value, sizeof(Point::value));
    }

    void jacobian(double t, const double* y, double* f, double* J) {
        value(t, y, f);
        const Tensors products = derivative(plan.rows, evaluated(t, y), read_[0].share(), 1);
        if (COLORS > 0)
            take_entries(products[0], J);
        else if (WIDTH > N)
            take_halves(products[0], J);
        else
            copy_out(products[0], J);
    }

    void slopes(double t, const double* y, double* f, double* J, double* ft) {
        jacobian(t, y, f, J);
        if (AUTONOMOUS)
            std::memset(ft, 0, sizeof(Point::y));
        else
            copy_out(twice(plan.rate, t, y, y, y, 0.0, 1)[0], ft);
    }

    void pull_back(double t, const double* y, const double* w, double* l) {
        copy_out(products(t, y, w)[0], l);
    }

    void parameters(double t, const double* y, const double* w, double* mu) {
        add(products(t, y, w), mu);
    }

    void second(double t, const double* y, const double* w, const double* v, double rate, double* l,
                double* mu) {
        const Tensors found = twice(plan.second, t, y, w, v, rate, 1 + plan.parameters);
        double own[N];
        copy_out(found[0], own);
        for (int k = 0; k < N; k++) l[k] += own[k];
        add(found, mu);
    }

  private:
    struct Point {
        bool known = false;
        double time = 0.0, y[WIDTH], value[N];
        Tensors saved;
    };

    Point& evaluated(double t, const double* y) {
        for (Point& point : points_) {
            const bool there = point.known && std::memcmp(y, point.y, sizeof(point.y)) == 0;
            if (there && (AUTONOMOUS || t == point.time)) return point;
        }
        Point& point = points_[next_];
        next_ = (next_ + 1) % POINTS;
        found_.clear();
        point.known = false;
        point.saved.clear();
        point.time = t;
        std::memcpy(point.y, y, sizeof(point.y));
        std::vector<Handle> inputs;
        stand(inputs, point);
        point.saved = plan.value(inputs, 1 + plan.saved);
        copy_out(point.saved[0], point.value);
        point.known = true;
        return point;
    }

    // dF/dy and dF/dy' from the products of unit vectors with -F at (y, y').
    void take_halves(const Tensor& products, double* J) {
        products_.resize(N * WIDTH);
        copy_out(products, products_.data());
        const double* row = products_.data();
        for (int i = 0; i < N; i++, row += WIDTH)
            for (int k = 0; k < N; k++) J[i * N + k] = row[k], J[(N + i) * N + k] = -row[WIDTH - N + k];
    }

    // Of a Jacobian from one product for each color, and one more, which shows that there are no others.
    void take_entries(const Tensor& products, double* J) {
        products_.resize((COLORS + 1) * N), sums_.assign(2 * N, 0.0);
        copy_out(products, products_.data());
        const double *w = read_[0].data<double>() + COLORS * N, *exact = &products_[COLORS * N];
        double *found = &sums_[0], *scale = &sums_[N];
        for (int k = 0; k < ENTRIES; k++) {
            const int64_t row = plan.rows_of[k], column = plan.columns_of[k];
            J[k] = products_[plan.colors[row] * N + column];
            found[column] += J[k] * w[row];
            scale[column] += std::fabs(J[k] * w[row]);
        }
        for (int k = 0; k < N; k++) {
            const double most = SQRT_EPS * (scale[k] + std::fabs(exact[k]));
            if (std::fabs(exact[k] - found[k]) > most) throw MISSING;
        }
    }

    // Those of w, if they were not taken last.
    const Tensors& products(double t, const double* y, const double* w) {
        Point& point = evaluated(t, y);
        const bool same = std::memcmp(w, cotangent_, sizeof(cotangent_)) == 0;
        if (found_.empty() || found_at_ != &point || !same) {
            found_.clear();
            std::memcpy(cotangent_, w, sizeof(cotangent_));
            found_ = derivative(plan.product, point, plan.read[1].view(cotangent_).take(),
                                1 + plan.parameters);
            found_at_ = &point;
        }
        return found_;
    }

    Tensors derivative(const Graph& graph, Point& point, Handle first, size_t results) {
        std::vector<Handle> inputs{first};
        stand(inputs, point);
        for (size_t k = 1; k < point.saved.size(); k++) inputs.push_back(point.saved[k].share());
        return graph(inputs, results);
    }

    void stand(std::vector<Handle>& inputs, Point& point) {
        inputs.push_back(number(point.time).take());
        inputs.push_back(plan.read[2].view(point.y).take());
        for (size_t k = 3; k < read_.size(); k++) inputs.push_back(read_[k].share());
    }

    Tensors twice(const Graph& graph, double t, const double* y, const double* w, const double* v,
                  double rate, size_t results) const {
        double given[3][N];
        const double* const from[] = {w, v, y};
        for (int i = 0; i < 3; i++) std::memcpy(given[i], from[i], sizeof(given[i]));
        std::vector<Handle> inputs;
        for (int i = 0; i < 2; i++) inputs.push_back(plan.read[1].view(given[i]).take());
        inputs.push_back(number(rate).take());
        inputs.push_back(number(t).take());
        inputs.push_back(plan.read[1].view(given[2]).take());
        for (const Tensor& tensor : more_) inputs.push_back(tensor.share());
        return graph(inputs, results);
    }

    // mu += the gradients behind the first result.
    void add(const Tensors& found, double* mu) {
        for (int64_t k = 1; k <= plan.parameters; k++) {
            const int64_t count = entries(found[k]);
            sum_.resize(std::max(sum_.size(), size_t(count)));
            copy_out(found[k], sum_.data());
            for (int64_t i = 0; i < count; i++) mu[i] += sum_[i];
            mu += count;
        }
    }

    Point points_[POINTS];
    int next_ = 0;
    Tensors read_, more_, found_;
    const Point* found_at_ = nullptr;
    double cotangent_[N];
    std::vector<double> sum_, products_, sums_;
};

typedef Field* Captured;

void value(double t, const double* y, Captured c, double* f) { c->value(t, y, f); }

void jacobian(double t, const double* y, Captured c, double* f, double* J) {
    c->jacobian(t, y, f, J);
}

void slopes(double t, const double* y, Captured c, double* f, double* J, double* ft) {
    c->slopes(t, y, f, J, ft);
}

void pull_back(double t, const double* y, const double* w, Captured c, double* l) {
    c->pull_back(t, y, w, l);
}

void parameters(double t, const double* y, const double* w, Captured c, double* mu) {
    c->parameters(t, y, w, mu);
}

void second(double t, const double* y, int count, const double (*w)[N], const double (*v)[N],
            const double* rates, Captured c, double* l, double* mu) {
    for (int i = count - 1; i >= 0; i--) c->second(t, y, w[i], v[i], rates[i], l, mu);
}

}  // namespace

// The last three: null where Jacobians are dense.
extern "C" void pnode_field(const FieldGraphs* graphs, const int64_t* text, const int64_t* rows_of,
                            const int64_t* columns_of, const int64_t* colors) {
    static_cast<FieldGraphs&>(plan) = *graphs;
    plan.read = forms(text);
    plan.more = forms(text);
    if (!COLORS || !plan.colors.empty()) return;
    plan.rows_of.assign(rows_of, rows_of + ENTRIES);
    plan.columns_of.assign(columns_of, columns_of + ENTRIES);
    plan.colors.assign(colors, colors + N);
}

// A field y' = f(t, y, p) on states with ghost cells or without, as compiled graphs: the functions that
// implicit_steps.cpp lists. Its Jacobian is no matrix but a point, for products there: krylov_systems.h.
// Ranks evaluate f and take products together, and one that has failed goes on with NaN. Above this
// stand kernel.h, graphs.h, exchange.h, N, WIDTH, AUTONOMOUS, and SEEN, what f gets of a state.

#include <map>

namespace {

constexpr int ENTRIES = 1;  // of a Jacobian: where its point is
constexpr bool CONSTANT = false;

struct GhostGraphs {  // of ghost_programs.py
  int64_t saved, parameters;
  Graph value, derivative, transpose, product;
};

struct Plan : GhostGraphs {
  Exchange exchange{};
  std::vector<Form> forms;  // of what f gets and returns
  std::vector<Form> read;   // what it reads besides
} plan;                     // the same in all sweeps: a library is for one field

class Field {
 public:
  static constexpr bool CHEAP = false, TOGETHER = true;

  struct Point {
    Field* field = nullptr;
    double time = 0.0, value[N];
    Numbers seen;  // of the state
    Tensors saved;  // none where they are to be had from what was seen
  };

  Field* lend(void* const* captured, Together* given = nullptr) {
    together = given;
    last_.saved.clear();
    found_.clear();
    for (auto& [J, point] : points_) point.saved.clear();
    read_ = captured ? views(plan.read, captured) : Tensors();
    return this;
  }

  void value(double t, const double* y, double* f) {
    std::memcpy(f, evaluated(t, y).value, sizeof(last_.value));
  }

  void jacobian(double t, const double* y, double* f, double* J) {
    value(t, y, f);
    Point& point = points_[J];
    point.field = this, point.time = last_.time, point.seen = last_.seen;
    point.saved.clear();
    found_.clear();
    tried([&] {
      for (const Tensor& tensor : last_.saved) point.saved.emplace_back(tensor.share());
    });
    const Point* address = &point;
    std::memcpy(J, &address, sizeof(address));
  }

  // y = f_y x.
  void push(Point& point, const double* x, double* y) {
    cells_.assign(SEEN, 0.0);
    together->failed |= !gather(x, cells_.data());
    attempted(y, N, [&] {
      copy_out(derivative(plan.derivative, point, plan.forms[0].view(cells_.data()), 1)[0], y);
    });
  }

  // l = f_y^T w.
  void pull(Point& point, const double* w, double* l) {
    scatter(l, [&] {
      std::memcpy(given_, w, sizeof(given_));
      return derivative(plan.transpose, point, plan.forms[1].view(given_), 1);
    });
  }

  // With what parameters() takes of the same w.
  void pull_back(double t, const double* y, const double* w, double* l) {
    Point& point = evaluated(t, y);
    scatter(l, [&]() -> const Tensors& { return products(point, w); });
  }

  // The rank's own part of it, of a field that reads some.
  void parameters(double t, const double* y, const double* w, double* mu) {
    Point& point = evaluated(t, y);
    if (!plan.parameters) return;
    tried([&] {
      const Tensors& found = products(point, w);
      for (int64_t k = 1; k <= plan.parameters; k++) {
        const int64_t count = entries(found[k]);
        cells_.resize(std::max(cells_.size(), size_t(count)));
        copy_out(found[k], cells_.data());
        for (int64_t i = 0; i < count; i++) mu[i] += cells_[i];
        mu += count;
      }
    });
  }

  Together* together = nullptr;

 private:
  Point& evaluated(double t, const double* y) {
    const bool there = known_ && std::memcmp(y, y_, sizeof(y_)) == 0;
    if (together->agreed(there && (AUTONOMOUS || t == last_.time))) return last_;
    last_.time = t;
    std::memcpy(y_, y, sizeof(y_));
    last_.seen.assign(SEEN, 0.0);
    together->failed |= !gather(y, last_.seen.data());
    last_.saved.clear();
    found_.clear();
    attempted(last_.value, N, [&] { run(last_); });
    known_ = !together->failed;  // of this rank: then all evaluate f there again
    return last_;
  }

  void run(Point& point) {
    std::vector<Handle> inputs;
    stand(inputs, point);
    point.saved = plan.value(inputs, 1 + plan.saved);
    copy_out(point.saved[0], point.value);
  }

  // Those of w, if they were not taken last.
  const Tensors& products(Point& point, const double* w) {
    const bool same = found_at_ == &point && std::memcmp(w, cotangent_, sizeof(cotangent_)) == 0;
    if (same && !found_.empty()) return found_;
    found_.clear();
    std::memcpy(cotangent_, w, sizeof(cotangent_));
    found_ = derivative(plan.product, point, plan.forms[1].view(cotangent_), 1 + plan.parameters);
    found_at_ = &point;
    return found_;
  }

  Tensors derivative(const Graph& graph, Point& point, Tensor first, size_t results) {
    if (point.saved.empty()) run(point);
    std::vector<Handle> inputs{first.take()};
    stand(inputs, point);
    for (size_t k = 1; k < point.saved.size(); k++) inputs.push_back(point.saved[k].share());
    return graph(inputs, results);
  }

  template <typename Function>
  void scatter(double* l, Function function) {
    cells_.resize(SEEN);
    attempted(cells_.data(), SEEN, [&] {
      const Tensors& found = function();
      copy_out(found[0], cells_.data());
    });
    together->failed |= !scatter_to(l);
  }

  // A state without ghost cells is all that f gets.
  static bool gather(const double* owned, double* seen) {
    if (plan.exchange.forest) return plan.exchange.gather(owned, seen);
    std::copy_n(owned, N, seen);
    return true;
  }

  bool scatter_to(double* owned) const {
    if (!plan.exchange.forest) return std::copy_n(cells_.data(), N, owned), true;
    std::fill_n(owned, N, 0.0);
    return plan.exchange.scatter(cells_.data(), owned);
  }

  void stand(std::vector<Handle>& inputs, Point& point) {
    inputs.push_back(number(point.time).take());
    inputs.push_back(plan.forms[0].view(point.seen.data()).take());
    for (const Tensor& tensor : read_) inputs.push_back(tensor.share());
  }

  template <typename Function>
  bool tried(Function function) {
    if (together->failed) return false;
    try {
      function();
    } catch (...) {
      together->failed = true;
    }
    return !together->failed;
  }

  template <typename Function>
  void attempted(double* result, int count, Function function) {
    if (!tried(function)) std::fill_n(result, count, NAN);
  }

  Point last_;  // where f was evaluated last, at this state
  bool known_ = false;
  double y_[N];
  std::map<const double*, Point> points_;  // of each Jacobian
  Tensors read_, found_;
  const Point* found_at_ = nullptr;
  Numbers cells_;
  alignas(64) double cotangent_[N], given_[N];
};

typedef Field* Captured;

void value(double t, const double* y, Captured c, double* f) { c->value(t, y, f); }

void jacobian(double t, const double* y, Captured c, double* f, double* J) {
  c->jacobian(t, y, f, J);
}

void pull_back(double t, const double* y, const double* w, Captured c, double* l) {
  c->pull_back(t, y, w, l);
}

void parameters(double t, const double* y, const double* w, Captured c, double* mu) {
  c->parameters(t, y, w, mu);
}

}  // namespace

extern "C" void pnode_field(const GhostGraphs* graphs, const int64_t* text) {
  static_cast<GhostGraphs&>(plan) = *graphs;
  plan.forms = forms(text);
  plan.read = forms(text);
}

extern "C" void pnode_exchange(const Exchange* exchange) { plan.exchange = *exchange; }

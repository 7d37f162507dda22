// Explicit Runge-Kutta steps and their adjoints. Above this stands implicit_steps.cpp.

namespace {

// The stages are kept, but one that is the next step's first (stiffly_accurate: FSAL).
class Explicit : public ImplicitSteps {
 public:
  Explicit(const Settings& settings, const double* y0) : ImplicitSteps(settings, y0) {
    for (int i = own_stages() - 1; i >= 0; i--) {
      live[i] = m.b[i] != 0.0;
      for (int j = i + 1; j < own_stages(); j++) live[i] |= live[j] && m.A[j * m.stages + i] != 0.0;
    }
  }

  void begin() override {
    ImplicitSteps::begin();
    knows_slope = false;
  }

  void accept(bool keep) override {
    ImplicitSteps::accept(keep);
    if (m.stiffly_accurate) std::memcpy(slope[0], slope[m.stages - 1], sizeof(slope[0]));
    knows_slope = m.stiffly_accurate;
  }

  double first_step(const Control& control, double s, double stop) override {
    return control.first_step > 0.0 ? control.first_step : automatic_step(control, s, stop);
  }

  // ExplicitAdjoint has the equations.
  Status adjoint(int64_t index, double t, double h) override {
    const double* Y = values.data() + index * N * own_stages();
    double l[MOST_STAGES][N], w[N], after[N];
    std::memcpy(after, lambda, sizeof(after));
    for (int i = own_stages() - 1; i >= 0; i--) {
      if (!live[i]) continue;
      for (int k = 0; k < N; k++) w[k] = m.b[i] * lambda[k];
      for (int j = i + 1; j < own_stages(); j++) {
        const double a = m.A[j * m.stages + i];
        if (live[j] && a != 0.0)
          for (int k = 0; k < N; k++) w[k] += a * l[j][k];
      }
      for (int k = 0; k < N; k++) w[k] *= h;
      const double time = t + m.alpha[i] * h;
      pull_back(time, Y + i * N, w, c, l[i]);
      counts.vjp++;
      if (m.wanted) parameters(time, Y + i * N, w, c, mu);
      for (int k = 0; k < N; k++) after[k] += l[i][k];
    }
    std::memcpy(lambda, after, sizeof(lambda));
    return DONE;
  }

 protected:
  void keep_step() override { keep_values(stages[0], N * own_stages()); }

  Status step(double t, double h) override {
    for (int i = 0; i < m.stages; i++) {
      if (i == 0 && knows_slope) {
        std::memcpy(stages[0], u, sizeof(u));
        continue;
      }
      combine(h, m.A + i * m.stages, i, u, stages[i]);
      value(t + m.alpha[i] * h, stages[i], c, slope[i]);
      counts.rhs++;
      if (m.adaptive && !(square(slope[i]) < MODERATE)) return NOT_FINITE;
      knows_slope = true;
    }
    combine(h, m.b, int(m.stages), u, end);
    const double zero[N] = {};
    if (m.adaptive) combine(h, m.defect, int(m.stages), zero, defect);
    for (int k = 0; k < N; k++)
      if (!std::isfinite(end[k])) return NOT_FINITE;
    return DONE;
  }

 private:
  int own_stages() const { return int(m.stages - m.stiffly_accurate); }

  // y = from + h sum_j weights_j slope_j.
  void combine(double h, const double* weights, int count, const double* from, double* y) const {
    for (int k = 0; k < N; k++) {
      double sum = 0.0;
      for (int j = 0; j < count; j++)
        if (weights[j] != 0.0) sum += weights[j] * slope[j][k];
      y[k] = from[k] + h * sum;
    }
  }

  double slope[MOST_STAGES][N];
  bool knows_slope = false, live[MOST_STAGES] = {};
};

struct LentField {
  Field field;
  Captured c = nullptr;
};

LentField& lent(void* part) { return *static_cast<LentField*>(part); }

}  // namespace

extern "C" {

// For the steps of another program, of which this is the explicit part.
const Part* pnode_part() {
  static const Part part = {
      [] { return static_cast<void*>(new LentField); },
      [](void* own) { delete &lent(own); },
      [](void* own, void* const* captured, Together* together) {
        lent(own).c = lent(own).field.lend(captured, together);
      },
      [](void* own, double t, const double* y, double* f) { value(t, y, lent(own).c, f); },
      [](void* own, double t, const double* y, const double* w, double* l, double* mu) {
        pull_back(t, y, w, lent(own).c, l);
        if (mu || Field::TOGETHER) parameters(t, y, w, lent(own).c, mu);
      },
  };
  return &part;
}

// To be freed by the sweep that takes it over.
void* pnode_implicit_steps(const Settings* settings, const double* y0, const double*) {
  return static_cast<Kernel*>(new Explicit(*settings, y0));
}
}

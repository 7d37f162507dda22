// Steps of fully implicit Runge-Kutta methods and their adjoints: what CoupledIntegrator, StageNewton
// and CoupledAdjoint do, which have the reasons. Above this stands implicit_steps.cpp.

namespace {

typedef std::complex<double> Complex;

constexpr int MOST_COUPLED = 3;  // stages
constexpr double LARGEST = 1e300, EPS = std::numeric_limits<double>::epsilon();

class PredictiveControl {
 public:
  explicit PredictiveControl(int most_iterations) : most(2 * most_iterations) {}

  void restart() { knows = false; }

  double reject(double step, double error, int iterations) const {
    return step * std::max(0.2, safety(iterations) * factor(step, error));
  }

  double accept(double step, double error, int iterations, bool renews) {
    const double found = std::min(10.0, safety(iterations) * factor(step, error));
    knows = true, length = step, last = error;
    return found < 1.2 && !renews ? step : step * found;
  }

 private:
  double safety(int iterations) const { return 0.9 * (most + 1) / (most + iterations); }

  double factor(double step, double error) const {
    if (error == 0.0) return 10.0;
    double growth = 1.0;
    if (knows && last > 0.0)
      growth = std::min(1.0, step / length * std::pow(last / error, 0.25));
    return growth * std::pow(error, -0.25);
  }

  const int most;
  bool knows = false;
  double length = 0.0, last = 0.0;
};

class Coupled : public ImplicitSteps {
 public:
  Coupled(const Settings& settings, const double* y0, const double* mass)
      : ImplicitSteps(settings, y0, mass), s(int(m.stages)), control(int(m.max_newton)) {
    chooses = m.adaptive;
    failure_factor = 0.5;
    first_order = 3.0;  // that of the error estimate
  }

  void begin() override {
    ImplicitSteps::begin();
    control.restart();
    tried = false;
    forget_last();
  }

  Attempt attempt(double t, double h) override {
    if (!m.adaptive) forget_last();
    const Status status = solve(t, h);
    if (status != DONE) {
      factored = 0.0, tried = true;
      return {status, 0.0};
    }
    return m.adaptive ? judge(t, h) : Attempt{DONE, 0.0};
  }

  void accept(bool keep) override {
    ImplicitSteps::accept(keep);
    tried = false;
  }

  void restart_step() override { forget_last(); }

  void adopt(const Kernel& other) override {
    ImplicitSteps::adopt(other);
    std::memcpy(Y, static_cast<const Coupled&>(other).Y, sizeof(Y));
    forget_last();
  }

  void live(Numbers& found) override { found.assign(Y, Y + s * N); }

  // K_Y^T w = d x lambda for the stages together.
  Status adjoint(int64_t index, double t, double h) override {
    const double* Y = kept_of(index, s * N);
    if (!couple(t, h, Y)) return SINGULAR;
    double w[MOST_COUPLED * N], driven[N] = {};
    for (int i = 0; i < s; i++)
      for (int k = 0; k < N; k++) w[i * N + k] = m.b[i] * lambda[k];
    coupled->solve_transposed(w, s * N);
    for (int i = 0; i < s; i++) {
      const double start = from_start(i);
      for (int k = 0; k < N; k++) driven[k] += start / h * w[i * N + k];
      add_parameters(t + m.alpha[i] * h, Y + i * N, w + i * N);
    }
    if (M) {
      std::memcpy(f, driven, sizeof(f));
      multiply_transposed(M, f, driven);
    }
    const double weight = start_weight();
    for (int k = 0; k < N; k++) lambda[k] = weight * lambda[k] + driven[k];
    return DONE;
  }

  // CoupledTangents has the equations.
  Status tangent(int64_t index, double t, double h) override {
    const double* Y = kept_of(index, s * N);
    if (!couple(t, h, Y)) return SINGULAR;
    Rows right[MOST_COUPLED], driven(du);
    if (M)
      for (size_t k = 0; k < du.size(); k += N) multiply(M, &du[k], &driven[k]);
    for (int i = 0; i < s; i++) {
      right[i].assign(du.size(), 0.0);
      plus(right[i], from_start(i) / h, driven);
      add_along(t + m.alpha[i] * h, Y + i * N, right[i]);
    }
    const double weight = start_weight();
    double x[MOST_COUPLED * N];
    for (size_t k = 0; k < du.size(); k += N) {
      for (int i = 0; i < s; i++) std::memcpy(x + i * N, &right[i][k], sizeof(f));
      coupled->solve(x, s * N);
      counts.krylov++;
      for (int j = 0; j < N; j++) {
        du[k + j] *= weight;
        for (int i = 0; i < s; i++) du[k + j] += m.b[i] * x[i * N + j];
      }
    }
    return DONE;
  }

 protected:
  void keep_step() override { keep_values(Y, s * N); }

 private:
  // That of stages in the variables in which their equations fall apart.
  double square_apart(const double* x, const double* scale) const {
    double apart[MOST_COUPLED * N] = {};
    for (int i = 0; i < s; i++)
      for (int j = 0; j < s; j++)
        for (int k = 0; k < N; k++) apart[i * N + k] += m.separated[i * s + j] * x[j * N + k];
    return square_in(apart, scale, s);
  }

  // Factor the matrix of a step's stages together, each with the Jacobian there.
  bool couple(double t, double h, const double* Y) {
    auto& lu = coupled->lu;
    for (int i = 0; i < s; i++) {
      jacobian(t + m.alpha[i] * h, Y + i * N, c, f, J);
      counts.jacobians++, counts.rhs++;
      for (int j = 0; j < s; j++)
        for (int k = 0; k < N; k++)
          for (int l = 0; l < N; l++)
            lu[i * N + k][j * N + l] =
                m.inverse[i * s + j] / h * entry(k, l) - (i == j ? J[k * N + l] : 0.0);
    }
    return coupled->factor(s * N);
  }

  // What a step's start is multiplied with in the equation of stage i, and in the step's end.
  double from_start(int i) const {
    double sum = 0.0;
    for (int j = 0; j < s; j++) sum += m.inverse[i * s + j];
    return sum;
  }

  double start_weight() const {
    double weight = 1.0;
    for (int i = 0; i < s; i++) weight -= m.b[i];
    return std::fabs(weight) <= 1e-12 ? 0.0 : weight;
  }

  double entry(int k, int l) const { return M ? M[k * N + l] : k == l; }

  void forget_last() {
    knows_jacobian = current = knows_slope = knows_last = false;
    factored = 0.0;
  }

  // The stages, with the Jacobian at hand or, where that fails, a new one.
  Status solve(double t, double h) {
    for (;;) {
      if (!knows_jacobian) {
        jacobian(t, u, c, slope, J);
        counts.jacobians++, counts.rhs++;
        factored = 0.0, current = true;
        if (!(square(slope) < LARGEST && square(J, N * N) < LARGEST)) return NOT_FINITE;
        knows_jacobian = knows_slope = true;
      }
      if (factored != h) factor(h);
      guess(h);
      Status status = newton(t, h, false);
      if (status == NOT_CONVERGED && !m.adaptive) guess(h), status = newton(t, h, true);
      if (status == DONE || current) return status;
      knows_jacobian = false;
    }
  }

  // A real eigenvalue comes first, if there is one.
  void factor(double h) {
    int which = 0;
    regular = true;
    if (s == MOST_COUPLED) {
      regular = real.factor(m.eigenvalues[0] / h, J, M);
      counts.factorizations++, which = 1;
    }
    const Complex shift = Complex(m.eigenvalues[2 * which], m.eigenvalues[2 * which + 1]) / h;
    for (int k = 0; k < N; k++)
      for (int l = 0; l < N; l++) pair.lu[k][l] = shift * entry(k, l) - J[k * N + l];
    regular = pair.factor() && regular;
    counts.factorizations++;
    factored = h;
  }

  // Z on the last step's polynomial; zero if there is none.
  void guess(double h) {
    std::memset(Z, 0, sizeof(Z));
    if (!knows_last) return;
    for (int i = 0; i < s; i++)
      for (int j = 0; j < s; j++) {
        double weight = (1.0 + m.alpha[i] * h / last_length) / m.alpha[j];
        for (int l = 0; l < s; l++)
          if (l != j)
            weight *= (1.0 + m.alpha[i] * h / last_length - m.alpha[l]) / (m.alpha[j] - m.alpha[l]);
        for (int k = 0; k < N; k++) Z[i * N + k] += (weight - m.b[j]) * last[j * N + k];
      }
  }

  // From b to Z of (A^-1 x M / h - I x J) Z = b.
  void solve_simplified(double* b) const {
    const int from = s == MOST_COUPLED;
    double first[N];
    Complex second[N];
    const auto at = [](const double* matrix, int i) {
      return Complex(matrix[2 * i], matrix[2 * i + 1]);
    };
    for (int k = 0; k < N; k++) {
      first[k] = 0.0, second[k] = 0.0;
      for (int i = 0; i < s; i++) {
        if (from) first[k] += (at(m.covectors, i) * b[i * N + k]).real();
        second[k] += at(m.covectors, from * s + i) * b[i * N + k];
      }
    }
    if (from) real.solve(first);
    pair.solve(second);
    for (int i = 0; i < s; i++)
      for (int k = 0; k < N; k++) {
        const double own = from ? (at(m.vectors, i * (1 + from)) * first[k]).real() : 0.0;
        b[i * N + k] = own + (at(m.vectors, i * (1 + from) + from) * second[k]).real();
      }
  }

  // `each`: with each stage's own Jacobian at each iterate, as a fixed step cannot be made smaller.
  Status newton(double t, double h, bool each) {
    double update[MOST_COUPLED * N], rates[N], scale[N], before = 0.0, allowed = 0.0;
    rate = 0.0;
    for (int k = 0; k < N; k++) scale[k] = m.atol[k] + m.rtol[k] * std::fabs(u[k]);
    const auto stage_values = [&] {
      for (int i = 0; i < s; i++)
        for (int k = 0; k < N; k++) Y[i * N + k] = u[k] + Z[i * N + k];
    };
    if (!regular && !each) return NOT_CONVERGED;
    for (iterations = 1; iterations <= m.max_newton; iterations++) {
      const bool first = iterations == 1;
      stage_values();
      for (int i = 0; i < s; i++) {
        value(t + m.alpha[i] * h, Y + i * N, c, f);
        counts.rhs++;
        double* residual = update + i * N;
        for (int k = 0; k < N; k++) {
          rates[k] = 0.0;
          for (int j = 0; j < s; j++) rates[k] += m.inverse[i * s + j] / h * Z[j * N + k];
        }
        if (M)
          multiply(M, rates, residual);
        else
          std::memcpy(residual, rates, sizeof(rates));
        for (int k = 0; k < N; k++) residual[k] = f[k] - residual[k];
      }
      if (!(square(update, s * N) < LARGEST)) return NOT_FINITE;
      if (each && !couple(t, h, Y)) return NOT_CONVERGED;
      if (each)
        coupled->solve(update, s * N);
      else
        solve_simplified(update);
      counts.newton++;
      for (int k = 0; k < s * N; k++) Z[k] += update[k];
      stage_values();
      const bool by_norm = m.by_norm || !m.adaptive;
      double sizes[] = {square(Y, s * N), square(update, s * N), 0.0, square_in(u, scale)};
      if (!by_norm) sizes[2] = square_apart(update, scale);
      const double entries = add_up(sums, sizes, N);
      const double length = std::sqrt(sizes[0]), moved = std::sqrt(sizes[1]), noise = EPS * length;
      const double now = by_norm ? moved : std::sqrt(sizes[2] / (s * entries));
      if (!(now * now < LARGEST)) return NOT_CONVERGED;
      if (!first) rate = before != 0.0 ? now / before : 0.0;
      if (by_norm)
        allowed = std::max(m.newton_stol * length, 2.0 * noise);
      else if (first)
        allowed = std::max(m.newton_kappa, 4.0 * EPS * std::sqrt(sizes[3] / entries));
      if (now <= 0.0 || (!first && rate < 1.0 && rate / (1.0 - rate) * now < allowed))
        return finish();
      if (!first && rate >= 1.0 && moved <= 1e3 * noise) return finish();
      if (!first && !each && hopeless(now, m.max_newton - iterations, allowed)) return NOT_CONVERGED;
      before = now;
    }
    return NOT_CONVERGED;
  }

  bool hopeless(double now, double left, double allowed) const {
    if (rate >= 1.0) return true;
    if (m.by_norm) return rate > 0.3;
    return std::pow(rate, left + 1.0) / (1.0 - rate) * now > allowed;
  }

  Status finish() {
    for (int k = 0; k < N; k++) {
      double moved = 0.0;
      for (int i = 0; i < s; i++) moved += m.b[i] * Z[i * N + k];
      end[k] = m.stiffly_accurate ? Y[(s - 1) * N + k] : u[k] + moved;
    }
    return DONE;
  }

  Attempt judge(double t, double h) {
    const double step = std::fabs(h);
    const double error = estimate(t, h);
    if (!std::isfinite(error)) return {HOPELESS, error};
    if (error > 1.0) {
      tried = true;
      return {DONE, error, control.reject(step, error, iterations)};
    }
    const bool renews = iterations > 2 && rate > 1e-3;
    const double next = control.accept(step, error, iterations, renews);
    std::memcpy(last, Z, sizeof(last));
    last_length = h, knows_last = true;
    knows_slope = current = false;
    if (renews) knows_jacobian = false;
    return {DONE, error, next};
  }

  // RADAU5's: (gamma M / h - J) e = f(t, u) + M sum E_i Z_i / h.
  double estimate(double t, double h) {
    double moved[N], e[N], y[N], scale[N], found = INFINITY;
    for (int k = 0; k < N; k++) {
      e[k] = 0.0;
      for (int i = 0; i < s; i++) e[k] += m.defect[i] * Z[i * N + k] / h;
      scale[k] = m.atol[k] + m.rtol[k] * std::max(std::fabs(u[k]), std::fabs(end[k]));
    }
    if (M)
      multiply(M, e, moved);
    else
      std::memcpy(moved, e, sizeof(moved));
    if (!knows_slope) value(t, u, c, slope), counts.rhs++, knows_slope = true;
    std::memcpy(f, slope, sizeof(f));
    for (int look = 0; look < 2; look++) {
      for (int k = 0; k < N; k++) e[k] = f[k] + moved[k];
      real.solve(e);
      double size[] = {square(f) < LARGEST ? square_in(e, scale) : NAN};  // the same on all ranks
      const double entries = add_up(sums, size, N), error = std::sqrt(size[0] / entries);
      if (!look || std::isfinite(error)) found = error;
      if (found <= 1.0 || look || !tried || !std::isfinite(found)) break;
      for (int k = 0; k < N; k++) y[k] = u[k] + e[k];
      value(t, y, c, f);
      counts.rhs++;
    }
    return found;
  }

  const int s;
  PredictiveControl control;
  double f[N], slope[N], J[N * N];  // at the start of a step, J perhaps of an earlier one
  double Z[MOST_COUPLED * N], Y[MOST_COUPLED * N], last[MOST_COUPLED * N], last_length = 0.0;
  bool knows_jacobian, current, knows_slope, knows_last, regular = false;
  bool tried = false;     // whether this step was, before
  double factored = 0.0;  // for a step of this length
  int iterations = 0;
  double rate = 0.0;
  Factors real;
  AnyLu<Complex, N> pair;
  typedef AnyLu<double, MOST_COUPLED * N> Coupling;
  const std::unique_ptr<Coupling> coupled{new Coupling};
};

}  // namespace

extern "C" {

// To be freed by the sweep that takes it over. `mass`: M of M y' = f(t, y), by rows, or null.
void* pnode_implicit_steps(const Settings* settings, const double* y0, const double* mass) {
  return static_cast<Kernel*>(new Coupled(*settings, y0, mass));
}
}

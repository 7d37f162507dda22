// BDF steps with variable coefficients, step size and order, and their adjoints: what
// MultistepIntegrator, ModifiedNewton and OrderControl do, which have the reasons. Above this stands
// implicit_steps.cpp.

namespace {

constexpr int MOST_ORDER = 6, MOST_STATES = MOST_ORDER + 2;
constexpr double EPS = std::numeric_limits<double>::epsilon();

// Coefficients of the polynomial through nodes at distances x[j - 1] = t_n - t_{n-j} > 0.

void derivative_weights(const double* x, int k, double* d) {
  d[0] = 0.0;
  for (int j = 0; j < k; j++) {
    d[0] += 1.0 / x[j];
    d[j + 1] = -1.0 / x[j];
    for (int i = 0; i < k; i++)
      if (i != j) d[j + 1] *= x[i] / (x[i] - x[j]);
  }
}

void extrapolation_weights(const double* x, int k, double* c) {
  for (int j = 0; j < k; j++) {
    c[j] = 1.0;
    for (int i = 0; i < k; i++)
      if (i != j) c[j] *= x[i] / (x[i] - x[j]);
  }
}

// Of x[0]^m times the divided difference of order m.
void difference_weights(const double* x, int m, double* w) {
  for (int j = 0; j <= m; j++) {
    double product = 1.0;
    const double here = j ? x[j - 1] / x[0] : 0.0;
    for (int i = 0; i <= m; i++)
      if (i != j) product *= (i ? x[i - 1] / x[0] : 0.0) - here;
    w[j] = 1.0 / product;
  }
}

double error_constant(const double* x, int k) {
  double product = 1.0, sum = 0.0;
  for (int j = 0; j < k; j++) product *= x[j] / x[0], sum += x[0] / x[j];
  return product / sum;
}

// Of implicit Euler with `number` substeps, of 1, 2... `order`.
double start_weight(int number, int order) {
  double product = 1.0;
  for (int i = 1; i <= order; i++)
    if (i != number) product *= double(number) / double(number - i);
  return product;
}

class OrderControl {
 public:
  OrderControl(int lowest, int highest) : lowest(lowest), highest(highest) { restart(); }

  void restart() {
    order = 1;
    since = taken = failures = 0;
    proposed = 0.0;
  }

  // `lengths`: the accepted step's and those before it; size(m): of its difference of order m.
  template <typename Size>
  double accept(double step, const double* lengths, int count, Size size) {
    const int k = order;
    failures = 0;
    since++, taken++;
    int chosen = k;
    double best = length(k, step, lengths, count, size, AIM);
    if (since > k) {
      for (const int q : {k - 1, k + 1}) {
        if (q < 1 || q > highest || count <= q) continue;
        const double found = length(q, step, lengths, count, size, q < k ? AIM : AIM_HIGHER);
        if (k < lowest || (q >= lowest && found > best)) best = found, chosen = q;
      }
    }
    const double longest = *std::max_element(lengths, lengths + std::min(count, k + 1));
    best = std::min(best, (taken == 1 ? FIRST_GROWTH : GROWTH) * longest);
    if (chosen > k && k >= lowest && best <= LEAST_GROWTH * step) chosen = k;
    if (chosen != k) order = chosen, since = 0;
    double natural = proposed != 0.0 ? proposed : step;
    if (!(LEAST_SHRINKAGE * natural <= best && best <= LEAST_GROWTH * natural)) natural = best;
    return proposed = natural;
  }

  template <typename Size>
  double reject(double step, const double* lengths, int count, Size size, double error) {
    const int k = order;
    failures++;
    since = 0;
    double shrunk = step * std::min(0.9, std::pow(6.0 * error, -1.0 / (k + 1)));
    if (k > lowest && count >= k) {
      const double lower = length(k - 1, step, lengths, count, size, AIM);
      if (lower > shrunk) order = k - 1, shrunk = std::min(lower, 0.9 * step);
    }
    return proposed = std::max(shrunk, (failures < 2 ? 0.2 : 0.1) * step);
  }

  void fail() { proposed = 0.0; }
  bool lost() const { return failures >= 3; }

  int order;

 private:
  static constexpr double AIM = 1.0 / 6.0, AIM_HIGHER = 1.0 / 10.0;
  static constexpr double LEAST_GROWTH = 1.5, LEAST_SHRINKAGE = 0.9, GROWTH = 10.0;
  static constexpr double FIRST_GROWTH = 1e3;

  template <typename Size>
  static double length(int q, double step, const double* lengths, int count, Size size,
                       double aim) {
    const double s = size(q + 1);
    if (!(s > 0.0)) return INFINITY;
    double factorial = 1.0, harmonic = 0.0, behind[MOST_STATES] = {0.0};
    for (int j = 1; j <= q; j++) factorial *= j, harmonic += 1.0 / j;
    double ratio = std::pow(aim / (factorial / harmonic * s), 1.0 / (q + 1));
    const int number = std::min(q, count + 1);
    for (int j = 1; j < number; j++) behind[j] = behind[j - 1] + lengths[j - 1] / step;
    for (int trial = 0; trial < 20; trial++) {
      double product = 1.0, sum = 0.0;
      for (int j = 0; j < number; j++) product *= ratio + behind[j], sum += 1.0 / (ratio + behind[j]);
      const double error = s * product / sum;
      if (error <= 1.05 * aim) break;
      ratio *= std::max(0.1, std::sqrt(aim / error));
    }
    return ratio * step;
  }

  const int lowest, highest;
  int since, taken, failures;
  double proposed;
};

class Newton {
 public:
  Newton(const Settings& settings, const double* mass, Counts& counts)
      : m(settings), mass(mass), counts(counts) {
    forget();
  }

  void forget() {
    refresh = true;
    kept_shift = 0.0;
    rate = 1.0;
  }

  // Solve M (shift u + psi) = f(t, u); `scale`: what is small in u.
  Status solve(Captured c, double t, const double* guess, double shift, const double* psi,
               const double* scale, double* u) {
    const bool stale = !refresh;
    Status status = iterate(c, t, guess, shift, psi, scale, u);
    if (stale && status != DONE && !bad_guess) {
      refresh = true;
      status = iterate(c, t, guess, shift, psi, scale, u);
    }
    if (status != DONE) refresh = true;
    return status;
  }

 private:
  static constexpr double KAPPA = 0.05, SLOW = 0.1, MEMORY = 0.2, DOUBT = 1.5, LEAST = 0.02;
  static constexpr double SHIFT_CHANGE = 0.1, LARGEST = 1e300;

  static double weighted(const double* v, const double* scale) {
    double sum = 0.0;
    for (int k = 0; k < N; k++) sum += (v[k] / scale[k]) * (v[k] / scale[k]);
    return std::sqrt(sum / N);
  }

  Status iterate(Captured c, double t, const double* guess, double shift, const double* psi,
                 const double* scale, double* u) {
    double f[N], rate_of_u[N], update[N], norm = 0.0, first = 0.0;
    bool fresh = refresh;
    std::memcpy(u, guess, sizeof(f));
    for (int iteration = 0; iteration < m.max_newton; iteration++) {
      bad_guess = iteration == 0;
      // As in Python, J is not kept for another shift where there is a mass matrix.
      const bool evaluates = refresh || (mass && outdated(shift));
      if (evaluates)
        jacobian(t, u, c, f, J);
      else
        value(t, u, c, f);
      counts.rhs++;
      for (int k = 0; k < N; k++) rate_of_u[k] = shift * u[k] + psi[k];
      if (mass)
        multiply(mass, rate_of_u, update);
      else
        std::memcpy(update, rate_of_u, sizeof(update));
      for (int k = 0; k < N; k++) update[k] -= f[k];
      const double residual = std::sqrt(square(update));
      if (!(square(f) < MODERATE && residual < LARGEST)) return NOT_FINITE;
      if (first == 0.0) first = residual;
      if (m.by_residual) {
        if (iteration && residual <= m.newton_rtol * first) return DONE;
        if (residual <= m.newton_atol) return DONE;
      }
      if (!correct(shift, update, evaluates)) return bad_guess = false, NOT_CONVERGED;
      for (int k = 0; k < N; k++) u[k] -= update[k];
      const double before = norm, length = std::sqrt(square(u));
      const double absolute = std::sqrt(square(update)), noise = EPS * length;
      norm = m.by_norm ? absolute : weighted(update, scale);
      const double tolerance = m.by_norm ? std::max(m.newton_stol * length, 2.0 * noise)
                                         : std::max(KAPPA, 4.0 * EPS * weighted(u, scale));
      if (!(norm < LARGEST)) return NOT_FINITE;
      bad_guess = false;
      if (iteration) {
        const double observed = norm / before;
        if (observed >= 1.0 && absolute <= 1e3 * noise) return DONE;
        if (observed >= 2.0 || (observed >= 1.0 && iteration > 1)) return NOT_CONVERGED;
        rate = fresh ? observed : std::max(MEMORY * rate, observed);
        fresh = false;
      }
      double expected = std::min(rate, 0.999);
      if (!iteration) expected = m.by_norm ? 0.5 : std::max(expected, LEAST);
      if (norm == 0.0 || expected / (1.0 - expected) * norm <= tolerance) {
        refresh = rate > SLOW && iteration > 0;
        if (!iteration) rate = std::min(1.0, DOUBT * rate);
        return DONE;
      }
    }
    return NOT_CONVERGED;
  }

  bool outdated(double shift) const {
    return !(std::fabs(shift / kept_shift - 1.0) <= SHIFT_CHANGE);
  }

  // From the residual to the update, with the Jacobian evaluated there or kept.
  bool correct(double shift, double* update, bool evaluated) {
    if (refresh || outdated(shift)) {
      counts.jacobians += evaluated;
      if (refresh) rate = 1.0;
      refresh = false;
      kept_shift = shift;
      counts.factorizations++;
      regular = factors.factor(shift, J, mass);
    }
    if (!regular) return false;
    factors.solve(update);
    counts.newton++, counts.krylov++;
    if (shift != kept_shift)
      for (int k = 0; k < N; k++) update[k] *= 2.0 / (1.0 + shift / kept_shift);
    return true;
  }

  const Settings& m;
  const double* mass;  // null: the identity
  Counts& counts;
  bool refresh, regular = false, bad_guess = false;
  double kept_shift, rate, J[N * N];
  Factors factors;
};

// Kept of a step: of order k its d_0..d_k and end, of a start of order p all substeps' states.
class Bdf : public ImplicitSteps {
 public:
  Bdf(const Settings& settings, const double* y0, const double* mass)
      : ImplicitSteps(settings, y0, mass), newton(m, M, counts),
        control(int(settings.lowest), int(settings.highest)) {
    chooses = absolute = true;
    first_order = 1.0;
  }

  void begin() override {
    ImplicitSteps::begin();
    newton.forget();
    control.restart();
    kept.clear();
    known = 0;
    remember(0.0, u);
  }

  Attempt attempt(double t, double h) override {
    step_length = std::fabs(h);
    if (!m.adaptive && known < m.highest) {
      taken = -int(m.highest - 1);
      return {extrapolate(t, h), 0.0};
    }
    taken = m.adaptive ? control.order : int(m.highest);
    return differentiate(t, h);
  }

  void accept(bool keep) override {
    ImplicitSteps::accept(keep);
    remember(step_length, u);
  }

  int64_t order() const override { return taken; }

  void begin_adjoint(double* const* sums) override {
    ImplicitSteps::begin_adjoint(sums);
    std::memset(waiting, 0, sizeof(waiting));
  }

  // MultistepAdjoint has the equations; what a step adds to states before its start waits.
  Status adjoint(int64_t index, double t, double h) override {
    const auto [k, first] = kept[index];
    const double* from = values.data() + first;
    double parts[MOST_STATES][N] = {};
    if (k < 0) {
      if (!adjoint_of_start(-k, t, h, from, parts[0])) return SINGULAR;
    } else {
      const double* y = from + k + 1;
      if (!transposed(t + h, y, from[0], lambda)) return SINGULAR;
      for (int j = 0; j < k; j++)
        for (int i = 0; i < N; i++) parts[j][i] = -from[j + 1] * lambda[i];
    }
    for (int i = 0; i < N; i++) lambda[i] = parts[0][i] + waiting[0][i];
    for (int j = 1; j < MOST_STATES; j++)
      for (int i = 0; i < N; i++)
        waiting[j - 1][i] = parts[j][i] + waiting[j][i];
    return DONE;
  }

  void begin_tangents(int64_t number, const double* first, const double* along) override {
    ImplicitSteps::begin_tangents(number, first, along);
    before.clear();
  }

  // MultistepTangents has the equations.
  Status tangent(int64_t index, double t, double h) override {
    const auto [k, first] = kept[index];
    const double* from = values.data() + first;
    Rows x(du.size());
    before.push_front(du);
    if (k < 0) {
      if (!tangents_of_start(-k, t, h, from, x)) return SINGULAR;
    } else {
      for (int j = 0; j < k; j++) plus(x, -from[j + 1], before[j]);
      if (!solve_tangents(t + h, from + k + 1, from[0], J, factors, x)) return SINGULAR;
    }
    du = x;
    if (before.size() == MOST_STATES) before.pop_back();
    return DONE;
  }

 protected:
  void keep_step() override {
    kept.emplace_back(taken, values.size());
    keep_values(record.data(), int64_t(record.size()));
  }

 private:
  void remember(double length, const double* state) {
    known = std::min(known + 1, MOST_STATES);
    for (int j = known - 1; j > 0; j--) {
      std::memcpy(states[j], states[j - 1], sizeof(states[0]));
      lengths[j] = lengths[j - 1];
    }
    std::memcpy(states[0], state, sizeof(states[0]));
    lengths[1] = length;  // lengths[0] is the next step's
    knows_slope = false;
  }

  void scale_by(const double* state, double* scale) const {
    for (int k = 0; k < N; k++) scale[k] = m.atol[k] + m.rtol[k] * std::fabs(state[k]);
  }

  // One step of implicit Euler with 1, 2... substeps, extrapolated.
  Status extrapolate(double t, double length) {
    const int p = -taken;
    double scale[N], psi[N], y[N], guess[N];
    scale_by(u, scale);
    std::memset(end, 0, sizeof(end));
    record.clear();
    for (int number = 1; number <= p; number++) {
      const double h = length / number, weight = start_weight(number, p);
      std::memcpy(y, u, sizeof(y));
      for (int i = 1; i <= number; i++) {
        for (int k = 0; k < N; k++) guess[k] = y[k], psi[k] = y[k] * (-1.0 / h);
        const Status status = newton.solve(c, t + i * h, guess, 1.0 / h, psi, scale, y);
        if (status != DONE) return status;
        record.insert(record.end(), y, y + N);
      }
      for (int k = 0; k < N; k++) end[k] += weight * y[k];
    }
    return DONE;
  }

  Attempt differentiate(double t, double h) {
    double d[MOST_STATES + 1], weights[MOST_STATES + 1], distances[MOST_STATES + 1];
    double psi[N] = {}, guess[N] = {}, scale[N];
    const double direction = h > 0.0 ? 1.0 : -1.0;
    lengths[0] = step_length;
    distances[0] = step_length;
    for (int j = 1; j < known; j++) distances[j] = distances[j - 1] + lengths[j];
    derivative_weights(distances, taken, d);
    const int guessed = std::min(taken + 1, known);
    extrapolation_weights(distances, guessed, weights);
    for (int j = 0; j <= taken; j++) d[j] *= direction;
    for (int j = 0; j < taken; j++)
      for (int k = 0; k < N; k++) psi[k] += d[j + 1] * states[j][k];
    for (int j = 0; j < guessed; j++)
      for (int k = 0; k < N; k++) guess[k] += weights[j] * states[j][k];
    const bool first = m.adaptive && known == 1;
    if (first && !M) {  // else y' is not at hand
      if (!knows_slope) value(t, u, c, slope), counts.rhs++, knows_slope = true;
      if (!(square(slope) < MODERATE)) return {HOPELESS, 0.0};
      for (int k = 0; k < N; k++) guess[k] += h * slope[k];
    }
    scale_by(u, scale);
    const Status status = newton.solve(c, t + h, guess, d[0], psi, scale, end);
    if (status != DONE) return control.fail(), Attempt{status, 0.0};
    record.assign(d, d + taken + 1);
    record.insert(record.end(), end, end + N);
    if (!m.adaptive) return {DONE, 0.0};
    // The slope makes the first node a double one.
    const auto size = [&](int order_of) {
      double sum = 0.0;
      const int n = std::min(order_of, known);
      if (!(first && order_of == 2)) difference_weights(distances, n, weights);
      for (int k = 0; k < N; k++) {
        double value = first && order_of == 2 ? end[k] - guess[k] : weights[0] * end[k];
        if (!(first && order_of == 2))
          for (int j = 0; j < n; j++) value += weights[j + 1] * states[j][k];
        sum += (value / scale[k]) * (value / scale[k]);
      }
      return std::sqrt(sum / N);
    };
    const double error = error_constant(distances, taken) * size(taken + 1);
    if (!std::isfinite(error)) return {HOPELESS, error};
    if (error > 1.0) {
      const double proposed = control.reject(step_length, lengths, known, size, error);
      if (control.lost()) control.restart(), known = 1, knows_slope = false;
      return {DONE, error, proposed};
    }
    scale_by(end, scale);
    if (first) lengths[1] = 0.0;
    return {DONE, error, control.accept(step_length, lengths, first ? 2 : known, size)};
  }

  // From a cotangent of y to M^T w of (shift M - J)^T w = cotangent, with the part of mu.
  bool transposed(double t, const double* y, double shift, double* w) {
    double f[N];
    jacobian(t, y, c, f, J);
    counts.jacobians++, counts.rhs++, counts.factorizations++;
    if (!factors.factor(shift, J, M)) return false;
    factors.solve_transposed(w);
    counts.krylov++;
    add_parameters(t, y, w);
    if (M) {
      std::memcpy(f, w, sizeof(f));
      multiply_transposed(M, f, w);
    }
    return true;
  }

  bool adjoint_of_start(int p, double t, double length, const double* from, double* total) {
    for (int number = 1; number <= p; number++) {
      const double h = length / number, weight = start_weight(number, p);
      double w[N];
      for (int k = 0; k < N; k++) w[k] = weight * lambda[k];
      from += number * N;
      for (int i = number; i > 0; i--) {
        if (!transposed(t + i * h, from - (number - i + 1) * N, 1.0 / h, w)) return false;
        for (int k = 0; k < N; k++) w[k] /= h;
      }
      for (int k = 0; k < N; k++) total[k] += w[k];
    }
    return true;
  }

  bool tangents_of_start(int p, double t, double length, const double* from, Rows& total) {
    for (int number = 1; number <= p; number++) {
      const double h = length / number;
      Rows x(du);
      for (int i = 1; i <= number; i++, from += N) {
        for (double& entry : x) entry /= h;
        if (!solve_tangents(t + i * h, from, 1.0 / h, J, factors, x)) return false;
      }
      plus(total, start_weight(number, p), x);
    }
    return true;
  }

  Newton newton;
  OrderControl control;
  // States before the new one, newest first, and the lengths of the steps between them.
  double states[MOST_STATES][N], lengths[MOST_STATES + 1] = {}, step_length = 0.0;
  int known = 0, taken = 0;
  double slope[N];  // where there is a single state
  bool knows_slope = false;
  std::vector<double> record;  // what the last step's adjoint takes
  std::vector<std::pair<int, size_t>> kept;
  double waiting[MOST_STATES][N];
  std::deque<Rows> before;  // tangents of the states so far, newest first
  double J[N * N];  // of the adjoint
  Factors factors;
};

}  // namespace

extern "C" {

// To be freed by the sweep that takes it over.
// `mass`: M of M y' = f(t, y), by rows, or null.
void* pnode_implicit_steps(const Settings* settings, const double* y0, const double* mass) {
  return static_cast<Kernel*>(new Bdf(*settings, y0, mass));
}
}

// BDF steps with variable coefficients, step size and order, and their adjoints: what
// MultistepIntegrator does, which has the reasons. Above this stand implicit_steps.cpp,
// bdf_control.h and modified_newton.h.

namespace {

// Kept of a step: of order k its d_0..d_k and end, of a start of order p all substeps' states.
class Bdf : public ImplicitSteps {
 public:
  Bdf(const Settings& settings, const double* y0, const double* mass)
      : ImplicitSteps(settings, y0, mass), newton(m, M, counts, sums),
        control(int(settings.lowest), int(settings.highest)) {
    chooses = absolute = true;
    first_order = 1.0;
  }

  void begin() override {
    ImplicitSteps::begin();
    newton.forget();
    control.restart();
    kept.clear();
    known = prescribed = 0;
    remember(0.0, u);
  }

  Attempt attempt(double t, double h) override {
    step_length = std::fabs(h);
    if (!m.adaptive && known < m.highest) {
      taken = -int(m.highest - 1);
      return {extrapolate(t, h), 0.0};
    }
    taken = prescribed ? prescribed : m.adaptive ? control.order : int(m.highest);
    return differentiate(t, h);
  }

  void accept(bool keep) override {
    ImplicitSteps::accept(keep);
    remember(step_length, u);
  }

  int64_t order() const override { return taken; }
  void prescribe(int64_t order) override { prescribed = int(order); }

  void follow(const Kernel& other) override {
    const auto& from = static_cast<const Bdf&>(other);
    std::memcpy(u, from.u, sizeof(u));
    std::memcpy(states, from.states, sizeof(states));
    std::memcpy(lengths, from.lengths, sizeof(lengths));
    known = from.known, taken = from.taken;
    newton.forget();
  }

  Status part(double t, double h) override {
    step_length = std::fabs(h);
    return taken < 0 ? extrapolate(t, h) : differentiate(t, h).status;
  }

  void adopt(const Kernel& other) override {
    const auto& from = static_cast<const Bdf&>(other);
    ImplicitSteps::adopt(other);
    record = from.record, step_length = from.step_length;
    newton.forget();
  }

  void begin_adjoint(double* const* sums) override {
    ImplicitSteps::begin_adjoint(sums);
    solves.forget();
    std::memset(waiting, 0, sizeof(waiting));
  }

  // MultistepAdjoint has the equations; what a step adds to states before its start waits.
  Status adjoint(int64_t index, double t, double h) override {
    const auto [k, first] = kept[index];
    const double* from = values.data() + first;
    double parts[MOST_STATES][N] = {};
    const Status status = k < 0 ? adjoint_of_start(-k, t, h, from, parts[0])
                                : transposed(t + h, from + k + 1, from[0], lambda);
    if (status != DONE) return status;
    for (int j = 0; j < k; j++)
      for (int i = 0; i < N; i++) parts[j][i] = -from[j + 1] * lambda[i];
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
    Status status;
    if (k < 0) {
      status = tangents_of_start(-k, t, h, from, x);
    } else {
      for (int j = 0; j < k; j++) plus(x, -from[j + 1], before[j]);
      status = solve_tangents(t + h, from + k + 1, from[0], J, factors, x);
    }
    if (status != DONE) return status;
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
    double scale[N], psi[N], y[WIDTH], guess[N];
    scale_by(u, scale);
    std::memset(end, 0, sizeof(end));
    record.clear();
    for (int number = 1; number <= p; number++) {
      const double h = length / number, weight = start_weight(number, p);
      std::memcpy(y, u, sizeof(u));
      for (int i = 1; i <= number; i++) {
        for (int k = 0; k < N; k++) guess[k] = y[k], psi[k] = y[k] * (-1.0 / h);
        const Status status = newton.solve(c, t + i * h, guess, 1.0 / h, psi, scale, y);
        if (status != DONE) return status;
        record.insert(record.end(), y, y + WIDTH);
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
    if (first && !is_massive()) {  // else y' is not at hand
      if (!knows_slope) value(t, u, c, slope), counts.rhs++, knows_slope = true;
      if (!is_usable(slope)) return {HOPELESS, 0.0};
      for (int k = 0; k < N; k++) guess[k] += h * slope[k];
    }
    scale_by(u, scale);
    const Status status = newton.solve(c, t + h, guess, d[0], psi, scale, end);
    if (status != DONE) return control.fail(), Attempt{status, 0.0};
    record.assign(d, d + taken + 1);
    record.insert(record.end(), end, end + WIDTH);
    if (!m.adaptive || prescribed) return {DONE, 0.0};
    // The slope makes the first node a double one.
    const auto size = [&](int order_of) {
      double sum[] = {0.0};
      const int n = std::min(order_of, known);
      if (!(first && order_of == 2)) difference_weights(distances, n, weights);
      for (int k = 0; k < N; k++) {
        double value = first && order_of == 2 ? end[k] - guess[k] : weights[0] * end[k];
        if (!(first && order_of == 2))
          for (int j = 0; j < n; j++) value += weights[j + 1] * states[j][k];
        sum[0] += (value / scale[k]) * (value / scale[k]);
      }
      const double entries = add_up(sums, sum, N);
      return std::sqrt(sum[0] / entries);
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
  Status transposed(double t, const double* y, double shift, double* w) {
    counts.rhs++;
    const Status status = solves.solve(c, t, y, shift, M, w);
    if (status != DONE) return status;
    add_parameters(t, y, w);
    if (is_massive()) {
      double rate[N];
      multiply_transposed(mass_at(solves.last_jacobian(), M), w, rate);
      std::memcpy(w, rate, sizeof(rate));
    }
    return DONE;
  }

  Status adjoint_of_start(int p, double t, double length, const double* from, double* total) {
    for (int number = 1; number <= p; number++) {
      const double h = length / number, weight = start_weight(number, p);
      double w[N];
      for (int k = 0; k < N; k++) w[k] = weight * lambda[k];
      from += number * WIDTH;
      for (int i = number; i > 0; i--) {
        const double* y = from - (number - i + 1) * WIDTH;
        const Status status = transposed(t + i * h, y, 1.0 / h, w);
        if (status != DONE) return status;
        for (int k = 0; k < N; k++) w[k] /= h;
      }
      for (int k = 0; k < N; k++) total[k] += w[k];
    }
    return DONE;
  }

  Status tangents_of_start(int p, double t, double length, const double* from, Rows& total) {
    for (int number = 1; number <= p; number++) {
      const double h = length / number;
      Rows x(du);
      for (int i = 1; i <= number; i++, from += WIDTH) {
        for (double& entry : x) entry /= h;
        const Status status = solve_tangents(t + i * h, from, 1.0 / h, J, factors, x);
        if (status != DONE) return status;
      }
      plus(total, start_weight(number, p), x);
    }
    return DONE;
  }

  Newton newton;
  OrderControl control;
  // States before the new one, newest first, and the lengths of the steps between them.
  double states[MOST_STATES][N], lengths[MOST_STATES + 1] = {}, step_length = 0.0;
  int known = 0, taken = 0, prescribed = 0;
  double slope[N];  // where there is a single state
  bool knows_slope = false;
  std::vector<double> record;  // what the last step's adjoint takes
  std::vector<std::pair<int, size_t>> kept;
  double waiting[MOST_STATES][N];
  std::deque<Rows> before;  // tangents of the states so far, newest first
  TransposedSolves solves{counts};
  double J[ENTRIES];  // of tangents
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

// Newton's method that keeps its Jacobian over many steps: what ModifiedNewton of
// solvers/newton.py does, which has the reasons. Above this stands implicit_steps.cpp.

namespace {

constexpr double EPS = std::numeric_limits<double>::epsilon();

class Newton {
 public:
  // `sums`: of ranks that take the same iterations, null without others.
  Newton(const Settings& settings, const double* mass, Counts& counts, Sums* const& sums)
      : m(settings), mass(mass), counts(counts), sums(sums) {
    forget();
  }

  void forget() {
    refresh = true;
    kept_shift = 0.0;
    rate = 1.0;
  }

  // Solve M (shift u + psi) = f(t, u), or F(t, u, shift u + psi) = 0, whose last argument comes behind u;
  // `scale`: what is small in u.
  Status solve(Captured c, double t, const double* guess, double shift, const double* psi,
               const double* scale, double* u) {
    const bool stale = !refresh;
    Status status = iterate(c, t, guess, shift, psi, scale, u);
    if (stale && status != DONE && !bad_guess) {
      refresh = true;
      status = iterate(c, t, guess, shift, psi, scale, u);
    }
    if (status != DONE) refresh = true;
    for (int k = 0; k < WIDTH - N; k++) u[N + k] = shift * u[k] + psi[k];
    if (status == DONE && m.integrals) {  // integrals, where the state has converged
      double f[N];
      value(t, u, c, f), counts.rhs++;
      for (int64_t k = own; k < N; k++)  // of a residual Integrand has the sign
        u[k] = RESIDUAL ? u[k] + f[k] / std::fabs(shift) : (f[k] - psi[k]) / shift;
    }
    return status;
  }

 private:
  static constexpr double KAPPA = 0.05, SLOW = 0.1, MEMORY = 0.2, DOUBT = 1.5, LEAST = 0.02;
  static constexpr double SHIFT_CHANGE = 0.1, LARGEST = 1e300;

  Status iterate(Captured c, double t, const double* guess, double shift, const double* psi,
                 const double* scale, double* u) {
    double f[N], rate_of_u[N], update[N], norm = 0.0, first = 0.0;
    bool fresh = refresh;
    std::memcpy(u, guess, sizeof(f));
    for (int iteration = 0; iteration < m.max_newton; iteration++) {
      bad_guess = iteration == 0;
      // As in Python, J is not kept for another shift where there is a mass matrix.
      const bool evaluates = refresh || ((RESIDUAL || mass) && outdated(shift));
      for (int k = 0; k < N; k++) rate_of_u[k] = shift * u[k] + psi[k];
      if (RESIDUAL) std::memcpy(u + WIDTH - N, rate_of_u, sizeof(rate_of_u));
      if (evaluates)
        jacobian(t, u, c, f, J);
      else
        value(t, u, c, f);
      counts.rhs++;
      if (RESIDUAL)
        std::memset(update, 0, sizeof(update));
      else if (mass)
        multiply(mass, rate_of_u, update);
      else
        std::memcpy(update, rate_of_u, sizeof(update));
      for (int k = 0; k < N; k++) update[k] -= f[k];
      double found[] = {square(update, own), square(f)};
      add_up(sums, found, N);
      const double residual = std::sqrt(found[0]);
      if (!(found[1] < MODERATE && residual < LARGEST)) return NOT_FINITE;
      if (first == 0.0) first = residual;
      if (m.by_residual) {
        if (iteration && residual <= m.newton_rtol * first) return DONE;
        if (residual <= m.newton_atol) return DONE;
      }
      const bool corrected = correct(shift, update, evaluates);
      for (int k = 0; k < N; k++) u[k] -= update[k];
      double sizes[] = {square(u, own), square(update, own), 0.0, 0.0, double(!corrected)};
      const bool judged = m.adaptive || !m.by_norm;
      if (judged) sizes[2] = square_in(update, scale), sizes[3] = square_in(u, scale);
      const double entries = add_up(sums, sizes, N);
      if (sizes[4] != 0.0) return bad_guess = false, NOT_CONVERGED;
      const double before = norm, length = std::sqrt(sizes[0]);
      const double absolute = std::sqrt(sizes[1]), noise = EPS * length;
      const double error = std::sqrt(sizes[2] / entries);
      const double content = std::max(KAPPA, 4.0 * EPS * std::sqrt(sizes[3] / entries));
      norm = m.by_norm ? absolute : error;
      const double tolerance = m.by_norm ? std::max(m.newton_stol * length, 2.0 * noise) : content;
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
      const double left = expected / (1.0 - expected);
      if (norm == 0.0 || (left * norm <= tolerance && left * error <= content)) {
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
      counts.jacobians += evaluated && ASSEMBLED;
      if (refresh) rate = 1.0;
      refresh = false;
      kept_shift = shift;
      counts.factorizations += ASSEMBLED;
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
  const int64_t own = N - m.integrals;
  const double* mass;  // null: the identity
  Counts& counts;
  Sums* const& sums;
  bool refresh, regular = false, bad_guess = false;
  double kept_shift, rate, J[ENTRIES];
  Factors factors;
};

}  // namespace

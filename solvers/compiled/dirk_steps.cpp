// Theta, diagonally implicit and IMEX Runge-Kutta steps, and their adjoints. Above this stands
// implicit_steps.cpp, below it dirk_derivatives.cpp.

namespace {

// All stages are kept; an explicit first stage is the step before's last, but of an IMEX method.
class Dirk : public ImplicitSteps {
 public:
  // `mass`: behind M, where the first stage is explicit, what gives its slope for f, and the transpose
  // of M times that where M is singular, else of the identity.
  Dirk(const Settings& settings, const double* y0, const double* mass)
      : ImplicitSteps(settings, y0, mass) {
    if (M && m.explicit_first) slopes.assign(mass + N * N, mass + 3 * N * N);
  }
  ~Dirk() override {
    if (other) part->destroy(other);
  }

  // From now on y' is a sum; the part's captured tensors are those from `first`.
  void split(const Part* explicit_part, int64_t first) {
    part = explicit_part, other = part->create(), part_first = first;
  }

  void lend(void* const* captured) override {
    ImplicitSteps::lend(captured);
    knows_constant = knows_constant_end = false;
    if (part) part->lend(other, captured ? captured + part_first : nullptr, &together);
  }

  void begin() override {
    ImplicitSteps::begin();
    knows_slope = false;
    last_time = NAN;
  }

  void accept(bool keep) override {
    ImplicitSteps::accept(keep);
    if (chained()) std::memcpy(first_slope, last_slope, sizeof(first_slope));
    knows_slope = chained();
  }

  void restart_step() override { knows_slope = false; }

  void adopt(const Kernel& other) override {
    ImplicitSteps::adopt(other);
    std::memcpy(last_slope, static_cast<const Dirk&>(other).last_slope, sizeof(last_slope));
  }

  // Of a residual's only stage y' comes first: what is kept ends with the step's end.
  void live(Numbers& found) override {
    found.assign(stages[0], stages[0] + WIDTH * m.stages);
    if (RESIDUAL) std::rotate(found.begin(), found.begin() + N, found.end());
  }

  void load(const double* checkpoint) override {
    ImplicitSteps::load(checkpoint);
    if (!RESIDUAL || !checkpoint) return;
    std::rotate_copy(checkpoint, checkpoint + N, checkpoint + WIDTH, point);
    loaded = point;
  }

  void begin_adjoint(double* const* sums) override {
    ImplicitSteps::begin_adjoint(sums);
    mu_explicit = part ? sums[1] : nullptr;  // null where none are wanted
    pending = false;
  }

  // Of dirk_derivatives.cpp.
  Status adjoint(int64_t index, double t, double h) override;
  Status tangent(int64_t index, double t, double h) override;

 protected:
  void keep_step() override {
    if (!kept_steps && chained()) keep_values(u, N);
    keep_values(stages[chained()], WIDTH * (m.stages - chained()));
  }

  void slope_at(double t, const double* y, double* f) override {
    ImplicitSteps::slope_at(t, y, f);
    if (!part) return;
    double more[N];
    part->value(other, t, y, more);
    counts.rhs++;
    for (int k = 0; k < N; k++) f[k] += more[k];
  }

  Status step(double t, double h) override {
    keeps = m.keeps_jacobian, damps = false;
    Status status = solve_stages(t, h);
    if (keeps && status == NOT_CONVERGED) {
      keeps = false;  // once more with a new Jacobian at each iterate
      status = solve_stages(t, h);
    }
    if (m.backtracks && status == NOT_CONVERGED) {
      keeps = m.keeps_jacobian, damps = true;
      status = solve_stages(t, h);
    }
    return status;
  }

 private:
  // Whether an explicit first stage, and its slope, is the last one of the step before.
  bool chained() const { return m.explicit_first && !part; }

  // How many slopes, of the first stage, are not solved for, but their products with M are known.
  int known_products() const { return M && m.explicit_first && !m.carries_slope; }

  void pass_back(double shift, const double* zeta, const double* rho, double* kappa, double* z,
                 double* own);

  Status solve_stages(double t, double h) {
    const int s = int(m.stages);
    knows_jacobian = false;
    double slope[MOST_STAGES][N], more[MOST_STAGES][N], z[N], known[N] = {};
    // The slopes with weights: of the table's rows from `row`, and of an explicit part.
    const auto sum_of = [&](const double* A, const double* A_explicit, int row, int count, int k) {
      double sum = 0.0;
      for (int j = known_products(); j < count; j++) sum += A[row * s + j] * slope[j][k];
      if (part)
        for (int j = 0; j < count; j++) sum += A_explicit[row * s + j] * more[j][k];
      return sum;
    };
    for (int i = 0; i < s; i++) {
      double* y = stages[i];
      if (i == 0 && m.explicit_first) {
        std::memcpy(y, u, sizeof(z));
        if (!knows_slope) {
          if (chained() && !m.carries_slope && !std::isnan(last_end)) {  // with the bits it had there
            evaluate(last_end, u);
            std::memcpy(first_slope, f, sizeof(f));
          } else {
            value(t, u, c, first_slope);
            counts.rhs++;
          }
          if (!is_usable(first_slope)) return NOT_FINITE;
          knows_slope = true;
          if (M && m.carries_slope) {
            std::memcpy(z, first_slope, sizeof(z));
            multiply(slopes.data(), z, first_slope);
          }
        }
        std::memcpy(slope[0], first_slope, sizeof(z));
      } else {
        for (int k = 0; k < N; k++) z[k] = u[k] + h * sum_of(m.A, m.A_explicit, i, i, k);
        std::memcpy(y, i ? stages[i - 1] : u, sizeof(z));
        const double shift = 1.0 / (h * m.A[i * s + i]);
        if (known_products())
          for (int k = 0; k < N; k++) known[k] = shift * h * m.A[i * s] * slope[0][k];
        const Status status = solve({t + m.alpha[i] * h, shift, z, known}, y);
        if (status != DONE) return status;
        for (int k = 0; k < N; k++) slope[i][k] = shift * (y[k] - z[k]);
      }
      if (!part) continue;
      part->value(other, t + m.alpha_explicit[i] * h, y, more[i]);
      counts.rhs++;
      if (!is_usable(more[i])) return NOT_FINITE;
    }
    for (int k = 0; k < N; k++) {
      const double moved = h * sum_of(m.b, m.b_explicit, 0, s, k);
      end[k] = m.stiffly_accurate ? stages[s - 1][k] : u[k] + moved;
      defect[k] = m.adaptive ? h * sum_of(m.defect, m.defect_explicit, 0, s, k) : 0.0;
    }
    std::memcpy(last_slope, m.carries_slope ? slope[s - 1] : f, sizeof(z));
    return together.agreed(std::isfinite(square(end))) ? DONE : NOT_FINITE;
  }

  // Evaluate f, and J if that is cheap, unless that was done last; of ranks that step together a
  // first guess alone may be what they were at, as they have to ask each other.
  void evaluate(double t, const double* y) {
    const bool there = std::memcmp(y, last_iterate, sizeof(last_iterate)) == 0;
    const bool then = t == last_time || (AUTONOMOUS && !std::isnan(last_time));
    if (together.sums ? guesses && together.agreed(there && then) : there && then) return;
    if (Field::CHEAP && !CONSTANT)
      jacobian(t, y, c, f, J);
    else
      value(t, y, c, f);
    counts.rhs++;
    last_time = t;
    std::memcpy(last_iterate, y, sizeof(last_iterate));
  }

  // Evaluate J_end, for an adjoint.
  void linearize(double t, const double* y) {
    double f[N];
    if (CONSTANT && knows_constant_end) return;
    jacobian(t, y, c, f, J_end), counts.jacobians += ASSEMBLED, counts.rhs++;
    knows_constant_end = CONSTANT, factored = 0.0;
  }

  bool factor(double shift, const double* J) {
    if (CONSTANT && factored == shift) return true;
    counts.factorizations += ASSEMBLED, factored = 0.0;
    if (!factors.factor(shift, J, M)) return false;
    factored = shift;
    return true;
  }

  // zeta = J^T tau of the explicit part; zero without one, or where nothing depends on its slope.
  void pull_back_explicit(int i, double t, double h, const double* y, const double* tau,
                          double* zeta) {
    std::memset(zeta, 0, sizeof(u));
    if (!part) return;
    bool used = m.b_explicit[i] != 0.0;
    for (int j = i + 1; j < m.stages; j++) used |= m.A_explicit[j * m.stages + i] != 0.0;
    if (!used) return;
    part->pull_back(other, t + m.alpha_explicit[i] * h, y, tau, zeta, mu_explicit);
    counts.vjp++;
  }

  // M (y - z) / (h a) = f(t, y) + known, with shift = 1 / (h a).
  struct Equation {
    double t, shift;
    const double *z, *known;
  };

  // The residual, and its square; f (and J) there, of which y' comes behind y.
  double residual_at(const Equation& of, double* y, double* residual) {
    double moved[N];
    for (int k = 0; k < N; k++) residual[k] = of.shift * (y[k] - of.z[k]);
    if (RESIDUAL) {
      std::memcpy(y + WIDTH - N, residual, sizeof(moved));
      std::memset(residual, 0, sizeof(moved));
    }
    evaluate(of.t, y);
    if (M) {
      std::memcpy(moved, residual, sizeof(moved));
      multiply(M, moved, residual);
      for (int k = 0; k < N; k++) residual[k] -= of.known[k];
    }
    for (int k = 0; k < N; k++) residual[k] -= f[k];
    return square(residual, own);
  }

  // From squares to norms, over all ranks.
  template <int count>
  void take_norms(double (&squares)[count]) {
    add_up(sums, squares, N);
    for (double& each : squares) each = std::sqrt(each);
  }

  // Solve for y, from a first guess; then for its integrals, whose residuals are there.
  Status solve(const Equation& of, double* y) {
    double residual[N];
    const Status status = newton(of, y, residual);
    if (status != DONE || !m.integrals) return status;
    const double slope = RESIDUAL ? std::fabs(of.shift) : of.shift;  // Integrand has the sign
    for (int64_t k = own; k < N; k++) y[k] -= residual[k] / slope;
    std::memcpy(last_iterate, y, sizeof(last_iterate));  // f is the same there
    return DONE;
  }

  // Newton's method, as SNES has it.
  Status newton(const Equation& of, double* y, double* residual) {
    guesses = true;
    double update[N], before = 0.0, norms[] = {residual_at(of, y, residual), 0.0, 0.0};
    guesses = false;
    take_norms(norms);
    double &norm = norms[0], &step = norms[1], &size = norms[2];  // of the update and of y
    const double first = norm;
    for (int iteration = 0;; iteration++) {
      if (iteration) {
        const bool slow = iteration > 1 && !(norm <= SLOW * before);
        if (CONSTANT ? !knows_constant : !keeps || !knows_jacobian || slow) {
          if (CONSTANT || !Field::CHEAP) jacobian(of.t, y, c, f, J);
          knows_jacobian = true, knows_constant = CONSTANT, factored = 0.0;
          counts.jacobians += ASSEMBLED;
        }
        const bool regular = factored == of.shift || factor(of.shift, J);
        std::memcpy(update, residual, sizeof(update));
        regular ? factors.solve(update) : void(update[0] = NAN);  // all ranks hear of it
        counts.newton++, counts.krylov++;
        before = norm;
        if (damps) {
          if (!backtrack(of, update, y, residual, norms)) return NOT_CONVERGED;
        } else {
          for (int k = 0; k < N; k++) y[k] -= update[k];
          norm = residual_at(of, y, residual), step = square(update, own), size = square(y, own);
          take_norms(norms);
        }
        if (!regular) return SINGULAR;
      }
      if (!(norm * norm < MODERATE)) return NOT_FINITE;
      if (norm < m.newton_atol) return DONE;
      if (iteration) {
        if (norm <= (CONSTANT ? LINEAR : 1.0) * m.newton_rtol * first || step < m.newton_stol * size) return DONE;
        if (norm > m.newton_divtol * first) return NOT_CONVERGED;
      }
      if (iteration >= m.max_newton) return NOT_CONVERGED;
    }
  }

  // Move y by a part of the update, which SNESLINESEARCHBT would choose with its defaults; whether
  // there is one. What is not finite ends Newton's method.
  bool backtrack(const Equation& of, const double* update, double* y, double* residual,
                 double (&norms)[3]) {
    double from[N], part = 1.0, part_before = 0.0, excess_before = 0.0;
    double sizes[] = {square(update, own), square(y, own)}, &norm = norms[0];
    take_norms(sizes);
    const auto look = [&] {
      double found[] = {residual_at(of, y, residual), square(y, own)};
      take_norms(found);
      norm = found[0], norms[1] = sizes[0], norms[2] = found[1];
    };
    std::memcpy(from, y, sizeof(from));
    const double start = 0.5 * norm * norm, slope = -norm * norm;
    for (bool whole = true;; whole = false) {
      for (int k = 0; k < N; k++) y[k] = from[k] - part * update[k];
      look();
      const double value = 0.5 * norm * norm, excess = value - start - part * slope;
      if (!(value < MODERATE) || value <= start + DESCENT * part * slope) return true;
      if (whole && sizes[0] < m.newton_stol * sizes[1]) {
        std::memcpy(y, from, sizeof(from));
        look();
        return true;
      }
      double next = -slope * part * part / (2.0 * excess);  // of a parabola
      if (!whole) {
        if (part <= LEAST_PART) return false;
        const double now = excess / (part * part), then = excess_before / (part_before * part_before);
        const double a = (now - then) / (part - part_before);
        const double b = (part * then - part_before * now) / (part - part_before);
        const double root = std::sqrt(std::max(b * b - 3.0 * a * slope, 0.0));
        next = a == 0.0 ? -slope / (2.0 * b) : (root - b) / (3.0 * a);
      }
      part_before = part, excess_before = excess;
      part = std::max(0.1 * part, std::min(next, 0.5 * part));
    }
  }

  static constexpr double DESCENT = 1e-4, LEAST_PART = 1e-12;
  static constexpr double SLOW = 0.1;      // of jacobians.py
  static constexpr double LINEAR = 100.0;  // of guesses.py

  Rows slopes;  // see the constructor
  double first_slope[N], last_slope[N];
  bool knows_slope = false;
  // Newton's last iterate, f (and J) there: a first guess is a stage already solved for.
  double last_time = NAN, last_iterate[WIDTH] = {}, f[N], J[ENTRIES];
  const int64_t own = N - m.integrals;  // entries that Newton's method looks at
  bool keeps = false, damps = false, knows_jacobian = false, guesses = false;
  bool knows_constant = false, knows_constant_end = false;
  Factors factors;
  double factored = 0.0;  // for this shift
  // Of the adjoint: an explicit first stage is the last one of the step before.
  bool pending = false;
  double cotangent[N], J_end[ENTRIES], point[WIDTH];
  // Of an IMEX method.
  const Part* part = nullptr;
  void* other = nullptr;
  int64_t part_first = 0;
  double* mu_explicit = nullptr;
};

}  // namespace

extern "C" {

// To be freed by the sweep that takes it over.
void* pnode_implicit_steps(const Settings* settings, const double* y0, const double* mass) {
  return static_cast<Kernel*>(new Dirk(*settings, y0, mass));
}

void pnode_split(void* kernel, const Part* part, int64_t first) {
  static_cast<Dirk*>(static_cast<Kernel*>(kernel))->split(part, first);
}
}

// Theta and diagonally implicit Runge-Kutta steps, and their adjoints. Above this stands
// implicit_steps.cpp.

namespace {

// All stages are kept; an explicit first stage is the step before's last.
class Dirk : public ImplicitSteps {
 public:
  using ImplicitSteps::ImplicitSteps;

  void begin() override {
    ImplicitSteps::begin();
    knows_slope = false;
    last_time = NAN;
  }

  void accept(bool keep) override {
    ImplicitSteps::accept(keep);
    if (m.explicit_first) std::memcpy(first_slope, last_slope, sizeof(first_slope));
    knows_slope = m.explicit_first;
  }

  void begin_adjoint(double* const* sums) override {
    ImplicitSteps::begin_adjoint(sums);
    pending = false;
  }

  // The cotangent of u' in, that of u out. Of stage i: zeta of Y_i itself (the last stage's, if it
  // is u'), rho of its slope, from what comes after. The stage's equation adds
  //   kappa = rho + h a_ii x,  x = zeta + J^T kappa,
  // the whole cotangents of slope and stage.
  Status adjoint(int64_t index, double t, double h) override {
    const int s = int(m.stages);
    const double* Y = values.data() + index * N * (s - m.explicit_first);
    double rho[MOST_STAGES][N], kappa[N], x[N], l[N], f[N];
    for (int i = 0; i < s; i++)
      for (int k = 0; k < N; k++) rho[i][k] = m.stiffly_accurate ? 0.0 : h * m.b[i] * lambda[k];
    for (int k = 0; k < N; k++) l[k] = m.stiffly_accurate ? 0.0 : lambda[k];
    for (int i = s - 1; i >= (m.explicit_first ? 1 : 0); i--) {
      const bool is_end = m.stiffly_accurate && i == s - 1;
      const double *y = Y + i * N, *A = m.A + i * s, time = t + m.alpha[i] * h;
      const bool known = is_end && pending;
      if (!known) jacobian(time, y, c, f, J_end), counts.jacobians++, counts.rhs++;
      const double shift = 1.0 / (h * A[i]);
      if (!factors.factor(shift, J_end)) return SINGULAR;
      counts.factorizations++, counts.krylov++;
      if (is_end) {
        for (int k = 0; k < N; k++) x[k] = shift * lambda[k];
        factors.solve_transposed(x);
        for (int k = 0; k < N; k++) kappa[k] = h * A[i] * x[k];
      } else {
        for (int k = 0; k < N; k++) kappa[k] = shift * rho[i][k];
        factors.solve_transposed(kappa);
        multiply_transposed(J_end, kappa, x);
      }
      for (int k = 0; k < N; k++) l[k] += x[k];
      for (int j = 0; j < i; j++)
        for (int k = 0; k < N; k++) rho[j][k] += h * A[j] * x[k];
      if (known)
        for (int k = 0; k < N; k++) kappa[k] += cotangent[k];
      add_parameters(time, y, kappa);
    }
    if (m.explicit_first) {
      jacobian(t, Y, c, f, J_end), counts.jacobians++, counts.rhs++;
      multiply_transposed(J_end, rho[0], x);
      for (int k = 0; k < N; k++) l[k] += x[k];
      std::memcpy(cotangent, rho[0], sizeof(cotangent));
      pending = true;
    }
    std::memcpy(lambda, l, sizeof(lambda));
    if (index == 0 && pending) add_parameters(t, Y, cotangent);
    return DONE;
  }

  // StageTangents has the equations.
  Status tangent(int64_t index, double t, double h) override {
    const int s = int(m.stages);
    const double* Y = values.data() + index * N * (s - m.explicit_first);
    Rows slope[MOST_STAGES], driven, x;
    for (int i = 0; i < s; i++) {
      const double *y = Y + i * N, *A = m.A + i * s, time = t + m.alpha[i] * h;
      driven = du;
      for (int j = 0; j < i; j++) plus(driven, h * A[j], slope[j]);
      if (i == 0 && m.explicit_first) {
        jacobian(time, y, c, f, J_end), counts.jacobians++, counts.rhs++;
        slope[0].resize(du.size());
        for (size_t k = 0; k < du.size(); k += N) multiply(J_end, &du[k], &slope[0][k]);
        add_along(time, y, slope[0]);
        continue;
      }
      const double shift = 1.0 / (h * A[i]);
      x.assign(du.size(), 0.0);
      plus(x, shift, driven);
      if (!solve_tangents(time, y, shift, J_end, factors, x)) return SINGULAR;
      slope[i].assign(du.size(), 0.0);
      plus(slope[i], shift, x), plus(slope[i], -shift, driven);
    }
    if (m.stiffly_accurate)
      du = x;
    else
      for (int i = 0; i < s; i++) plus(du, h * m.b[i], slope[i]);
    return DONE;
  }

 protected:
  void keep_step() override {
    if (!kept_steps && m.explicit_first) keep_values(u, N);
    keep_values(stages[m.explicit_first], N * (m.stages - m.explicit_first));
  }

  Status step(double t, double h) override {
    keeps = m.keeps_jacobian;
    const Status status = solve_stages(t, h);
    if (!keeps || status != NOT_CONVERGED) return status;
    keeps = false;  // once more with a new Jacobian at each iterate
    return solve_stages(t, h);
  }

 private:
  Status solve_stages(double t, double h) {
    const int s = int(m.stages);
    knows_jacobian = false;
    double slope[MOST_STAGES][N], z[N];
    for (int i = 0; i < s; i++) {
      const double *A = m.A + i * s, diagonal = A[i];
      double* y = stages[i];
      if (i == 0 && m.explicit_first) {
        std::memcpy(y, u, sizeof(z));
        if (!knows_slope) {
          value(t, u, c, first_slope);
          counts.rhs++;
          if (!(square(first_slope) < MODERATE)) return NOT_FINITE;
          knows_slope = true;
        }
        std::memcpy(slope[0], first_slope, sizeof(z));
        continue;
      }
      for (int k = 0; k < N; k++) {
        double sum = 0.0;
        for (int j = 0; j < i; j++) sum += A[j] * slope[j][k];
        z[k] = u[k] + h * sum;
      }
      std::memcpy(y, i ? stages[i - 1] : u, sizeof(z));
      const double shift = 1.0 / (h * diagonal);
      const Status status = newton(t + m.alpha[i] * h, shift, z, y);
      if (status != DONE) return status;
      for (int k = 0; k < N; k++) slope[i][k] = shift * (y[k] - z[k]);
    }
    for (int k = 0; k < N; k++) {
      double sum = 0.0, difference = 0.0;
      for (int i = 0; i < s; i++) {
        sum += m.b[i] * slope[i][k];
        if (m.adaptive) difference += m.defect[i] * slope[i][k];
      }
      end[k] = m.stiffly_accurate ? stages[s - 1][k] : u[k] + h * sum;
      defect[k] = h * difference;
    }
    std::memcpy(last_slope, m.carries_slope ? slope[s - 1] : f, sizeof(z));
    return std::isfinite(square(end)) ? DONE : NOT_FINITE;
  }

  // Evaluate f, and J if that is cheap, unless that was done last.
  void evaluate(double t, const double* y) {
    const bool there = std::memcmp(y, last_iterate, sizeof(last_iterate)) == 0;
    if (there && (t == last_time || (AUTONOMOUS && !std::isnan(last_time)))) return;
    if (Field::CHEAP)
      jacobian(t, y, c, f, J);
    else
      value(t, y, c, f);
    counts.rhs++;
    last_time = t;
    std::memcpy(last_iterate, y, sizeof(last_iterate));
  }

  // Solve (y - z) / (h a) = f(t, y) for y, from a first guess, by Newton's method as SNES does.
  Status newton(double t, double shift, const double* z, double* y) {
    double residual[N], first = 0.0, norm = 0.0, before = 0.0;
    for (int iteration = 0;; iteration++) {
      double step = 0.0, size = 0.0;
      if (iteration) {
        const bool slow = iteration > 1 && !(norm <= SLOW * before);
        if (!keeps || !knows_jacobian || slow) {
          if (!Field::CHEAP) jacobian(t, y, c, f, J);
          knows_jacobian = true, factored = 0.0;
          counts.jacobians++;
        }
        if (factored != shift) {
          if (!factors.factor(shift, J)) return SINGULAR;
          counts.factorizations++, factored = shift;
        }
        factors.solve(residual);
        counts.newton++, counts.krylov++;
        before = norm;
        for (int k = 0; k < N; k++) y[k] -= residual[k];
        step = std::sqrt(square(residual)), size = std::sqrt(square(y));
      }
      evaluate(t, y);
      for (int k = 0; k < N; k++) residual[k] = shift * (y[k] - z[k]) - f[k];
      norm = std::sqrt(square(residual));
      if (!(norm * norm < MODERATE)) return NOT_FINITE;
      if (iteration == 0) first = norm;
      if (norm < m.newton_atol) return DONE;
      if (iteration) {
        if (norm <= m.newton_rtol * first || step < m.newton_stol * size) return DONE;
        if (norm > m.newton_divtol * first) return NOT_CONVERGED;
      }
      if (iteration >= m.max_newton) return NOT_CONVERGED;
    }
  }

  static constexpr double SLOW = 0.1;  // of jacobians.py

  double first_slope[N], last_slope[N];
  bool knows_slope = false;
  // Newton's last iterate, f (and J) there: a first guess is a stage already solved for.
  double last_time = NAN, last_iterate[N] = {}, f[N], J[N * N];
  bool keeps = false, knows_jacobian = false;
  Factors factors;
  double factored = 0.0;  // for this shift
  // Of the adjoint: an explicit first stage is the last one of the step before.
  bool pending = false;
  double cotangent[N], J_end[N * N];
};

}  // namespace

extern "C" {

// To be freed by the sweep that takes it over.
void* pnode_implicit_steps(const Settings* settings, const double* y0, const double*) {
  return static_cast<Kernel*>(new Dirk(*settings, y0));
}
}

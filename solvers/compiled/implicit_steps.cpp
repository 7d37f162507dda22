// Sweeps of implicit methods on a small system with a dense Jacobian, forwards and backwards.
//
// What stands above this file when it is compiled (see implicit_programs.py), for y' = f(t, y, p):
//
//   N                                    size of y
//   AUTONOMOUS                           whether f does not depend on t
//   Captured                             the arrays that f reads besides t and y
//   value(t, y, c, f)                    f
//   jacobian(t, y, c, f, J)              f and J = df/dy, by rows
//   slopes(t, y, c, f, J, ft)            and df/dt (Rosenbrock methods)
//   pull_back(t, y, w, c, l)             l = J^T w (Rosenbrock methods)
//   parameters(t, y, w, c, mu)           mu += (df/dp)^T w
//   second(t, y, S, w, c, l, mu)         l, mu += d/d(y, p) (sum_kl S_kl J_kl + w^T df/dt)
//
// Times and steps are the user's: h is negative where time runs backwards. s counts forwards.

namespace {

enum Status { DONE, STEP_LIMIT, UNDERFLOW_, NOT_FINITE, NOT_CONVERGED, SINGULAR };

// Square of the largest norm that is not taken for an overflow; see vectors.is_moderate.
constexpr double MODERATE = 1e200;
// TSADAPTBASIC's defaults (TSAdaptSetSafety, TSAdaptSetClip).
constexpr double SAFETY = 0.9, LEAST_FACTOR = 0.1, LARGEST_FACTOR = 10.0;
constexpr double FAILURE_FACTOR = 0.25;
constexpr int MOST_STAGES = 16;

struct Counts {
  int64_t steps, rejected, rhs, vjp, jacobians, newton, krylov, bytes;
};

}  // namespace

extern "C" {
struct Settings {
  int64_t rosenbrock, stages, adaptive, keep, max_steps, max_newton;
  // Rosenbrock: one matrix for all stages; f_t is needed. DIRK: u' is the last stage; the first
  // stage is u; its slope is the last stage's of the step before, as that was solved for.
  int64_t one_matrix, time_slope, stiffly_accurate, explicit_first, carries_slope;
  double direction, order, first_step, min_step, max_step, longest;
  double newton_rtol, newton_stol, newton_atol, newton_divtol;
  const double *A, *inverse, *correction, *b, *defect, *alpha, *gamma, *diagonal;
  const double *rtol, *atol;
};
}

namespace {

double square(const double* x) {
  double sum = 0.0;
  for (int k = 0; k < N; k++) sum += x[k] * x[k];
  return sum;
}

// LU with partial pivoting of shift I - J.
struct Factors {
  double lu[N][N];
  int pivots[N];

  bool factor(double shift, const double* J) {
    for (int i = 0; i < N; i++)
      for (int j = 0; j < N; j++) lu[i][j] = (i == j ? shift : 0.0) - J[i * N + j];
    for (int k = 0; k < N; k++) {
      int best = k;
      for (int i = k + 1; i < N; i++)
        if (std::fabs(lu[i][k]) > std::fabs(lu[best][k])) best = i;
      pivots[k] = best;
      if (best != k)
        for (int j = 0; j < N; j++) std::swap(lu[k][j], lu[best][j]);
      if (lu[k][k] == 0.0) return false;
      const double reciprocal = 1.0 / lu[k][k];
      for (int i = k + 1; i < N; i++) {
        const double l = lu[i][k] *= reciprocal;
        for (int j = k + 1; j < N; j++) lu[i][j] -= l * lu[k][j];
      }
    }
    return true;
  }

  void solve(double* x) const {
    for (int k = 0; k < N; k++) std::swap(x[k], x[pivots[k]]);
    for (int i = 0; i < N; i++)
      for (int j = 0; j < i; j++) x[i] -= lu[i][j] * x[j];
    for (int i = N - 1; i >= 0; i--) {
      for (int j = i + 1; j < N; j++) x[i] -= lu[i][j] * x[j];
      x[i] /= lu[i][i];
    }
  }

  void solve_transposed(double* x) const {
    for (int i = 0; i < N; i++) {
      for (int j = 0; j < i; j++) x[i] -= lu[j][i] * x[j];
      x[i] /= lu[i][i];
    }
    for (int i = N - 1; i >= 0; i--)
      for (int j = i + 1; j < N; j++) x[i] -= lu[j][i] * x[j];
    for (int k = N - 1; k >= 0; k--) std::swap(x[k], x[pivots[k]]);
  }
};

void multiply_transposed(const double* J, const double* w, double* l) {
  for (int j = 0; j < N; j++) {
    l[j] = 0.0;
    for (int i = 0; i < N; i++) l[j] += J[i * N + j] * w[i];
  }
}

// The accepted steps of a sweep, and what their adjoints need: the state at the start of a
// Rosenbrock step, all stages of the others. An explicit first stage is the step before's last.
struct Sweep {
  std::vector<double> starts, lengths, kept;
  std::vector<int64_t> outputs;
};

int64_t first_kept(const Settings& m) { return m.explicit_first ? N : 0; }

int64_t kept_per_step(const Settings& m) {
  return m.rosenbrock ? N : N * (m.stages - m.explicit_first);
}

struct Stepper {
  const Settings& m;
  Captured c;
  Counts& counts;
  double stages[MOST_STAGES][N];
  double end[N], defect[N];
  double first_slope[N], last_slope[N];
  bool knows_slope = false, forwards = true;
  // Newton's last iterate, f and J there: a first guess is a stage already solved for.
  double last_time = NAN, last_iterate[N] = {}, f[N], J[N * N];

  Stepper(const Settings& m, Captured c, Counts& counts) : m(m), c(c), counts(counts) {}

  Status attempt(double t, double h, const double* u) {
    return m.rosenbrock ? rosenbrock(t, h, u) : dirk(t, h, u);
  }

  // The attempt's end is where the next one begins.
  void accept() {
    if (m.explicit_first) std::memcpy(first_slope, last_slope, sizeof(first_slope));
    knows_slope = m.explicit_first;
  }

#if ROSENBROCK
  // The stages Y of RosenbrockTableau.transformed, the states Z they are at, and what J multiplies.
  Status rosenbrock_stages(double t, double h, const double* u, double (*Y)[N], double (*Z)[N],
                           double (*V)[N], double* J, Factors& factors) {
    const int s = int(m.stages);
    double f[N], ft[N];
    for (int i = 0; i < s; i++) {
      const double *A = m.A + i * s, *inverse = m.inverse + i * s, *corr = m.correction + i * s;
      for (int k = 0; k < N; k++) {
        Z[i][k] = u[k];
        for (int j = 0; j < i; j++) Z[i][k] += A[j] * Y[j][k];
      }
      if (i == 0)
        slopes(t, u, c, f, J, ft), counts.jacobians++;
      else
        value(t + m.alpha[i] * h, Z[i], c, f);
      counts.rhs++;
      if (!(square(f) < MODERATE)) return NOT_FINITE;
      double* y = Y[i];
      for (int k = 0; k < N; k++) {
        double sum = 0.0;
        for (int j = 0; j < i; j++) sum += inverse[j] * Y[j][k];
        y[k] = f[k] - sum / h;
        if (m.time_slope) y[k] += m.gamma[i] * h * ft[k];
        V[i][k] = 0.0;
      }
      if (m.diagonal[i] == 0.0) {
        for (int k = 0; k < N; k++)
          for (int j = 0; j < i; j++) V[i][k] += corr[j] * Y[j][k];
        for (int k = 0; k < N; k++) {
          for (int l = 0; l < N; l++) y[k] += J[k * N + l] * V[i][l];
          y[k] *= h;
        }
        continue;
      }
      if (i == 0 || !m.one_matrix)
        if (!factors.factor(1.0 / (h * m.diagonal[i]), J)) return SINGULAR;
      factors.solve(y);
      counts.newton += forwards, counts.krylov++;
      std::memcpy(V[i], y, sizeof(V[i]));
    }
    return DONE;
  }
#endif

  Status rosenbrock(double t, double h, const double* u) {
#if ROSENBROCK
    double Z[MOST_STAGES][N], V[MOST_STAGES][N], J[N * N];
    Factors factors;
    const Status status = rosenbrock_stages(t, h, u, stages, Z, V, J, factors);
    if (status != DONE) return status;
    for (int k = 0; k < N; k++) {
      end[k] = u[k];
      defect[k] = 0.0;
      for (int i = 0; i < m.stages; i++) {
        end[k] += m.b[i] * stages[i][k];
        if (m.adaptive) defect[k] += m.defect[i] * stages[i][k];
      }
    }
    return std::isfinite(square(end)) ? DONE : NOT_FINITE;
#else
    return NOT_CONVERGED;
#endif
  }

  // Evaluate f and J, unless that was done last.
  void evaluate(double t, const double* y) {
    const bool there = std::memcmp(y, last_iterate, sizeof(last_iterate)) == 0;
    if (there && (t == last_time || (AUTONOMOUS && !std::isnan(last_time)))) return;
    jacobian(t, y, c, f, J);
    counts.rhs++;
    last_time = t;
    std::memcpy(last_iterate, y, sizeof(last_iterate));
  }

  // Solve (y - z) / (h a) = f(t, y) for y, from a first guess, by Newton's method as SNES does.
  Status newton(double t, double shift, const double* z, double* y) {
    double residual[N], first = 0.0, norm = 0.0;
    Factors factors;
    for (int iteration = 0;; iteration++) {
      double step = 0.0, size = 0.0;
      if (iteration) {
        if (!factors.factor(shift, J)) return SINGULAR;
        factors.solve(residual);
        counts.newton++, counts.krylov++, counts.jacobians++;
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

  Status dirk(double t, double h, const double* u) {
    const int s = int(m.stages);
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

  // Weighted RMS norm of the error estimate (VecErrorWeightedNorms).
  double error() const {
    double sum = 0.0;
    for (int k = 0; k < N; k++) {
      const double larger_end = std::max(std::fabs(end[k]), std::fabs(end[k] + defect[k]));
      const double ratio = defect[k] / (m.atol[k] + m.rtol[k] * larger_end);
      sum += ratio * ratio;
    }
    return std::sqrt(sum / N);
  }
};

// The choices of forward_sweep (stepping.py), and TSADAPTBASIC's.
struct Driver {
  const Settings& m;
  Stepper stepper;
  Counts& counts;
  Sweep& sweep;
  double u[N];
  double natural = NAN;

  Driver(const Settings& m, Captured c, Counts& counts, Sweep& sweep)
      : m(m), stepper(m, c, counts), counts(counts), sweep(sweep) {}

  void accept(double s, double h) {
    if (m.keep) {
      sweep.starts.push_back(s);
      sweep.lengths.push_back(h);
      const double* kept = m.rosenbrock ? u : stepper.stages[m.explicit_first];
      sweep.kept.insert(sweep.kept.end(), kept, kept + kept_per_step(m));
    }
    std::memcpy(u, stepper.end, sizeof(u));
    stepper.accept();
    counts.steps++;
  }

  Status fixed(double start, double end, int64_t number) {
    const double h = (end - start) / double(number);
    double s = start;
    for (int64_t index = 1; index <= number; index++) {
      if (m.max_steps >= 0 && counts.steps >= m.max_steps) return STEP_LIMIT;
      const Status status = stepper.attempt(m.direction * s, m.direction * h, u);
      if (status != DONE) return status;
      accept(s, h);
      s = start + double(index) * h;
    }
    return DONE;
  }

  Status adapt(double start, double end) {
    double s = start;
    if (std::isnan(natural)) natural = first_step(start, end);
    while (s < end) {
      if (m.max_steps >= 0 && counts.steps >= m.max_steps) return STEP_LIMIT;
      const double remaining = end - s, size = std::fabs(s);
      const double spacing = std::nextafter(size, INFINITY) - size;
      const double least = std::max(4.0 * spacing, 1e-30 * remaining);
      natural = std::min(std::max(std::max(natural, m.min_step), least), m.max_step);
      if (natural < std::min(least, remaining)) return UNDERFLOW_;
      double wanted = natural;
      if (natural >= remaining * (1.0 - 1e-10))
        wanted = remaining;
      else if (natural > remaining / 2.0)
        wanted = remaining / 2.0;
      // The clock moves by as much as the state: move of clock.py.
      double after = wanted == remaining ? end : s + wanted;
      if (wanted != remaining && after - s > wanted) after = std::nextafter(after, s);
      const double h = after - s;
      const Status status = stepper.attempt(m.direction * s, m.direction * h, u);
      if (status == SINGULAR) return status;
      double error = INFINITY, proposed = h;
      if (status == DONE) error = stepper.error();
      const bool failed = status != DONE || !std::isfinite(error);
      if (!failed) {
        double factor = error > 0.0 ? SAFETY * std::pow(error, -1.0 / m.order) : INFINITY;
        factor = std::min(std::max(factor, LEAST_FACTOR), LARGEST_FACTOR);
        proposed = std::min(h * factor, m.longest);
      }
      if (!failed && error <= 1.0) {
        // A step shortened to meet an output time says nothing against the natural one.
        const bool shortened = wanted < natural && proposed >= h;
        natural = shortened ? std::max(proposed, natural) : proposed;
        accept(s, h);
        s = after;
        continue;
      }
      counts.rejected++;
      if (wanted <= std::max(m.min_step, least)) return UNDERFLOW_;
      if (status != DONE) proposed = FAILURE_FACTOR * h;
      natural = 0.0 < proposed && proposed < h ? proposed : FAILURE_FACTOR * h;
    }
    return DONE;
  }

  double scaled(const double* x, const double* scale) const {
    double sum = 0.0;
    for (int k = 0; k < N; k++) sum += (x[k] / scale[k]) * (x[k] / scale[k]);
    return std::sqrt(sum / N);
  }

  // stepping.first_step.
  double first_step(double start, double end) {
    double f0[N], f1[N], y[N], scale[N];
    value(m.direction * start, u, stepper.c, f0);
    for (int k = 0; k < N; k++) scale[k] = m.atol[k] + m.rtol[k] * std::fabs(u[k]);
    const double d0 = scaled(u, scale), d1 = scaled(f0, scale);
    const bool moves = d0 >= 1e-5 && d1 >= 1e-5 && d1 < INFINITY;
    double guess = moves ? 0.01 * d0 / d1 : 1e-6;
    guess = std::min(guess, end - start);
    for (int k = 0; k < N; k++) y[k] = u[k] + guess * m.direction * f0[k];
    value(m.direction * (start + guess), y, stepper.c, f1);
    counts.rhs += 2;
    for (int k = 0; k < N; k++) f1[k] -= f0[k];
    const double d2 = scaled(f1, scale) / guess, steepest = std::max(d1, d2);
    double step;
    if (!std::isfinite(d1) || !std::isfinite(d2))
      step = guess;
    else if (steepest <= 1e-15)
      step = std::max(1e-6, 1e-3 * guess);
    else
      step = std::pow(0.01 / steepest, 1.0 / (m.order + 1.0));
    if (std::isfinite(d1) && std::isfinite(d2))
      step = std::min(std::min(100.0 * guess, step), m.max_step);
    return m.first_step > 0.0 ? std::min(m.first_step, step) : step;
  }
};

struct Backwards {
  const Settings& m;
  Captured c;
  Counts& counts;
  double* state;  // lambda
  double* mu;
  bool wanted;
  // DIRK with an explicit first stage: that stage is the last one of the step before.
  bool pending = false;
  double cotangent[N], J[N * N], f[N];

  void add_parameters(double t, const double* y, const double* w) {
    if (!wanted) return;
    parameters(t, y, w, c, mu);
    counts.vjp++;
  }

  // The cotangent of u' in, that of u out. Of stage i: zeta of Y_i itself (the last stage's, if it
  // is u'), rho of its slope, from what comes after. The stage's equation adds
  //   kappa = rho + h a_ii x,  x = zeta + J^T kappa,
  // the whole cotangents of slope and stage.
  Status dirk(double t, double h, const double* Y) {
    const int s = int(m.stages);
    double rho[MOST_STAGES][N], kappa[N], x[N], lambda[N];
    Factors factors;
    for (int i = 0; i < s; i++)
      for (int k = 0; k < N; k++) rho[i][k] = m.stiffly_accurate ? 0.0 : h * m.b[i] * state[k];
    for (int k = 0; k < N; k++) lambda[k] = m.stiffly_accurate ? 0.0 : state[k];
    for (int i = s - 1; i >= (m.explicit_first ? 1 : 0); i--) {
      const bool is_end = m.stiffly_accurate && i == s - 1;
      const double *y = Y + i * N, *A = m.A + i * s, time = t + m.alpha[i] * h;
      const bool known = is_end && pending;
      if (!known) jacobian(time, y, c, f, J), counts.jacobians++, counts.rhs++;
      const double shift = 1.0 / (h * A[i]);
      if (!factors.factor(shift, J)) return SINGULAR;
      counts.krylov++;
      if (is_end) {
        for (int k = 0; k < N; k++) x[k] = shift * state[k];
        factors.solve_transposed(x);
        for (int k = 0; k < N; k++) kappa[k] = h * A[i] * x[k];
      } else {
        for (int k = 0; k < N; k++) kappa[k] = shift * rho[i][k];
        factors.solve_transposed(kappa);
        multiply_transposed(J, kappa, x);
      }
      for (int k = 0; k < N; k++) lambda[k] += x[k];
      for (int j = 0; j < i; j++)
        for (int k = 0; k < N; k++) rho[j][k] += h * A[j] * x[k];
      if (known)
        for (int k = 0; k < N; k++) kappa[k] += cotangent[k];
      add_parameters(time, y, kappa);
    }
    if (m.explicit_first) {
      jacobian(t, Y, c, f, J), counts.jacobians++, counts.rhs++;
      multiply_transposed(J, rho[0], x);
      for (int k = 0; k < N; k++) lambda[k] += x[k];
      std::memcpy(cotangent, rho[0], sizeof(cotangent));
      pending = true;
    }
    std::memcpy(state, lambda, sizeof(lambda));
    return DONE;
  }

  // RosenbrockAdjoint has the equations.
  Status rosenbrock(double t, double h, const double* u) {
#if ROSENBROCK
    const int s = int(m.stages);
    double Y[MOST_STAGES][N], Z[MOST_STAGES][N], V[MOST_STAGES][N], bar[MOST_STAGES][N];
    double S[N * N] = {}, weight[N] = {}, w[N], l[N], through[N], lambda[N];
    Factors factors;
    Stepper stepper(m, c, counts);
    stepper.forwards = false;
    Status status = stepper.rosenbrock_stages(t, h, u, Y, Z, V, J, factors);
    if (status != DONE) return status;
    for (int i = 0; i < s; i++)
      for (int k = 0; k < N; k++) bar[i][k] = m.b[i] * state[k];
    std::memcpy(lambda, state, sizeof(lambda));
    for (int i = s - 1; i >= 0; i--) {
      const double *A = m.A + i * s, *inverse = m.inverse + i * s, *corr = m.correction + i * s;
      const bool is_explicit = m.diagonal[i] == 0.0;
      std::memcpy(w, bar[i], sizeof(w));
      if (is_explicit) {
        for (int k = 0; k < N; k++) w[k] *= h;
        multiply_transposed(J, w, through);
      } else {
        if (!m.one_matrix)
          if (!factors.factor(1.0 / (h * m.diagonal[i]), J)) return SINGULAR;
        factors.solve_transposed(w);
        counts.krylov++;
      }
      const double time = t + m.alpha[i] * h;
      if (i == 0)
        multiply_transposed(J, w, l);
      else
        pull_back(time, Z[i], w, c, l);
      counts.vjp++;
      if (wanted) parameters(time, Z[i], w, c, mu);
      for (int k = 0; k < N; k++) {
        lambda[k] += l[k];
        weight[k] += m.gamma[i] * h * w[k];
        for (int j = 0; j < N; j++) S[k * N + j] += w[k] * V[i][j];
        for (int j = 0; j < i; j++) {
          bar[j][k] += A[j] * l[k] - inverse[j] / h * w[k];
          if (is_explicit) bar[j][k] += corr[j] * through[k];
        }
      }
    }
    if (!m.time_slope) std::memset(weight, 0, sizeof(weight));
    second(t, u, S, weight, c, lambda, mu);
    counts.vjp++;
    std::memcpy(state, lambda, sizeof(lambda));
    return DONE;
#else
    return NOT_CONVERGED;
#endif
  }
};

}  // namespace

extern "C" {

// Integrate from times[0] through all of times; ys receives the states there. Returns the sweep.
// fixed: how many equal steps there are between them.
void* pnode_forward(const Settings* m, Captured c, const double* y0, const double* times,
                    const int64_t* fixed, int64_t number, double* ys, Counts* counts,
                    int64_t* status) {
  Sweep* sweep = new Sweep;
  Driver driver(*m, c, *counts, *sweep);
  std::memcpy(driver.u, y0, sizeof(driver.u));
  std::memcpy(ys, y0, sizeof(driver.u));
  if (m->keep) sweep->kept.assign(y0, y0 + first_kept(*m));
  sweep->outputs.push_back(0);
  *status = DONE;
  for (int64_t index = 1; index < number; index++) {
    const double start = times[index - 1], end = times[index];
    *status = m->adaptive ? driver.adapt(start, end) : driver.fixed(start, end, fixed[index - 1]);
    if (*status != DONE) break;
    std::memcpy(ys + index * N, driver.u, sizeof(driver.u));
    sweep->outputs.push_back(counts->steps);
  }
  counts->bytes = int64_t(sweep->kept.size() * sizeof(double));
  return sweep;
}

// The adjoint of a sweep: state and mu come as zeros.
int64_t pnode_reverse(const Settings* m, Captured c, const void* done, const double* cotangents,
                      const uint8_t* nonzero, double* state, double* mu, int64_t wanted,
                      Counts* counts) {
  const Sweep& sweep = *static_cast<const Sweep*>(done);
  Backwards adjoint{*m, c, *counts, state, mu, wanted != 0};
  const int64_t width = kept_per_step(*m);
  int64_t waiting = int64_t(sweep.outputs.size()) - 1;
  bool active = false;
  for (int64_t step = int64_t(sweep.starts.size()); step >= 1; step--) {
    for (; waiting > 0 && sweep.outputs[waiting] == step; waiting--) {
      if (!nonzero[waiting]) continue;
      active = true;
      for (int k = 0; k < N; k++) state[k] += cotangents[waiting * N + k];
    }
    if (!active) continue;
    const double t = m->direction * sweep.starts[step - 1];
    const double h = m->direction * sweep.lengths[step - 1];
    const double* kept = sweep.kept.data() + (step - 1) * width;
    const Status status =
        m->rosenbrock ? adjoint.rosenbrock(t, h, kept) : adjoint.dirk(t, h, kept);
    if (status != DONE) return status;
    counts->steps++;
    if (step == 1 && adjoint.pending) adjoint.add_parameters(t, kept, adjoint.cotangent);
  }
  return DONE;
}

void pnode_free(void* sweep) { delete static_cast<Sweep*>(sweep); }

// f, and the products of w, to compare with the vector field itself. mu comes as zeros.
void pnode_products(Captured c, double t, const double* y, const double* w, double* f, double* l,
                    double* mu) {
  double J[N * N];
  jacobian(t, y, c, f, J);
  multiply_transposed(J, w, l);
  parameters(t, y, w, c, mu);
}

// The relative difference of f and what it should be; NaN if one of them is not finite.
double pnode_difference(Captured c, double t, const double* y, const double* expected) {
  double f[N];
  value(t, y, c, f);
  for (int k = 0; k < N; k++) f[k] -= expected[k];
  const double difference = std::sqrt(square(f));
  return difference == 0.0 ? 0.0 : difference / std::sqrt(square(expected));
}

// The derivatives of w^T J v + w^T df/dt. l and mu come as zeros.
void pnode_second(Captured c, double t, const double* y, const double* w, const double* v,
                  double* l, double* mu) {
#if ROSENBROCK
  double S[N * N];
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++) S[i * N + j] = w[i] * v[j];
  second(t, y, S, w, c, l, mu);
#endif
}

}  // extern "C"

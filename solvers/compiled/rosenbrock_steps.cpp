// Rosenbrock steps and their adjoints. Above this stands implicit_steps.cpp.

namespace {

// The state at the start of a step is kept.
class Rosenbrock : public ImplicitSteps {
 public:
  using ImplicitSteps::ImplicitSteps;

  void accept(bool keep) override {
    std::memcpy(begun, u, sizeof(begun));
    ImplicitSteps::accept(keep);
  }

  void live(Numbers& found) override { found.assign(begun, begun + N); }

  // RosenbrockAdjoint has the equations.
  Status adjoint(int64_t index, double t, double h) override {
    const int s = int(m.stages);
    double Y[MOST_STAGES][N], Z[MOST_STAGES][N], V[MOST_STAGES][N], bar[MOST_STAGES][N];
    double W[MOST_STAGES][N], rates[MOST_STAGES], l[N], through[N], moved[N], after[N];
    Factors factors;
    const double* u = kept_of(index, N);
    const Status status = solve_stages(t, h, u, Y, Z, V, J, factors, false);
    if (status != DONE) return status;
    for (int i = 0; i < s; i++)
      for (int k = 0; k < N; k++) bar[i][k] = m.b[i] * lambda[k];
    std::memcpy(after, lambda, sizeof(after));
    for (int i = s - 1; i >= 0; i--) {
      const double *A = m.A + i * s, *inverse = m.inverse + i * s, *corr = m.correction + i * s;
      const bool is_explicit = m.diagonal[i] == 0.0;
      double* w = W[i];
      std::memcpy(w, bar[i], sizeof(W[i]));
      rates[i] = m.time_slope ? m.gamma[i] * h : 0.0;
      if (is_explicit) {
        for (int k = 0; k < N; k++) w[k] *= h;
        apply_transposed(J, w, through);
      } else {
        if (!m.one_matrix) {
          if (!factors.factor(1.0 / (h * m.diagonal[i]), J, M)) return SINGULAR;
          counts.factorizations++;
        }
        if (!factors.solve_exactly(w, true)) return NOT_CONVERGED;
        counts.krylov++;
      }
      const double time = t + m.alpha[i] * h;
      if (i == 0)
        apply_transposed(J, w, l);
      else
        pull_back(time, Z[i], w, c, l);
      counts.vjp++;
      if (m.wanted) parameters(time, Z[i], w, c, mu);
      if (M) multiply_transposed(M, w, moved);
      for (int k = 0; k < N; k++) {
        after[k] += l[k];
        for (int j = 0; j < i; j++) {
          bar[j][k] += A[j] * l[k] - inverse[j] / h * (M ? moved : w)[k];
          if (is_explicit) bar[j][k] += corr[j] * through[k];
        }
      }
    }
    second(t, u, s, W, V, rates, c, after, mu);
    counts.vjp++;
    std::memcpy(lambda, after, sizeof(lambda));
    return DONE;
  }

  // RosenbrockTangents has the equations.
  Status tangent(int64_t index, double t, double h) override {
    const int s = int(m.stages);
    double Y[MOST_STAGES][N], at[MOST_STAGES][N], V[MOST_STAGES][N];
    double f[N], moved[N], through[N];
    Factors factors;
    const double* u = kept_of(index, N);
    const Status status = solve_stages(t, h, u, Y, at, V, J, factors, false);
    if (status != DONE) return status;
    Rows dY[MOST_STAGES], dZ;
    for (int i = 0; i < s; i++) {
      const double *A = m.A + i * s, *inverse = m.inverse + i * s, *corr = m.correction + i * s;
      const double time = t + m.alpha[i] * h;
      dZ = du;
      for (int j = 0; j < i; j++) plus(dZ, A[j], dY[j]);
      if (i) jacobian(time, at[i], c, f, own), counts.jacobians++, counts.rhs++;
      dY[i].resize(du.size());
      for (size_t k = 0; k < du.size(); k += N) apply(i ? own : J, &dZ[k], &dY[i][k]);
      add_along(time, at[i], dY[i]);
      Rows driven(M ? du.size() : 0);
      for (int j = 0; j < i; j++) plus(M ? driven : dY[i], -inverse[j] / h, dY[j]);
      for (size_t k = 0; k < driven.size(); k += N) {
        multiply(M, &driven[k], moved);
        for (int l = 0; l < N; l++) dY[i][k + l] += moved[l];
      }
      add_second(t, u, V[i], m.time_slope ? m.gamma[i] * h : 0.0, dY[i]);
      const bool is_explicit = m.diagonal[i] == 0.0;
      if (!is_explicit && !m.one_matrix) {
        if (!factors.factor(1.0 / (h * m.diagonal[i]), J, M)) return SINGULAR;
        counts.factorizations++;
      }
      for (size_t k = 0; k < du.size(); k += N) {
        double* y = &dY[i][k];
        if (!is_explicit) {
          if (!factors.solve_exactly(y)) return NOT_CONVERGED;
          counts.krylov++;
          continue;
        }
        for (int l = 0; l < N; l++) {
          moved[l] = 0.0;
          for (int j = 0; j < i; j++) moved[l] += corr[j] * dY[j][k + l];
        }
        apply(J, moved, through);
        for (int l = 0; l < N; l++) y[l] = h * (y[l] + through[l]);
      }
    }
    for (int i = 0; i < s; i++) plus(du, m.b[i], dY[i]);
    return DONE;
  }

 protected:
  void keep_step() override { keep_values(u, N); }

  Status step(double t, double h) override {
    double Z[MOST_STAGES][N], V[MOST_STAGES][N];
    Factors factors;
    const Status status = solve_stages(t, h, u, stages, Z, V, J, factors, true);
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
  }

 private:
  double begun[N];  // where the last step began

  // x_k += the derivative of J v + weight df/dt, at a step's start, along tangent k there.
  void add_second(double t, const double* u, const double* v, double weight, Rows& x) {
    double w[1][N] = {}, along[1][N], l[N];
    std::memcpy(along[0], v, sizeof(l));
    Rows slopes(m.wanted);
    for (int i = 0; i < N; i++) {
      std::memset(l, 0, sizeof(l));
      std::fill(slopes.begin(), slopes.end(), 0.0);
      w[0][i] = 1.0;
      second(t, u, 1, w, along, &weight, c, l, slopes.data());
      w[0][i] = 0.0;
      for (size_t k = 0; k < x.size(); k += N)
        for (int j = 0; j < N; j++) x[k + i] += l[j] * du[k + j];
      if (directions.empty()) continue;
      for (size_t k = 0; k < x.size() / N; k++)
        for (int64_t j = 0; j < m.wanted; j++)
          x[k * N + i] += slopes[j] * directions[k * m.wanted + j];
    }
    counts.vjp += N;
  }

  // The stages Y of RosenbrockTableau.transformed, the states Z they are at, and what J multiplies.
  Status solve_stages(double t, double h, const double* u, double (*Y)[N], double (*Z)[N],
                      double (*V)[N], double* J, Factors& factors, bool forwards) {
    const int s = int(m.stages);
    double f[N], ft[N], through[N];
    for (int i = 0; i < s; i++) {
      const double *A = m.A + i * s, *inverse = m.inverse + i * s, *corr = m.correction + i * s;
      for (int k = 0; k < N; k++) {
        Z[i][k] = u[k];
        for (int j = 0; j < i; j++) Z[i][k] += A[j] * Y[j][k];
      }
      if (i == 0)
        if (m.time_slope)
          slopes(t, u, c, f, J, ft);
        else
          jacobian(t, u, c, f, J);
      else
        value(t + m.alpha[i] * h, Z[i], c, f);
      counts.rhs++, counts.jacobians += i == 0;
      if (!(square(f) < MODERATE)) return NOT_FINITE;
      double *y = Y[i], sum[N], moved[N];
      for (int k = 0; k < N; k++) {
        sum[k] = 0.0;
        for (int j = 0; j < i; j++) sum[k] += inverse[j] * Y[j][k];
      }
      if (M) multiply(M, sum, moved);
      for (int k = 0; k < N; k++) {
        y[k] = f[k] - (M ? moved : sum)[k] / h;
        if (m.time_slope) y[k] += m.gamma[i] * h * ft[k];
        V[i][k] = 0.0;
      }
      if (m.diagonal[i] == 0.0) {
        for (int k = 0; k < N; k++)
          for (int j = 0; j < i; j++) V[i][k] += corr[j] * Y[j][k];
        apply(J, V[i], through);
        for (int k = 0; k < N; k++) y[k] = h * (y[k] + through[k]);
        continue;
      }
      if (i == 0 || !m.one_matrix) {
        if (!factors.factor(1.0 / (h * m.diagonal[i]), J, M)) return SINGULAR;
        counts.factorizations++;
      }
      if (!factors.solve_exactly(y)) return NOT_CONVERGED;
      counts.newton += forwards, counts.krylov++;
      std::memcpy(V[i], y, sizeof(V[i]));
    }
    return DONE;
  }

  double J[ENTRIES], own[ENTRIES];
};

}  // namespace

extern "C" {

// To be freed by the sweep that takes it over.
void* pnode_implicit_steps(const Settings* settings, const double* y0, const double* mass) {
  return static_cast<Kernel*>(new Rosenbrock(*settings, y0, mass));
}

// The derivatives of w^T J v + w^T df/dt. l and mu come as zeros.
void pnode_second(Captured c, double t, const double* y, const double* w, const double* v,
                  double* l, double* mu) {
  const double rate = 1.0;
  second(t, y, 1, reinterpret_cast<const double(*)[N]>(w), reinterpret_cast<const double(*)[N]>(v), &rate,
         c, l, mu);
}

// The same of independent samples, whose mu is added up; of one shape with pnode_row_products.
void pnode_row_seconds(void* const* read, const int64_t* apart, int64_t count, const double* t,
                       const double* y, const double* w, const double* v, int64_t rows, double*,
                       double* l, double* mu) {
  Field field;
  for (int64_t row = 0; row < rows; row++, y += N, w += N, v += N, l += N) {
    const std::vector<void*> own = of_row(read, apart, count, row);
    pnode_second(field.lend(own.data()), t[row], y, w, v, l, mu);
  }
}
}

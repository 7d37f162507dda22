// Adjoints and tangents of the steps of dirk_steps.cpp, which stands above this.

namespace {

// From the cotangents of a stage and its slope to kappa, that of its start, z = M^T own. Matrices with a
// mass are dense.
void Dirk::pass_back(double shift, const double* zeta, const double* rho, double* kappa,
                     double* z, double* own) {
  const double* M = mass_at(J_end, this->M);
  multiply_transposed(M, rho, z);
  const double* moved = m.stiffly_accurate ? z : rho;
  for (int k = 0; k < N; k++) kappa[k] = zeta[k] + shift * moved[k];
  factors.solve_transposed(kappa);
  if (m.stiffly_accurate) {
    for (int k = 0; k < N; k++) own[k] = shift * (kappa[k] - rho[k]);
    multiply_transposed(M, own, z);
  } else {
    multiply_transposed(M, kappa, z);
    for (int k = 0; k < N; k++) z[k] = shift * (z[k] - rho[k]);
  }
}

// The cotangent of u' in, that of u out. Of stage i: zeta of Y_i itself (the last stage's, if it
// is u'), rho of its slope, from what comes after. The stage's equation adds
//   kappa = rho + h a_ii x,  x = zeta + J^T kappa = (kappa - rho) / (h a_ii),
// the whole cotangents of slope and stage. tau is that of the explicit slope, whose J_e^T tau is
// part of zeta. With a mass matrix rho is that of M times the slope where the last stage is u'.
Status Dirk::adjoint(int64_t index, double t, double h) {
  const int s = int(m.stages);
  const double* Y = kept_of(index, WIDTH * (s - chained()));
  double rho[MOST_STAGES][N], tau[MOST_STAGES][N], zeta[N], kappa[N], x[N], own[N], l[N];
  for (int i = 0; i < s; i++)
    for (int k = 0; k < N; k++) {
      rho[i][k] = m.stiffly_accurate ? 0.0 : h * m.b[i] * lambda[k];
      if (part) tau[i][k] = h * m.b_explicit[i] * lambda[k];
    }
  for (int k = 0; k < N; k++) l[k] = m.stiffly_accurate ? 0.0 : lambda[k];
  for (int i = s - 1; i >= (m.explicit_first ? 1 : 0); i--) {
    const bool is_end = m.stiffly_accurate && i == s - 1;
    const double *y = Y + i * WIDTH, *A = m.A + i * s, time = t + m.alpha[i] * h;
    const bool known = is_end && pending;
    if (!known) linearize(time, y);
    const double shift = 1.0 / (h * A[i]);
    if (!factor(shift, J_end)) return SINGULAR;
    counts.krylov++;
    pull_back_explicit(i, t, h, y, tau[i], zeta);
    double* passed = x;
    if (is_massive()) {
      pass_back(shift, is_end ? lambda : zeta, rho[i], kappa, x, own);
      if (m.stiffly_accurate) passed = own;
    } else if (is_end) {
      for (int k = 0; k < N; k++) x[k] = shift * lambda[k];
      if (!factors.solve_exactly(x, true)) return NOT_CONVERGED;
      for (int k = 0; k < N; k++) kappa[k] = h * A[i] * x[k];
    } else {
      for (int k = 0; k < N; k++) kappa[k] = shift * rho[i][k] + zeta[k];
      if (!factors.solve_exactly(kappa, true)) return NOT_CONVERGED;
      for (int k = 0; k < N; k++) x[k] = shift * (kappa[k] - rho[i][k]);  // J^T would amplify round-off
    }
    for (int k = 0; k < N; k++) l[k] += x[k];
    for (int j = 0; j < i; j++)
      for (int k = 0; k < N; k++) {
        rho[j][k] += h * A[j] * passed[k];
        if (part) tau[j][k] += h * m.A_explicit[i * s + j] * x[k];
      }
    if (known)
      for (int k = 0; k < N; k++) kappa[k] += cotangent[k];
    add_parameters(time, y, kappa);
  }
  if (m.explicit_first) {
    linearize(t, Y);
    if (M && (m.carries_slope || !m.stiffly_accurate)) {
      std::memcpy(own, rho[0], sizeof(own));
      multiply_transposed(slopes.data() + (m.stiffly_accurate ? N * N : 0), own, rho[0]);
    }
    apply_transposed(J_end, rho[0], x);
    pull_back_explicit(0, t, h, Y, tau[0], zeta);
    for (int k = 0; k < N; k++) l[k] += x[k] + zeta[k];
    std::memcpy(cotangent, rho[0], sizeof(cotangent));
    pending = chained();
    if (!pending) add_parameters(t, Y, cotangent);
  }
  std::memcpy(lambda, l, sizeof(lambda));
  if (index == 0 && pending) add_parameters(t, Y, cotangent);
  return DONE;
}

// StageTangents has the equations.
Status Dirk::tangent(int64_t index, double t, double h) {
  const int s = int(m.stages);
  const double* Y = kept_of(index, WIDTH * (s - chained()));
  Rows slope[MOST_STAGES], driven, x, more;
  double value[N];
  factored = 0.0;
  for (int i = 0; i < s; i++) {
    const double *y = Y + i * WIDTH, *A = m.A + i * s, time = t + m.alpha[i] * h;
    driven = du;
    for (int j = known_products(); j < i; j++) plus(driven, h * A[j], slope[j]);
    if (i == 0 && m.explicit_first) {
      jacobian(time, y, c, value, J_end), counts.jacobians++, counts.rhs++;
      slope[0].resize(du.size());
      for (size_t k = 0; k < du.size(); k += N) apply(J_end, &du[k], &slope[0][k]);
      add_along(time, y, slope[0]);
      if (M && m.carries_slope)
        for (size_t k = 0; k < du.size(); k += N) {
          std::memcpy(value, &slope[0][k], sizeof(value));
          multiply(slopes.data(), value, &slope[0][k]);
        }
      continue;
    }
    const double shift = 1.0 / (h * A[i]);
    x.assign(du.size(), 0.0);
    plus(x, shift, driven);
    if (known_products()) {
      more = slope[0];
      for (double& entry : more) entry *= shift * h * A[0];
    }
    const Status status = solve_tangents(time, y, shift, J_end, factors, x, more);
    if (status != DONE) return status;
    slope[i].assign(du.size(), 0.0);
    plus(slope[i], shift, x), plus(slope[i], -shift, driven);
  }
  if (m.stiffly_accurate)
    du = x;
  else
    for (int i = 0; i < s; i++) plus(du, h * m.b[i], slope[i]);
  return DONE;
}

}  // namespace

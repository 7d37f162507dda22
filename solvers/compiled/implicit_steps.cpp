// Steps on a small system, implicit ones with a dense Jacobian: what dirk_steps.cpp, bdf_steps.cpp,
// coupled_steps.cpp, rosenbrock_steps.cpp and explicit_steps.cpp have in common.
//
// What stands above this file when it is compiled (see programs.py): kernel.h, dense_systems.h or
// sparse_systems.h, and, as scalars or by graph_field.cpp, of y' = f(t, y, p)
//
//   N                                    size of y
//   WIDTH                                N, or for a residual F(t, y, y') 2 N: f is then -F, its `y` have y'
//                                        behind them, J is -dF/dy, and dF/dy' stands behind that
//   AUTONOMOUS                           whether f does not depend on t
//   CONSTANT                             whether its Jacobian depends on neither t nor y
//   Field                                lends Captured, what f reads besides t and y; CHEAP: J costs
//                                        little where f is evaluated, and a step a microsecond or so;
//                                        TOGETHER: all ranks evaluate it, and take products, at once
//   value(t, y, c, f)                    f
//   jacobian(t, y, c, f, J)              f and J = df/dy, its ENTRIES
//   slopes(t, y, c, f, J, ft)            and df/dt (Rosenbrock methods)
//   pull_back(t, y, w, c, l)             l = J^T w (Rosenbrock and explicit methods)
//   parameters(t, y, w, c, mu)           mu += (df/dp)^T w
//   second(t, y, n, w, v, r, c, l, mu)   l, mu += d/d(y, p) sum_i w_i^T (J v_i + r_i df/dt), i < n

namespace {

constexpr int MOST_STAGES = 16;

struct Settings {  // of programs.py
  // `wanted`: entries of mu.
  int64_t stages, adaptive, max_newton, wanted;
  // Rosenbrock: one matrix for all stages; f_t is needed. DIRK, explicit: u' is the last stage; DIRK: the first
  // stage is u; its slope is the last stage's of the step before, as that was solved for.
  int64_t one_matrix, time_slope, stiffly_accurate, explicit_first, carries_slope;
  // DIRK: a Jacobian serves for a step's iterations as long as they converge well.
  int64_t keeps_jacobian;
  // DIRK: damped steps of Newton's method are tried where full ones fail.
  int64_t backtracks;
  // BDF: lowest and highest order; whether Newton's method looks at the residual, and at the update
  // in relation to u instead of to the tolerances.
  int64_t lowest, highest, by_residual, by_norm;
  // The last entries of y, which nothing depends on, and no Newton's method looks at.
  int64_t integrals;
  double newton_rtol, newton_stol, newton_atol, newton_divtol, newton_kappa;
  double krylov_rtol;  // of krylov_systems.h
  const double *A, *inverse, *correction, *b, *defect, *alpha, *gamma, *diagonal;
  // Of the explicit part of an IMEX method.
  const double *A_explicit, *b_explicit, *defect_explicit, *alpha_explicit;
  // Coupled stages: of A^-1, complex numbers but for the last.
  const double *eigenvalues, *vectors, *covectors, *separated;
  const double *rtol, *atol;
};

constexpr bool ASSEMBLED = !Field::TOGETHER;  // whether a Jacobian is a matrix

typedef std::vector<double> Rows;

// The explicit part of a split field, in a program of its own. Each is lent its captured tensors.
struct Part {
  void* (*create)();
  void (*destroy)(void*);
  void (*lend)(void*, void* const*, Together*);
  void (*value)(void*, double, const double*, double*);
  // l = J^T w and, but for null, mu += (df/dp)^T w.
  void (*pull_back)(void*, double, const double*, const double*, double*, double*);
};

double square(const double* x, int64_t count = N) {
  double sum = 0.0;
  for (int k = 0; k < count; k++) sum += x[k] * x[k];
  return sum;
}

// The same in units of a tolerance, of so many vectors: nothing is nothing where that is zero, too.
double square_in(const double* x, const double* scale, int number = 1) {
  double sum = 0.0;
  for (int i = 0; i < number; i++)
    for (int k = 0; k < N; k++) {
      const double v = x[i * N + k], ratio = v == 0.0 ? 0.0 : v / scale[k];
      sum += ratio * ratio;
    }
  return sum;
}

// x += factor y.
void plus(Rows& x, double factor, const Rows& y) {
  if (factor != 0.0)
    for (size_t k = 0; k < x.size(); k++) x[k] += factor * y[k];
}

class ImplicitSteps : public Kernel {
 public:
  // `mass`: M of M y' = f(t, y), by rows; null for the identity.
  ImplicitSteps(const Settings& settings, const double* y0, const double* mass = nullptr)
      : Kernel(N), m(settings), matrix(mass, mass + (mass ? N * N : 0)),
        M(mass ? matrix.data() : nullptr) {
    std::memcpy(start, y0, sizeof(start));
    steps_per_look = Field::CHEAP ? 64 : 1;
    collective = reduces = Field::TOGETHER;
    together.counts = &counts, together.rtol = m.krylov_rtol, together.integrals = m.integrals;
  }

  void lend(void* const* captured) override {
    if (Field::TOGETHER) together.sums = sums;
    c = field.lend(captured, &together);
  }

  void fail() override { together.failed = true; }
  bool failed() const override { return together.failed; }

  void begin() override {
    together.failed = false;
    std::memcpy(u, start, sizeof(u));
    kept_steps = 0;
    values.clear();
  }

  Attempt attempt(double t, double h) override {
    const Status status = step(t, h);
    return {status, status == DONE && m.adaptive ? error() : 0.0};
  }

  void accept(bool keep) override {
    if (keep) {
      keep_step();
      kept_steps++;
      counts.bytes = int64_t(values.size() * sizeof(double));
    }
    std::memcpy(u, end, sizeof(u));
  }

  void output(void* outputs, int64_t index) const override {
    std::memcpy(static_cast<double*>(outputs) + index * N, u, sizeof(u));
  }

  int64_t kept() const override { return kept_steps; }

  void begin_adjoint(double* const* sums) override {
    std::memset(lambda, 0, sizeof(lambda));
    together.failed = false;
    mu = sums[0];
  }

  void add(const double* cotangent) override {
    for (int k = 0; k < N; k++) lambda[k] += cotangent[k];
  }

  void forget() override {}  // a second backward sweep takes the same

  const double* state() const override { return u; }
  void load(const double* checkpoint) override { loaded = checkpoint; }

  void stand(const double* from) override {
    std::memcpy(u, from ? from : start, sizeof(u));
    restart_step();
  }

  const double* tried() const override { return end; }

  void follow(const Kernel& other) override { stand(static_cast<const ImplicitSteps&>(other).u); }

  void adopt(const Kernel& other) override {
    const auto& from = static_cast<const ImplicitSteps&>(other);
    std::memcpy(end, from.end, sizeof(end));
    std::memcpy(stages, from.stages, sizeof(stages));
  }

  bool slope(double t, const double* y, double* f) override {
    if (is_massive()) return false;
    slope_at(t, y, f);
    return true;
  }

  void end_adjoint(double* state, double* const*) override {
    if (together.failed) throw FAILED;
    std::memcpy(state, lambda, sizeof(lambda));
  }

  void begin_tangents(int64_t number, const double* first, const double* along) override {
    du.assign(first, first + number * N);
    directions.assign(along, along + (along ? number * m.wanted : 0));
  }

  void tangents(double* rows) const override { std::copy(du.begin(), du.end(), rows); }

  // step_control.first_step.
  double first_step(const Control& control, double s, double stop) override {
    const double step = is_massive() ? std::min(1e-6 * (stop - s), control.max_step)
                          : automatic_step(control, s, stop);
    return control.first_step > 0.0 ? std::min(control.first_step, step) : step;
  }

 protected:
  bool is_massive() const { return RESIDUAL || M; }

  double automatic_step(const Control& control, double s, double stop) {
    double scale[N];
    for (int k = 0; k < N; k++) scale[k] = m.atol[k] + m.rtol[k] * std::fabs(u[k]);
    return ::automatic_step(
        control, first_order ? first_order : control.order, s, stop, u, N,
        [&](double t, const double* y, double* f) { slope_at(t, y, f); },
        [&](const double* x) { return std::sqrt(square_in(x, scale) / N); });
  }

  // y', for the first step.
  virtual void slope_at(double t, const double* y, double* f) {
    value(t, y, c, f);
    counts.rhs++;
  }

  // From u: `end`, and with error control `defect`.
  virtual Status step(double, double) { return FAILED; }  // of those that leave `attempt` alone
  virtual void keep_step() = 0;

  // The checkpoint of a step, of so many numbers.
  const double* kept_of(int64_t index, int64_t count) const {
    return loaded ? loaded : values.data() + index * count;
  }

  void keep_values(const double* first, int64_t count) {
    values.insert(values.end(), first, first + count);
  }

  // Where ranks are together one without parameters has to be there for the others' evaluation.
  void add_parameters(double t, const double* y, const double* w) {
    if (!m.wanted && !Field::TOGETHER) return;
    parameters(t, y, w, c, mu);
    counts.vjp += m.wanted > 0;
  }

  // x_k += f_p v_k for each tangent.
  void add_along(double t, const double* y, Rows& x) {
    if (directions.empty()) return;
    Rows slopes(m.wanted);
    double unit[N] = {};
    for (int i = 0; i < N; i++) {
      std::fill(slopes.begin(), slopes.end(), 0.0);
      unit[i] = 1.0;
      parameters(t, y, unit, c, slopes.data());
      unit[i] = 0.0;
      const double* v = directions.data();
      for (size_t k = i; k < x.size(); k += N, v += m.wanted)
        for (int64_t j = 0; j < m.wanted; j++) x[k] += slopes[j] * v[j];
    }
    counts.vjp += N;
  }

  // f_y, to J, and x_k from (shift M - f_y) x_k = M x_k + more_k + f_p v_k.
  Status solve_tangents(double t, const double* y, double shift, double* J, Factors& factors,
                        Rows& x, const Rows& more = {}) {
    double f[N];
    jacobian(t, y, c, f, J);
    counts.jacobians++, counts.rhs++, counts.factorizations++;
    if (!factors.factor(shift, J, M)) return SINGULAR;
    if (is_massive())
      for (size_t k = 0; k < x.size(); k += N) {
        std::memcpy(f, &x[k], sizeof(f));
        multiply(mass_at(J, M), f, &x[k]);
      }
    if (!more.empty()) plus(x, 1.0, more);
    add_along(t, y, x);
    for (size_t k = 0; k < x.size(); k += N, counts.krylov++)
      if (!factors.solve_exactly(&x[k])) return NOT_CONVERGED;
    return DONE;
  }

  // Whether numbers may be squared; where ranks step together those that are not end the step of all.
  bool is_usable(double* x) {
    const bool usable = square(x) < MODERATE;
    if (!usable && Field::TOGETHER) x[0] = NAN;
    return usable || Field::TOGETHER;
  }

  const Settings m;
  Together together;
  const std::vector<double> matrix;
  const double* const M;      // null: the identity
  double first_order = 0.0;   // for the first step, if not the method's
  Field field;
  Captured c = nullptr;
  double u[N], end[WIDTH], defect[N], stages[MOST_STAGES][WIDTH];
  double lambda[N], *mu = nullptr;
  Rows du, directions;  // tangents of the state and of the parameters, one after the other
  std::vector<double> values;  // kept
  const double* loaded = nullptr;  // instead of these
  int64_t kept_steps = 0;

 private:
  // Weighted RMS norm of the error estimate (VecErrorWeightedNorms).
  double error() const {
    double sum = 0.0;
    int counted = 0;  // those that have a tolerance
    for (int k = 0; k < N; k++) {
      const double larger_end = std::max(std::fabs(end[k]), std::fabs(end[k] + defect[k]));
      const double allowed = m.atol[k] + m.rtol[k] * larger_end, ratio = defect[k] / allowed;
      if (allowed == 0.0) continue;
      sum += ratio * ratio, counted++;
    }
    return counted ? std::sqrt(sum / counted) : 0.0;
  }

  double start[N];
};

}  // namespace

extern "C" {

// f, and the products of w, to compare with the vector field itself. mu comes as zeros.
void pnode_products(Captured c, double t, const double* y, const double* w, double* f, double* l,
                    double* mu) {
  Rows J(ENTRIES);
  jacobian(t, y, c, f, J.data());
  apply_transposed(J.data(), w, l);
  for (int k = 0; k < WIDTH - N; k++) {
    l[N + k] = 0.0;
    for (int i = 0; i < N; i++) l[N + k] -= J[(N + i) * N + k] * w[i];
  }
  parameters(t, y, w, c, mu);
}

// What Newton's method decides by, besides settings and norms.
int64_t pnode_decides() { return CONSTANT; }

void pnode_lapack(const Lapack* functions) { lapack = *functions; }

// The same of independent samples, whose mu is added up.
void pnode_row_products(void* const* read, const int64_t* apart, int64_t count, const double* t,
                        const double* y, const double* w, const double*, int64_t rows, double* f,
                        double* l, double* mu) {
  Field field;
  for (int64_t row = 0; row < rows; row++, y += N, w += N, f += N, l += N) {
    const std::vector<void*> own = of_row(read, apart, count, row);
    pnode_products(field.lend(own.data()), t[row], y, w, f, l, mu);
  }
}

void* pnode_implicit_steps(const Settings* settings, const double* y0, const double* mass);

// A kernel for each of independent samples, whose tolerances are so many numbers apart.
void pnode_row_steps(const Settings* settings, const double* y0, int64_t rows, int64_t apart,
                     void** kernels) {
  Settings own = *settings;
  for (int64_t row = 0; row < rows; row++, own.rtol += apart, own.atol += apart)
    kernels[row] = pnode_implicit_steps(&own, y0 + row * N, nullptr);
}

// f, to compare with the vector field itself.
void pnode_value(Captured c, double t, const double* y, double* f) { value(t, y, c, f); }
}

// Dense Jacobians, and what is solved with them. Above this stand N, ENTRIES, all of them by rows, and
// lu.h.

namespace {

// Of shift M - J; without a mass matrix M = I.
struct Factors : AnyLu<double, N> {
  bool factor(double shift, const double* J, const double* mass = nullptr) {
    mass = mass_at(J, mass);
    for (int i = 0; i < N; i++)
      for (int j = 0; j < N; j++) {
        const double entry = mass ? mass[i * N + j] : i == j;
        lu[i][j] = shift * entry - J[i * N + j];
      }
    return AnyLu<double, N>::factor();
  }

  // As sparse_systems.h has it; here pivots come from all rows.
  bool solve_exactly(double* x, bool transposed = false) const {
    transposed ? this->solve_transposed(x) : this->solve(x);
    return true;
  }
};

void apply(const double* J, const double* x, double* y) { multiply(J, x, y); }

void apply_transposed(const double* J, const double* w, double* l) { multiply_transposed(J, w, l); }

// Of (shift M - J)^T, J at one point of the path after the other; null stands for the identity.
class TransposedSolves {
 public:
  explicit TransposedSolves(Counts& counts) : counts(counts) {}

  void forget() {}

  // Of the last solve.
  const double* last_jacobian() const { return J; }

  Status solve(Captured c, double t, const double* y, double shift, const double* M, double* w) {
    double f[N];
    jacobian(t, y, c, f, J);
    counts.jacobians++, counts.factorizations++, counts.krylov++;
    if (!factors.factor(shift, J, M)) return SINGULAR;
    factors.solve_transposed(w);
    return DONE;
  }

 private:
  Counts& counts;
  Factors factors;
  double J[ENTRIES];
};

}  // namespace

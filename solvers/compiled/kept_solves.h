// Transposed solves with the factors of another point of the path: GMRES (Saad & Schultz, SIAM J. Sci.
// Stat. Comput. 7 (1986) 856), with products that are exact whatever the factors are. Above this stands
// sparse_systems.h.

namespace {

typedef std::vector<double> Vector;

class TransposedSolves {
 public:
  explicit TransposedSolves(Counts& counts) : counts(counts) {}

  // The first solve to come factors.
  void forget() { known = false; }

  // At that point.
  const double* last_jacobian() const { return J.data(); }

  // From b to w of (shift - f_y(t, y))^T w = b.
  Status solve(Captured c, double t, const double* y, double shift, const double*, double* w) {
    const Vector b(w, w + N);
    int taken = 0;
    if (known && regular && excess <= WORTH && approach(c, t, y, shift, b, w, taken) &&
        is_small(shift, b, w)) {
      least = least ? std::min(least, taken) : taken;
      excess += taken - least;
      return DONE;
    }
    factor(c, t, y, shift);
    if (!regular) return SINGULAR;
    std::fill(w, w + N, 0.0);
    left = b;
    for (int turn = 0; turn < REFINED; turn++) {
      factors.solve_transposed(left.data()), counts.krylov++;
      for (int k = 0; k < N; k++) w[k] += left[k];
      find_left(c, t, y, shift, b, w);
      if (is_small(shift, b, w)) return DONE;
    }
    return approach(c, t, y, shift, b, w, taken = 0) ? DONE : NOT_CONVERGED;
  }

 private:
  // Iterations, and cycles of them; how many a factorization is about worth; what is left of b.
  static constexpr int MOST = 30, CYCLES = 4, WORTH = 20, REFINED = 3;
  static constexpr double LEFT = 50.0 * std::numeric_limits<double>::epsilon();
  static constexpr double PART = 1e-12;  // of the terms of an equation

  void factor(Captured c, double t, const double* y, double shift) {
    double f[N];
    J.resize(ENTRIES);
    jacobian(t, y, c, f, J.data());
    counts.jacobians++, counts.factorizations++;
    regular = factors.factor(shift, J.data());
    Vector sums(N);
    size = 0.0;
    for (int e = 0; e < ENTRIES; e++) sums[structure.rows[e]] += std::fabs(J[e]);
    for (const double sum : sums) size = std::max(size, std::fabs(shift) + sum);
    known = true, excess = least = 0;
  }

  // v = (shift - f_y)^T x.
  static void multiply_with(Captured c, double t, const double* y, double shift, const double* x,
                            double* v) {
    pull_back(t, y, x, c, v);
    for (int k = 0; k < N; k++) v[k] = shift * x[k] - v[k];
  }

  // left = b - (shift - f_y)^T w.
  void find_left(Captured c, double t, const double* y, double shift, const Vector& b,
                 const double* w) {
    multiply_with(c, t, y, shift, w, left.data());
    counts.vjp++;
    for (int k = 0; k < N; k++) left[k] = b[k] - left[k];
  }

  // Whether what is left of each equation is small beside its terms, whatever the units of states
  // (Oettli & Prager, Numer. Math. 6 (1964) 405); not of what is not finite, which is no one's fault.
  bool is_small(double shift, const Vector& b, const double* w) {
    Vector terms(N);
    for (int k = 0; k < N; k++) terms[k] = std::fabs(b[k]) + std::fabs(shift * w[k]);
    for (int e = 0; e < ENTRIES; e++)
      terms[structure.columns[e]] += std::fabs(J[e] * w[structure.rows[e]]);
    for (int k = 0; k < N; k++)
      if (std::fabs(left[k]) > PART * terms[k]) return false;
    return true;
  }

  bool approach(Captured c, double t, const double* y, double shift, const Vector& b, double* w,
                int& taken) {
    const double of_b = std::sqrt(dot(b.data(), b.data(), N));
    left = b;
    std::fill(w, w + N, 0.0);
    for (int cycle = 0;; cycle++) {
      const double norm = std::sqrt(dot(left.data(), left.data(), N));
      const double goal = LEFT * (of_b + cycle * size * std::sqrt(dot(w, w, N)));
      if (norm <= goal) return true;
      // Twice as much: what a cycle takes for done is not in the last bits.
      if (cycle && norm <= 2.0 * goal) return true;
      if (!std::isfinite(norm)) return std::fill(w, w + N, norm), true;
      if (cycle == CYCLES) return false;
      taken += improve(c, t, y, shift, left, norm, goal, w);
      find_left(c, t, y, shift, b, w);
    }
  }

  // One cycle: add to w what brings `left` down, and return the iterations.
  int improve(Captured c, double t, const double* y, double shift, const Vector& left, double norm,
              double goal, double* w) {
    double H[MOST + 1][MOST], cosine[MOST], sine[MOST], rest[MOST + 1] = {norm};
    V.resize(size_t(MOST + 1) * N), Z.resize(size_t(MOST) * N);
    for (int k = 0; k < N; k++) V[k] = left[k] / norm;
    int count = 0;
    while (count < MOST && !(std::fabs(rest[count]) <= goal)) {
      const int j = count++;
      double *z = &Z[size_t(j) * N], *v = &V[size_t(j + 1) * N];
      std::memcpy(z, &V[size_t(j) * N], sizeof(double) * N);
      factors.solve_transposed(z);
      multiply_with(c, t, y, shift, z, v);
      for (int i = 0; i <= j; i++) {
        const double* other = &V[size_t(i) * N];
        const double h = H[i][j] = dot(v, other, N);
        for (int k = 0; k < N; k++) v[k] -= h * other[k];
      }
      const double length = std::sqrt(dot(v, v, N));
      for (int i = 0; i < j; i++) {
        const double one = H[i][j], two = H[i + 1][j];
        H[i][j] = cosine[i] * one + sine[i] * two, H[i + 1][j] = cosine[i] * two - sine[i] * one;
      }
      const double radius = std::hypot(H[j][j], length);
      if (!(radius > 0.0)) {
        count = j;
        break;
      }
      cosine[j] = H[j][j] / radius, sine[j] = length / radius;
      H[j][j] = radius;
      rest[j + 1] = -sine[j] * rest[j], rest[j] *= cosine[j];
      if (!(length > 0.0)) break;
      for (int k = 0; k < N; k++) v[k] /= length;
    }
    for (int i = count - 1; i >= 0; i--) {
      for (int j = i + 1; j < count; j++) rest[i] -= H[i][j] * rest[j];
      rest[i] /= H[i][i];
      const double* z = &Z[size_t(i) * N];
      for (int k = 0; k < N; k++) w[k] += rest[i] * z[k];
    }
    counts.krylov += count, counts.vjp += count;
    return count;
  }

  Counts& counts;
  Factors factors;
  Vector J, V, Z, left;
  bool known = false, regular = false;
  double size = 0.0;  // of the matrix
  int excess = 0, least = 0;  // iterations more than the fewest with these factors
};

}  // namespace

// What is solved with Jacobians of which there are products alone, by all ranks together: GMRES (Saad &
// Schultz, SIAM J. Sci. Stat. Comput. 7 (1986) 856) without a preconditioner, as KSPGMRES has it with the
// options that pnode sets. Above this stand lu.h and ghost_field.cpp.

namespace {

// Of shift - J. Iterations and norms are of the state without its integrals, on which nothing depends:
// within Newton's method, which solves for these itself, theirs is some number, in a transposed
// system they are solved for first.
class Factors {
 public:
  bool factor(double of_shift, const double* J, const double* = nullptr) {
    shift = of_shift, point = point_of(J), own = N - int(point->field->together->integrals);
    return true;
  }

  // Within Newton's method, which ends with NaN. Beside integrals as exactly as the steps taken from
  // Python, whose systems are those of the adjoint.
  void solve(double* x) {
    if (!find(x, own < N ? TIGHT : point->field->together->rtol, false)) x[0] = NAN;
  }

  void solve_transposed(double* x) {
    if (!find(x, TIGHT, true)) x[0] = NAN;
  }

  bool solve_exactly(double* x, bool transposed = false) { return find(x, TIGHT, transposed); }

  static Field::Point* point_of(const double* J) {
    Field::Point* point;
    std::memcpy(&point, J, sizeof(point));
    return point;
  }

 private:
  typedef std::vector<double> Vector;
  // Iterations of a cycle, and of all; what is left of the right-hand side.
  static constexpr int CYCLE = 100, MOST = 10000;
  static constexpr int PART = 1024;  // entries
  static constexpr double TIGHT = 1e-12, LEAST = 1e-50;

  // From b to x. Where b is not finite, nor is x: no one's fault. A matrix that is singular or not
  // finite is.
  bool find(double* x, double rtol, bool transposed) {
    const Vector b(x, x + N);
    left = b;
    std::fill_n(x, N, 0.0);
    if (transposed && own < N) {
      for (int k = own; k < N; k++) x[k] = b[k] / shift;
      leave(b, transposed, x);
    }
    double norm = length(left.data());
    const double goal = std::max(rtol * norm, LEAST);
    int taken = 0;
    while (!(norm <= goal)) {
      if (!std::isfinite(norm)) return std::fill_n(x, N, NAN), taken == 0;
      if (taken >= MOST) return false;
      taken += improve(norm, goal, transposed, x);
      if (norm <= goal) break;
      leave(b, transposed, x);
      norm = length(left.data());
    }
    point->field->together->counts->krylov += taken - 1;  // whoever asks counts one
    return true;
  }

  // What is left of b.
  void leave(const Vector& b, bool transposed, const double* x) {
    multiply_with(x, transposed, left.data());
    for (int k = 0; k < N; k++) left[k] = k < own ? b[k] - left[k] : 0.0;
  }

  // One cycle: add to x what brings `left`, of this norm, down, and return the iterations.
  int improve(double& norm, double goal, bool transposed, double* x) {
    std::fill_n(rest, CYCLE + 1, 0.0), rest[0] = norm;
    basis(0);
    for (int k = 0; k < N; k++) V[k] = left[k] / norm;
    int count = 0;
    while (count < CYCLE && !(norm <= goal)) {
      const int j = count++;
      double* v = basis(j + 1);
      multiply_with(&V[size_t(j) * N], transposed, v);
      const double next = orthogonalize(j, v);
      rotate(j, next);
      norm = std::fabs(rest[j + 1]);
      if (!(next > 0.0)) break;  // NaN too: this norm is
      for (int k = 0; k < N; k++) v[k] /= next;
    }
    for (int i = count - 1; i >= 0; i--) {
      for (int j = i + 1; j < count; j++) rest[i] -= H[i][j] * rest[j];
      rest[i] /= H[i][i];
    }
    add(rest, count, x);
    return count;
  }

  double* basis(int j) {
    if (V.size() < size_t(j + 1) * N) V.resize(size_t(j + 8) * N);
    return &V[size_t(j) * N];
  }

  // Classical Gram-Schmidt, whose sums ranks add up at once. Return what is left of v, added up once
  // more: as h . h less than v . v it would be wrong as soon as the basis is a little, and make the next
  // vector no unit one, by which the basis is lost within some 20 iterations.
  double orthogonalize(int j, double* v) {
    double h[CYCLE];
    project(v, j + 1, h);
    sum(h, j + 1);
    for (int i = 0; i <= j; i++) H[i][j] = h[i], h[i] = -h[i];
    add(h, j + 1, v);
    return length(v);
  }

  // h = V^T v for the first vectors of the basis: entries that stay in the cache one part after the
  // other, four vectors at once.
  void project(const double* v, int vectors, double* h) const {
    std::fill_n(h, vectors, 0.0);
    for (int begin = 0; begin < own; begin += PART) {
      const int end = std::min(begin + PART, own);
      int i = 0;
      for (; i + 4 <= vectors; i += 4) {
        const double *one = &V[size_t(i) * N], *two = one + N, *three = two + N, *four = three + N;
        double a = 0.0, b = 0.0, c = 0.0, d = 0.0;
#pragma omp simd reduction(+ : a, b, c, d)
        for (int k = begin; k < end; k++)
          a += one[k] * v[k], b += two[k] * v[k], c += three[k] * v[k], d += four[k] * v[k];
        h[i] += a, h[i + 1] += b, h[i + 2] += c, h[i + 3] += d;
      }
      for (; i < vectors; i++) h[i] += dot(v + begin, &V[size_t(i) * N] + begin, end - begin);
    }
  }

  // y += V h, alike.
  void add(const double* h, int vectors, double* y) const {
    for (int begin = 0; begin < N; begin += PART) {
      const int end = std::min(begin + PART, N);
      int i = 0;
      for (; i + 4 <= vectors; i += 4) {
        const double *one = &V[size_t(i) * N], *two = one + N, *three = two + N, *four = three + N;
        const double a = h[i], b = h[i + 1], c = h[i + 2], d = h[i + 3];
#pragma omp simd
        for (int k = begin; k < end; k++)
          y[k] += (a * one[k] + b * two[k]) + (c * three[k] + d * four[k]);
      }
      for (; i < vectors; i++) {
        const double* one = &V[size_t(i) * N];
#pragma omp simd
        for (int k = begin; k < end; k++) y[k] += h[i] * one[k];
      }
    }
  }

  void rotate(int j, double next) {
    for (int i = 0; i < j; i++) {
      const double one = H[i][j], two = H[i + 1][j];
      H[i][j] = cosine[i] * one + sine[i] * two, H[i + 1][j] = cosine[i] * two - sine[i] * one;
    }
    const double radius = std::hypot(H[j][j], next);
    cosine[j] = H[j][j] / radius, sine[j] = next / radius;
    H[j][j] = radius;
    rest[j + 1] = -sine[j] * rest[j], rest[j] *= cosine[j];
  }

  // v = (shift - J) x, or its transpose.
  void multiply_with(const double* x, bool transposed, double* v) {
    Counts& counts = *point->field->together->counts;
    ++(transposed ? counts.vjp : counts.jvp);
    transposed ? point->field->pull(*point, x, v) : point->field->push(*point, x, v);
    for (int k = 0; k < N; k++) v[k] = shift * x[k] - v[k];
  }

  static double dot(const double* x, const double* y, int count) {
    double total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int k = 0; k < count; k++) total += x[k] * y[k];
    return total;
  }

  double length(const double* x) const {
    double square = dot(x, x, own);
    sum(&square, 1);
    return std::sqrt(square);
  }

  void sum(double* numbers, int count) const {
    Sums* sums = point->field->together->sums;
    for (int k = 0; sums && k < count; k += Sums::MOST)
      sums->add(numbers + k, std::min(count - k, Sums::MOST));
  }

  Field::Point* point = nullptr;
  double shift = 0.0;
  int own = N;
  Vector V, left;
  double H[CYCLE + 1][CYCLE], cosine[CYCLE], sine[CYCLE], rest[CYCLE + 1];
};

// y = J x.
void apply(const double* J, const double* x, double* y) {
  Field::Point& point = *Factors::point_of(J);
  point.field->push(point, x, y);
}

// l = J^T w.
void apply_transposed(const double* J, const double* w, double* l) {
  Field::Point& point = *Factors::point_of(J);
  point.field->together->counts->vjp++;
  point.field->pull(point, w, l);
}

// Of (shift - J)^T, J at one point of the path after the other.
class TransposedSolves {
 public:
  explicit TransposedSolves(Counts& counts) : counts(counts) {}

  void forget() {}
  const double* last_jacobian() const { return J; }

  Status solve(Captured c, double t, const double* y, double shift, const double*, double* w) {
    double f[N];
    jacobian(t, y, c, f, J);
    counts.krylov++;
    factors.factor(shift, J);
    return factors.solve_exactly(w, true) ? DONE : NOT_CONVERGED;
  }

 private:
  Counts& counts;
  Factors factors;
  double J[ENTRIES];
};

}  // namespace

// Products with dense matrices, LU of small ones, and LAPACK's of larger ones. Above this stand N and WIDTH.

#include <type_traits>

namespace {

constexpr bool RESIDUAL = WIDTH > N;

// LU with partial pivoting of the first n rows and columns of `lu`.
template <typename T, int MOST>
struct Lu {
  T lu[MOST][MOST];
  int pivots[MOST];

  bool factor(int n = MOST) {
    for (int k = 0; k < n; k++) {
      int best = k;
      for (int i = k + 1; i < n; i++)
        if (std::abs(lu[i][k]) > std::abs(lu[best][k])) best = i;
      pivots[k] = best;
      if (best != k)
        for (int j = 0; j < n; j++) std::swap(lu[k][j], lu[best][j]);
      if (lu[k][k] == T(0.0)) return false;
      const T reciprocal = T(1.0) / lu[k][k];
      for (int i = k + 1; i < n; i++) {
        const T l = lu[i][k] *= reciprocal;
        for (int j = k + 1; j < n; j++) lu[i][j] -= l * lu[k][j];
      }
    }
    return true;
  }

  void solve(T* x, int n = MOST) const {
    for (int k = 0; k < n; k++) std::swap(x[k], x[pivots[k]]);
    for (int i = 0; i < n; i++)
      for (int j = 0; j < i; j++) x[i] -= lu[i][j] * x[j];
    for (int i = n - 1; i >= 0; i--) {
      for (int j = i + 1; j < n; j++) x[i] -= lu[i][j] * x[j];
      x[i] /= lu[i][i];
    }
  }

  void solve_transposed(T* x, int n = MOST) const {
    for (int i = 0; i < n; i++) {
      for (int j = 0; j < i; j++) x[i] -= lu[j][i] * x[j];
      x[i] /= lu[i][i];
    }
    for (int i = n - 1; i >= 0; i--)
      for (int j = i + 1; j < n; j++) x[i] -= lu[j][i] * x[j];
    for (int k = n - 1; k >= 0; k--) std::swap(x[k], x[pivots[k]]);
  }
};

struct Lapack {  // getrf and getrs, of double and of complex numbers; dtrsm and dgemm
  void (*factor[2])(int*, int*, void*, int*, int*, int*);
  void (*solve[2])(char*, int*, int*, const void*, int*, const int*, void*, int*, int*);
  void (*triangle)(char*, char*, char*, char*, int*, int*, double*, double*, int*, double*, int*);
  void (*product)(char*, char*, int*, int*, int*, double*, double*, int*, double*, int*, double*,
                  double*, int*);
} lapack;

// The same by LAPACK, to which the rows are columns.
template <typename T, int MOST>
struct LargeLu {
  const std::unique_ptr<T[][MOST]> lu{new T[MOST][MOST]};
  int pivots[MOST];

  bool factor(int n = MOST) {
    int most = MOST, info = 0;
    lapack.factor[KIND](&n, &n, lu.get(), &most, pivots, &info);
    return info == 0;
  }

  void solve(T* x, int n = MOST) const { apply('T', x, n); }
  void solve_transposed(T* x, int n = MOST) const { apply('N', x, n); }

 private:
  static constexpr int KIND = !std::is_same<T, double>::value;

  void apply(char form, T* x, int n) const {
    int most = MOST, one = 1, info = 0;
    lapack.solve[KIND](&form, &n, &one, lu.get(), &most, pivots, x, &n, &info);
  }
};

template <typename T, int MOST>
using AnyLu = std::conditional_t<(N > 32), LargeLu<T, MOST>, Lu<T, MOST>>;

// M where J was evaluated, of a residual dF/dy' behind dF/dy; null stands for the identity.
const double* mass_at(const double* J, const double* M) { return RESIDUAL ? J + N * N : M; }

// y = M x, of N rows.
void multiply(const double* M, const double* x, double* y) {
  for (int i = 0; i < N; i++) {
    y[i] = 0.0;
    for (int j = 0; j < N; j++) y[i] += M[i * N + j] * x[j];
  }
}

// l = M^T w.
void multiply_transposed(const double* M, const double* w, double* l) {
  for (int j = 0; j < N; j++) l[j] = 0.0;
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++) l[j] += M[i * N + j] * w[i];
}

}  // namespace

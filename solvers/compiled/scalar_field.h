// A field y' = f(t, y, p) of scalar operations: the functions that implicit_steps.cpp lists. They are compiled
// apart from the steps, which all fields of one size share. Above this stand N and WIDTH.

constexpr int ENTRIES = N * WIDTH;
typedef const double* const* Captured;
struct Together;  // of kernel.h

namespace {

struct Field {
  static constexpr bool CHEAP = true, TOGETHER = false;
  Captured lend(void* const* captured, Together* = nullptr) { return reinterpret_cast<Captured>(captured); }
};

}  // namespace

// For the program alone that both are linked to.
#pragma GCC visibility push(hidden)
extern const bool AUTONOMOUS, CONSTANT;
void value(double t, const double* y, Captured c, double* f);
void jacobian(double t, const double* y, Captured c, double* f, double* J);
void slopes(double t, const double* y, Captured c, double* f, double* J, double* ft);
void pull_back(double t, const double* y, const double* w, Captured c, double* l);
void parameters(double t, const double* y, const double* w, Captured c, double* mu);
void second_of_sums(double t, const double* y, const double* S, const double* w, Captured c, double* l,
                    double* mu);
#pragma GCC visibility pop

namespace {

void second(double t, const double* y, int count, const double (*w)[N], const double (*v)[N],
            const double* rates, Captured c, double* l, double* mu) {
  double S[N * N] = {}, weights[N] = {};
  for (int i = count - 1; i >= 0; i--)
    for (int k = 0; k < N; k++) {
      weights[k] += rates[i] * w[i][k];
      for (int j = 0; j < N; j++) S[k * N + j] += w[i][k] * v[i][j];
    }
  second_of_sums(t, y, S, weights, c, l, mu);
}

}  // namespace

// Coefficients of BDF formulas on unequal steps, and the choice of step and order: what
// OrderControl of solvers/bdf.py does, which has the reasons.

namespace {

constexpr int MOST_ORDER = 6, MOST_STATES = MOST_ORDER + 2;

// Coefficients of the polynomial through nodes at distances x[j - 1] = t_n - t_{n-j} > 0.

void derivative_weights(const double* x, int k, double* d) {
  d[0] = 0.0;
  for (int j = 0; j < k; j++) {
    d[0] += 1.0 / x[j];
    d[j + 1] = -1.0 / x[j];
    for (int i = 0; i < k; i++)
      if (i != j) d[j + 1] *= x[i] / (x[i] - x[j]);
  }
}

void extrapolation_weights(const double* x, int k, double* c) {
  for (int j = 0; j < k; j++) {
    c[j] = 1.0;
    for (int i = 0; i < k; i++)
      if (i != j) c[j] *= x[i] / (x[i] - x[j]);
  }
}

// Of x[0]^m times the divided difference of order m.
void difference_weights(const double* x, int m, double* w) {
  for (int j = 0; j <= m; j++) {
    double product = 1.0;
    const double here = j ? x[j - 1] / x[0] : 0.0;
    for (int i = 0; i <= m; i++)
      if (i != j) product *= (i ? x[i - 1] / x[0] : 0.0) - here;
    w[j] = 1.0 / product;
  }
}

double error_constant(const double* x, int k) {
  double product = 1.0, sum = 0.0;
  for (int j = 0; j < k; j++) product *= x[j] / x[0], sum += x[0] / x[j];
  return product / sum;
}

// Of implicit Euler with `number` substeps, of 1, 2... `order`.
double start_weight(int number, int order) {
  double product = 1.0;
  for (int i = 1; i <= order; i++)
    if (i != number) product *= double(number) / double(number - i);
  return product;
}

class OrderControl {
 public:
  OrderControl(int lowest, int highest) : lowest(lowest), highest(highest) { restart(); }

  void restart() {
    order = 1;
    since = taken = failures = 0;
    proposed = 0.0;
  }

  // `lengths`: the accepted step's and those before it; size(m): of its difference of order m.
  template <typename Size>
  double accept(double step, const double* lengths, int count, Size size) {
    const int k = order;
    failures = 0;
    since++, taken++;
    int chosen = k;
    double best = length(k, step, lengths, count, size, AIM);
    if (since > k) {
      for (const int q : {k - 1, k + 1}) {
        if (q < 1 || q > highest || count <= q) continue;
        const double found = length(q, step, lengths, count, size, q < k ? AIM : AIM_HIGHER);
        if (k < lowest || (q >= lowest && found > best)) best = found, chosen = q;
      }
    }
    const double longest = *std::max_element(lengths, lengths + std::min(count, k + 1));
    best = std::min(best, (taken == 1 ? FIRST_GROWTH : GROWTH) * longest);
    if (chosen > k && k >= lowest && best <= LEAST_GROWTH * step) chosen = k;
    if (chosen != k) order = chosen, since = 0;
    double natural = proposed != 0.0 ? proposed : step;
    if (!(LEAST_SHRINKAGE * natural <= best && best <= LEAST_GROWTH * natural)) natural = best;
    return proposed = natural;
  }

  template <typename Size>
  double reject(double step, const double* lengths, int count, Size size, double error) {
    const int k = order;
    failures++;
    since = 0;
    double shrunk = step * std::min(0.9, std::pow(6.0 * error, -1.0 / (k + 1)));
    if (k > lowest && count >= k) {
      const double lower = length(k - 1, step, lengths, count, size, AIM);
      if (lower > shrunk) order = k - 1, shrunk = std::min(lower, 0.9 * step);
    }
    return proposed = std::max(shrunk, (failures < 2 ? 0.2 : 0.1) * step);
  }

  void fail() { proposed = 0.0; }
  bool lost() const { return failures >= 3; }

  int order;

 private:
  static constexpr double AIM = 1.0 / 6.0, AIM_HIGHER = 1.0 / 10.0;
  static constexpr double LEAST_GROWTH = 1.5, LEAST_SHRINKAGE = 0.9, GROWTH = 10.0;
  static constexpr double FIRST_GROWTH = 1e3;

  template <typename Size>
  static double length(int q, double step, const double* lengths, int count, Size size,
                       double aim) {
    const double s = size(q + 1);
    if (!(s > 0.0)) return INFINITY;
    double factorial = 1.0, harmonic = 0.0, behind[MOST_STATES] = {0.0};
    for (int j = 1; j <= q; j++) factorial *= j, harmonic += 1.0 / j;
    double ratio = std::pow(aim / (factorial / harmonic * s), 1.0 / (q + 1));
    const int number = std::min(q, count + 1);
    for (int j = 1; j < number; j++) behind[j] = behind[j - 1] + lengths[j - 1] / step;
    for (int trial = 0; trial < 20; trial++) {
      double product = 1.0, sum = 0.0;
      for (int j = 0; j < number; j++) product *= ratio + behind[j], sum += 1.0 / (ratio + behind[j]);
      const double error = s * product / sum;
      if (error <= 1.05 * aim) break;
      ratio *= std::max(0.1, std::sqrt(aim / error));
    }
    return ratio * step;
  }

  const int lowest, highest;
  int since, taken, failures;
  double proposed;
};

}  // namespace

// The next step's length from the errors of the last ones: ErrorMemory of pnode/controllers.py.

#include <algorithm>
#include <cmath>
#include <limits>

namespace {

class ErrorMemory {
  public:
    explicit ErrorMemory(const Control& control) : rule_(control) {}

    void restart() { before_[0] = before_[1] = 1.0; }

    // By what to lengthen a step of this error.
    double factor(double error, bool accepted) {
        const double errors[] = {error, before_[0], before_[1]};
        double factor = rule_.safety;
        for (int i = 0; i < 3; i++) {
            if (rule_.exponents[i] == 0.0) continue;
            factor *= errors[i] > 0.0 ? std::pow(errors[i], -rule_.exponents[i] / rule_.order)
                                      : std::numeric_limits<double>::infinity();
        }
        if (accepted) {
            before_[1] = before_[0];
            before_[0] = error > 0.0 ? error : 1.0;
        }
        return std::min(std::max(factor, rule_.least[accepted]), rule_.largest[accepted]);
    }

  private:
    const Control& rule_;
    double before_[2] = {1.0, 1.0};
};

}  // namespace

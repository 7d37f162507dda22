// What takes single steps, their adjoints and their tangents, for the loop of sweeps.cpp.
//
// A kernel holds the state that a sweep has reached, what a step carries over to the next, the
// checkpoints, and in a backward sweep lambda and mu. There are three kinds: compiled graphs of explicit
// steps (graph_steps.cpp), explicit stages with ghost cells (staged_steps.cpp), and implicit steps
// on a field of scalars (implicit_steps.cpp).
//
// Times and steps are the user's: h is negative where time runs backwards.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

// Each but the first two: the solve is repeated step by step, which tells the error.
enum Status : int64_t {
    MISSING = 100,  // entries of a Jacobian, in the pattern that it is said to have
    DONE = 0, PAUSED, NOT_FINITE, NOT_CONVERGED, SINGULAR, STEP_LIMIT, TOO_SMALL, FAILED,
    HOPELESS,  // not finite, which shorter steps would not mend
    NO_ROOM,  // for more checkpoints
    WAITING,  // for orders, of checkpoints.h
    SHOWN  // a step, before it is accepted
};

// Square of the largest norm that is not taken for an overflow: what an adaptive step may square
// and divide by a tolerance; see vectors.is_moderate.
constexpr double MODERATE = 1e200;

struct Counts {  // of driver.py
    int64_t steps, rejected, recomputed, rhs, vjp, jvp, jacobians, factorizations, newton, krylov;
    int64_t bytes;
};

struct Control {  // of driver.py
    int64_t keep, fresh, adaptive, max_steps;
    double direction, order, first_step, min_step, max_step, longest;
    double safety, least[2], largest[2], exponents[3];  // of accepted steps behind rejected ones
};

struct Attempt {
    Status status;
    double error;  // of adaptive steps: accepted up to 1
    double next = 0.0;  // the next step's length, where the kernel chooses it
};

// Numbers that compiled graphs take as they do torch's own, to the same bits: those of a product
// depend on where its factors begin.
template <typename T>
struct Aligned {
    typedef T value_type;
    static constexpr std::align_val_t BYTES{64};
    Aligned() = default;
    template <typename U>
    Aligned(const Aligned<U>&) {}
    T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), BYTES)); }
    void deallocate(T* place, std::size_t) { ::operator delete(place, BYTES); }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
};
typedef std::vector<double, Aligned<double>> Numbers;

// What ranks that share the state add up within an attempt: see ranks.h.
class Sums {
  public:
    virtual ~Sums() = default;
    // Replace so many numbers, MOST at most, by their sums: NaN where a rank has failed, which ends
    // the attempt on all of them. Collective.
    virtual void add(double* numbers, int count) = 0;

    static constexpr int MOST = 16;
    double entries = 0.0;  // of the whole state, once something was added up
};

// The sums of numbers over all ranks, and of how many entries these are.
template <int count>
double add_up(Sums* sums, double (&numbers)[count], int64_t own) {
    static_assert(count <= Sums::MOST, "");
    if (!sums) return double(own);
    sums->add(numbers, count);
    return sums->entries;
}

// What an implicit kernel and its field know of ranks that take each evaluation and each product
// together: see krylov_systems.h.
struct Together {
    Sums* sums = nullptr;  // null: there are no others
    Counts* counts = nullptr;
    double rtol = 0.0;  // of linear systems within Newton's method
    int64_t integrals = 0;  // the last entries, which nothing depends on
    bool failed = false;  // this rank goes on with NaN

    // Whether all ranks say so. Collective.
    bool agreed(bool here) const {
        if (!sums) return here;
        double others[] = {here ? 0.0 : 1.0};
        sums->add(others, 1);
        return others[0] == 0.0;
    }
};

class Kernel {
  public:
    explicit Kernel(int64_t size) : size(size) {}
    virtual ~Kernel() = default;

    // What f reads besides t and y, for the calls that follow; null when they are over.
    virtual void lend(void* const* captured) = 0;

    // Stand at the start of the sweep, with no checkpoints.
    virtual void begin() = 0;
    // The first step that an adaptive sweep tries, from s, the time that runs forwards.
    virtual double first_step(const Control& control, double, double) { return control.first_step; }
    virtual Attempt attempt(double t, double h) = 0;
    // The attempt's end is where the next one begins.
    virtual void accept(bool keep) = 0;
    // The order of the last step, where there are several: Step.order of stepping.py.
    virtual int64_t order() const { return 0; }
    // Of the next attempt, which takes a step once more.
    virtual void prescribe(int64_t) {}
    // Write the state as row `index` of the outputs.
    virtual void output(void* outputs, int64_t index) const = 0;

    // How many steps have checkpoints.
    virtual int64_t kept() const = 0;
    // Begin with lambda = 0; `sums`: zeros, for mu.
    virtual void begin_adjoint(double* const* sums) = 0;
    // Add to lambda.
    virtual void add(const double* cotangent) = 0;
    // Of step `index`, the last that has not been forgotten.
    virtual Status adjoint(int64_t index, double t, double h) = 0;
    virtual void forget() = 0;
    // Write lambda and mu.
    virtual void end_adjoint(double* state, double* const* sums) = 0;

    // Of checkpoints.h, where single steps are kept: the state; what the adjoint of the last step
    // needs, which ends with that step's end if the method holds it; the same for adjoints and
    // tangents that follow; go on from a state, from the first one for null.
    virtual const double* state() const { return nullptr; }
    virtual void live(Numbers&) {}
    virtual void load(const double*) {}
    virtual void stand(const double*) {}
    // Let the next step begin without what the last one has left.
    virtual void restart_step() {}

    // Of steps that are shown before they are accepted: the attempt's end. Another kernel of the same
    // kind, without error control, takes parts of them: it stands where this one does, takes a part
    // in the attempt's order, and its last attempt becomes this one's.
    virtual const double* tried() const { return nullptr; }
    virtual void follow(const Kernel&) {}
    virtual Status part(double t, double h) { return attempt(t, h).status; }
    virtual void adopt(const Kernel&) {}
    // Of outputs inside of steps, interpolants.h: slopes of the last attempt, rows; where cotangents of
    // all but the last are put for the next adjoint, zeros so far; write a state as output() does.
    virtual const double* step_slopes() const { return nullptr; }
    virtual double* slope_cotangents() { return nullptr; }
    virtual void write(const double*, void*, int64_t) const {}
    // y' at a time of the user's; false where that is not to be had.
    virtual bool slope(double, const double*, double*) { return false; }

    // Of kernels whose every step is collective: fail, and go on for those who wait.
    virtual void fail() {}
    virtual bool failed() const { return false; }

    // Begin with so many tangents of the state, rows of `start`, and as many of what mu is the
    // gradient by, rows of `along`, null where it does not move.
    virtual void begin_tangents(int64_t, const double*, const double*) {}
    // Take them over step `index`, whose checkpoint is kept.
    virtual Status tangent(int64_t, double, double) { return FAILED; }
    // Write them.
    virtual void tangents(double*) const {}

    const int64_t size;  // of the state
    // Whether it chooses the lengths of adaptive steps, instead of the loop, and whether those are
    // what it wants even where the last step was shortened to meet an output time.
    bool chooses = false, absolute = false;
    // Whether ranks that share the state take each step, and each adjoint, together.
    bool collective = false;
    // Whether these add up over ranks too, a way back and steps taken again as well.
    bool reduces = false;
    // Of ranks that decide together within a step; null: there are no others.
    Sums* sums = nullptr;
    // Where the step before the next one ended, if that was not taken just now; else NaN.
    double last_end = std::numeric_limits<double>::quiet_NaN();
    // A step that failed is tried again with this share of its length.
    double failure_factor = 0.25;
    // After so many steps the loop looks at the clock.
    int64_t steps_per_look = 1;
    Counts counts{};     // but steps, which the loop counts
};

// The first step that an adaptive sweep tries: automatic_step of step_control.py. `slope(t, y, f)`
// gives y', of the user's time; `scaled(x)` is the norm in units of the tolerances.
template <typename Slope, typename Scaled>
double automatic_step(const Control& control, double order, double s, double stop, const double* u,
                      int64_t size, Slope slope, Scaled scaled) {
    std::vector<double> f0(size), f1(size), y(size);
    const double direction = control.direction;
    slope(direction * s, u, f0.data());
    const double d0 = scaled(u), d1 = scaled(f0.data());
    const bool moves = d0 >= 1e-5 && d1 >= 1e-5 && std::isfinite(d1);
    const double guess = std::min(moves ? 0.01 * d0 / d1 : 1e-6, stop - s);
    for (int64_t k = 0; k < size; k++) y[k] = u[k] + guess * direction * f0[k];
    slope(direction * (s + guess), y.data(), f1.data());
    for (int64_t k = 0; k < size; k++) f1[k] -= f0[k];
    const double d2 = scaled(f1.data()) / guess, steepest = std::max(d1, d2);
    if (!std::isfinite(d1) || !std::isfinite(d2)) return guess;
    const double better = steepest <= 1e-15 ? std::max(1e-6, 1e-3 * guess)
                                            : std::pow(0.01 / steepest, 1.0 / (order + 1.0));
    return std::min(std::min(100.0 * guess, better), control.max_step);
}

// What one of several rows reads: tensors of all, or of each, so many numbers apart.
inline std::vector<void*> of_row(void* const* read, const int64_t* apart, int64_t count,
                                 int64_t row) {
    std::vector<void*> own(read, read + count);
    for (int64_t k = 0; k < count; k++) own[k] = static_cast<double*>(own[k]) + row * apart[k];
    return own;
}

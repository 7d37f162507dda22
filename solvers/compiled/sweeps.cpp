// Whole sweeps, forwards and backwards: what solvers/stepping.py and adjoint steps do one by one,
// with the same numbers. Above this stand kernel.h, interpolants.h, checkpoints.h, ranks.h, clock.h,
// fixed_steps.h, error_memory.h, suspects.h, below it sweep_derivatives.cpp, shown_steps.cpp and
// sweep_calls.cpp.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

namespace {

const double INFINITE = std::numeric_limits<double>::infinity();

struct Taken {
    double t, h;
    int64_t order;
};

class Sweep {
  public:
    Sweep(Kernel* kernel, const Control& control, const double* times, const int64_t* counts,
          int64_t number)
        : kernel_(kernel), control_(control), times_(times, times + number),
          steps_(counts, number), memory_(control_) {
        begin();
    }

    // Let fixed steps go from one of these times to the next.
    void prescribe(const double* points, int64_t number) { steps_.prescribe(points, number); }

    // Not alone: the first pass over the steps is collective.
    void share(const Ranks& ranks) {
        reduction_.begin(ranks, kernel_->size);
        kernel_->sums = &reduction_;
    }

    // Take checkpoints out of so many bytes, which other sweeps share; of its own.
    void share(std::atomic<int64_t>* room) { room_ = room; }

    void limit(int64_t bytes) {
        most_ = bytes;
        begin();
    }

    // Keep what orders say, which are waited for.
    void schedule(const Order* orders, int64_t count) {
        if (!budget_) budget_ = std::make_unique<Checkpoints>(kernel_.get());
        budget_->give(orders, count);
    }

    // Take steps until they are done, or the time is over. Among ranks that share the state the
    // sweep ends with one reduction, and as well or badly on all of them.
    Status forward(void* const* captured, void* outputs, double seconds) {
        if (reduction_.shared() && !reduction_.open && !again_) return ended_;
        Status status = FAILED;
        try {
            status = take(captured, outputs, seconds);
        } catch (...) {
        }
        return status == PAUSED || status == WAITING ? status : close(status);
    }

    // End the sweep, which may be under way; DONE if it has ended well. A rank that gives up takes
    // part in the reduction that the others come to next, an attempt's or the last one.
    Status close(Status status) {
        if (status == DONE && kernel_->failed()) status = FAILED;
        if (!reduction_.open) return reduction_.shared() && !again_ ? ended_ : status;
        const double marks = reduction_.sum(nullptr, 0, status == DONE ? 0.0 : GONE);
        reduction_.open = false;
        if (status == DONE && marks != 0.0) status = FAILED;
        return ended_ = status;
    }

    void fail() { kernel_->fail(); }

    // Of shown_steps.cpp.
    void watch(Kernel* trial);
    void sift(const Sieve& sieve);
    bool is_suspect();
    void shown(double* step, double* start, double* end) const;
    Status part(void* const* captured, double length, double* state);
    void cut(double end);
    void stop();

    // Keep the state at the end of each step of the first pass, until they are asked for.
    void keep_ends() { keeps_ends_ = true; }

    void ends(double* states) {
        std::copy(ends_.begin(), ends_.end(), states);
        std::vector<double>().swap(ends_);
        keeps_ends_ = false;
    }

    // Take steps from the first time to the last, and outputs between them inside of these.
    void interpolate(const Given& given) { inside_ = std::make_unique<Inside>(given, kernel_->size); }

    Inside* inside() const { return inside_.get(); }

    // Cotangents are of the states after so many steps each, the first after none, not of outputs.
    void nodes(const int64_t* first, int64_t count) { nodes_.assign(first, first + count); }

    // Begin once more with the steps that were taken, which is not collective.
    void repeat() { again_ = true, begin(); }

    // Begin a backward sweep, whatever became of one before: of sweep_derivatives.cpp.
    void restart() { backwards_ = over_ = false, reopen(); }
    Status reverse(void* const* captured, double* const* sums, const double* cotangents,
                   double seconds);

    // How many steps are left to it.
    int64_t left() const { return left_; }

    void finish(double* state, double* const* sums) { kernel_->end_adjoint(state, sums); }

    Status tangents(void* const* captured, int64_t number, const double* start, const double* along,
                    double* outputs, double seconds);

    Counts counts(bool backward) const {
        Counts counts = kernel_->counts;
        counts.steps = backward ? taken_ : static_cast<int64_t>(record_.size());
        counts.rejected = backward ? 0 : rejected_;
        if (budget_) counts.bytes = budget_->peak;
        return counts;
    }

    // Start, length and order of each step, and how many come before each output.
    int64_t recorded(double* steps, int64_t* orders, int64_t* outputs) const {
        if (steps) {
            for (const Taken& step : record_)
                *steps++ = step.t, *steps++ = step.h, *orders++ = step.order;
            std::copy(outputs_at_.begin(), outputs_at_.end(), outputs);
        }
        return static_cast<int64_t>(record_.size());
    }

    bool whole() const {
        if (kernel_->failed()) return false;
        return budget_ ? complete_ : kernel_->kept() == number_of_steps();
    }

  private:
    Status take(void* const* captured, void* outputs, double seconds) {
        lend(captured);
        outputs_ = outputs;
        Clock clock(seconds, kernel_->steps_per_look);
        Status status = PAUSED;
        if (!interval_) output();
        do {
            const bool stops = stopped_ && !shown_.open && index_ == number_of_steps();
            if (stops || interval_ == times_.size()) {
                if (budget_) budget_->hold();
                complete_ = true;
                status = DONE;
                break;
            }
            if (budget_ && !budget_->next()) {
                status = WAITING;
                break;
            }
            if (control_.fresh && begun_ != index_) {
                begun_ = index_;
                kernel_->restart_step();
            }
            status = shown_.open ? accept() : again_ ? repeated() : go_on();
        } while (status == PAUSED && !clock.over());
        lend(nullptr);
        return status;
    }

    void lend(void* const* captured) {
        kernel_->lend(captured);
        if (suspects_) trial_->lend(captured);
    }

    // An adaptive attempt, with the same verdict on all ranks: a failure of one is one of all, and
    // the error is the root mean square over the entries of all, unless a kernel's that chooses.
    Attempt attempt(double t, double h) {
        if (!reduction_.open) return kernel_->attempt(t, h);
        Attempt own{FAILED, 0.0};
        reduction_.over = false;
        try {
            own = kernel_->attempt(t, h);
        } catch (...) {
        }
        if (kernel_->failed()) own.status = FAILED;
        const bool usable = own.status == DONE;
        const bool curable = own.status == NOT_FINITE || own.status == NOT_CONVERGED;
        double square = usable ? own.error * own.error * double(kernel_->size) : 0.0, marks = MISSED;
        if (!reduction_.over)
            marks = reduction_.sum(&square, 1, usable ? 0.0 : curable ? MISSED : GONE);
        if (!reduction_.open) return {FAILED, 0.0};
        if (marks > 0.0) return {NOT_FINITE, 0.0};
        const double error = std::sqrt(square / reduction_.entries);
        return {DONE, kernel_->chooses ? own.error : error, own.next};
    }

    void reopen() { if (kernel_->reduces) reduction_.reopen(); }

    void begin() {
        reopen();
        kernel_->counts = {};
        kernel_->begin();
        if (inside_ && !again_) inside_->begin();
        if (budget_) budget_->clear();
        own_room_ = most_;
        if (most_ >= 0) room_ = &own_room_;
        complete_ = false;
        kernel_->last_end = std::nan("");
        begun_ = -1;
        if (!again_) record_.clear(), outputs_at_.clear();
        index_ = position_ = interval_ = 0;
        steps_.begin(), memory_.restart();
        s_ = times_[0];
        natural_ = rest_ = std::nan("");
        rejected_ = 0;
        backwards_ = false;
    }

    // The next output, from the state as it stands.
    void output() {
        kernel_->output(outputs_, inside_ && interval_ ? 1 + inside_->number() : interval_);
        if (!again_) outputs_at_.push_back(index_);
        if (interval_) steps_.next(interval_ - 1);
        ++interval_;
        position_ = 0;
    }

    int64_t number_of_steps() const { return static_cast<int64_t>(record_.size()); }

    bool at_limit() const { return control_.max_steps >= 0 && index_ >= control_.max_steps; }

    Status go_on() { return control_.adaptive ? adapt() : fixed(); }

    // A step that was taken before.
    Status repeated() {
        const Taken step = record_[index_];
        kernel_->prescribe(step.order);  // without the attempts that were rejected
        const Status status = again(step);
        if (status != DONE) return status;
        const bool reached = interval_ < outputs_at_.size() && index_ + 1 == outputs_at_[interval_];
        return show({step.t, step.h, reached});
    }

    Status fixed() {
        if (at_limit()) return STEP_LIMIT;
        const size_t before = interval_ - 1;
        const auto place = steps_.at(before, position_, times_[before], times_[interval_]);
        const bool cut = !std::isnan(rest_);
        const double start = cut ? rest_ : place.start;
        const double t = control_.direction * start;
        const double h = control_.direction * (cut ? place.end - start : place.length);
        const Status status = kernel_->attempt(t, h).status;
        if (status != DONE) return status;
        rest_ = std::nan("");
        return show({t, h, place.last, start, place.end});
    }

    // One attempt of an adaptive step: _Sweep.adapt of stepping.py, and TSADAPTBASIC's choice.
    Status adapt() {
        if (at_limit()) return STEP_LIMIT;
        const double end = times_[interval_], left = end - s_;
        if (std::isnan(natural_))  // of all ranks it is given
            natural_ = reduction_.open ? control_.first_step : kernel_->first_step(control_, s_, end);
        const double size = std::fabs(s_), spacing = std::nextafter(size, INFINITE) - size;
        const double least = std::max(4.0 * spacing, 1e-30 * left);
        const double natural =
            std::min(std::max({natural_, control_.min_step, least}), control_.max_step);
        if (natural < std::min(least, left)) return TOO_SMALL;
        double wanted = natural;
        if (natural >= left * (1.0 - 1e-10)) {
            wanted = left;
        } else if (natural > left / 2.0) {
            wanted = left / 2.0;
        }
        // The clock moves by as much as the state: move of clock.py.
        const bool reached = wanted == left;
        double after = reached ? end : s_ + wanted;
        if (!reached && after - s_ > wanted) after = std::nextafter(after, s_);
        const double length = after - s_;
        const double t = control_.direction * s_, h = control_.direction * length;
        const Attempt attempt = this->attempt(t, h);
        if (attempt.status == SINGULAR || attempt.status >= FAILED) return attempt.status;
        const bool failed = attempt.status != DONE;
        bool accepted = false;
        double proposed = failed ? kernel_->failure_factor * length : length;
        if (!failed && kernel_->chooses) {
            accepted = attempt.error <= 1.0;
            proposed = attempt.next;
        } else if (!failed && std::isfinite(attempt.error)) {
            accepted = attempt.error <= 1.0;
            const double factor = memory_.factor(attempt.error, accepted);
            proposed = std::min(length * factor, control_.longest);
        }
        if (accepted) {
            // A step shortened to meet an output time says nothing against the natural one.
            const bool shortened =
                !kernel_->absolute && wanted < natural && proposed >= length;
            natural_ = shortened ? std::max(proposed, natural) : proposed;
            const double start = s_;
            s_ = after;
            return show({t, h, reached, start, after});
        }
        ++rejected_;
        if (wanted <= std::max(control_.min_step, least))
            return attempt.status == NOT_FINITE ? NOT_FINITE : TOO_SMALL;
        natural_ =
            0.0 < proposed && proposed < length ? proposed : kernel_->failure_factor * length;
        return PAUSED;
    }

    // Attempt a step that was taken before. Who fails goes on for the ranks that wait for its cells.
    Status again(const Taken& step) {
        const Status status = kernel_->attempt(step.t, step.h).status;
        if (status == DONE || !(kernel_->collective && reduction_.shared())) return status;
        kernel_->fail();
        return DONE;
    }

    Status advance(int64_t step);

    struct Step {
        double t, h;
        bool reached;  // an output time
        double start = 0.0, end = 0.0;  // to be shown
        bool open = false;
    };

    // Accept a step, once it was shown.
    Status show(const Step& step) {
        shown_ = step;
        shown_.open = watched_ && !again_ && is_suspect();
        return shown_.open ? SHOWN : accept();
    }

    Status accept() {
        const Step step = shown_;
        shown_.open = false;
        if (inside_ && !again_ && !inside_->write(*kernel_, outputs_, index_, step.start, step.end,
                                                  step.h, stopped_)) return NOT_FINITE;
        if (std::isnan(rest_)) ++position_;
        const int64_t before = kernel_->counts.bytes;
        kernel_->accept(control_.keep && !budget_);
        if (budget_) {  // what there is to do up to ACCEPTED
            budget_->pop();
            budget_->advanced(index_);
            if (!budget_->next()) return FAILED;
            budget_->pop();
        }
        if (room_ && (*room_ -= kernel_->counts.bytes - before) < 0) {
            if (!kernel_->collective) return NO_ROOM;
            kernel_->fail();
        }
        if (!again_) record_.push_back({step.t, step.h, kernel_->order()});
        if (keeps_ends_) ends_.insert(ends_.end(), kernel_->state(), kernel_->state() + kernel_->size);
        ++index_;
        if (step.reached) output();
        return PAUSED;
    }

    const std::unique_ptr<Kernel> kernel_;
    std::unique_ptr<Kernel> trial_;
    std::unique_ptr<Inside> inside_;  // null: steps end at all outputs
    std::unique_ptr<Suspects> suspects_;  // null: each step is shown
    bool watched_ = false, stopped_ = false;
    Step shown_{};
    double rest_;  // where the rest of a fixed step begins that was cut; else NaN
    const Control control_;
    const std::vector<double> times_;
    FixedSteps steps_;  // between them
    ErrorMemory memory_;
    void* outputs_ = nullptr;
    Reduction reduction_;
    Status ended_ = FAILED;
    std::atomic<int64_t>* room_ = nullptr;  // for checkpoints; null: any number
    int64_t most_ = -1;
    std::atomic<int64_t> own_room_{0};
    std::unique_ptr<Checkpoints> budget_;  // null: the kernel keeps those of all steps
    bool complete_ = false, was_complete_ = false;  // whether a backward sweep can begin
    int64_t begun_ = -1;
    // Where the sweep stands.
    size_t interval_;
    int64_t index_, position_, rejected_;
    double s_, natural_;
    bool again_ = false;
    // What it has done.
    std::vector<Taken> record_;
    std::vector<int64_t> outputs_at_, nodes_;
    bool keeps_ends_ = false;
    std::vector<double> ends_;
    // Its adjoint, or its tangents.
    bool backwards_ = false, active_ = false, over_ = false;
    size_t waiting_ = 0;
    int64_t left_ = 0, taken_ = 0;
};
}  // namespace

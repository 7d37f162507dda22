// Steps that a sweep of sweeps.cpp, which stands above this, shows before it accepts them.

namespace {

// Show each step before it is accepted; `trial` takes parts of it, null where none are wanted.
void Sweep::watch(Kernel* trial) {
    watched_ = true;
    trial_.reset(trial);
    if (trial) trial->begin();
}

// Show those alone that may hold an event.
void Sweep::sift(const Sieve& sieve) {
    if (!trial_) throw FAILED;
    suspects_ = std::make_unique<Suspects>(sieve, kernel_->size);
}

// Whether a step is to be shown. Of those that are not, the slope at the end counts: an observer
// would have it evaluated, and does so itself at the start of the next one that it is shown.
bool Sweep::is_suspect() {
    if (!suspects_) return true;
    int64_t& calls = kernel_->counts.rhs;
    const bool is = suspects_->in(*trial_, control_.direction, shown_.start, shown_.end,
                                  kernel_->state(), kernel_->tried());
    if (is && suspects_->passed) calls -= suspects_->evaluations;
    suspects_->passed = !is;
    if (!is) calls += suspects_->evaluations;
    return is;
}

// Start and end of the step, in time that runs forwards, its order and number, and the states there,
// that at the start where steps may not have been shown.
void Sweep::shown(double* step, double* start, double* end) const {
    const double found[] = {shown_.start, shown_.end, static_cast<double>(kernel_->order()),
                            static_cast<double>(index_)};
    std::copy_n(found, 4, step);
    if (suspects_) std::copy_n(kernel_->state(), kernel_->size, start);
    std::copy_n(kernel_->tried(), kernel_->size, end);
}

// Take a part of it, of a length in time that runs forwards.
Status Sweep::part(void* const* captured, double length, double* state) {
    trial_->lend(captured);
    trial_->follow(*kernel_);
    trial_->counts = {};
    const Status status =
        trial_->part(control_.direction * shown_.start, control_.direction * length);
    trial_->lend(nullptr);
    Counts& counts = kernel_->counts;
    counts.rhs += trial_->counts.rhs;
    counts.jacobians += trial_->counts.jacobians;
    counts.factorizations += trial_->counts.factorizations;
    counts.newton += trial_->counts.newton;
    counts.krylov += trial_->counts.krylov;
    if (status == DONE) std::copy_n(trial_->tried(), kernel_->size, state);
    return status;
}

// Let it end where the last part does.
void Sweep::cut(double end) {
    kernel_->adopt(*trial_);
    shown_.h = control_.direction * (end - shown_.start);
    if (suspects_) suspects_->forget();
    if (end == shown_.end) return;
    shown_.end = s_ = rest_ = end;
    shown_.reached = false;
}

// Let the sweep end with it.
void Sweep::stop() {
    stopped_ = true;
    shown_.reached = false;
}

}  // namespace

// Steps that a sweep of sweeps.cpp, which stands above this, shows before it accepts them.

namespace {

// Start and end of the step, in time that runs forwards, its order, and the state at its end.
void Sweep::shown(double* step, double* state) const {
    const double found[] = {shown_.start, shown_.end, static_cast<double>(kernel_->order())};
    std::copy_n(found, 3, step);
    std::copy_n(kernel_->tried(), kernel_->size, state);
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

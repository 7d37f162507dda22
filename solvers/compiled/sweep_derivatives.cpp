// The way back of a sweep of sweeps.cpp, which stands above this, and tangents beside its steps.

namespace {

// Take a step once more that was taken before, for its checkpoint.
Status Sweep::advance(int64_t step) {
    const Taken& taken = record_[step];
    if (control_.fresh) kernel_->restart_step();
    kernel_->last_end = step ? record_[step - 1].t + record_[step - 1].h : std::nan("");
    const Status status = again(taken);
    if (status != DONE) return status;
    kernel_->accept(false);
    ++kernel_->counts.recomputed;
    budget_->advanced(step);
    return PAUSED;
}

// Take adjoints until they are done, or the time is over.
Status Sweep::reverse(void* const* captured, double* const* sums, const double* cotangents,
                      double seconds) {
    if (over_) return FAILED;
    kernel_->lend(captured);
    Clock clock(seconds, kernel_->steps_per_look);
    const std::vector<int64_t>& at = nodes_.empty() ? outputs_at_ : nodes_;
    if (!backwards_) {
        backwards_ = true;
        active_ = kernel_->collective;  // others may have cotangents
        left_ = record_.size();
        waiting_ = at.size();
        taken_ = 0;
        kernel_->counts = {};
        kernel_->begin_adjoint(sums);
        if (budget_) budget_->drop_orders();
        complete_ = false;
    }
    Status status = PAUSED;
    do {
        if (budget_) {
            const Order* order = budget_->next();
            if (!order) {
                status = WAITING;
                break;
            }
            const Order found = *order;
            budget_->pop();
            if (found.act == ADVANCE) {
                status = advance(found.step);
                continue;
            }
            kernel_->load(budget_->hold().data());
        }
        for (; waiting_ > 1 && at[waiting_ - 1] == left_; --waiting_) {
            const double* row = cotangents + (waiting_ - 1) * kernel_->size;
            if (std::all_of(row, row + kernel_->size, [](double x) { return x == 0.0; }))
                continue;
            kernel_->add(row);
            active_ = true;
        }
        --left_;
        const Taken& step = record_[left_];
        if (inside_ && inside_->pull_back(*kernel_, left_, step.h, left_ ? record_[left_ - 1].h : 0.0))
            active_ = true;
        if (active_) {
            const Status found = kernel_->adjoint(left_, step.t, step.h);
            if (found != DONE) {
                status = found;
                break;
            }
            ++taken_;
        }
        if (inside_) inside_->add_start(*kernel_);
        kernel_->forget();
        if (!left_) status = DONE;
    } while (status == PAUSED && !clock.over());
    kernel_->lend(nullptr);
    kernel_->load(nullptr);
    backwards_ = status == PAUSED || status == WAITING;
    over_ = !backwards_;
    if (budget_ && status == DONE) budget_->clear();
    return status;
}

// Take tangents over the steps that were taken until they are done, or the time is over, from
// the first one where `start` is given; they are written to each output, one after the other.
Status Sweep::tangents(void* const* captured, int64_t number, const double* start,
                       const double* along, double* outputs, double seconds) {
    kernel_->lend(captured);
    Clock clock(seconds, kernel_->steps_per_look);
    if (start) {
        taken_ = 0;
        waiting_ = 0;
        kernel_->counts = {};
        kernel_->begin_tangents(number, start, along);
        if (budget_) kernel_->stand(nullptr);
        was_complete_ = complete_;
        complete_ = complete_ && !budget_;  // the last step's are not at hand meanwhile
    }
    Status status = PAUSED;
    for (;;) {
        for (; waiting_ < outputs_at_.size() && outputs_at_[waiting_] == taken_; ++waiting_)
            kernel_->tangents(outputs + waiting_ * number * kernel_->size);
        if (taken_ == static_cast<int64_t>(record_.size())) {
            complete_ = was_complete_;
            status = DONE;
        }
        if (status != PAUSED || clock.over()) break;
        if (budget_) {
            status = advance(taken_);
            if (status != PAUSED) break;
            kernel_->load(budget_->live()->data());
        }
        const Status found = kernel_->tangent(taken_, record_[taken_].t, record_[taken_].h);
        if (found != DONE) status = found;
        ++taken_;
    }
    kernel_->lend(nullptr);
    kernel_->load(nullptr);
    return status;
}

}  // namespace

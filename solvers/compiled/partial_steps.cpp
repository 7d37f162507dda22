// Parts of steps, taken again from the steps' starts, and their adjoints. Above this stands
// sweep_calls.cpp.

namespace {

class PartialSteps {
  public:
    // The kernel is one without error control.
    explicit PartialSteps(Kernel* kernel) : kernel_(kernel) { kernel_->begin(); }

    // From one state, for so many lengths: write their ends; `keep`: what their adjoints need.
    Status take(void* const* captured, double t, const double* lengths, int64_t number, bool keep,
                const double* start, double* ends) {
        kernel_->lend(captured);
        kept_.resize(number);
        Status status = DONE;
        for (int64_t k = 0; k < number; ++k) {
            kernel_->stand(start);
            status = kernel_->attempt(t, lengths[k]).status;
            if (status != DONE) break;
            std::copy_n(kernel_->tried(), kernel_->size, ends + k * kernel_->size);
            if (!keep) continue;
            kernel_->accept(false);
            kernel_->live(kept_[k]);
        }
        kernel_->lend(nullptr);
        return status;
    }

    // From the cotangents of the ends of those that were kept to those of their start; adds to mu.
    Status adjoint(void* const* captured, double t, const double* lengths, double* const* sums,
                   double* cotangents) {
        kernel_->lend(captured);
        Status status = DONE;
        for (size_t k = 0; k < kept_.size() && status == DONE; ++k) {
            double* row = cotangents + k * kernel_->size;
            kernel_->begin_adjoint(sums);
            kernel_->add(row);
            kernel_->load(kept_[k].data());
            status = kernel_->adjoint(0, t, lengths[k]);
            if (status == DONE) kernel_->end_adjoint(row, sums);
        }
        kernel_->load(nullptr);
        kernel_->lend(nullptr);
        return status;
    }

    // What was done since this was asked for.
    Counts counts() { return std::exchange(kernel_->counts, {}); }

  private:
    const std::unique_ptr<Kernel> kernel_;
    std::vector<Numbers> kept_;
};

PartialSteps& partial(void* steps) { return *static_cast<PartialSteps*>(steps); }

}  // namespace

extern "C" {

// Takes over the kernel.
void* pnode_partial(void* kernel) {
    try {
        return new PartialSteps(static_cast<Kernel*>(kernel));
    } catch (...) {
        return nullptr;
    }
}

void pnode_free_partial(void* steps) { delete static_cast<PartialSteps*>(steps); }

int64_t pnode_partial_take(void* steps, void* const* captured, double t, const double* lengths,
                           int64_t number, int64_t keep, const double* start, double* ends) {
    return guarded(
        [&] { return partial(steps).take(captured, t, lengths, number, keep, start, ends); });
}

int64_t pnode_partial_adjoint(void* steps, void* const* captured, double t, const double* lengths,
                              double* const* sums, double* cotangents) {
    return guarded(
        [&] { return partial(steps).adjoint(captured, t, lengths, sums, cotangents); });
}

void pnode_partial_counts(void* steps, Counts* counts) { *counts = partial(steps).counts(); }
}

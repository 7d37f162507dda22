// Sweeps of independent samples, on several threads. Above this stands sweeps.cpp.

#include <thread>

namespace {

// Calls `task` with each number below `count`; which thread takes which is left to chance.
template <typename Task>
void on_threads(int64_t threads, int64_t count, Task task) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t k; (k = next++) < count;) task(k);
    };
    std::vector<std::thread> others;
    try {
        while (static_cast<int64_t>(others.size()) + 1 < std::min(threads, count))
            others.emplace_back(work);
    } catch (...) {  // the system has no more threads
    }
    work();
    for (std::thread& other : others) other.join();
}

class Rows {
  public:
    // Takes over the kernels. `times` and `counts` are those of one row after the other, `apart` is
    // how far apart rows are in each of `read` tensors, `bytes` what checkpoints may take; -1: any.
    Rows(void* const* kernels, const Control& control, const double* directions,
         const double* times, const int64_t* counts, int64_t rows, int64_t number,
         const int64_t* apart, int64_t read, int64_t bytes)
        : number_(number), apart_(apart, apart + read), limited_(bytes >= 0),
          room_(bytes) {
        std::vector<std::unique_ptr<Kernel>> own;
        for (int64_t row = 0; row < rows; ++row)
            own.emplace_back(static_cast<Kernel*>(kernels[row]));
        size_ = own[0]->size;
        for (int64_t row = 0; row < rows; ++row) {
            Control chosen = control;
            chosen.direction = directions[row];
            sweeps_.push_back(std::make_unique<Sweep>(
                own[row].release(), chosen, times + row * number, counts + row * number, number));
            if (limited_) sweeps_.back()->share(&room_);
        }
    }

    Sweep* operator[](int64_t row) const { return sweeps_[row].get(); }

    // Let rows whose status is PAUSED go on. `outputs`: (rows, number, size).
    void forward(void* const* captured, double* outputs, int64_t threads, double seconds,
                 int64_t* statuses) {
        const Clock clock(seconds, 1);
        on_threads(threads, sweeps_.size(), [&](int64_t row) {
            if (statuses[row] != PAUSED || clock.left() <= 0.0 || full()) return;
            statuses[row] = guarded([&] {
                return sweeps_[row]->forward(own(captured, row).data(),
                                             outputs + row * number_ * size_, clock.left());
            });
        });
    }

    // The rows of a group add to its own part of `sums`, one after the other: the same sums on any
    // number of threads.
    void reverse(void* const* captured, double* sums, int64_t entries, int64_t group,
                 const double* cotangents, double* states, int64_t threads, double seconds,
                 int64_t* statuses) {
        const Clock clock(seconds, 1);
        const int64_t rows = sweeps_.size();
        on_threads(threads, (rows + group - 1) / group, [&](int64_t k) {
            double* const mu = sums + k * entries;
            for (int64_t row = k * group; row < std::min((k + 1) * group, rows); ++row) {
                if (statuses[row] == DONE) continue;
                if (clock.left() <= 0.0) return;
                statuses[row] = guarded([&] {
                    Sweep& sweep = *sweeps_[row];
                    double* const state = states + row * size_;
                    if (!sweep.recorded(nullptr, nullptr, nullptr)) {
                        std::fill_n(state, size_, 0.0);
                        return DONE;
                    }
                    const Status found =
                        sweep.reverse(own(captured, row).data(), &mu,
                                      cotangents + row * number_ * size_, clock.left());
                    if (found == DONE) sweep.finish(state, &mu);
                    return found;
                });
                if (statuses[row] != DONE) return;
            }
        });
    }

    void restart() {
        for (const auto& sweep : sweeps_) sweep->restart();
    }

    Counts counts(bool backward) const {
        Counts all{};
        for (const auto& sweep : sweeps_) {
            const Counts own = sweep->counts(backward);
            for (size_t k = 0; k < sizeof(Counts) / sizeof(int64_t); ++k)
                reinterpret_cast<int64_t*>(&all)[k] += reinterpret_cast<const int64_t*>(&own)[k];
        }
        return all;
    }

  private:
    std::vector<void*> own(void* const* captured, int64_t row) const {
        return of_row(captured, apart_.data(), apart_.size(), row);
    }

    bool full() const { return limited_ && room_ < 0; }

    int64_t number_, size_;
    const std::vector<int64_t> apart_;
    const bool limited_;
    std::atomic<int64_t> room_;
    std::vector<std::unique_ptr<Sweep>> sweeps_;
};

Rows& all(void* rows) { return *static_cast<Rows*>(rows); }

}  // namespace

extern "C" {

void* pnode_rows(void* const* kernels, const Control* control, const double* directions,
                 const double* times, const int64_t* counts, int64_t rows, int64_t number,
                 const int64_t* apart, int64_t read, int64_t bytes) {
    try {
        return new Rows(kernels, *control, directions, times, counts, rows, number, apart,
                        read, bytes);
    } catch (...) {
        return nullptr;
    }
}

void pnode_free_rows(void* rows) { delete static_cast<Rows*>(rows); }

void* pnode_row(void* rows, int64_t row) { return all(rows)[row]; }

void pnode_rows_forward(void* rows, void* const* captured, double* outputs, int64_t threads,
                        double seconds, int64_t* statuses) {
    all(rows).forward(captured, outputs, threads, seconds, statuses);
}

void pnode_rows_restart(void* rows) { all(rows).restart(); }

void pnode_rows_reverse(void* rows, void* const* captured, double* sums, int64_t entries,
                        int64_t group, const double* cotangents,
                        double* states, int64_t threads, double seconds, int64_t* statuses) {
    all(rows).reverse(captured, sums, entries, group, cotangents, states, threads,
                      seconds, statuses);
}

void pnode_rows_counts(void* rows, int64_t backward, Counts* counts) {
    *counts = all(rows).counts(backward);
}
}

// What a sweep keeps within a budget, by the actions of adjoint/schedule.py, which come as numbers.
// Above this stands kernel.h.

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

enum Act : int64_t {  // of adjoint/script.py
    ADVANCE, ADJOINT, ACCEPTED, STORE_SOLUTION, RESTORE_SOLUTION, DISCARD_SOLUTION,
    STORE_STAGES, RESTORE_STAGES, DISCARD_STAGES, RESTORE_END, KEEP_END
};

struct Order {
    int64_t act, step;
};

class Checkpoints {
  public:
    explicit Checkpoints(Kernel* kernel) : kernel_(kernel) {}

    void clear() {
        orders_.clear();
        solutions_.clear();
        stages_.clear();
        live_.reset();
        stored_ = 0;
        live_step_ = -1;
    }

    void give(const Order* orders, int64_t count) {
        orders_.insert(orders_.end(), orders, orders + count);
    }

    // Let go of orders for steps that the sweep did not take.
    void drop_orders() { orders_.clear(); }

    // Follow orders up to the next one for the sweep: ADVANCE, ADJOINT or ACCEPTED; null if there is
    // none so far.
    const Order* next() {
        for (; !orders_.empty(); orders_.pop_front()) {
            if (orders_.front().act <= ACCEPTED) return &orders_.front();
            follow(orders_.front());
        }
        return nullptr;
    }

    void pop() { orders_.pop_front(); }

    // The kernel has taken a step, whose state it is at.
    void advanced(int64_t step) {
        live_step_ = step;
        live_.reset();
    }

    typedef std::shared_ptr<const Numbers> Held;  // what is live and what is stored may be the same

    // What derivatives of the step that is live need; the kernel gives it once.
    const Held& live() {
        if (!live_) {
            Numbers found;
            kernel_->live(found);
            live_ = std::make_shared<const Numbers>(std::move(found));
        }
        return live_;
    }

    // Of its adjoint, and it counts from now on.
    const Numbers& hold() {
        const Held& found = live();
        count(stages_.count(live_step_) ? 0 : found->size());
        return *found;
    }

    int64_t peak = 0;  // bytes

  private:
    typedef std::unordered_map<int64_t, Held> Kept;

    void follow(const Order& order) {
        const int64_t step = order.step;
        switch (order.act) {
            case STORE_SOLUTION: return put(solutions_, step, copied(kernel_->state()));
            case RESTORE_SOLUTION:
                return kernel_->stand(step ? solutions_.at(step)->data() : nullptr);
            case DISCARD_SOLUTION: return drop(solutions_, step);
            case STORE_STAGES: return put(stages_, step, live());
            case RESTORE_STAGES:
                live_ = stages_.at(step);
                live_step_ = step;
                return;
            case DISCARD_STAGES: return drop(stages_, step);
            case RESTORE_END: return kernel_->stand(end(step));
            case KEEP_END: {
                const Held own = copied(end(step));
                drop(stages_, step);
                return put(solutions_, step + 1, own);
            }
        }
    }

    const double* end(int64_t step) const {
        const Held& found = stages_.at(step);
        return found->data() + found->size() - kernel_->size;
    }

    Held copied(const double* state) const {
        return std::make_shared<const Numbers>(state, state + kernel_->size);
    }

    void put(Kept& kept, int64_t step, const Held& numbers) {
        kept[step] = numbers;
        stored_ += numbers->size();
        count(0);
    }

    void drop(Kept& kept, int64_t step) {
        stored_ -= kept.at(step)->size();
        kept.erase(step);
    }

    void count(size_t more) {
        peak = std::max(peak, int64_t((stored_ + more) * sizeof(double)));
    }

    Kernel* const kernel_;
    std::deque<Order> orders_;
    Kept solutions_, stages_;  // by step: the state at its start, what its adjoint needs
    Held live_;
    int64_t live_step_ = -1;
    size_t stored_ = 0;
};

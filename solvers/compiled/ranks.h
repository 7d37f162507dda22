// What ranks that share the state add up, by MPI's own reduction: nothing here knows MPI's headers.
// Above this stands kernel.h.

#include <cstdint>
#include <limits>

struct Ranks {  // of communicators.py: MPI_Allreduce, the size of MPI's handles, and three of them
    int64_t allreduce, handle_size, type, sum, comm;
};

// Marks of a rank: it has failed, which a shorter step may mend; it takes part in no other reduction.
// The latter is more than there are ranks.
constexpr double MISSED = 1.0, GONE = 1e18;

// What ranks that share the state add up. All reductions are alike, so that one who gives up may
// meet the others in any.
class Reduction : public Sums {
  public:
    // Not collective: alone, until then.
    void begin(const Ranks& ranks, int64_t size) { ranks_ = ranks, size_ = size, open = true; }
    bool shared() const { return ranks_.allreduce; }
    // For steps that all ranks take to their end.
    void reopen() { open = shared(), over = false; }

    void add(double* numbers, int count) override {
        if (!over) over = sum(numbers, count, 0.0, 0.0) != 0.0;
        if (over) std::fill(numbers, numbers + count, std::numeric_limits<double>::quiet_NaN());
    }

    // Add up numbers, and return the sum of the ranks' marks. `end`: 1 after an attempt or the sweep;
    // where some are there, and nobody has failed, they have lost each other, and all give up.
    double sum(double* numbers, int count, double mark, double end = 1.0) {
        double given[LENGTH] = {}, found[LENGTH] = {};
        if (!open) return GONE;
        std::copy(numbers, numbers + count, given);
        given[MOST] = double(size_), given[MOST + 1] = mark, given[MOST + 2] = end, given[MOST + 3] = 1.0;
        const bool heard = ranks_.handle_size == sizeof(int) ? call<int>(given, found)
                                                             : call<void*>(given, found);
        const bool lost = found[MOST + 2] != end * found[MOST + 3];
        const double marks = !heard || (found[MOST + 1] == 0.0 && lost) ? GONE : found[MOST + 1];
        open = open && marks < GONE;
        std::copy(found, found + count, numbers);
        entries = found[MOST];
        return marks;
    }

    bool open = false;  // whether reductions are to come
    bool over = false;  // whether that attempt has failed on a rank

  private:
    static constexpr int LENGTH = MOST + 4;

    template <typename Handle>
    bool call(const double* given, double* found) const {
        using Function = int (*)(const void*, void*, int, Handle, Handle, Handle);
        const auto allreduce = reinterpret_cast<Function>(ranks_.allreduce);
        return !allreduce(given, found, LENGTH, Handle(ranks_.type), Handle(ranks_.sum),
                          Handle(ranks_.comm));
    }

    Ranks ranks_{};
    int64_t size_ = 0;
};

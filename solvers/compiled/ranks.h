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

    void add(double* numbers, int count) override {
        if (!over) over = sum(numbers, count, 0.0) != 0.0;
        if (over) std::fill(numbers, numbers + count, std::numeric_limits<double>::quiet_NaN());
    }

    // Add up numbers, and return the sum of the ranks' marks.
    double sum(double* numbers, int count, double mark) {
        double given[MOST + 2] = {}, found[MOST + 2];
        if (!open) return GONE;
        std::copy(numbers, numbers + count, given);
        given[MOST] = double(size_), given[MOST + 1] = mark;
        const bool heard = ranks_.handle_size == sizeof(int) ? call<int>(given, found)
                                                             : call<void*>(given, found);
        const double marks = heard ? found[MOST + 1] : GONE;
        open = open && marks < GONE;
        std::copy(found, found + count, numbers);
        entries = found[MOST];
        return marks;
    }

    bool open = false;  // whether reductions are to come
    bool over = false;  // whether that attempt has failed on a rank

  private:
    template <typename Handle>
    bool call(const double* given, double* found) const {
        using Function = int (*)(const void*, void*, int, Handle, Handle, Handle);
        const auto allreduce = reinterpret_cast<Function>(ranks_.allreduce);
        return !allreduce(given, found, MOST + 2, Handle(ranks_.type), Handle(ranks_.sum),
                          Handle(ranks_.comm));
    }

    Ranks ranks_{};
    int64_t size_ = 0;
};

// What ranks that share the state add up, by MPI's own reduction: nothing here knows MPI's headers.

#include <cstdint>

struct Ranks {  // of communicators.py: MPI_Allreduce, the size of MPI's handles, and three of them
    int64_t allreduce, handle_size, type, sum, comm;
};

// Given to a reduction by a rank that takes part in no other; more than there are ranks.
constexpr double GONE = 1e18;

// What ranks that share the state add up.
class Reduction {
  public:
    // Not collective: alone, until then.
    void begin(const Ranks& ranks) { ranks_ = ranks; }
    bool shared() const { return ranks_.allreduce; }

    // False where MPI fails.
    bool sum(const double (&given)[3], double (&found)[3]) const {
        if (ranks_.handle_size == sizeof(int)) return call<int>(given, found);
        return call<void*>(given, found);
    }

  private:
    template <typename Handle>
    bool call(const double* given, double* found) const {
        using Function = int (*)(const void*, void*, int, Handle, Handle, Handle);
        const auto allreduce = reinterpret_cast<Function>(ranks_.allreduce);
        return !allreduce(given, found, 3, Handle(ranks_.type), Handle(ranks_.sum),
                          Handle(ranks_.comm));
    }

    Ranks ranks_{};
};

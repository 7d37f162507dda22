// The exchange of ghost cells in C: nothing here knows PETSc's or MPI's headers.

#include <cstdint>

namespace {

// Ghost cells, by PETSc's star forest: leaves are what f gets, roots what a rank owns.
struct Exchange {  // of exchanges.py
    int64_t handle_size, forest, gather_begin, gather_end, scatter_begin, scatter_end;
    int64_t type, replace, sum;

    bool gather(const double* owned, double* seen) const {
        return call(gather_begin, owned, seen, replace) && call(gather_end, owned, seen, replace);
    }

    // Adds to `owned`.
    bool scatter(const double* seen, double* owned) const {
        return call(scatter_begin, seen, owned, sum) && call(scatter_end, seen, owned, sum);
    }

  private:
    bool call(int64_t function, const double* from, double* to, int64_t how) const {
        return handle_size == sizeof(int) ? call_as<int>(function, from, to, how)
                                          : call_as<void*>(function, from, to, how);
    }

    template <typename Handle>
    bool call_as(int64_t function, const double* from, double* to, int64_t how) const {
        using Function = int (*)(void*, Handle, const void*, void*, Handle);
        return !reinterpret_cast<Function>(function)(reinterpret_cast<void*>(forest), Handle(type),
                                                     from, to, Handle(how));
    }
};

}  // namespace

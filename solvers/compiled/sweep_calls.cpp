// The sweeps of sweeps.cpp, which stands above this, as functions in C for driver.py.

namespace {

template <typename Function>
int64_t guarded(Function function) {
    try {
        return function();
    } catch (Status status) {
        return status;
    } catch (...) {
        return FAILED;
    }
}

Sweep& own(void* sweep) { return *static_cast<Sweep*>(sweep); }

}  // namespace

extern "C" {

// Takes over the kernel.
void* pnode_sweep(void* kernel, const Control* control, const double* times, const int64_t* counts,
                  int64_t number) {
    try {
        return new Sweep(static_cast<Kernel*>(kernel), *control, times, counts, number);
    } catch (...) {
        return nullptr;
    }
}

void pnode_prescribe(void* sweep, const double* points, int64_t number) {
    own(sweep).prescribe(points, number);
}

void pnode_free_sweep(void* sweep) { delete static_cast<Sweep*>(sweep); }

// Let the sweep be that of all ranks, which follows as a collective call.
void pnode_share(void* sweep, const Ranks* ranks) { own(sweep).share(*ranks); }

// Give a shared sweep up, unless it has ended; DONE if it has ended well.
int64_t pnode_leave(void* sweep) { return own(sweep).close(FAILED); }

void pnode_fail(void* sweep) { own(sweep).fail(); }

int64_t pnode_forward(void* sweep, void* const* captured, void* outputs, double seconds,
                      Counts* counts) {
    return guarded([&] {
        const Status status = own(sweep).forward(captured, outputs, seconds);
        *counts = own(sweep).counts(false);
        return status;
    });
}

// Takes over the kernel, null where no parts of steps are wanted.
void pnode_watch(void* sweep, void* trial) { own(sweep).watch(static_cast<Kernel*>(trial)); }

// Between calls of pnode_forward.
int64_t pnode_sift(void* sweep, const Sieve* sieve) {
    return guarded([&] {
        own(sweep).sift(*sieve);
        return DONE;
    });
}

void pnode_shown(void* sweep, double* step, double* start, double* end) {
    own(sweep).shown(step, start, end);
}

int64_t pnode_part(void* sweep, void* const* captured, double length, double* state) {
    return guarded([&] { return own(sweep).part(captured, length, state); });
}

void pnode_cut(void* sweep, double end) { own(sweep).cut(end); }

void pnode_stop(void* sweep) { own(sweep).stop(); }

void pnode_keep_ends(void* sweep) { own(sweep).keep_ends(); }

void pnode_ends(void* sweep, double* states) { own(sweep).ends(states); }

int64_t pnode_interpolate(void* sweep, const Given* given) {
    return guarded([&] {
        own(sweep).interpolate(*given);
        return DONE;
    });
}

int64_t pnode_inside(void* sweep, int64_t* steps, double* thetas) {
    return own(sweep).inside()->places(steps, thetas);
}

void pnode_take_inside(void* sweep, const double* cotangents) {
    own(sweep).inside()->take(cotangents);
}

int64_t pnode_nodes(void* sweep, const int64_t* first, int64_t count) {
    return guarded([&] {
        own(sweep).nodes(first, count);
        return DONE;
    });
}

void pnode_repeat(void* sweep) { own(sweep).repeat(); }

void pnode_limit(void* sweep, int64_t bytes) { own(sweep).limit(bytes); }

// Orders of checkpoints.h, two numbers each, behind those before.
int64_t pnode_schedule(void* sweep, const int64_t* orders, int64_t count) {
    return guarded([&] {
        own(sweep).schedule(reinterpret_cast<const Order*>(orders), count);
        return DONE;
    });
}

void pnode_restart(void* sweep) { own(sweep).restart(); }

int64_t pnode_reverse(void* sweep, void* const* captured, double* const* sums,
                      const double* cotangents, double seconds) {
    return guarded([&] { return own(sweep).reverse(captured, sums, cotangents, seconds); });
}

int64_t pnode_left(void* sweep) { return own(sweep).left(); }

int64_t pnode_tangents(void* sweep, void* const* captured, int64_t number, const double* start,
                       const double* along, double* outputs, double seconds, Counts* counts) {
    return guarded([&] {
        const Status status =
            own(sweep).tangents(captured, number, start, along, outputs, seconds);
        *counts = own(sweep).counts(true);
        return status;
    });
}

int64_t pnode_finish(void* sweep, double* state, double* const* sums, Counts* counts) {
    return guarded([&] {
        own(sweep).finish(state, sums);
        *counts = own(sweep).counts(true);
        return DONE;
    });
}

int64_t pnode_recorded(void* sweep, double* steps, int64_t* orders, int64_t* outputs) {
    return own(sweep).recorded(steps, orders, outputs);
}

// Whether all checkpoints are there.
int64_t pnode_whole(void* sweep) { return own(sweep).whole(); }
}

/* Counts collective calls through MPI's profiling interface: preload it (LD_PRELOAD).

   PETSc's own counter misses the reductions that it makes through MPI-4's MPI_Allreduce_c. */

#include <mpi.h>

double mpi_calls = 0.0; /* on communicators of more than one rank */
double mpi_call_bytes = 0.0; /* of what this rank gave to them */

static void note(MPI_Comm comm, MPI_Count count, MPI_Datatype type)
{
  int size = 0, width = 0;
  PMPI_Comm_size(comm, &size);
  if (size < 2) return;
  if (count) PMPI_Type_size(type, &width);
  mpi_calls += 1.0;
  mpi_call_bytes += (double)count * width;
}

#define REDUCTION(name, integer)                                                                 \
  int MPI_##name(const void *a, void *b, integer n, MPI_Datatype t, MPI_Op op, MPI_Comm comm)    \
  {                                                                                              \
    note(comm, n, t);                                                                            \
    return PMPI_##name(a, b, n, t, op, comm);                                                    \
  }
#define GATHER(name, integer)                                                                    \
  int MPI_##name(const void *a, integer n, MPI_Datatype t, void *b, integer m, MPI_Datatype u,   \
                 MPI_Comm comm)                                                                  \
  {                                                                                              \
    note(comm, n, t);                                                                            \
    return PMPI_##name(a, n, t, b, m, u, comm);                                                  \
  }
#define BROADCAST(name, integer)                                                                 \
  int MPI_##name(void *a, integer n, MPI_Datatype t, int root, MPI_Comm comm)                    \
  {                                                                                              \
    note(comm, n, t);                                                                            \
    return PMPI_##name(a, n, t, root, comm);                                                     \
  }
REDUCTION(Allreduce, int)
REDUCTION(Scan, int)
REDUCTION(Exscan, int)
REDUCTION(Reduce_scatter_block, int)
GATHER(Allgather, int)
GATHER(Alltoall, int)
BROADCAST(Bcast, int)
#if MPI_VERSION >= 4
REDUCTION(Allreduce_c, MPI_Count)
REDUCTION(Scan_c, MPI_Count)
REDUCTION(Exscan_c, MPI_Count)
REDUCTION(Reduce_scatter_block_c, MPI_Count)
GATHER(Allgather_c, MPI_Count)
GATHER(Alltoall_c, MPI_Count)
BROADCAST(Bcast_c, MPI_Count)
#endif

int MPI_Barrier(MPI_Comm comm)
{
  note(comm, 0, MPI_BYTE);
  return PMPI_Barrier(comm);
}

int MPI_Iallreduce(const void *a, void *b, int n, MPI_Datatype t, MPI_Op op, MPI_Comm comm,
                   MPI_Request *request)
{
  note(comm, n, t);
  return PMPI_Iallreduce(a, b, n, t, op, comm, request);
}

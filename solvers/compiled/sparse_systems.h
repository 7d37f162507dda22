// Sparse Jacobians, and what is solved with them: LU by fronts. Above this stand N, ENTRIES and lu.h.
//
// Duff & Reid, ACM Trans. Math. Softw. 9 (1983) 302: columns whose entries lie in the same rows are
// eliminated together, in a dense matrix of these rows and columns, a front. What is left of it is added
// to the front that comes next of those with these rows. Pivots are chosen within the columns of a front.

namespace {

typedef std::vector<int> Indices;

struct Front {
  int first, width;   // its columns
  Indices rows;       // those below them; the matrix is taken for symmetric, but for its values
  double used;        // entries that are not zero
  int parent = -1;    // the front that comes next
  Indices into;       // where its rows are there
  size_t lower, right;  // where its part of L and U is, and what of U is right of that, by rows
  std::vector<std::pair<int, size_t>> entries;  // of the Jacobian, and where they are
  int size() const { return width + int(rows.size()); }
  // Where a row or column is.
  int place(int row) const {
    if (row < first + width) return row - first;
    return width + int(std::lower_bound(rows.begin(), rows.end(), row) - rows.begin());
  }
};

// The order of elimination, and what follows from a pattern.
class Structure {
 public:
  // `order`: N rows, the first to be eliminated first.
  void find(const int64_t* at_rows, const int64_t* at_columns, const int64_t* order) {
    rows.assign(at_rows, at_rows + ENTRIES), columns.assign(at_columns, at_columns + ENTRIES);
    Indices place(N);
    for (int k = 0; k < N; k++) place[order[k]] = k;
    const Indices tree = elimination_tree(below(place));
    const Indices last = postorder(tree);
    for (int k = 0; k < N; k++) position[k] = last[place[k]];
    find_fronts();
    place_entries();
  }

  Indices rows, columns;  // of entries
  int position[N];        // in the order of elimination
  std::vector<Front> fronts;
  size_t room = 0, pending = 0;  // of the factors; of what is left of fronts at a time
  int largest = 0;               // front

 private:
  // Fronts are joined as long as this share of them is not zero, and if they are narrow.
  static constexpr double FULL = 0.9;
  static constexpr int NARROW = 8;

  // Of each column of the symmetric pattern the rows below the diagonal.
  std::vector<Indices> below(const Indices& place) const {
    std::vector<Indices> found(N);
    for (int e = 0; e < ENTRIES; e++) {
      const int i = place[rows[e]], j = place[columns[e]];
      if (i != j) found[std::min(i, j)].push_back(std::max(i, j));
    }
    return found;
  }

  // Liu, SIAM J. Matrix Anal. Appl. 11 (1990) 134, algorithm 4.2.
  static Indices elimination_tree(const std::vector<Indices>& below) {
    Indices tree(N, -1), ancestor(N, -1);
    std::vector<Indices> left(N);
    for (int j = 0; j < N; j++)
      for (const int i : below[j]) left[i].push_back(j);
    for (int i = 0; i < N; i++)
      for (int j : left[i])
        while (j != i) {
          const int next = std::exchange(ancestor[j], i);
          if (next == i) break;
          if (next < 0) tree[j] = i;
          j = next < 0 ? i : next;
        }
    return tree;
  }

  // The number of each node where descendants come before a node, one next to the other.
  static Indices postorder(const Indices& tree) {
    Indices head(N + 1, -1), next(N, -1), number(N), stack;
    for (int j = N - 1; j >= 0; j--) {
      int& first = head[tree[j] < 0 ? N : tree[j]];
      next[j] = std::exchange(first, j);
    }
    int count = 0;
    for (int root = head[N]; root >= 0; root = next[root]) {
      stack.push_back(root);
      while (!stack.empty()) {
        const int j = stack.back(), child = head[j];
        if (child < 0) {
          number[j] = count++;
          stack.pop_back();
        } else {
          head[j] = next[child];
          stack.push_back(child);
        }
      }
    }
    return number;
  }

  void find_fronts() {
    std::vector<Indices> in_column = below(Indices(position, position + N)), of_children(N);
    Indices seen(N, -1);
    fronts.clear();
    for (int j = 0; j < N; j++) {
      Front front{j, 1, {}, 0.0};
      const auto look = [&](const Indices& more) {
        for (const int i : more)
          if (i != j && std::exchange(seen[i], j) != j) front.rows.push_back(i);
      };
      look(in_column[j]);
      for (const int child : of_children[j]) look(in_column[child]);
      std::sort(front.rows.begin(), front.rows.end());
      in_column[j] = front.rows;  // of L
      if (!front.rows.empty()) of_children[front.rows[0]].push_back(j);
      for (const int child : of_children[j]) Indices().swap(in_column[child]);
      front.used = 1.0 + 2.0 * front.rows.size();
      while (!fronts.empty() && joins(fronts.back(), front)) {
        front.first = fronts.back().first;
        front.width += fronts.back().width;
        front.used += fronts.back().used;
        fronts.pop_back();
      }
      fronts.push_back(front);
    }
  }

  static bool joins(const Front& child, const Front& front) {
    if (child.rows.empty() || child.rows[0] >= front.first + front.width) return false;
    const double width = child.width + front.width;
    const double entries = width * (width + 2.0 * front.rows.size());
    return width <= NARROW || child.used + front.used >= FULL * entries;
  }

  void place_entries() {
    Indices owner(N);
    for (size_t s = 0; s < fronts.size(); s++)
      for (int k = 0; k < fronts[s].width; k++) owner[fronts[s].first + k] = int(s);
    room = pending = 0;
    largest = 0;
    for (int e = 0; e < ENTRIES; e++) {
      const int i = position[rows[e]], j = position[columns[e]];
      Front& front = fronts[owner[std::min(i, j)]];
      front.entries.emplace_back(e, front.place(i) + size_t(front.size()) * front.place(j));
    }
    std::vector<size_t> left(fronts.size());
    size_t now = 0;
    for (size_t s = 0; s < fronts.size(); s++) {
      Front& front = fronts[s];
      const size_t size = front.size(), width = front.width, below = front.rows.size();
      front.lower = room, front.right = room + size * width;
      room = front.right + width * below;
      largest = std::max(largest, int(size));
      if (!front.rows.empty()) {
        front.parent = owner[front.rows[0]];
        for (const int row : front.rows) front.into.push_back(fronts[front.parent].place(row));
      }
      now = now - left[s] + below * below;
      pending = std::max(pending, now);
      if (front.parent >= 0) left[front.parent] += below * below;
    }
  }
} structure;

double dot(const double* a, const double* b, int count) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int k = 0; k < count; k++) sum += a[k] * b[k];
  return sum;
}

// Of shift - J; J stays where it is as long as there are solves.
class Factors {
 public:
  bool factor(double shift_, const double* J_, const double* = nullptr) {
    const size_t most = structure.largest;
    shift = shift_, J = J_, pivoted = false;
    values.resize(structure.room), left.resize(structure.pending), front.resize(most * most);
    pivots.resize(N);
    waiting.clear();
    size_t used = 0;
    for (const Front& f : structure.fronts) {
      const int size = f.size();
      std::fill(front.begin(), front.begin() + size_t(size) * size, 0.0);
      for (const auto& [entry, place] : f.entries) front[place] = -J[entry];
      for (int k = 0; k < f.width; k++) front[k + size_t(size) * k] += shift;
      while (!waiting.empty() && waiting.back()->parent == &f - structure.fronts.data())
        used = take(*waiting.back(), used, size);
      if (!eliminate(f, used)) return false;
      if (!f.rows.empty()) waiting.push_back(&f), used += f.rows.size() * f.rows.size();
    }
    return true;
  }

  void solve(double* b) {
    const double* x = arrange(b);
    for (const Front& f : structure.fronts) forward(f, false);
    for (size_t s = structure.fronts.size(); s-- > 0;) backward(structure.fronts[s], false);
    for (int k = 0; k < N; k++) b[k] = x[structure.position[k]];
  }

  void solve_transposed(double* b) {
    const double* x = arrange(b);
    for (const Front& f : structure.fronts) forward(f, true);
    for (size_t s = structure.fronts.size(); s-- > 0;) backward(structure.fronts[s], true);
    for (int k = 0; k < N; k++) b[k] = x[structure.position[k]];
  }

  // The same where nothing corrects a solution later: pivots are not chosen between fronts. False if
  // neither refinement nor dense factors with pivots from all rows do.
  bool solve_exactly(double* b, bool transposed = false) {
    const std::vector<double> right(b, b + N);
    for (;;) {
      rest = right;
      std::fill(b, b + N, 0.0);
      for (int turn = 0; turn < REFINED; turn++) {
        solve_any(rest.data(), transposed);
        for (int k = 0; k < N; k++) b[k] += rest[k];
        if (leaves_little(right.data(), b, transposed)) return true;
      }
      if (pivoted || !are_finite(right)) return true;  // nothing does better
      if (N > MOST_PIVOTED || !factor_pivoted()) return false;
    }
  }

 private:
  static constexpr int REFINED = 4, MOST_PIVOTED = 1024;
  static constexpr double PART = 1e-12;  // of the terms of an equation

  bool factor_pivoted() {
    int n = N, info = 0;
    all.assign(size_t(N) * N, 0.0), rows.resize(N);
    for (int e = 0; e < ENTRIES; e++)
      all[structure.rows[e] + size_t(N) * structure.columns[e]] = -J[e];
    for (int k = 0; k < N; k++) all[k + size_t(N) * k] += shift;
    lapack.factor[0](&n, &n, all.data(), &n, rows.data(), &info);
    return pivoted = info == 0;
  }

  void solve_any(double* b, bool transposed) {
    if (!pivoted) return transposed ? solve_transposed(b) : solve(b);
    int n = N, one = 1, info = 0;
    char form = transposed ? 'T' : 'N';
    lapack.solve[0](&form, &n, &one, all.data(), &n, rows.data(), b, &n, &info);
  }

  static bool are_finite(const std::vector<double>& right) {
    double sum = 0.0;
    for (const double x : right) sum += x - x;
    return sum == 0.0;
  }

  // Entries that are rounded as the smallest numbers are count as one that is not.
  static double size_of(double x) { return std::fabs(x) + std::numeric_limits<double>::min(); }

  // What a solution leaves of each equation, to `rest`, and whether that is small beside its terms,
  // whatever the units of states (Oettli & Prager, Numer. Math. 6 (1964) 405).
  bool leaves_little(const double* right, const double* b, bool transposed) {
    const int* into = (transposed ? structure.columns : structure.rows).data();
    const int* from = (transposed ? structure.rows : structure.columns).data();
    terms.resize(N);
    for (int k = 0; k < N; k++) {
      rest[k] = right[k] - shift * b[k];
      terms[k] = std::fabs(right[k]) + std::fabs(shift) * size_of(b[k]);
    }
    for (int e = 0; e < ENTRIES; e++) {
      rest[into[e]] += J[e] * b[from[e]];
      terms[into[e]] += std::fabs(J[e]) * size_of(b[from[e]]);
    }
    bool little = true;
    for (int k = 0; k < N; k++) little &= std::fabs(rest[k]) <= PART * terms[k];
    return little;
  }

  // Add what is left of a child.
  size_t take(const Front& child, size_t used, int size) {
    const int count = int(child.rows.size());
    used -= size_t(count) * count;
    const double* from = left.data() + used;
    for (int j = 0; j < count; j++, from += count) {
      double* column = front.data() + size_t(size) * child.into[j];
      for (int i = 0; i < count; i++) column[child.into[i]] += from[i];
    }
    waiting.pop_back();
    return used;
  }

  bool eliminate(const Front& f, size_t used) {
    int size = f.size(), width = f.width, count = size - width, info = 0;
    int* own = pivots.data() + f.first;
    double one = 1.0, minus = -1.0, *all = front.data(), *right = all + size_t(size) * width;
    lapack.factor[0](&width, &width, all, &size, own, &info);
    if (info) return false;
    if (count) {
      for (int j = 0; j < count; j++)
        for (int k = 0; k < width; k++)
          std::swap(right[k + size_t(size) * j], right[own[k] - 1 + size_t(size) * j]);
      char l = 'L', r = 'R', u = 'U', n = 'N';
      lapack.triangle(&l, &l, &n, &u, &width, &count, &one, all, &size, right, &size);
      lapack.triangle(&r, &u, &n, &n, &count, &width, &one, all, &size, all + width, &size);
      lapack.product(&n, &n, &count, &count, &width, &minus, all + width, &size, right, &size, &one,
                     right + width, &size);
    }
    std::memcpy(values.data() + f.lower, all, sizeof(double) * size * width);
    for (int j = 0; j < count; j++) {
      const double* column = right + size_t(size) * j;
      for (int k = 0; k < width; k++) values[f.right + size_t(count) * k + j] = column[k];
      std::memcpy(left.data() + used + size_t(count) * j, column + width, sizeof(double) * count);
    }
    return true;
  }

  double* arrange(const double* b) {
    x.resize(N), gathered.resize(structure.largest);
    for (int k = 0; k < N; k++) x[structure.position[k]] = b[k];
    return x.data();
  }

  // x = L^-1 x, or U^-T x.
  void forward(const Front& f, bool transposed) {
    const int size = f.size(), width = f.width, count = size - width;
    const double *lower = values.data() + f.lower, *right = values.data() + f.right;
    double *own = x.data() + f.first, *sums = gathered.data();
    std::fill(sums, sums + count, 0.0);
    if (transposed) {
      for (int k = 0; k < width; k++) {
        const double* column = lower + size_t(size) * k;
        own[k] = (own[k] - dot(column, own, k)) / column[k];
      }
      for (int k = 0; k < width; k++)
        for (int i = 0; i < count; i++) sums[i] += right[size_t(count) * k + i] * own[k];
    } else {
      for (int k = 0; k < width; k++) std::swap(own[k], own[pivots[f.first + k] - 1]);
      for (int k = 0; k < width; k++) {
        const double *column = lower + size_t(size) * k, value = own[k];
        for (int i = k + 1; i < width; i++) own[i] -= column[i] * value;
        for (int i = 0; i < count; i++) sums[i] += column[width + i] * value;
      }
    }
    for (int i = 0; i < count; i++) x[f.rows[i]] -= sums[i];
  }

  // x = U^-1 x, or L^-T x.
  void backward(const Front& f, bool transposed) {
    const int size = f.size(), width = f.width, count = size - width;
    const double *lower = values.data() + f.lower, *right = values.data() + f.right;
    double *own = x.data() + f.first, *after = gathered.data();
    for (int i = 0; i < count; i++) after[i] = x[f.rows[i]];
    if (transposed) {
      for (int k = width - 1; k >= 0; k--) {
        const double* column = lower + size_t(size) * k;
        own[k] -= dot(column + width, after, count) +
                  dot(column + k + 1, own + k + 1, width - k - 1);
      }
      for (int k = width - 1; k >= 0; k--) std::swap(own[k], own[pivots[f.first + k] - 1]);
    } else {
      for (int k = 0; k < width; k++) own[k] -= dot(right + size_t(count) * k, after, count);
      for (int k = width - 1; k >= 0; k--) {
        const double *column = lower + size_t(size) * k, value = own[k] /= column[k];
        for (int i = 0; i < k; i++) own[i] -= column[i] * value;
      }
    }
  }

  std::vector<double> values, left, front, x, gathered;
  std::vector<const Front*> waiting;  // whose rest the next ones take
  Indices pivots;
  double shift = 0.0;
  const double* J = nullptr;
  std::vector<double> rest, terms, all;  // all entries, where fronts do not do
  Indices rows;                          // their pivots
  bool pivoted = false;
};

// y = J x.
void apply(const double* J, const double* x, double* y) {
  std::fill(y, y + N, 0.0);
  for (int e = 0; e < ENTRIES; e++) y[structure.rows[e]] += J[e] * x[structure.columns[e]];
}

// l = J^T w.
void apply_transposed(const double* J, const double* w, double* l) {
  std::fill(l, l + N, 0.0);
  for (int e = 0; e < ENTRIES; e++) l[structure.columns[e]] += J[e] * w[structure.rows[e]];
}

}  // namespace

// Of one field and pattern, as a library is.
extern "C" void pnode_structure(const int64_t* rows, const int64_t* columns, const int64_t* order) {
  if (structure.fronts.empty()) structure.find(rows, columns, order);
}

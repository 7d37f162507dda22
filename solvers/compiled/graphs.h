// Compiled graphs, libraries of their own, called through torch's C interface for them; graph_calls.py
// passes the functions.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

typedef void* Handle;  // of a tensor

struct Torch {  // 0 is success
    int32_t (*from_blob)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t,
                         int32_t, Handle*);
    int32_t (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
    int32_t (*share)(Handle, Handle*);
    int32_t (*release)(Handle);
    int32_t (*data)(Handle, void**);
    int32_t (*dimensions)(Handle, int64_t*);
    int32_t (*sizes)(Handle, int64_t**);
    int32_t (*strides)(Handle, int64_t**);
};

Torch torch;  // the same in all libraries
constexpr int32_t CPU = 0, DOUBLE = 7, FLOAT = 6;

struct GraphFailed {};

void check(int32_t error) {
    if (error) throw GraphFailed();
}

std::atomic<int64_t> owned{0};

// Owns a tensor.
class Tensor {
  public:
    Tensor() = default;
    explicit Tensor(Handle handle) : handle_(handle) { ++owned; }
    Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Tensor() {
        if (handle_) torch.release(take());
    }
    Handle share() const {
        Handle other;
        check(torch.share(handle_, &other));
        return other;
    }
    Handle take() {
        if (handle_) --owned;
        return std::exchange(handle_, nullptr);
    }
    Handle get() const { return handle_; }
    explicit operator bool() const { return handle_ != nullptr; }
    template <typename T>
    T* data() const {
        void* data;
        check(torch.data(handle_, &data));
        return static_cast<T*>(data);
    }

  private:
    Handle handle_ = nullptr;
};

typedef std::vector<Tensor> Tensors;

struct Form {
    int32_t dtype;
    std::vector<int64_t> sizes, strides;

    Tensor view(void* data) const {
        Handle handle;
        check(torch.from_blob(data, sizes.size(), sizes.data(), strides.data(), 0, dtype, CPU, 0,
                              &handle));
        return Tensor(handle);
    }

    Tensor empty() const {
        Handle handle;
        check(torch.empty(sizes.size(), sizes.data(), strides.data(), dtype, CPU, 0, &handle));
        return Tensor(handle);
    }
};

Tensors views(const std::vector<Form>& forms, void* const* data) {
    Tensors tensors;
    for (const Form& form : forms) tensors.push_back(form.view(*data++));
    return tensors;
}

Tensor number(double& value) { return Form{DOUBLE, {}, {}}.view(&value); }

Tensor vector(int64_t size, int32_t dtype) {
    const int64_t one = 1;
    Handle handle;
    check(torch.empty(1, &size, &one, dtype, CPU, 0, &handle));
    return Tensor(handle);
}

int64_t entries(const Tensor& tensor) {
    int64_t dimensions, *sizes, count = 1;
    check(torch.dimensions(tensor.get(), &dimensions));
    check(torch.sizes(tensor.get(), &sizes));
    while (dimensions-- > 0) count *= sizes[dimensions];
    return count;
}

void copy_out(const Tensor& tensor, double* target) {
    int64_t dimensions, *sizes, *strides;
    check(torch.dimensions(tensor.get(), &dimensions));
    check(torch.sizes(tensor.get(), &sizes));
    check(torch.strides(tensor.get(), &strides));
    const double* source = tensor.data<double>();
    int64_t count = 1;
    bool contiguous = true;
    for (int64_t d = dimensions; d-- > 0;) {
        contiguous = contiguous && (sizes[d] == 1 || strides[d] == count);
        count *= sizes[d];
    }
    if (contiguous) {
        std::memmove(target, source, count * sizeof(double));
        return;
    }
    for (int64_t k = 0; k < count; ++k) {
        int64_t rest = k, place = 0;
        for (int64_t d = dimensions; d-- > 0;) {
            place += rest % sizes[d] * strides[d];
            rest /= sizes[d];
        }
        target[k] = source[place];
    }
}

struct Graph {
    int32_t (*run)(void*, Handle*, size_t, Handle*, size_t, void*, void*);
    void* container;

    Tensors operator()(std::vector<Handle>& inputs, size_t results) const {
        std::vector<Handle> outputs(results);
        check(run(container, inputs.data(), inputs.size(), outputs.data(), results, nullptr,
                  nullptr));
        Tensors tensors;
        for (Handle output : outputs) tensors.emplace_back(output);
        return tensors;
    }
};

std::vector<Form> forms(const int64_t*& text) {
    std::vector<Form> found(*text++);
    for (Form& form : found) {
        form.dtype = static_cast<int32_t>(*text++);
        const int64_t dimensions = *text++;
        form.sizes.assign(text, text + dimensions);
        form.strides.assign(text + dimensions, text + 2 * dimensions);
        text += 2 * dimensions;
    }
    return found;
}

}  // namespace

extern "C" void pnode_torch(const Torch* functions) { torch = *functions; }

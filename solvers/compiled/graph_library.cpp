// A compiled graph as torch and graphs.h call it: torch's interface in C to libraries of graphs, for one
// that has no constants, so that there is nothing to be set up. Above this stand the graph's run_impl and
// INPUTS and OUTPUTS, the number of its tensors.

#include <iostream>
#include <string>

namespace {

thread_local std::string last_error;

// As torch does: some of what graphs call takes no tensors that gradients are wanted of.
class WithoutGradients {
  public:
    WithoutGradients() { aoti_torch_grad_mode_set_enabled(false); }
    ~WithoutGradients() { aoti_torch_grad_mode_set_enabled(before_); }

  private:
    const bool before_ = aoti_torch_grad_mode_is_enabled();
};

}  // namespace

extern "C" {

AOTIRuntimeError AOTInductorModelContainerCreateWithDevice(void** graph, size_t, const char*,
                                                           const char*) {
    static torch::aot_inductor::AOTInductorModel model;
    *graph = &model;
    return AOTI_RUNTIME_SUCCESS;
}

AOTIRuntimeError AOTInductorModelContainerDelete(void*) { return AOTI_RUNTIME_SUCCESS; }

AOTIRuntimeError AOTInductorModelContainerRun(void* graph, AtenTensorHandle* given, size_t number,
                                              AtenTensorHandle* results, size_t wanted, void* stream,
                                              AOTIProxyExecutorHandle executor) {
    last_error.clear();
    try {
        AOTI_RUNTIME_CHECK(number == INPUTS && wanted == OUTPUTS, "a graph has other arguments");
        const WithoutGradients guard;
        static_cast<torch::aot_inductor::AOTInductorModel*>(graph)->run_impl(given, results, stream,
                                                                             executor);
        return AOTI_RUNTIME_SUCCESS;
    } catch (const std::exception& error) {
        last_error = error.what();
    } catch (...) {
        last_error = "an error without a name";
    }
    std::cerr << "Error: " << last_error << '\n';
    return AOTI_RUNTIME_FAILURE;
}

AOTIRuntimeError AOTInductorModelContainerRunSingleThreaded(
    void* graph, AtenTensorHandle* given, size_t number, AtenTensorHandle* results, size_t wanted,
    void* stream, AOTIProxyExecutorHandle executor) {
    return AOTInductorModelContainerRun(graph, given, number, results, wanted, stream, executor);
}

AOTIRuntimeError AOTInductorModelContainerGetNumInputs(void*, size_t* number) {
    *number = INPUTS;
    return AOTI_RUNTIME_SUCCESS;
}

AOTIRuntimeError AOTInductorModelContainerGetNumOutputs(void*, size_t* number) {
    *number = OUTPUTS;
    return AOTI_RUNTIME_SUCCESS;
}

AOTIRuntimeError AOTInductorModelContainerGetNumConstants(void*, size_t* number) {
    *number = 0;
    return AOTI_RUNTIME_SUCCESS;
}

AOTIRuntimeError AOTInductorModelContainerGetCallSpec(void*, const char** given,
                                                      const char** results) {
    *given = *results = "";
    return AOTI_RUNTIME_SUCCESS;
}

AOTIRuntimeError AOTInductorGetLastError(const char** error) {
    *error = last_error.c_str();
    return AOTI_RUNTIME_SUCCESS;
}
}

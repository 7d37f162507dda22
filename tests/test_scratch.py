"""What of a compiled graph lies on the stack, and what stays a tensor."""

import pytest
import torch
from compile_cache import share_headers

from pnode.solvers.compiled import inductor, scratch

TEXT = """AtenTensorHandle* input_handles) {
    static constexpr int64_t int_array_0[] = {5L, 3L};
    static constexpr int64_t int_array_1[] = {3L, 1L};
"""
MADE = """
    AtenTensorHandle buf%(n)d_handle;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, int_array_0, int_array_1, \
cached_torch_dtype_float64, cached_torch_device_type_cpu, this->device_idx_, &buf%(n)d_handle));
    RAIIAtenTensorHandle buf%(n)d(buf%(n)d_handle);
"""
MOVED = "    auto buf%d = std::move(buf%d);  // reuse\n"
VIEW = (
    "    auto buf%d = wrap_with_raii_handle_if_needed(reinterpret_tensor_wrapper(buf%d, 2, "
    "int_array_0, int_array_1, %dL));  // alias\n"
)
KERNEL = "    kernel((double*)(buf%d.data_ptr()));\n"
RETURNED = "    output_handles[0] = buf%d.release();\n}"


def made(*numbers):
    return "".join(MADE % {"n": n} for n in numbers)


def tensors(text):
    return {n for n in range(9) if f"buf{n}_handle" in text}


def test_only_what_torch_is_given_is_a_tensor():
    text = (
        TEXT + made(0, 1, 2) + MOVED % (3, 0) + MOVED % (4, 1) + VIEW % (5, 4, 2) + VIEW % (6, 3, 7)
    )
    text += (
        "".join(KERNEL % n for n in (3, 5, 6))
        + "    aoti_torch_cpu_mm_out(buf2, arg0_1, arg1_1);\n"
    )
    found = scratch.on_the_stack(text + RETURNED % 4)
    assert tensors(found) == {1, 2}  # the second is returned under another name
    assert "alignas(64) char scratch[128];" in found and "Scratch buf0{scratch + 0};" in found
    assert "Scratch buf5{static_cast<char*>(buf4.data_ptr()) + 16};" in found
    assert "Scratch buf6{static_cast<char*>(buf3.data_ptr()) + 56};" in found
    assert "reinterpret" not in found


def test_a_view_that_outlives_its_tensor_shares_it():
    text = TEXT + made(0, 1) + "    torch_takes(buf0);\n" + VIEW % (2, 0, 0) + "    buf0.reset();\n"
    found = scratch.on_the_stack(text + KERNEL % 2 + KERNEL % 1 + "}")
    assert tensors(found) == {0} and VIEW % (2, 0, 0) in found


def test_a_returned_view_is_of_a_tensor():
    found = scratch.on_the_stack(TEXT + made(0, 1) + VIEW % (2, 0, 3) + KERNEL % 1 + RETURNED % 2)
    assert tensors(found) == {0} and VIEW % (2, 0, 3) in found


@pytest.mark.parametrize(
    "text",
    [
        TEXT + made(0) + "    {" + made(0) + "    }" + KERNEL % 0 + "}",  # which one is used?
        TEXT.replace("5L, 3L", "5000L, 4000L") + made(0) + KERNEL % 0 + "}",
        TEXT.replace("5L, 3L", "0L, 3L") + made(0) + KERNEL % 0 + "}",
        TEXT.replace("static constexpr", "const") + made(0) + KERNEL % 0 + "}",
        TEXT + made(0).replace("float64", "complex128") + KERNEL % 0 + "}",
        TEXT + made(0).replace("type_cpu", "type_cuda") + KERNEL % 0 + "}",
        TEXT + made(0).replace("aoti_torch_empty", "aoti_torch_new_empty") + KERNEL % 0 + "}",
    ],
)
def test_else_a_text_stays_as_it_is(text):
    assert scratch.on_the_stack(text) == text


def test_graphs_on_the_stack_compute_what_torch_does(tmp_path, monkeypatch):
    """Of inductor's own text: kernels, torch's product of matrices, views and a returned stack."""
    seen, change = [], scratch.on_the_stack

    def watched(text):
        seen.append(change(text))
        return seen[-1]

    def function(x):
        product = (x - x.sum(0)) @ x.cos()
        rows = torch.stack([product.sum(1), product.abs().sum(1)])
        return rows, (rows[0] / rows[1].sum()).sin().sum().view(1)

    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    share_headers(cache)
    monkeypatch.setenv("PNODE_CACHE_DIR", str(cache))
    monkeypatch.setattr(scratch, "on_the_stack", watched)
    x = torch.linspace(-1.0, 1.0, 900, dtype=torch.float64).view(30, 30)
    found = inductor.compile_graph("graph", function, [x])([x])
    (text,) = seen
    assert "Scratch buf" in text and "mm_out(" in text
    for a, b in zip(found, function(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)

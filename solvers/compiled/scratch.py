"""What only the kernels of a graph write and read: on the stack, in the C++ that inductor writes.

Inductor makes a tensor of each, for which torch takes longer than a kernel to fill a small one. A
text that looks different stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["CLASS", "on_the_stack"]

#: Bytes in a call; where there are more, kernels take longer than torch's calls.
_MOST = 131_072
_ALIGNED = 64  # as torch's own tensors are
_BYTES = {"float64": 8, "float32": 4, "int64": 8, "int32": 4, "bool": 1}
#: To be put before the calls: what inductor's own handles of tensors are asked for.
CLASS = """
namespace {
struct Scratch {
    void* place;
    void* data_ptr() const { return place; }
    void reset() {}
};
}  // namespace
"""
_ARRAY = re.compile(r"static constexpr int64_t (\w+)\[\] = \{([\dL, ]*)\};")
_NO_ARRAY = re.compile(r"static constexpr int64_t \*(\w+)=nullptr;")  # of a number alone
_MADE = re.compile(
    r"AtenTensorHandle (?P<name>buf\d+)_handle;\s*"
    r"AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_empty_strided\(\d+, (?P<sizes>\w+), "
    r"(?P<strides>\w+), cached_torch_dtype_(?P<dtype>\w+), cached_torch_device_type_cpu, "
    r"this->device_idx_, &(?P=name)_handle\)\);\s*"
    r"RAIIAtenTensorHandle (?P=name)\((?P=name)_handle\);"
)
_MOVED = re.compile(r"auto (?P<name>buf\d+) = std::move\((?P<source>buf\d+)\);")
_VIEW = re.compile(
    r"auto (?P<name>buf\d+) = wrap_with_raii_handle_if_needed\(reinterpret_tensor_wrapper\("
    r"(?P<source>buf\d+), \d+, \w+, \w+, (?P<offset>\d+)L\)\);"
)
_AS_TENSOR = re.compile(r"\b(buf\d+)\b(?!\.data_ptr\(\)|\.reset\(\))")
_FREED = re.compile(r"\b(buf\d+)\.reset\(\)")


def on_the_stack(calls: str) -> str:
    """Return the text of a graph's calls, from its arguments on, with tensors where one is needed.

    A buffer that is handed to torch, or returned, is one, as is what it was moved from or is a
    view of.
    """
    made = {found["name"]: found for found in _MADE.finditer(calls)}
    derived = [*_MOVED.finditer(calls), *_VIEW.finditer(calls)]
    sources = {found["name"]: found["source"] for found in derived}
    roots = {name: _line(name, sources)[-1] for name in (*made, *sources)}
    if len(roots) < len(derived) + len(_MADE.findall(calls)):
        return calls  # two of the same name, in blocks of their own
    rest = _VIEW.sub("", _MOVED.sub("", _MADE.sub("", calls)))
    tensors = {name for used in _AS_TENSOR.findall(rest) for name in _line(used, sources)}
    freed = {roots.get(name) for name in _FREED.findall(calls)}
    places, total = _places(calls, made, tensors)
    if not places:
        return calls

    def make(found: re.Match[str]) -> str:
        name = found["name"]
        return f"Scratch {name}{{scratch + {places[name]}}};" if name in places else found[0]

    def view(found: re.Match[str]) -> str:
        name, source, root = found["name"], found["source"], roots[found["name"]]
        lasts = root in places or (root in made and root not in freed)
        if name in tensors or not lasts:
            return found[0]
        offset = _BYTES.get(made[root]["dtype"], 0) * int(found["offset"])
        return f"Scratch {name}{{static_cast<char*>({source}.data_ptr()) + {offset}}};"

    calls = _VIEW.sub(view, _MADE.sub(make, calls))
    begin = calls.index("{") + 1
    return f"{calls[:begin]}\n    alignas({_ALIGNED}) char scratch[{total}];{calls[begin:]}"


def _line(name: str, sources: Mapping[str, str]) -> list[str]:
    """Return a buffer, what it was made from, and so on."""
    line = [name]
    while line[-1] in sources:
        line.append(sources[line[-1]])
    return line


def _places(
    calls: str, made: Mapping[str, re.Match[str]], tensors: set[str]
) -> tuple[dict[str, int], int]:
    """Return where each buffer begins that need not be a tensor, and the bytes of all."""
    arrays = {
        name: [int(n) for n in re.findall(r"\d+", text)] for name, text in _ARRAY.findall(calls)
    }
    arrays |= {name: [] for name in _NO_ARRAY.findall(calls)}
    places, total = {}, 0
    for name, found in made.items():
        if found["sizes"] not in arrays or found["strides"] not in arrays:
            continue
        sizes, strides = arrays[found["sizes"]], arrays[found["strides"]]
        entries = 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        length = -(-entries * _BYTES.get(found["dtype"], 0) // _ALIGNED) * _ALIGNED
        if name not in tensors and all(sizes) and 0 < length <= _MOST - total:
            places[name] = total
            total += length
    return places, total

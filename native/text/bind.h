#pragma once

#include <nanobind/nanobind.h>

namespace mnemos {

// Adds the tokenizers to the Python module.
void bind_text(nanobind::module_ &m);

}  // namespace mnemos

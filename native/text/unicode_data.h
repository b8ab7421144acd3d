// The tables of unicode_data.cpp. "Runs" are (first code point << 8 | value), in ascending order from 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnemos {

// A class of code points that no property tells apart: category (enum Category) and flags (w, s, Han, Hiragana, ...).
extern const uint8_t regex_class_categories[], regex_class_flags[];
extern const size_t regex_class_categories_size, regex_class_flags_size;
extern const uint32_t regex_class_runs[], character_flag_runs[], combining_class_runs[], grapheme_break_runs[];
extern const size_t regex_class_runs_size, character_flag_runs_size, combining_class_runs_size,
    grapheme_break_runs_size;
extern const uint32_t lower_cases[];  // pairs
extern const size_t lower_cases_size;
// (code point, where its decomposition begins in the texts), which ends where the next one begins.
extern const uint32_t canonical_entries[], canonical_texts[], compatible_entries[], compatible_texts[];
extern const size_t canonical_entries_size, canonical_texts_size, compatible_entries_size, compatible_texts_size;
extern const uint32_t compositions[];  // triples: first, second, what they compose to
extern const size_t compositions_size;

}  // namespace mnemos

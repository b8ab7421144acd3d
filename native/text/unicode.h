// Characters and their properties, as the tokenizers in use know them; tools/unicode_tables.py made the tables.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mnemos {

constexpr char32_t code_points = 0x110000;

// The character at text[at], of which `at` is moved to the end. Bytes that are not UTF-8 count as characters of their
// own, so that any bytes can be walked.
inline char32_t next_character(std::string_view text, size_t &at) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const char32_t first = byte(at);
  const size_t left = text.size() - at;
  const auto further = [&](size_t i) { return static_cast<char32_t>(byte(at + i) & 0x3F); };
  char32_t c = first;
  size_t size = 1;
  if (first >= 0xF0 && left >= 4) {
    c = (first & 7) << 18 | further(1) << 12 | further(2) << 6 | further(3), size = 4;
  } else if (first >= 0xE0 && left >= 3) {
    c = (first & 15) << 12 | further(1) << 6 | further(2), size = 3;
  } else if (first >= 0xC0 && left >= 2) {
    c = (first & 31) << 6 | further(1), size = 2;
  }
  at += size;
  return c < code_points ? c : 0xFFFD;
}

// The character that ends before text[at], where `at` is moved to its beginning.
inline char32_t previous_character(std::string_view text, size_t &at) {
  size_t begin = at - 1;
  while (begin > 0 && at - begin < 4 && (static_cast<uint8_t>(text[begin]) & 0xC0) == 0x80) begin--;
  at = begin;
  return next_character(text, begin);
}

inline void append_character(std::string &text, char32_t c) {
  if (c < 0x80) {
    text.push_back(static_cast<char>(c));
    return;
  }
  if (c < 0x800) {
    text.push_back(static_cast<char>(0xC0 | c >> 6));
  } else {
    if (c < 0x10000) {
      text.push_back(static_cast<char>(0xE0 | c >> 12));
    } else {
      text.push_back(static_cast<char>(0xF0 | c >> 18));
      text.push_back(static_cast<char>(0x80 | (c >> 12 & 0x3F)));
    }
    text.push_back(static_cast<char>(0x80 | (c >> 6 & 0x3F)));
  }
  text.push_back(static_cast<char>(0x80 | (c & 0x3F)));
}

bool is_utf8(std::string_view text);  // no surrogates, nothing overlong
size_t count_characters(std::string_view text);

// A byte for each code point: pages of 256, the equal ones shared.
class CharacterTable {
 public:
  CharacterTable(const uint32_t *runs, size_t count);
  uint8_t operator[](char32_t c) const { return values_[size_t(pages_[c >> 8]) << 8 | (c & 0xFF)]; }

 private:
  std::array<uint16_t, code_points / 256> pages_;
  std::vector<uint8_t> values_;
};

// Bits of `character_flags`.
enum CharacterFlag : uint8_t {
  word_flag = 1,
  space_flag = 2,
  numeric_flag = 4,
  punctuation_flag = 8,
  control_flag = 16,
  nonspacing_flag = 32,
  mark_flag = 64,
};

const CharacterTable &regex_classes();
const CharacterTable &character_flags();
const CharacterTable &combining_classes();

inline bool is_space(char32_t c) { return character_flags()[c] & space_flag; }

// Appends `text` in lower case, character by character.
void append_lower(std::string &result, std::string_view text);
enum class NormalForm { NFC, NFD, NFKC, NFKD };
void append_normal_form(std::string &result, std::string_view text, NormalForm form);
// Where the extended grapheme cluster that begins at text[at] ends (UAX 29).
size_t grapheme_end(std::string_view text, size_t at);

}  // namespace mnemos

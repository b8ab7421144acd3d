#include "text/unicode.h"

#include <algorithm>
#include <unordered_map>

#include "text/unicode_data.h"

namespace mnemos {
namespace {

// UAX 15, section 16: Hangul syllables are composed by arithmetic.
constexpr char32_t first_lead = 0x1100, first_vowel = 0x1161, first_tail = 0x11A7, first_syllable = 0xAC00;
constexpr char32_t leads = 19, vowels = 21, tails = 28, syllables = leads * vowels * tails;

bool find_text(const uint32_t *entries, size_t size, char32_t c, uint32_t &begin, uint32_t &end) {
  size_t low = 0, high = size / 2 - 1;  // the last entry only ends the one before it
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (entries[2 * middle] < c)
      low = middle + 1;
    else
      high = middle;
  }
  if (entries[2 * low] != c) return false;
  begin = entries[2 * low + 1], end = entries[2 * low + 3];
  return true;
}

void decompose(std::u32string &result, char32_t c, bool compatible) {
  if (c < 0xA0) {
    result.push_back(c);
    return;
  }
  if (c - first_syllable < syllables) {
    const char32_t index = c - first_syllable, tail = index % tails;
    result.push_back(first_lead + index / (vowels * tails));
    result.push_back(first_vowel + index % (vowels * tails) / tails);
    if (tail != 0) result.push_back(first_tail + tail);
    return;
  }
  uint32_t begin, end;
  const uint32_t *texts = compatible_texts;
  bool found = compatible && find_text(compatible_entries, compatible_entries_size, c, begin, end);
  if (!found) {
    found = find_text(canonical_entries, canonical_entries_size, c, begin, end);
    texts = canonical_texts;
  }
  if (!found)
    result.push_back(c);
  else
    for (uint32_t i = begin; i < end; i++) result.push_back(texts[i]);
}

// Marks in the order of their classes, those of one class in the order of the text.
void order_marks(std::u32string &text) {
  const CharacterTable &classes = combining_classes();
  for (size_t i = 0; i < text.size();) {
    if (text[i] < 0x300 || classes[text[i]] == 0) {
      i++;
      continue;
    }
    size_t end = i + 1;
    while (end < text.size() && classes[text[end]] != 0) end++;
    std::stable_sort(text.begin() + static_cast<ptrdiff_t>(i), text.begin() + static_cast<ptrdiff_t>(end),
                     [&](char32_t a, char32_t b) { return classes[a] < classes[b]; });
    i = end;
  }
}

// What two characters compose to; 0 if they do not.
char32_t compose_pair(char32_t first, char32_t second) {
  if (first - first_lead < leads && second - first_vowel < vowels) {
    return first_syllable + ((first - first_lead) * vowels + second - first_vowel) * tails;
  }
  if (first - first_syllable < syllables && (first - first_syllable) % tails == 0 && second > first_tail &&
      second < first_tail + tails) {
    return first + second - first_tail;
  }
  static const std::unordered_map<uint64_t, char32_t> pairs = [] {
    std::unordered_map<uint64_t, char32_t> found;
    for (size_t i = 0; i < compositions_size; i += 3)
      found.emplace(uint64_t(compositions[i]) << 32 | compositions[i + 1], compositions[i + 2]);
    return found;
  }();
  const auto found = pairs.find(uint64_t(first) << 32 | second);
  return found == pairs.end() ? 0 : found->second;
}

void compose(std::u32string &text) {
  const CharacterTable &classes = combining_classes();
  size_t size = 0, starter = std::u32string::npos;
  int last_class = -1;  // of what stands between the starter and here; -1: nothing does
  for (const char32_t c : text) {
    const int kind = c < 0x300 ? 0 : classes[c];
    if (starter != std::u32string::npos && last_class < kind + (last_class < 0)) {
      if (const char32_t composed = compose_pair(text[starter], c)) {
        text[starter] = composed;
        continue;
      }
    }
    if (kind == 0)
      starter = size, last_class = -1;
    else
      last_class = kind;
    text[size++] = c;
  }
  text.resize(size);
}

}  // namespace

bool is_utf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    const uint8_t first = static_cast<uint8_t>(text[at]);
    if (first < 0x80) {
      at++;
      continue;
    }
    const char32_t c = next_character(text, at);
    const size_t size = at - begin;
    if (size == 1 || first > 0xF4 || (c >= 0xD800 && c < 0xE000)) return false;
    for (size_t i = begin + 1; i < at; i++)
      if ((static_cast<uint8_t>(text[i]) & 0xC0) != 0x80) return false;
    const char32_t least = size == 2 ? 0x80 : size == 3 ? 0x800 : 0x10000;
    if (c < least || (first == 0xF4 && static_cast<uint8_t>(text[begin + 1]) > 0x8F)) return false;
  }
  return true;
}

size_t count_characters(std::string_view text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; }));
}

CharacterTable::CharacterTable(const uint32_t *runs, size_t count) {
  std::array<int, 256> uniform;  // the page of which every value is this one; -1: there is none
  uniform.fill(-1);
  size_t run = 0;
  for (size_t page = 0; page < pages_.size(); page++) {
    const uint32_t begin = static_cast<uint32_t>(page << 8), end = begin + 256;
    const auto ends_at = [&](size_t r) { return r + 1 < count ? runs[r + 1] >> 8 : uint32_t(code_points); };
    while (ends_at(run) <= begin) run++;
    const uint8_t value = static_cast<uint8_t>(runs[run]);
    if (ends_at(run) >= end && uniform[value] >= 0) {
      pages_[page] = static_cast<uint16_t>(uniform[value]);
      continue;
    }
    if (ends_at(run) >= end) uniform[value] = static_cast<int>(values_.size() >> 8);
    pages_[page] = static_cast<uint16_t>(values_.size() >> 8);
    for (uint32_t c = begin; c < end; c++) {
      while (ends_at(run) <= c) run++;
      values_.push_back(static_cast<uint8_t>(runs[run]));
    }
  }
}

const CharacterTable &regex_classes() {
  static const CharacterTable table(regex_class_runs, regex_class_runs_size);
  return table;
}

const CharacterTable &character_flags() {
  static const CharacterTable table(character_flag_runs, character_flag_runs_size);
  return table;
}

const CharacterTable &combining_classes() {
  static const CharacterTable table(combining_class_runs, combining_class_runs_size);
  return table;
}

void append_lower(std::string &result, std::string_view text) {
  static const std::unordered_map<char32_t, char32_t> lower = [] {
    std::unordered_map<char32_t, char32_t> found;
    for (size_t i = 0; i < lower_cases_size; i += 2) found.emplace(lower_cases[i], lower_cases[i + 1]);
    return found;
  }();
  for (size_t at = 0; at < text.size();) {
    const char32_t c = next_character(text, at);
    if (c < 0x80) {
      result.push_back(static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c));
    } else if (c == 0x130) {
      result += "i\u0307";  // the only one that becomes two
    } else {
      const auto found = lower.find(c);
      append_character(result, found == lower.end() ? c : found->second);
    }
  }
}

void append_normal_form(std::string &result, std::string_view text, NormalForm form) {
  const bool compatible = form == NormalForm::NFKC || form == NormalForm::NFKD;
  const bool composes = form == NormalForm::NFC || form == NormalForm::NFKC;
  // No character below these is changed, nor by what follows it if that is below, too.
  const uint8_t same = form == NormalForm::NFC ? 0xCC : 0x80;
  if (std::all_of(text.begin(), text.end(), [&](char c) { return static_cast<uint8_t>(c) < same; })) {
    result += text;
    return;
  }
  std::u32string characters;
  characters.reserve(text.size());
  for (size_t at = 0; at < text.size();) decompose(characters, next_character(text, at), compatible);
  order_marks(characters);
  if (composes) compose(characters);
  for (const char32_t c : characters) append_character(result, c);
}

}  // namespace mnemos
